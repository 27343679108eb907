"""One line of the comparison of methods."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Measured"]


class Measured(NamedTuple):
    """A method on a task, as benchmarks/compare/methods.py found it.

    Attributes:
        task: ``"classification"`` (docstrings, a pretrained encoder) or ``"language"`` (from code
            to prose, a small decoder).
        method: Name of the class.
        variant: The row: the class with its start or form; ``"MAM"`` has two classes.
        score_name: Name of `score`: accuracy in percent, or perplexity.
        score: Mean over seeds.
        to_full: Distance of the mean to that of full fine-tuning.
        seeds: Number of seeds.
        percent: Share of trained parameters.
        peak_mb: Peak memory of a training step in MB, model included.
        nbytes: Size of the adapter in bytes.
        step_ms: Median of a training step on the CPU; None where it was not timed.
    """

    task: str
    method: str
    variant: str
    score_name: str
    score: float
    to_full: float
    seeds: int
    percent: float
    peak_mb: float
    nbytes: int
    step_ms: float | None

    def __str__(self) -> str:
        step = "" if self.step_ms is None else f" ({self.step_ms:g} ms)"
        name = "" if self.variant == self.method else f"{self.variant}: "
        return f"{name}{self.score:.1f}, {self.to_full:+.1f}{step}"
