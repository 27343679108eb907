"""Vocabularies of another size: resized before attach, after it, or in the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, randomise, run, trained
from tests.hf.test_tied_weights import build as build_tied

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rows": (lambda: lp.TrainableTokens([3, 5]), {}),
    "both": (lambda: lp.TrainableTokens({"embed_tokens": [3], "lm_head": [3]}), {}),
    "embedding": (lambda: lp.LoRA(r=2, target_modules=["embed_tokens", "q_proj"]), {}),
    "head": (lambda: lp.LoRA(r=2, target_modules=["lm_head"]), {}),
    "copies": (lambda: lp.LoRA(r=2), {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


def resized(model: nn.Module, more: int) -> nn.Module:
    torch.manual_seed(0)
    model.resize_token_embeddings(model.config.vocab_size + more, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", METHODS)
def test_resized_after_attach(case: str, tied: bool, tmp_path: Path) -> None:
    base = build_tied("llama")[0] if tied else build("llama")[0]
    make, more = METHODS[case]
    model = resized(trained(base, make(), **more), 2)
    for call in (
        lambda: lp.save_adapter(model, tmp_path),
        lambda: lp.adapter_state_dict(model),
        lambda: lp.save_checkpoint(model, tmp_path / "a.ckpt"),
        lambda: lp.merge(model),
    ):
        with pytest.raises(RuntimeError, match=r"resize_token_embeddings\(\.\.\.\) before "):
            call()


def test_layers_that_are_not_resized_go_on() -> None:
    base, inputs = build("llama")
    model = trained(base, lp.LoRA(r=2))
    want = run(model, inputs)
    resized(model, 2)
    assert_same_bits("logits", run(model, inputs)[..., : want.shape[-1]], want)
    assert len(lp.adapter_state_dict(model)) == 8


def test_rows_for_new_tokens_in_another_process(tmp_path: Path) -> None:
    """The random rows of the two resizes differ; the trained ones replace them."""
    base, inputs, _, targets = build_tied("llama")
    size = base.config.vocab_size
    ids = [size, size + 1]
    inputs["input_ids"][:, :2] = torch.tensor(ids)
    model = resized(copy.deepcopy(base), 2)
    lp.attach(model, lp.LoRA(r=2, target_modules=targets, trainable_token_indices=ids))
    randomise(model)
    want = run(model, inputs)
    lp.save_adapter(model, tmp_path)
    other = copy.deepcopy(base)
    other.resize_token_embeddings(size + 2)
    with torch.no_grad():
        other.get_input_embeddings().weight[size:] = 9.0
    assert_close("ours", run(loaded(other, tmp_path), inputs), want, floor=1e-5)
    assert_close("peft", run(in_peft(other, tmp_path), inputs), want, floor=1e-5)
    with pytest.raises(ValueError, match=f"size {size}, got .*resize_token_embeddings"):
        lp.load_adapter(copy.deepcopy(base), tmp_path)


#: name → layers that peft adapts besides q_proj, and save_pretrained's arguments
RESIZED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "beside": ([], {"save_embedding_layers": True}),
    "embedding": (["embed_tokens"], {}),
    "head": (["lm_head"], {}),
}


def written_by_peft(base: nn.Module, name: str, tied: bool, directory: Path) -> nn.Module:
    """An adapter of peft on a model with two tokens more, with the model's embeddings."""
    targets, options = RESIZED[name]
    theirs = peft.get_peft_model(
        resized(copy.deepcopy(base), 2),
        peft.LoraConfig(
            r=2, target_modules=["q_proj", *targets], task_type="CAUSAL_LM" if tied else None
        ),
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(str(directory), **options)
    return theirs


def with_other_rows(base: nn.Module, size: int) -> nn.Module:
    """A copy with two tokens more, whose rows another process drew."""
    model = copy.deepcopy(base)
    model.resize_token_embeddings(size + 2, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[size:] = 9.0
        model.get_output_embeddings().weight[size:] = 9.0
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", RESIZED)
def test_files_with_resized_embeddings(name: str, tied: bool, tmp_path: Path) -> None:
    base = build_tied("llama")[0] if tied else build("llama")[0]
    size = base.config.vocab_size
    theirs = written_by_peft(base, name, tied, tmp_path)
    ids = torch.tensor([[3, size, 5, size + 1]])
    with pytest.raises(RuntimeError, match="size mismatch"):
        in_peft(base, tmp_path)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({size + 2}\) before load"):
        lp.load_adapter(copy.deepcopy(base), tmp_path, embeddings="restore")
    model = with_other_rows(base, size)
    want = in_peft(model, tmp_path)(input_ids=ids).logits
    if tied or name == "beside":  # else peft writes the rows of the adapted end only
        assert_close("peft restores", want, theirs(input_ids=ids).logits, floor=1e-5)
    before = copy.deepcopy(model)
    message = rf"in 2 of {size + 2} rows \(\[{size}, {size + 1}\]\); .*embeddings='restore'"
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(model, tmp_path)
    assert_same_bits("refused", model(input_ids=ids).logits, before(input_ids=ids).logits)
    report = lp.load_adapter(model, tmp_path, embeddings="restore")
    assert any("2 of" in note and "are the file's now" in note for note in report.notes)
    assert_close("restored", model(input_ids=ids).logits, want, floor=1e-5)
    lp.save_checkpoint(model, tmp_path / "a.ckpt")
    again = with_other_rows(base, size)
    lp.load_adapter(again, tmp_path, embeddings="restore")
    lp.load_checkpoint(again, tmp_path / "a.ckpt")
    assert_same_bits("resumed", again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_embeddings_that_cannot_be_restored(tmp_path: Path) -> None:
    base = build_tied("llama")[0]
    size = base.config.vocab_size
    written_by_peft(base, "beside", True, tmp_path)
    model = with_other_rows(base, size)
    lp.attach(model, lp.LoRA(r=2), adapter_name="first")
    with pytest.raises(ValueError, match="expected a model without adapters"):
        lp.load_adapter(model, tmp_path, embeddings="restore")
    with pytest.raises(ValueError, match="embeddings: expected 'check' or 'restore'"):
        lp.load_adapter(model, tmp_path, embeddings="yes")  # type: ignore[arg-type]
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    other = with_other_rows(base, size)
    with pytest.raises(ValueError, match="which it is tied to"):
        lp.load_adapter(other, tmp_path, embeddings="restore")
    assert other.get_input_embeddings().weight[size].eq(9.0).all()


def test_trained_copies_of_another_size(tmp_path: Path) -> None:
    """They hold every row themselves, so nothing is restored."""
    base, inputs = build("llama")
    size = base.config.vocab_size
    theirs = by_peft(
        resized(copy.deepcopy(base), 2),
        tmp_path,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({size + 2}\) before load"):
        lp.load_adapter(copy.deepcopy(base), tmp_path)
    model = loaded(with_other_rows(base, size), tmp_path)
    assert_close("logits", run(model, inputs), run(theirs, inputs), floor=1e-5)


def test_an_error_while_loading_puts_the_rows_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build_tied("llama")[0]
    written_by_peft(base, "beside", True, tmp_path)
    model = with_other_rows(base, base.config.vocab_size)
    before = copy.deepcopy(model)

    def fails(*_: Any) -> None:
        raise MemoryError("made up")

    monkeypatch.setattr("lightning_peft.hf.load._copy", fails)
    with pytest.raises(MemoryError):
        lp.load_adapter(model, tmp_path, embeddings="restore")
    for key, tensor in before.state_dict().items():
        assert_same_bits(key, model.state_dict()[key], tensor)
