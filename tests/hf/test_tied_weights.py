"""Tied embeddings to and from Hugging Face peft: separate copies, tied ones, LoRA on both ends."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import by_peft, in_peft, loaded, randomise, run, trained

FLOOR = 1e-5
_SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**_SIZES, "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}

#: name → (model, embedding, layers for LoRA)
MODELS: dict[str, tuple[Any, str, list[str]]] = {
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=True)),
        "embed_tokens",
        ["q_proj", "v_proj"],
    ),
    "qwen2": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER, tie_word_embeddings=True)),
        "embed_tokens",
        ["q_proj", "v_proj"],
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        ),
        "wte",
        ["c_attn"],
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                tie_word_embeddings=True, decoder_start_token_id=0,
            )
        ),
        "shared",
        ["q", "v"],
    ),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], str, list[str]]:
    torch.manual_seed(0)
    make, embedding, targets = MODELS[name]
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids.flip(1)
    return make().eval(), inputs, embedding, targets


def refuse_warnings() -> Any:
    return warnings.catch_warnings(action="error", category=UserWarning)


@pytest.mark.parametrize("name", MODELS)
def test_separate_copies_of_peft(name: str, tmp_path: Path) -> None:
    base, inputs, embedding, targets = build(name)
    saved = [embedding, "lm_head"]
    theirs = by_peft(base, tmp_path, target_modules=targets, modules_to_save=saved)
    want = run(theirs, inputs)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=FLOOR)
    lp.save_adapter(model, tmp_path / "again")
    assert_close("again", run(in_peft(base, tmp_path / "again"), inputs), want, floor=FLOOR)
    assert_close("ours", run(loaded(base, tmp_path / "again"), inputs), want, floor=FLOOR)
    report = lp.merge(model)
    assert_close("merged", run(model, inputs), want, floor=FLOOR)
    assert any("lm_head" in key for key in report.untied)


def test_tensors_that_two_embeddings_of_t5_share(tmp_path: Path) -> None:
    base, inputs, _, targets = build("t5")
    theirs = by_peft(base, tmp_path, target_modules=targets, modules_to_save=["embed_tokens"])
    assert_close("logits", run(loaded(base, tmp_path), inputs), run(theirs, inputs), floor=FLOOR)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # peft itself fails on encoder-decoders
@pytest.mark.parametrize("saved", ["embedding", "both"])
def test_tied_copies_of_peft_stay_tied(name: str, saved: str, tmp_path: Path) -> None:
    base, inputs, embedding, targets = build(name)
    names = [embedding] if saved == "embedding" and name == "llama" else [embedding, "lm_head"]
    config = {"target_modules": targets, "modules_to_save": names, "ensure_weight_tying": True}
    theirs = by_peft(base, tmp_path, **config)
    want = run(theirs, inputs)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=FLOOR)
    copies = {
        id(p) for n, p in model.named_parameters(remove_duplicate=False) if n.endswith("t.weight")
    }
    assert len(copies) == 1
    lp.save_adapter(model, tmp_path / "again")
    with refuse_warnings():
        again = in_peft(base, tmp_path / "again")
    assert_close("again", run(again, inputs), want, floor=FLOOR)
    lp.merge_and_unload(model)
    assert_close("merged", run(model, inputs), want, floor=FLOOR)
    assert model.config.tie_word_embeddings


def test_tied_copies_that_differ_are_refused(tmp_path: Path) -> None:
    base, _, embedding, targets = build("llama")
    by_peft(
        base, tmp_path, target_modules=targets, modules_to_save=[embedding],
        ensure_weight_tying=True,
    )  # fmt: skip
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="equal copies of tied weights"):
        lp.load_adapter(base, tmp_path)


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["embedding", "lm_head", "both", "tied"])
def test_lora_on_tied_weights(name: str, target: str, tmp_path: Path) -> None:
    base, inputs, embedding, targets = build(name)
    named = {"embedding": [embedding], "lm_head": ["lm_head"]}.get(target, [embedding, "lm_head"])
    more: dict[str, Any] = {"ensure_weight_tying": True} if target == "tied" else {}
    theirs = by_peft(
        base, tmp_path, r=4, target_modules=[*targets, *named], task_type="CAUSAL_LM", **more
    )
    want = run(theirs, inputs)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=FLOOR)
    lp.save_adapter(model, tmp_path / "again")
    assert_close("again", run(in_peft(base, tmp_path / "again"), inputs), want, floor=FLOOR)
    lp.merge(model)
    assert_close("merged", run(model, inputs), want, floor=FLOOR)
    lp.unmerge(model)
    assert_close("unmerged", run(model, inputs), want, floor=FLOOR)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_lora_with_tied_factors(name: str, tmp_path: Path) -> None:
    base, inputs, embedding, targets = build(name)
    method = lp.LoRA(r=4, target_modules=[*targets, embedding], ensure_weight_tying=True)
    model = trained(base, method)
    own = [n for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    assert not own, "the head reads the embedding's factors"
    want = run(model, inputs)
    W = model.get_submodule("lm_head").weight  # W', as others read it
    assert_same_bits("one weight", W, model.get_input_embeddings().weight)
    lp.save_adapter(model, tmp_path)
    assert_close("peft", run(in_peft(base, tmp_path), inputs), want, floor=FLOOR)
    assert_close("ours", run(loaded(base, tmp_path), inputs), want, floor=FLOOR)
    twin = copy.deepcopy(model)
    randomise(twin, seed=9)
    assert_same_bits("the copy is its own", run(model, inputs), want)
    lp.merge_and_unload(model)
    assert_close("merged", run(model, inputs), want, floor=FLOOR)
    assert model.config.tie_word_embeddings


def test_tied_factors_next_to_a_trained_head(tmp_path: Path) -> None:
    """The head is trained whole, so nothing is tied; peft would tie the copy."""
    base, inputs, embedding, targets = build("llama")
    method = lp.LoRA(r=4, target_modules=[*targets, embedding], ensure_weight_tying=True)
    model = trained(base, method, modules_to_save=["lm_head"])
    lp.save_adapter(model, tmp_path)
    want = run(model, inputs)
    assert_close("peft", run(in_peft(base, tmp_path), inputs), want, floor=FLOOR)
    assert_close("ours", run(loaded(base, tmp_path), inputs), want, floor=FLOOR)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_take_a_part_of_a_tied_weight(start: str, tmp_path: Path) -> None:
    """The embedding would change with the head, and nothing make up for it; so it does in peft."""
    base, inputs, _, targets = build("llama")
    model = copy.deepcopy(base)
    message = r"'lm_head': expected a weight of its own, .* got one that is also 'model.embed_tok"
    with pytest.raises(ValueError, match=message):
        lp.attach(model, lp.LoRA(r=4, init=start, target_modules=[*targets, "lm_head"]))
    assert_same_bits("attach", run(model, inputs), run(base, inputs))
    by_peft(base, tmp_path, r=4, init_lora_weights=start, target_modules=[*targets, "lm_head"])
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(model, tmp_path)
    assert_same_bits("load", run(model, inputs), run(base, inputs))
    lp.attach(model, lp.LoRA(r=4, init=start, target_modules=targets))
    assert_close("others", run(model, inputs), run(base, inputs), floor=FLOOR)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_files_with_copies_of_the_base(name: str, tmp_path: Path) -> None:
    base, inputs, _, targets = build(name)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=targets)
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert_close("logits", run(loaded(base, tmp_path), inputs), run(theirs, inputs), floor=FLOOR)


# ---- the recipe of chat tokens: both ends of the tie trained, by peft and here


def losses(model: nn.Module, inputs: dict[str, Tensor], steps: int) -> list[float]:
    trained_ones = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained_ones, lr=0.05)
    found = []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize(
    ("name", "separate"),
    [*((name, True) for name in MODELS), ("llama", False), ("qwen2", False), ("gpt2", False)],
)
def test_thirty_steps_in_peft_and_here(name: str, separate: bool, tmp_path: Path) -> None:
    base, inputs, embedding, targets = build(name)
    inputs.pop("decoder_input_ids", None)
    saved = [embedding, "lm_head"]
    config = {"r": 4, "target_modules": targets, "modules_to_save": saved}
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**config, ensure_weight_tying=not separate)
    ).eval()
    randomise(theirs, std=0.05)
    theirs.save_pretrained(str(tmp_path / "start"))
    ours = loaded(base, tmp_path / "start")
    want = losses(theirs, inputs, 30)
    got = losses(ours, inputs, 30)
    assert want[-1] < 0.7 * want[0]
    assert_close("losses", torch.tensor(got), torch.tensor(want), floor=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    lp.save_adapter(ours, tmp_path / "ours")
    full = {**inputs, "labels": inputs["input_ids"]}
    end = run(theirs, full)
    assert_close("their end here", run(loaded(base, tmp_path / "theirs"), full), end, floor=1e-5)
    mine = run(ours, full)
    assert_close("our end there", run(in_peft(base, tmp_path / "ours"), full), mine, floor=1e-5)


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize("form", ["beside LoRA", "alone"])
@pytest.mark.parametrize("name", MODELS)
def test_thirty_steps_of_rows_in_peft_and_here(name: str, form: str, tmp_path: Path) -> None:
    """The rows of new tokens, which both ends of the tie read."""
    base, inputs, _, targets = build(name)
    inputs.pop("decoder_input_ids", None)
    ids = inputs["input_ids"].unique().tolist()[2:8]
    config: Any = (
        peft.TrainableTokensConfig(token_indices=ids)
        if form == "alone"
        else peft.LoraConfig(r=4, target_modules=targets, trainable_token_indices=ids)
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs, std=0.05)
    theirs.save_pretrained(str(tmp_path / "start"))
    ours = loaded(base, tmp_path / "start")
    table = ours.get_input_embeddings()._parameters["weight"].detach().clone()
    want = losses(theirs, inputs, 30)
    got = losses(ours, inputs, 30)
    assert want[-1] < want[0]
    assert_close("losses", torch.tensor(got), torch.tensor(want), floor=1e-5)
    assert_same_bits("the table", ours.get_input_embeddings()._parameters["weight"], table)
    lp.save_adapter(ours, tmp_path / "ours")
    full = {**inputs, "labels": inputs["input_ids"]}
    mine = run(ours, full)
    assert_close("our end there", run(in_peft(base, tmp_path / "ours"), full), mine, floor=1e-5)
    lp.merge(ours)
    merged = ours.get_input_embeddings()._parameters["weight"]
    others = [i for i in range(len(table)) if i not in ids]
    assert_same_bits("other rows", merged[others], table[others])


def test_separate_copies_from_attach_and_a_checkpoint(tmp_path: Path) -> None:
    base, inputs, embedding, targets = build("llama")
    method, saved = lp.LoRA(r=4, target_modules=targets), [embedding, "lm_head"]
    model = trained(base, method, modules_to_save=saved, separate_copies=True)
    copies = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("t.weight")]
    assert len(copies) == 2
    lp.save_checkpoint(model, tmp_path / "last.ckpt")
    fresh = copy.deepcopy(base)
    lp.attach(fresh, method, modules_to_save=saved, separate_copies=True)
    lp.load_checkpoint(fresh, tmp_path / "last.ckpt")
    assert_same_bits("resumed", run(fresh, inputs), run(model, inputs))
    tied = copy.deepcopy(base)
    lp.attach(tied, method, modules_to_save=saved)
    with pytest.raises(ValueError, match="separate_copies: True in the file, False attached"):
        lp.load_checkpoint(tied, tmp_path / "last.ckpt")
