"""What every job shows: LoRA over NF4 trains, saves adapters only, resumes and predicts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_peft import (
    PEFT,
    LoRA,
    Quantization,
    adapter_state_dict,
    attach,
    load_checkpoint,
    parameter_report,
    save_checkpoint,
)

STORAGE = Quantization("nf4", block_size=32)


def lora(exclude: tuple[str, ...] = ()) -> LoRA:
    return LoRA(r=4, target_modules="all-linear", exclude_modules=list(exclude) or None)


def method(exclude: tuple[str, ...] = ()) -> PEFT:
    """The callback that goes into the library's own entry point."""
    return PEFT(lora(exclude), quantization=STORAGE, report=False)


class Run:
    """One package: its folder for files, and the line that is printed at the end."""

    def __init__(self, package: str, exclude: tuple[str, ...] = ()) -> None:
        self.package, self.exclude = package, exclude
        self.folder = Path(tempfile.mkdtemp(prefix=f"{package}-"))
        self.start: dict[str, torch.Tensor] = {}

    def attach_from(self, module: nn.Module, path: str | None) -> None:
        """Attach and load the adapters of `path`; with None, the callback attaches."""
        if path is not None:
            attach(module, lora(self.exclude), quantization=STORAGE)
            load_checkpoint(module, path)
            self.start = copies(module)

    def save(self, module: nn.Module) -> str:
        path = self.folder / "adapters.ckpt"
        save_checkpoint(module, path)
        written = torch.load(path, weights_only=True)["state_dict"]
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        base = {n for n, p in module.named_parameters() if id(p) not in trained}
        assert not base & set(written), "the base is in the file"
        assert all(torch.equal(written[k], v) for k, v in copies(module).items())
        return str(path)

    def done(self, first: nn.Module, again: nn.Module, predicted: Any) -> None:
        """Check the resumed run, and print one line of JSON."""
        before, after = copies(first), copies(again)
        assert any(float(v.abs().sum()) > 0 for k, v in before.items() if k.endswith(".B"))
        assert all(torch.equal(before[k], self.start[k]) for k in before), "not where it stopped"
        assert any(not torch.equal(before[k], after[k]) for k in before), "the resumed run stood"
        assert np.isfinite(np.asarray(predicted, dtype=float)).all()
        report = parameter_report(again)
        layers = sum(g.count for g in report.groups)
        packed = sum(p.dtype == torch.uint8 for p in again.parameters())
        assert packed, "nothing was quantised"
        line = {
            "package": self.package,
            "adapted": layers,
            "packed tensors": packed,
            "trained": report.trainable,
            "total": report.total,
            "predicted": list(np.shape(predicted)),
        }
        print(json.dumps(line))


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in adapter_state_dict(module).items()}
