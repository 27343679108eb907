"""What attach costs: calls grow as the layers do, and packed layers go where they are kept."""

from __future__ import annotations

import cProfile
import pstats

import torch
from torch import nn

from lightning_peft import LoRA, Quantization, attach
from lightning_peft.adapters.attach import attach_within

METHOD = LoRA(r=2, target_modules="all-linear")


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)


def calls(experts: int) -> int:
    """Function calls of attaching to unfused experts, quantised, on the meta device."""
    with torch.device("meta"):
        model = nn.ModuleList(Expert() for _ in range(experts))
    profile = cProfile.Profile()
    profile.runcall(attach, model, METHOD, quantization=Quantization("nf4"))
    found: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return found


def test_calls_are_linear_in_layers() -> None:
    calls(2)  # what is imported and cached once
    few, many = calls(60), calls(240)
    assert many < 4.4 * few, (few, many)


def test_packed_layers_are_kept_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    attach_within(
        model,
        METHOD,
        adapter_name="default",
        quantization=Quantization("nf4"),
        modules_to_save=(),
        device="cpu",
        keep_on=torch.device("meta"),
    )
    packed = [model[i]._parameters["weight"] for i in (0, 1)]
    assert [(p.dtype, p.device.type) for p in packed if p is not None] == [
        (torch.uint8, "meta")
    ] * 2
