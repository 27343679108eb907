"""Prompts and prefixes in whole transformers: start to detach, padding, training, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.methods import PrefixTuning, PromptTuning, PTuning
from lightning_peft.methods.base import SequenceMethod
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.prompt_cases import (
    FEW,
    METHODS,
    MODELS,
    NO_PREFIX,
    attached,
    built,
    logits,
    move,
    some,
)
from tests.helpers.tiny_models import BUILDERS, KINDS, main_output


@pytest.mark.parametrize("method_name", METHODS)
@pytest.mark.parametrize("name", some(MODELS))
def test_life(name: str, method_name: str) -> None:
    """Shapes, gradients, off, on, copies, merge refused, detach."""
    model, x = built(name)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    base = model(**x)
    lp.attach(model, METHODS[method_name])
    if method_name == "add":
        assert_same_bits("start", logits(model, x), main_output(base))
    move(model)
    out = model(**x)
    assert main_output(out).shape == main_output(base).shape
    assert not torch.equal(main_output(out), main_output(base))
    out.loss.backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, n
    y = main_output(out).detach()
    with lp.disable_adapters(model):
        assert_same_bits("off", logits(model, x), main_output(base))
    assert_same_bits("on", logits(model, x).detach(), y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits("copy", logits(twin, x).detach(), y)
        move(twin)
        assert_same_bits("model", logits(model, x).detach(), y)
    with pytest.raises(RuntimeError, match=r"no merged form: it adds positions"):
        lp.merge(model)
    lp.detach(model)
    assert set(model.state_dict()) == set(before)
    assert_same_bits("detached", logits(model, x), main_output(base))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", [PromptTuning(n=2), PrefixTuning(n=2)], ids=["prompt", "prefix"])
@pytest.mark.parametrize("name", some([n for n in BUILDERS if n not in MODELS]))
def test_other_architectures(name: str, method: SequenceMethod) -> None:
    model, x = built(name)
    tokens = KINDS[name] in ("decoder", "encoder", "encoder_decoder")
    if not tokens or (isinstance(method, PrefixTuning) and name in NO_PREFIX):
        with pytest.raises(ValueError, match="an adapter of layers"):
            lp.attach(model, method)
        return
    base = logits(model, x)
    lp.attach(model, method)
    y = model(**x)
    y.loss.backward()
    assert main_output(y).shape == base.shape
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with lp.disable_adapters(model):
        assert_same_bits("off", logits(model, x), base)


@pytest.mark.parametrize("method_name", FEW)
@pytest.mark.parametrize("name", some(["llama", "gpt2", "opt", "bloom"], "bloom"))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, method_name: str, side: str) -> None:
    """A padded row gives what it gives alone."""
    model, _ = attached(name, METHODS[method_name])
    ids = torch.randint(3, 99, (1, 6))
    pad = torch.zeros(1, 3, dtype=torch.int64)
    other = torch.randint(3, 99, (1, 9))
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = torch.ones(2, 9, dtype=torch.int64)
    place = slice(3, 9) if side == "left" else slice(0, 6)
    mask[0] = 0
    mask[0, place] = 1
    x: dict[str, Tensor] = {"input_ids": torch.cat([padded, other]), "attention_mask": mask}
    if name in ("llama", "gpt2"):  # the others count positions by the mask
        x["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(**x).logits
        assert_close("alone", both[0, place], model(input_ids=ids).logits[0])
        assert_close("other", both[1], model(input_ids=other).logits[0])


@pytest.mark.parametrize("method_name", FEW)
@pytest.mark.parametrize("name", some(["bert", "roberta", "t5", "bart"]))
def test_padding_of_encoders(name: str, method_name: str) -> None:
    model, x = attached(name, METHODS[method_name])
    with torch.no_grad():
        both = logits(model, x)
        short = {
            "input_ids": x["input_ids"][:1, :-2],
            "attention_mask": x["attention_mask"][:1, :-2],
            "labels": x["labels"][:1],
        }
        assert_close("alone", both[:1], logits(model, short))


def test_labels_and_masks_are_those_of_the_text() -> None:
    model, x = attached("llama", PromptTuning(n=3))
    out = model(**x, output_hidden_states=True)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x["labels"][:, 1:].flatten())
    assert_close("loss", out.loss, want)
    with torch.no_grad():
        short = model(input_ids=x["input_ids"], logits_to_keep=1).logits
        whole = model(input_ids=x["input_ids"]).logits
    assert_close("last logits", short, whole[:, -1:])


def test_classifier_of_a_decoder_pools_the_text() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=99, num_attention_heads=4, pad_token_id=0, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    lp.attach(model, PromptTuning(n=3))
    ids = torch.randint(3, 99, (1, 6))
    padded = F.pad(ids, (0, 2))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        mask = (padded != 0).long()
        assert_close("padded", model(input_ids=padded, attention_mask=mask).logits, want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method_name", ["prompt", "lstm", "prefix", "projection"])
@pytest.mark.parametrize("name", some(["llama", "gpt2", "gemma2", "bert", "t5", "bart"], "gpt2"))
def test_gradient_checkpointing(name: str, method_name: str, reentrant: bool) -> None:
    model, x = built(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lp.attach(model, METHODS[method_name])
    move(model)
    model.train()
    for module in model.modules():  # functional dropout reads the config of each attention
        for key in ("attention_dropout", "dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    loss = model(**x).loss
    loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = model(**x).loss
    assert_close("loss", again.detach(), loss.detach())
    again.backward()
    for n, p in model.named_parameters():
        if n in want:
            assert_close(n, p.grad, want[n])


def test_a_model_that_learns() -> None:
    """A prefix alone makes a frozen model repeat one token."""
    model, _ = built("gpt2")
    lp.attach(model, PrefixTuning(n=4))
    x = {"input_ids": torch.randint(3, 99, (4, 6))}
    labels = torch.full((4, 6), 11)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(25):
        loss = model(**x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("method_name", METHODS)
def test_quantised_and_half_precision(method_name: str) -> None:
    model, x = built("llama")
    lp.attach(model, METHODS[method_name], quantization=lp.Quantization("nf4", block_size=32))
    move(model)
    model(**x).loss.backward()
    y = logits(model, x).detach()
    model.to(torch.bfloat16)
    assert_close("bf16", logits(model, x).detach().float(), y, floor=0.08)


def test_hybrid_and_state() -> None:
    methods = [PrefixTuning(n=3, projection=True), PTuning(n=2), lp.LoRA(r=2)]
    model, x = built("llama")
    lp.attach(model, methods)
    move(model)
    y = logits(model, x).detach()
    state = lp.adapter_state_dict(model)
    twin, _ = built("llama")
    lp.attach(twin, methods)
    lp.load_adapter_state_dict(twin, state)
    assert_same_bits("loaded", logits(twin, x).detach(), y)
    with pytest.raises(ValueError, match="one method"):
        lp.save_adapter(model, "unused")


def test_inside_a_module_that_holds_the_model() -> None:
    base, x = built("t5")
    model, _ = built("t5")
    holder = nn.Module()
    holder.net = model
    torch.manual_seed(0)
    lp.attach(holder, PromptTuning(n=3))
    assert all(k.startswith("net.encoder.peft.") for k in lp.adapter_state_dict(holder))
    assert not torch.equal(logits(model, x), logits(base, x))


@pytest.mark.parametrize("method_name", ["prompt", "prefix"])
def test_one_graph_every_attention_and_meta(method_name: str) -> None:
    model, x = attached("llama", METHODS[method_name])
    with torch.no_grad():
        want = logits(model, x)
        model.set_attn_implementation("eager")
        assert_close("eager attention", logits(model, x), want)
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        ids = {k: t for k, t in x.items() if k != "labels"}
        assert_close("compiled", compiled(**ids).logits, want)
    with torch.device("meta"):
        empty = BUILDERS["llama"]()
    lp.attach(empty, METHODS[method_name])
    assert all(p.device.type == "meta" for p in empty.parameters())
