"""Adaption prompts: peft's outputs and gradients, caches, checkpointing and rows."""

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
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, randomise, run


def attached(base: nn.Module, **fields: Any) -> Any:
    model: Any = copy.deepcopy(base).eval()
    lp.attach(model, lp.AdaptionPrompt(**{"n": 4, **fields}))
    return model


def blocks_of(model: nn.Module) -> list[Any]:
    return [a.block for _, m in adapted_modules(model) for a in adapters_of(m)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_and_gradients_are_pefts(name: str, layers: int) -> None:
    base, inputs = build(name)
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=layers, task_type="CAUSAL_LM")
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    ours = attached(base, layers=layers)
    assert torch.equal(run(ours, inputs), run(base, inputs))
    there = [m for m in theirs.modules() if hasattr(m, "adaption_prompt")]
    blocks = blocks_of(ours)
    assert len(there) == len(blocks) == layers
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, other in zip(blocks, there, strict=True):
            other.adaption_gate.fill_(0.7)
            other.adaption_prompt.copy_(torch.randn(other.adaption_prompt.shape, generator=g))
            mine.P.copy_(other.adaption_prompt)
            mine.g.copy_(other.adaption_gate)
    for model in (ours, theirs):
        y = model(**inputs, use_cache=False).logits
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        (y * weight).sum().backward()
    assert_close("output", run(ours, inputs), run(theirs, inputs), floor=1e-5)
    assert (run(ours, inputs) - run(base, inputs)).norm() > 1e-3
    for mine, other in zip(blocks, there, strict=True):
        assert_close("dP", mine.P.grad, other.adaption_prompt.grad, floor=1e-5)
        assert_close("dg", mine.g.grad, other.adaption_gate.grad, floor=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("layers", [1, 2])
def test_exchange(name: str, layers: int, tmp_path: Path) -> None:
    base, inputs = build(name)
    config = {"adapter_len": 4, "adapter_layers": layers, "task_type": "CAUSAL_LM"}
    theirs = by_peft(base, tmp_path / "theirs", peft.AdaptionPromptConfig, **config)
    want = run(theirs, inputs)
    ours = loaded(base, tmp_path / "theirs")
    assert_close("peft's in ours", run(ours, inputs), want, floor=1e-5)
    lp.save_adapter(ours, tmp_path / "ours")
    assert_close("ours in peft", run(in_peft(base, tmp_path / "ours"), inputs), want, floor=1e-5)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace(".1.", ".7."): t for k, t in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"extra .* not in the attention of the last blocks"):
        loaded(base, tmp_path / "theirs")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_generation_and_checkpointing(name: str) -> None:
    base, inputs = build(name)
    model = attached(base)
    randomise(model, std=0.5)
    ids = torch.randint(3, 90, (2, 5))
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    text = ids
    for _ in range(5):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, text)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(2)
        model.train()(**{**inputs, "labels": inputs["input_ids"]}).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        assert_close("gradient", b, a, floor=1e-5)


def test_rows_resume_and_detach() -> None:
    base, _ = build("llama")
    model, ids = attached(base), torch.randint(3, 90, (3, 6))
    lp.attach(model, lp.AdaptionPrompt(n=2), adapter_name="other")
    lp.set_adapter(model, ["default", "other"])
    randomise(model, std=0.5)
    with torch.no_grad(), lp.adapter_names(["other", "__base__", "default"]):
        mixed = model(input_ids=ids).logits
    for row, name in ((0, "other"), (2, "default")):
        lp.set_adapter(model, name)
        want = run(model, {"input_ids": ids[row : row + 1]})
        torch.testing.assert_close(mixed[row : row + 1], want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1:2], run(base, {"input_ids": ids[1:2]}), atol=1e-5, rtol=1e-4)
    lp.set_adapter(model, "default")
    fresh = attached(base)
    lp.load_adapter_state_dict(fresh, lp.adapter_state_dict(model, "default"))
    assert torch.equal(run(fresh, {"input_ids": ids}), run(model, {"input_ids": ids}))
    lp.detach(model)
    assert torch.equal(run(model, {"input_ids": ids}), run(base, {"input_ids": ids}))
    assert not any(m._forward_hooks for m in model.modules())


def test_refused() -> None:
    with pytest.raises(ValueError, match="expected one of gpt2, llama, mistral, qwen2, got bert"):
        attached(build("bert")[0])
    with pytest.raises(ValueError, match="got qwen3; use PrefixTuning"):
        attached(build("qwen3")[0])
    with pytest.raises(ValueError, match="expected a Hugging Face decoder"):
        attached(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="layers >= 1"):
        lp.AdaptionPrompt(layers=0)
