"""A check of one kernel: inputs on the device, results, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from lightning_peft_kernels.dispatch import Decision, use_backend
from torch import Tensor

from lightning_peft.diagnostics.pairs import Pair
from lightning_peft.diagnostics.timing import medians

__all__ = ["Check", "Trial"]

_DECODED = ("triton", "fused", "pairs", "scaled_mm", "scaled_rows")


@dataclass(frozen=True)
class Trial:
    """One kernel on one set of inputs.

    Attributes:
        run: Runs the kernel on inputs that lie on the device; returns its results.
        compare: Returns results beside their references.
    """

    run: Callable[[], Sequence[Tensor]]
    compare: Callable[[Sequence[Tensor]], list[Pair]]


@dataclass(frozen=True)
class Check:
    """One kernel and its reference.

    Attributes:
        op: Name of the op, as its failures are remembered.
        configuration: Which of its kernels.
        trials: Builds the inputs.
        decide: Returns what the dispatch selects.
        short: Whether the check at the start of fit includes it.
    """

    op: str
    configuration: str
    trials: Callable[[], Iterable[Trial]]
    decide: Callable[[], Decision]
    short: bool = False

    @property
    def applies(self) -> bool:
        """Whether this device would run the kernel at all."""
        with use_backend("triton"):
            return self.decide().backend in _DECODED

    def error(self) -> str:
        """Run and return the largest violation; "" if every result is within its limit."""
        return self.examine(None)[0]

    def examine(self, device: torch.device | None) -> tuple[str, float]:
        """Return (what `error` returns, median microseconds of the kernel on its first inputs).

        Args:
            device: Where times are taken, if nothing is wrong; None takes none, and they are 0.
        """
        violations: list[str] = []
        first: Trial | None = None
        with use_backend("triton"):
            for trial in self.trials():
                first = first or trial
                violations += [pair.violation() for pair in trial.compare(trial.run())]
            error = "; ".join(filter(None, violations))
            if error or first is None or device is None:
                return error, 0.0
            return "", medians({"": first.run}, device, repeats=5)[""]
