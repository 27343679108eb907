"""Multitask prompts: peft's outputs and gradients, a prompt per row, and generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, in_peft, loaded, randomise

N = 3
TASKS = {
    "llama": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bert": "SEQ_CLS",
    "gpt2": "CAUSAL_LM",
    "gpt_neox": "CAUSAL_LM",
    "bart": "SEQ_2_SEQ_LM",
    "modernbert": "SEQ_CLS",
}


def output(model: nn.Module, inputs: Any, **kwargs: Any) -> Tensor:
    found = model(**inputs, **kwargs)
    return next(v for v in found.values() if torch.is_tensor(v) and v.ndim > 1)


@pytest.mark.parametrize("name", TASKS)
def test_exchange_and_gradients(name: str, tmp_path: Path) -> None:
    base, inputs = build(name)
    config = peft.MultitaskPromptTuningConfig(
        task_type=TASKS[name],
        num_virtual_tokens=N,
        num_tasks=3,
        num_ranks=2,
        num_transformer_submodules=1,
        prompt_tuning_init="RANDOM",
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs, std=0.5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = loaded(base, tmp_path / "theirs").eval()
    tasks = torch.tensor([2, 0])
    assert len(next(iter(inputs.values()))) == 2
    with lp.task_ids(tasks):
        got = output(ours, inputs)
        other = output(ours, inputs)[[1, 0]]
    want = output(theirs, inputs, task_ids=tasks)
    want = want[:, -got.shape[1] :] if want.dim() == 3 else want
    assert_close("peft's in ours", got, want, floor=1e-5)
    assert not torch.equal(got, other)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5))
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    mine = {n.rpartition(".")[2]: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    encoder: Any = theirs.prompt_encoder["default"]
    assert_close("P", mine["P"], encoder.embedding.weight.grad, floor=1e-5)
    assert_close("cols", mine["cols"], encoder.prefix_task_cols.grad, floor=1e-5)
    assert_close("rows", mine["rows"], encoder.prefix_task_rows.grad, floor=1e-5)
    assert not mine["cols"][1].any()
    lp.save_adapter(ours, tmp_path / "ours")
    again = output(in_peft(base, tmp_path / "ours"), inputs, task_ids=tasks)
    again = again[:, -got.shape[1] :] if again.dim() == 3 else again
    assert_close("ours in peft", again, got, floor=1e-5)


def test_a_prompt_in_the_decoder_is_refused(tmp_path: Path) -> None:
    base, _ = build("t5")
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N, prompt_tuning_init="RANDOM"
    )
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="a second prompt into the decoder"):
        loaded(base, tmp_path)


def model_of(base: nn.Module) -> Any:
    model: Any = copy.deepcopy(base).eval()
    lp.attach(model, lp.MultitaskPrompt(n=N, tasks=2, init="random"))
    randomise(model, std=0.5)
    return model


def test_beams_and_rows() -> None:
    base, _ = build("llama")
    model = model_of(base)
    ids = torch.randint(3, 90, (2, 5))
    how: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    with lp.task_ids([1, 0]):
        both = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    for row, task in enumerate([1, 0]):
        with lp.task_ids([task]):
            one = ids[row : row + 1]
            alone = model.generate(one, attention_mask=torch.ones_like(one), **how)
        n = min(both.shape[1], alone.shape[1])
        assert torch.equal(both[row, :n], alone[0, :n])
    lp.attach(model, lp.PromptTuning(n=2), adapter_name="plain")
    lp.set_adapter(model, ["default", "plain"])
    with torch.no_grad(), lp.task_ids([1, 1]), lp.adapter_names(["plain", "default"]):
        mixed = model(input_ids=ids).logits
    lp.set_adapter(model, "default")
    with torch.no_grad(), lp.task_ids([1]):
        torch.testing.assert_close(mixed[1:], model(input_ids=ids[1:]).logits)


def test_refused() -> None:
    base, inputs = build("llama")
    with pytest.raises(RuntimeError, match="MultitaskPrompt: expected the task of every sample"):
        model_of(base)(**inputs)
    with pytest.raises(ValueError, match="expected 1 <= tasks <= 1048576"):
        lp.MultitaskPrompt(tasks=0)
    with pytest.raises(ValueError, match="mode='prepend'"):
        lp.MultitaskPrompt(mode="add")
