"""Report of `extract_lora`: the share of fine-tuning that the adapter keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_peft.report.summary import Report

__all__ = ["ExtractReport", "ExtractedLayer"]


@dataclass(frozen=True)
class ExtractedLayer:
    """Result for one weight.

    Attributes:
        name: The weight.
        rank: Rank of the factors.
        energy: 1 − ‖ΔW − BA‖² / ‖ΔW‖², before factors are fitted to inputs.
        change: ‖ΔW‖ / ‖W‖, how far fine-tuning moved it.
    """

    name: str
    rank: int
    energy: float
    change: float


@dataclass
class ExtractReport:
    """Share of the fine-tuning that the adapter keeps, and what it drops.

    Attributes:
        layers: One entry an extracted weight.
        left_out: (parameter, ‖Δ‖ / ‖W‖) of everything else that fine-tuning moved, largest first.
        output_error: ‖extracted − tuned‖ / ‖tuned‖ of the output on the batch given; None without
            one.
        fitted: The same over the inputs given, before and after fitting; None without any.
        output_change: ‖base − tuned‖ / ‖tuned‖: what fine-tuning is worth on that batch.
        attached: The report of attaching.
    """

    layers: list[ExtractedLayer] = field(default_factory=list)
    left_out: list[tuple[str, float]] = field(default_factory=list)
    output_error: float | None = None
    output_change: float | None = None
    fitted: tuple[float, float] | None = None
    attached: Report | None = None

    @property
    def energy(self) -> float:
        """Return the smallest share kept of any layer's change."""
        return min((e.energy for e in self.layers), default=1.0)

    def __str__(self) -> str:
        """Return one line per layer, then what is missing."""
        lines = [
            f"{e.name:<48} rank {e.rank:<4} {e.energy:8.2%} of the energy of a change of "
            f"{e.change:.2e}"
            for e in self.layers
        ]
        if self.left_out:
            most = ", ".join(f"{n} ({c:.1e})" for n, c in self.left_out[:5])
            lines.append(
                f"{len(self.left_out)} other parameters were changed and are left out: {most}"
            )
        if self.output_error is not None:
            lines.append(
                f"output on the batch differs from the tuned model's by {self.output_error:.2e}; "
                f"the base's by {self.output_change:.2e}"
            )
        if self.fitted is not None:
            lines.append("output on the inputs: {:.2e} off, fitted {:.2e}".format(*self.fitted))
        return "\n".join(lines)
