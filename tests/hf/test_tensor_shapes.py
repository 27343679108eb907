"""Vectors of a file must have peft's shape exactly: another one means another axis."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.peft_exchange import by_peft

KINDS: dict[str, tuple[type[Any], dict[str, Any], str]] = {
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": 3, "target_r": 2, "total_step": 10}, "lora_E"),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}, "ia3_l"),
    "IA3 on inputs": (peft.IA3Config, {"feedforward_modules": ["0"]}, "ia3_l"),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4}, "boft_s"),
    "BEFT": (peft.BeftConfig, {}, "beft_bias"),
}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda t: t.flatten(),
    "turned": lambda t: t.mT.contiguous(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_another_shape(kind: str, change: str, tmp_path: Path) -> None:
    config, options, leaf = KINDS[kind]
    base = nn.Sequential(nn.Linear(8, 8)).eval()  # square: both axes have one length
    by_peft(base, tmp_path, config, target_modules=["0"], **options)
    lp.load_adapter(copy.deepcopy(base), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: CHANGES[change](t) if leaf in k else t for k, t in tensors.items()}, file)
    with pytest.raises(ValueError, match=rf"{leaf}.*shape|shape.*{leaf}"):
        lp.load_adapter(base, tmp_path)
