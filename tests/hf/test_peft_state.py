"""State dicts of a living PeftModel; the scale comes from its config, or from `alpha`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, randomise, run

KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 2, "lora_alpha": 5, "modules_to_save": ["lm_head"]}),
    "tokens": (peft.LoraConfig, {"r": 2, "trainable_token_indices": [3, 5]}),
    "loha": (peft.LoHaConfig, {"r": 2}),
    "vera": (peft.VeraConfig, {"r": 2}),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}),
    "oft": (peft.OFTConfig, {"oft_block_size": 4}),
}


@pytest.mark.parametrize("state", [lambda m: m.state_dict(), peft.get_peft_model_state_dict])
@pytest.mark.parametrize("kind", KINDS)
def test_with_its_config(kind: str, state: Callable[[Any], Any], tmp_path: Path) -> None:
    base, inputs = build("llama")
    config, options = KINDS[kind]
    theirs: Any = by_peft(base, tmp_path, config, target_modules=["q_proj", "v_proj"], **options)
    model = copy.deepcopy(base)
    lp.load_adapter(model, state(theirs), config=theirs.peft_config["default"])
    assert_close("logits", run(model, inputs), run(theirs, inputs), floor=1e-5)


def test_the_scale_is_never_guessed(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    options: dict[str, Any] = {"rank_pattern": {"1": 3}, "lora_alpha": 5}
    theirs: Any = by_peft(base, tmp_path, r=2, target_modules=["0", "1"], **options)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(ValueError, match="does not hold the scale"):
        lp.load_adapter(base, theirs.state_dict())
    with pytest.raises(ValueError, match="leave one out"):
        lp.load_adapter(base, theirs.state_dict(), alpha=5.0, config=theirs.peft_config["default"])
    with pytest.raises(ValueError, match="says its own"):
        lp.load_adapter(base, tmp_path, config=theirs.peft_config["default"])
    assert before.keys() == base.state_dict().keys()
    lp.load_adapter(base, theirs.state_dict(), alpha=5.0)
    x = torch.randn(3, 8)
    assert_close("output", base(x), theirs(x), floor=1e-5)


def test_one_of_several_adapters(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8)).eval()
    theirs: Any = by_peft(base, tmp_path, r=2, target_modules=["0"])
    theirs.add_adapter("second", peft.LoraConfig(r=3, target_modules=["0"]))
    theirs.set_adapter("second")
    randomise(theirs, seed=4)
    state, x = theirs.state_dict(), torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"\['default', 'second'\], got 'third'"):
        lp.load_adapter(base, state, config=theirs.peft_config["second"], adapter_name="third")
    model = copy.deepcopy(base)
    lp.load_adapter(model, state, config=theirs.peft_config["second"], adapter_name="second")
    assert_close("second", model(x), theirs(x), floor=1e-5)


def test_another_base(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8)).eval()
    theirs: Any = by_peft(base, tmp_path, r=2, target_modules=["0"])
    with torch.no_grad():
        base[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="differs from this one"):
        lp.load_adapter(base, theirs.state_dict(), config=theirs.peft_config["default"])
