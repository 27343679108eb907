"""One line of the comparison of methods."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Measured"]


class Measured(NamedTuple):
    """A method on a task, as ``benchmarks/compare`` found it.

    Attributes:
        task: Id of the task, such as ``"classification"`` or ``"language"``.
        method: Name of the class; a hybrid has several, joined by ``+``.
        variant: The row: the class with its start or form.
        score_name: Name of `score`: accuracy in percent, perplexity, or an error.
        score: Mean over seeds.
        to_full: Mean paired difference to the reference, full fine-tuning.
        low: Lower end of the 95 % paired bootstrap interval of `to_full`.
        high: Its upper end.
        seeds: Number of seeds.
        percent: Share of trained parameters, in percent.
        peak_mb: Peak memory of a training step in MB, model included.
        nbytes: Bytes of the trained tensors.
        step_ms: Median of a training step on the CPU; None if it was not timed.
        learning_rate: The rate that the row was run with.
        rate_to_full: `learning_rate` over the reference's.
        settings: Constructor calls of the methods, without ``target_modules``.
        tied: Whether the row cannot be told from the best mergeable row of its task: the 95 %
            interval of their paired difference contains zero.
        protocol: ``"held-out"``: rates were chosen on validation data and test data was read once.
            ``"exploratory"``: rates were chosen on the scores that are reported.
    """

    task: str
    method: str
    variant: str
    score_name: str
    score: float
    to_full: float
    low: float
    high: float
    seeds: int
    percent: float
    peak_mb: float
    nbytes: int
    step_ms: float | None
    learning_rate: float
    rate_to_full: float
    settings: str
    tied: bool
    protocol: Literal["held-out", "exploratory"]

    def __str__(self) -> str:
        step = "" if self.step_ms is None else f" ({self.step_ms:g} ms)"
        name = "" if self.variant == self.method else f"{self.variant}: "
        interval = f"[{self.low:+.1f}, {self.high:+.1f}]"
        return f"{name}{self.score:.1f}, {self.to_full:+.1f} {interval}{step}"
