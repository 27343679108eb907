"""Starts that change the base, as peft converts them on saving: read for the original base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_tables import perturb

STARTS: dict[str, dict[str, Any]] = {
    "pissa": {},
    "olora": {},
    "corda": {"corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"lora_ga_config": peft.LoraGAConfig()},
}


def prepare(model: nn.Module, start: str, config: peft.LoraConfig) -> None:
    if start == "corda":
        with torch.no_grad():
            preprocess_corda(model, config, run_model=lambda: model(torch.randn(64, 12)))
    if start == "lora_ga":
        peft.preprocess_loraga(
            model, config, lambda: model(torch.randn(16, 12)).square().mean().backward()
        )


@pytest.mark.parametrize("start", STARTS)
def test_converted(start: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)).eval(), torch.randn(5, 12)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["0", "1"],
        init_lora_weights=start,  # type: ignore[arg-type]
        **STARTS[start],
    )
    model = copy.deepcopy(base)
    prepare(model, start, config)
    theirs: Any = peft.get_peft_model(model, config)
    own = theirs.peft_config["default"]
    own.init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    own.init_lora_weights = start
    perturb(theirs, 0.1)
    want = theirs.eval()(x)
    theirs.save_pretrained(
        str(tmp_path / "converted"),
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    ours = copy.deepcopy(base)
    lp.load_adapter(ours, tmp_path / "converted")
    assert_close("output", ours(x), want, floor=1e-5)
    theirs.save_pretrained(str(tmp_path / "plain"))
    if start in ("corda", "lora_ga"):  # the base that it belongs to depends on data
        with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
            lp.load_adapter(copy.deepcopy(base), tmp_path / "plain")
