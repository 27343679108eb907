"""Prompts and prefixes: start to detach, padding, generation, checkpointing, rows, state."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.methods import HardPrompt, PrefixTuning, PromptTuning, PTuning
from lightning_peft.methods.base import SequenceMethod
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.tiny_models import BUILDERS, KINDS, example_inputs, main_output

METHODS: dict[str, SequenceMethod] = {
    "prompt": PromptTuning(n=3),
    "random": PromptTuning(n=3, init="random"),
    "text": PromptTuning(n=5, init="text", init_ids=[7, 8, 9]),
    "add": PromptTuning(n=3, mode="add"),
    "hard": HardPrompt(n=3),
    "mlp": PTuning(n=3, hidden=16),
    "lstm": PTuning(n=3, encoder="lstm", hidden=8),
    "prefix": PrefixTuning(n=3),
    "projection": PrefixTuning(n=3, projection=True, hidden=8),
}
FEW = ["prompt", "add", "mlp", "prefix", "projection"]
# By default a few of each kind; `-m slow` runs the others.
QUICK = {"llama", "gpt_neox", "bert", "t5", "mamba", "vit", "clip", "whisper", "deepseek_v3"}
MODELS = ["llama", "gpt2", "gemma2", "opt", "bloom", "bert", "roberta", "t5", "bart"]
NO_PREFIX = {"mamba", "modernbert", "distilbert", "deepseek_v3"}


def some(names: list[str], *more: str) -> list[Any]:
    quick = QUICK | set(more)
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def built(name: str, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    return BUILDERS[name]().requires_grad_(False), example_inputs(name, **changes)


def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    return main_output(model(**x))


def move(model: nn.Module, std: float = 0.2) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn_like(p))


def attached(name: str, method: SequenceMethod, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    model, x = built(name, **changes)
    lp.attach(model, method)
    move(model)
    return model, x


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


# ---- generation


DECODERS = ["llama", "gpt2", "gemma2", "opt", "bloom", "t5", "bart"]


def prompt_of(name: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (2, 5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stepwise(model: Any, x: dict[str, Tensor], sequences: Tensor, steps: int) -> Tensor:
    """Logits of every generated token by one full forward, without a cache."""
    if model.config.is_encoder_decoder:
        y = model(**x, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
        return y[:, -steps:]
    mask = torch.ones_like(sequences)
    y = model(input_ids=sequences, attention_mask=mask, use_cache=False).logits
    return y[:, -steps - 1 : -1]


@pytest.mark.parametrize("method_name", FEW)
@pytest.mark.parametrize("name", some(DECODERS, "bart"))
def test_generate_greedy_and_sampled(name: str, method_name: str) -> None:
    model, _ = attached(name, METHODS[method_name])
    x = prompt_of(name)
    for sample in (False, True):
        out = model.generate(
            **x,
            do_sample=sample,
            max_new_tokens=6,
            min_new_tokens=6,
            output_logits=True,
            return_dict_in_generate=True,
        )
        got = torch.stack(out.logits, dim=1)
        with torch.no_grad():
            want = stepwise(model, x, out.sequences, got.shape[1])
        assert_close("logits", got, want)


@pytest.mark.parametrize("method_name", ["prompt", "add", "prefix"])
@pytest.mark.parametrize("name", some(DECODERS, "bart"))
def test_generate_beams(name: str, method_name: str) -> None:
    model, _ = attached(name, METHODS[method_name])
    x = prompt_of(name)
    found = []
    for cache in (True, False):
        found.append(
            model.generate(
                **x,
                num_beams=3,
                do_sample=False,
                use_cache=cache,
                max_new_tokens=5,
                output_scores=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_close("scores", found[0].sequences_scores, found[1].sequences_scores)


@pytest.mark.parametrize("method_name", ["prompt", "add", "prefix"])
@pytest.mark.parametrize("name", some(["llama", "gpt2", "opt", "bloom"], "bloom"))
def test_generate_with_left_padding(name: str, method_name: str) -> None:
    model, _ = attached(name, METHODS[method_name])
    ids = torch.randint(3, 99, (1, 4))
    padded = torch.cat([F.pad(ids, (3, 0)), torch.randint(3, 99, (1, 7))])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    options: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    both = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert torch.equal(both[0, 7:], alone[0, 4:])


def test_masks_of_four_axes_are_refused() -> None:
    model, _ = attached("llama", PromptTuning(n=3))
    x = prompt_of("llama")
    with pytest.raises(ValueError, match="dynamic cache"):
        model.generate(**x, cache_implementation="static", max_new_tokens=3)


# ---- training


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


# ---- several adapters


def alone_and_mixed(
    name: str, methods: dict[str, SequenceMethod], rows: list[str]
) -> tuple[Tensor, Tensor]:
    model, x = built(name, batch=len(rows))
    for adapter, method in methods.items():
        lp.attach(model, method, adapter_name=adapter)
        move(model)
    alone = []
    with torch.no_grad():
        for i, row in enumerate(rows):
            lp.set_adapter(model, None if row == "__base__" else row)
            alone.append(logits(model, x)[i])
        lp.set_adapter(model, list(methods))
        with lp.adapter_names(rows):
            mixed = logits(model, x)
    return torch.stack(alone), mixed


@pytest.mark.parametrize("method_name", ["prompt", "add", "mlp", "prefix"])
@pytest.mark.parametrize("name", some(["llama", "gpt2", "bloom", "t5"], "bloom"))
def test_rows(name: str, method_name: str) -> None:
    method = METHODS[method_name]
    alone, mixed = alone_and_mixed(name, {"a": method, "b": method}, ["b", "__base__", "a"])
    if name == "t5" and method_name == "prefix":
        assert_close("rows", mixed, alone, floor=1e-4)
    else:
        assert_close("rows", mixed, alone)


def test_rows_of_different_length_and_kind() -> None:
    methods: dict[str, SequenceMethod] = {
        "short": PromptTuning(n=2),
        "long": PromptTuning(n=5),
        "prefix": PrefixTuning(n=3),
    }
    for name in ("llama", "gpt2"):
        alone, mixed = alone_and_mixed(name, methods, ["long", "prefix", "short", "__base__"])
        assert_close(name, mixed, alone)


def test_rows_in_an_encoder() -> None:
    method = PromptTuning(n=3)
    alone, mixed = alone_and_mixed("bert", {"a": method, "b": method}, ["b", "a", "b"])
    assert_close("rows", mixed, alone)
    with pytest.raises(ValueError, match="one after the other"):
        alone_and_mixed("bert", {"a": method}, ["a", "__base__"])


def test_rows_while_generating() -> None:
    model, _ = built("llama")
    for adapter, n in (("a", 2), ("b", 4)):
        lp.attach(model, PromptTuning(n=n), adapter_name=adapter)
        move(model)
    x = prompt_of("llama")
    options: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = []
    for i, adapter in enumerate(("a", None)):
        lp.set_adapter(model, adapter)
        alone.append(model.generate(**x, **options)[i])
    lp.set_adapter(model, ["a", "b"])
    with lp.adapter_names(["a", "__base__"]):
        both = model.generate(**x, **options)
    assert torch.equal(both, torch.stack(alone))


def test_two_prompts_stand_in_the_order_named() -> None:
    """The adapter named last stands outermost, as every other kind does."""
    model, x = built("gpt2")
    for adapter in ("a", "b"):
        lp.attach(model, PromptTuning(n=2), adapter_name=adapter)
        move(model)
    tensors = trained_tensors(model)
    parts = [next(t for k, t in tensors.items() if f"peft.{a}." in k) for a in ("b", "a")]
    lp.set_adapter(model, ["a", "b"])
    y = logits(model, x).detach()
    one, _ = built("gpt2")
    lp.attach(one, PromptTuning(n=4))
    with torch.no_grad():
        next(p for p in one.parameters() if p.requires_grad).copy_(torch.cat(parts))
    assert_close("one long prompt", logits(one, x).detach(), y)


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


# ---- starts, tokens, values


def test_starts() -> None:
    model, _ = built("gemma2")  # its embeddings are scaled behind the table
    embed = model.get_input_embeddings()
    report = lp.attach(model, PromptTuning(n=5, init="text", init_ids=[7, 8, 9]))
    (P,) = trained_tensors(model).values()
    assert report.trainable == P.numel()
    with torch.no_grad():
        assert_same_bits("text", P.detach(), embed(torch.tensor([7, 8, 9, 7, 8])))
    lp.detach(model)
    lp.attach(model, PromptTuning(n=4))
    (P,) = trained_tensors(model).values()
    with torch.no_grad():
        rows = embed(torch.arange(99))
        assert all((rows == p).all(dim=1).any() for p in P)
    start = P.detach().clone()
    with torch.no_grad():
        P.zero_()
    lp.reset_adapters(model)
    assert_same_bits("reset", P.detach(), start)

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    assert PromptTuning.from_text("a bc def", tokenizer).init_ids == [1, 2, 3]
    assert PromptTuning.from_text("a bc def", tokenizer, n=8).n == 8


def test_hard_prompt_is_made_of_tokens() -> None:
    model, x = attached("gpt2", HardPrompt(n=3))
    ids = lp.hard_prompt_ids(model)
    tokens = torch.tensor([ids, ids])
    base, _ = built("gpt2")
    mask = torch.ones_like(x["attention_mask"])
    with torch.no_grad():
        want = base(input_ids=torch.cat([tokens, x["input_ids"]], dim=1)).logits[:, 3:]
        got = model(input_ids=x["input_ids"], attention_mask=mask).logits
    assert_close("as if the tokens were given", got, want)
    with pytest.raises(KeyError, match="found none"):
        lp.hard_prompt_ids(base)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (PromptTuning, {"n": 0}),
        (PromptTuning, {"mode": "behind"}),
        (PromptTuning, {"init": "text"}),
        (PromptTuning, {"init_ids": [1]}),
        (HardPrompt, {"mode": "add"}),
        (PTuning, {"encoder": "gru"}),
        (PTuning, {"hidden": 0}),
        (PTuning, {"dropout": 1.0}),
        (PrefixTuning, {"n": 0}),
        (PrefixTuning, {"init": "ones"}),
    ],
    ids=str,
)
def test_bad_values(cls: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        cls(**fields)


def test_ids_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary's size 99"):
        lp.attach(built("gpt2")[0], PromptTuning(init="text", init_ids=[99]))


def test_a_transformer_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="one Hugging Face transformer"):
        lp.attach(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), PromptTuning())
    two = nn.ModuleList([built("gpt2")[0], built("bert")[0]])
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        lp.attach(two, PromptTuning())


# ---- a transformer of the user's own


class Own(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, **masks: Any) -> Tensor:
        y: Tensor = self.layers(self.embed(ids), **masks)
        return y


def masks_for(kind: str) -> dict[str, Tensor | bool]:
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    return {
        "none": {},
        "causal": {"mask": causal, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
        "both": {"mask": causal, "src_key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("train", [True, False])
def test_prefix_in_multihead_attention(kind: str, train: bool) -> None:
    """Against attention by hand; no prefix and a masked row give the plain module's output."""
    model = Own().train(train)
    ids, masks = torch.randint(0, 20, (3, 5)), masks_for(kind)
    with torch.no_grad():
        base = model(ids, **masks)
        # torch.matmul takes another routine for a frozen weight, on some CPUs with other last bits.
        frozen = copy.deepcopy(model).requires_grad_(False)(ids, **masks)
    for name in ("a", "b"):
        lp.attach(model, PrefixTuning(n=2, target_modules=["self_attn"]), adapter_name=name)
        move(model)
    lp.set_adapter(model, "a")
    y = model(ids, **masks)
    y.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    keep = ~masks.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    lp.set_adapter(model, ["a", "b"])
    with torch.no_grad():
        with lp.adapter_names(["a", "__base__", "a"]):
            mixed = model(ids, **masks)
        assert_close("base row", mixed[1], base[1])
        assert_close("row 0", mixed[0][keep[0]], y[0][keep[0]].detach())
        assert_close("row 2", mixed[2], y[2].detach())
        with lp.disable_adapters(model):
            off = model(ids, **masks)
            assert_close("off", off[keep], base[keep])
            if train:  # in eval the base takes a fused path, which adapters turn off
                assert_same_bits("off", off, frozen)
    lp.detach(model)
    with torch.no_grad():
        assert_same_bits("detached", model(ids, **masks), base)


@pytest.mark.parametrize("batch_first", [True, False])
def test_prefix_formula_in_multihead_attention(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=batch_first))
    lp.attach(model, PrefixTuning(n=3, target_modules=["0"]))
    (P,) = trained_tensors(model).values()
    x = torch.randn(2, 4, 8)
    q, k, v = F.linear(x, model[0].in_proj_weight, model[0].in_proj_bias).chunk(3, dim=-1)
    k = torch.cat([P[:, :8].expand(2, -1, -1), k], dim=1)
    v = torch.cat([P[:, 8:].expand(2, -1, -1), v], dim=1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    want = model[0].out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
    z = x if batch_first else x.transpose(0, 1)
    for need_weights in (True, False):
        y, weights = model[0](z, z, z, need_weights=need_weights)
        assert_close("output", y if batch_first else y.transpose(0, 1), want)
        assert (weights is None) != need_weights
    assert weights is None or weights.shape == (2, 4, 4)


def test_prefix_beside_lora_in_one_module() -> None:
    model, ids = Own().eval(), torch.randint(0, 20, (3, 5))
    lp.attach(
        model,
        [
            PrefixTuning(n=2, target_modules=["self_attn"]),
            lp.LoRA(r=2, target_modules=["self_attn"]),
        ],
    )
    with torch.no_grad():
        prefix = model(ids)
        move(model)
        assert not torch.allclose(model(ids), prefix)
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_where_a_prefix_does_not_fit() -> None:
    with pytest.raises(ValueError, match="type Linear"):
        lp.attach(Own(), PrefixTuning(target_modules=["linear1"]))
    with pytest.raises(ValueError, match="one module that gives"):
        lp.attach(Own(), PromptTuning(target_modules=["linear1"]))
    with pytest.raises(ValueError, match="use init='random'"):
        lp.attach(Own(), PromptTuning(target_modules=["layers.layers.0.norm1"]))


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("method", [PromptTuning(n=2), PTuning(n=2)], ids=["prompt", "mlp"])
def test_prompt_before_embeddings_of_the_users(kind: str, method: SequenceMethod) -> None:
    """Equal to the plain model on embeddings and masks that are put together by hand."""
    model, plain = Own(), Own()
    ids, masks = torch.randint(0, 20, (3, 5)), masks_for(kind)
    with torch.no_grad():
        base = model(ids, **masks)
        # torch.matmul takes another routine for a frozen weight, on some CPUs with other last bits.
        frozen = copy.deepcopy(model).requires_grad_(False)(ids, **masks)
    lp.attach(model, dataclasses.replace(method, target_modules=["embed"]))
    move(model)
    y = model(ids, **masks)
    assert y.shape == base.shape
    y.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        x = model.embed(ids)
        if "mask" in masks:
            masks["mask"] = torch.ones(7, 7, dtype=torch.bool).triu(1)
            masks["mask"][:2, :2] = False
        if "src_key_padding_mask" in masks:
            masks["src_key_padding_mask"] = F.pad(masks["src_key_padding_mask"], (2, 0))
        want = plain.layers(x, **{**masks, "is_causal": False} if masks else {})[:, 2:]
        keep = ~masks_for("padding")["src_key_padding_mask"]
        assert_close("output", y.detach()[keep], want[keep])
        with lp.disable_adapters(model):
            assert_same_bits("off", model(ids, **masks_for(kind)), frozen)
    twin = copy.deepcopy(model)
    move(twin)
    assert not torch.equal(twin(ids), model(ids))
    lp.detach(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with torch.no_grad():
        assert_same_bits("detached", model(ids, **masks_for(kind)), base)


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
