"""Vocabularies of another size: resized before attach, after it, or in the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, in_peft, loaded, randomise, run, trained
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


def test_files_with_resized_embeddings(tmp_path: Path) -> None:
    base, inputs, _, targets = build_tied("llama")
    size = base.config.vocab_size
    theirs = peft.get_peft_model(
        resized(copy.deepcopy(base), 2), peft.LoraConfig(r=2, target_modules=targets)
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    model = copy.deepcopy(base)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({size + 2}\) before load"):
        lp.load_adapter(model, tmp_path)
    model.resize_token_embeddings(size + 2)
    with torch.no_grad():
        model.get_input_embeddings().weight[size:] = 9.0
    message = rf"in 2 of {size + 2} rows \(\[{size}, {size + 1}\]\); .*copy_"
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(model, tmp_path)
    key = "base_model.model.model.embed_tokens.weight"
    file = tmp_path / "adapter_model.safetensors"
    model.get_parameter("model.embed_tokens.weight").data.copy_(load_file(file)[key])
    lp.load_adapter(model, tmp_path)
    assert_close("logits", run(model, inputs), run(theirs, inputs), floor=1e-5)
