"""Report of a merge: errors of weights and output, and the base that fits the adapter better."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

__all__ = ["MergeReport", "SiteError"]


@dataclass(frozen=True)
class SiteError:
    """Effect of a merge on one weight; all numbers are relative, in the Frobenius norm.

    Attributes:
        name: The weight.
        delta: Change by the adapter, ‖W' − W‖ / ‖W‖ with W as stored (dequantised).
        error: Loss by rounding or requantising, ‖stored − W'‖ / ‖W'‖.
        base_delta: Distance to the original base, ‖stored − W₀‖ / ‖W₀‖; None without one.
        kept: Part of the update that is in a requantised weight, ⟨stored − W, δ⟩ / ‖δ‖² with
            δ = W' − W: 1 if nothing was lost. It is None if the weight is dense or δ is 0.
        noise: What requantising added, ‖stored − W'‖ / ‖δ‖. None where `kept` is.
    """

    name: str
    delta: float
    error: float
    base_delta: float | None = None
    kept: float | None = None
    noise: float | None = None


@dataclass
class MergeReport:
    """Errors of a merge.

    Attributes:
        sites: One entry per weight.
        outputs: Relative difference of each layer's output on a random input, before and after.
        not_compared: Layers whose outputs were not compared: kinds without an example input, or a
            merge onto another base.
        untied: Parameters that were tied and got a tensor of their own.
        output_error: Error of the output on the batch, ‖merged − attached‖ / ‖attached‖; None
            without a batch.
        output_errors: Output error by base: ``"dequantized"`` (the weights as stored) and
            ``"original"`` (``base=``). Filled if both a batch and a base were given.
        output_change: Effect of the adapter on the output, ‖attached − base‖ / ‖base‖; None
            without a batch.
    """

    sites: list[SiteError] = field(default_factory=list)
    outputs: dict[str, float] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    output_error: float | None = None
    output_errors: dict[str, float] = field(default_factory=dict)
    output_change: float | None = None

    @property
    def worst(self) -> float:
        """Largest relative error of a weight."""
        return max((s.error for s in self.sites), default=0.0)

    @property
    def lost(self) -> list[SiteError]:
        """Requantised weights whose noise exceeds the update."""
        return [s for s in self.sites if s.noise is not None and s.noise > 1]

    @property
    def better_base(self) -> str | None:
        """The base whose merge is nearer to the attached model; None if only one was tried."""
        if not self.output_errors:
            return None
        return min(self.output_errors, key=lambda base: self.output_errors[base])

    def note_output(self, label: str, difference: float | None, is_merged: bool) -> None:
        """Add the comparison of one module's outputs."""
        if difference is not None:
            self.outputs[label] = difference
        elif is_merged:
            self.not_compared.append(label)

    def __str__(self) -> str:
        """Lines on the weights, then on the outputs."""
        lines = [
            f"merged {len(self.sites)} weights, largest relative error {self.worst:.2e}"
            + (f"; untied {', '.join(self.untied)}" if self.untied else "")
        ]
        requantised = [(s.kept, s.noise) for s in self.sites if s.noise is not None and s.kept]
        if requantised:
            kept, noise = (median(part) for part in zip(*requantised, strict=True))
            lines.append(
                f"of the update {kept:.0%} survives requantising, with noise of {noise:.2g} times "
                f"its size (medians); {len(self.lost)} weights have more noise than update"
            )
        if self.outputs:
            lines.append(
                f"outputs of {len(self.outputs)} layers on random inputs differ by at most "
                f"{max(self.outputs.values()):.1e}"
            )
        if self.not_compared:
            names = ", ".join(self.not_compared[:3])
            lines.append(f"outputs of {len(self.not_compared)} layers not compared: {names}")
        if self.output_error is not None:
            lines.append(f"output on the batch differs by {self.output_error:.2e} (relative)")
        if self.output_change is not None:
            lines.append(f"the adapter itself changes it by {self.output_change:.2e}")
        if self.output_errors:
            tried = ", ".join(f"{e:.2e} onto the {b} base" for b, e in self.output_errors.items())
            lines.append(f"output error {tried}: the {self.better_base} base is nearer")
        lines.append("adapters stay attached for unmerge; merge_and_unload(model) to save it plain")
        return "\n".join(lines)
