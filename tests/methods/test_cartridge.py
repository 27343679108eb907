"""Cartridges: started from a text they are that text's cache; exchange with peft; frozen rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, in_peft, loaded, randomise, run

TEXT = [5, 9, 17, 33]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_starts_as_the_text_in_front(name: str) -> None:
    base, _ = build(name)
    model: Any = copy.deepcopy(base)
    lp.attach(model, lp.Cartridge(n=4, init="text", init_ids=TEXT))
    ids = torch.randint(3, 90, (2, 6))
    whole = torch.cat([torch.tensor(TEXT).expand(2, -1), ids], dim=1)
    want = run(base, {"input_ids": whole})[:, 4:]
    assert_close("logits", run(model.eval(), {"input_ids": ids}), want, floor=1e-5)
    assert model.training is False
    plain: Any = base
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    text = plain.generate(whole, attention_mask=torch.ones_like(whole), **how)
    assert torch.equal(got, text[:, 4:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "mistral", "phi"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_exchange(name: str, frozen: int, tmp_path: Path) -> None:
    base, inputs = build(name)
    config = peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=frozen
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs, std=0.5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = loaded(base, tmp_path / "theirs")
    want = run(theirs, inputs)
    assert_close("peft's in ours", run(ours, inputs), want, floor=1e-5)
    lp.save_adapter(ours, tmp_path / "ours")
    assert_close("ours in peft", run(in_peft(base, tmp_path / "ours"), inputs), want, floor=1e-5)


def test_the_first_positions_are_not_trained() -> None:
    base, inputs = build("llama")
    model: Any = copy.deepcopy(base)
    lp.attach(model, lp.Cartridge(n=4, frozen=2, init="text", init_ids=TEXT))
    before = {k: t.clone() for k, t in lp.adapter_state_dict(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**{**inputs, "labels": inputs["input_ids"]}).loss.backward()
    optimizer.step()
    after = lp.adapter_state_dict(model)
    moved = {k.rpartition(".")[2]: not torch.equal(after[k], before[k]) for k in after}
    assert moved == {"F": False, "P": True}
    fresh: Any = copy.deepcopy(base)
    lp.attach(fresh, lp.Cartridge(n=4, frozen=2))
    lp.load_adapter_state_dict(fresh, after)
    assert torch.equal(run(fresh.eval(), inputs), run(model.eval(), inputs))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 4, "frozen": 4}, "0 <= frozen < n = 4"),
        ({"n": 4, "init": "text", "init_ids": [1]}, "4 init_ids or more"),
        ({"projection": True}, "projection=False"),
    ],
)
def test_bad_values(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        lp.Cartridge(**fields)
    with pytest.raises(ValueError, match="expected one Hugging Face transformer"):
        lp.attach(nn.Sequential(nn.Linear(4, 4)), lp.Cartridge(n=2))
