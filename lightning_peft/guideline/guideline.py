"""What the literature recommends, as data, next to our measurements. `literature` filters it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_peft.guideline.measurements import MEASURED, Measured

__all__ = ["GUIDELINE", "Advice", "guideline_table", "literature"]


@dataclass(frozen=True)
class Advice:
    """One row of the guideline.

    Attributes:
        method: Name of the class.
        tasks: ``"classification"``, ``"generation"``, ``"vision"``.
        budget: Share of trained parameters that the papers report, in percent of a large model.
            Small models need a larger share at the same rank; `measured` has theirs.
        multi_task: Whether samples of one batch can run under different adapters of it.
        latency: Whether it merges, so that inference costs nothing.
        why: Finding of the source.
        source: The paper.
    """

    method: str
    tasks: tuple[str, ...]
    budget: float
    multi_task: bool
    latency: bool
    why: str
    source: str

    @property
    def measured(self) -> tuple[Measured, ...]:
        """Rows of the comparison (benchmarks/compare) for this method."""
        return tuple(m for m in MEASURED if m.method == self.method)


_ALL = ("classification", "generation", "vision")
GUIDELINE: tuple[Advice, ...] = (
    Advice("LoRA", _ALL, 0.5, True, True,
           "near full fine-tuning on all linear layers; the choice of layers matters more than the "
           "rank", "arXiv:2106.09685; arXiv:2305.14314"),
    Advice("DoRA", _ALL, 0.5, True, True,
           "above LoRA at low ranks, at a higher cost per step", "arXiv:2402.09353"),
    Advice("AdaLoRA", ("classification", "generation"), 0.3, True, True,
           "above LoRA at equal and very small budgets", "arXiv:2303.10512"),
    Advice("LoRAPlus", _ALL, 0.5, True, True,
           "reaches LoRA's score in fewer steps", "arXiv:2402.12354"),
    Advice("IA3", ("classification", "generation"), 0.02, True, True,
           "few examples and many tasks: above full fine-tuning with few shots on T0",
           "arXiv:2205.05638"),
    Advice("VeRA", _ALL, 0.02, True, True,
           "LoRA's score with a tenth of its trained parameters", "arXiv:2310.11454"),
    Advice("OFT", ("vision", "generation"), 0.5, False, True,
           "keeps the angles between neurons: subjects and control in image models",
           "arXiv:2306.07280"),
    Advice("BOFT", ("vision", "generation"), 0.5, False, True,
           "OFT with fewer parameters", "arXiv:2311.06243"),
    Advice("LoHa", ("vision", "generation"), 0.5, True, True,
           "higher rank from as many parameters", "arXiv:2108.06098"),
    Advice("LoKr", ("vision", "generation"), 0.1, True, True,
           "small files for image models", "arXiv:2309.14859"),
    Advice("BottleneckAdapter", ("classification", "generation"), 2.0, True, False,
           "within half a point of full fine-tuning on GLUE; costs time at inference",
           "arXiv:1902.00751"),
    Advice("PrefixTuning", ("generation",), 0.1, True, False,
           "generation from tables and summaries, better than fine-tuning with little data",
           "arXiv:2101.00190"),
    Advice("PromptTuning", ("classification", "generation"), 0.01, True, False,
           "close to full fine-tuning only for models of billions of parameters",
           "arXiv:2104.08691"),
    Advice("PTuning", ("classification",), 0.1, True, False,
           "understanding tasks with decoders", "arXiv:2103.10385"),
    Advice("BitFit", ("classification",), 0.1, False, True,
           "small and middling data sets, encoders with biases", "arXiv:2106.10199"),
    Advice("DiffPruning", ("classification",), 0.5, False, True,
           "full fine-tuning's score from 0.5 % changed weights; trains all of them meanwhile",
           "arXiv:2012.07463"),
)  # fmt: skip


def literature(
    task: str | None = None,
    *,
    budget: float | None = None,
    multi_task: bool = False,
    latency: bool = False,
) -> Sequence[Advice]:
    """Return the rows of the guideline that fit, in its order.

    Args:
        task: ``"classification"``, ``"generation"`` or ``"vision"``; None for any.
        budget: Most trained parameters, in percent of the model.
        multi_task: Several adapters in one batch are needed.
        latency: No cost at inference is allowed.

    Raises:
        ValueError: an unknown task, a budget that is not positive.
    """
    if task is not None and task not in _ALL:
        raise ValueError(f"literature: task: expected one of {_ALL} or None, got {task!r}")
    if budget is not None and budget <= 0:
        raise ValueError(f"literature: budget: expected a percentage above 0, got {budget}")
    return [
        row
        for row in GUIDELINE
        if (task is None or task in row.tasks)
        and (budget is None or row.budget <= budget)
        and (row.multi_task or not multi_task)
        and (row.latency or not latency)
    ]


def guideline_table(rows: Sequence[Advice] = GUIDELINE) -> str:
    """Return Markdown: what the literature says, and the measured distance to full fine-tuning.

    Args:
        rows: The answer of `literature`; all of the guideline by default.
    """
    tasks = sorted({m.task for m in MEASURED})
    titles = ["method", "tasks", "trained", "by row", "merges", "the literature"]
    titles += [f"{task}: {_score_name(task)}, to full fine-tuning (step)" for task in tasks]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [
            row.method,
            ", ".join(row.tasks),
            f"{row.budget:g} %",
            "yes" if row.multi_task else "no",
            "yes" if row.latency else "no",
            f"{row.why} ({row.source})",
        ]
        for task in tasks:
            own = [m for m in row.measured if m.task == task]
            cells.append("; ".join(map(str, own)) or "not measured")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _score_name(task: str) -> str:
    return next(m.score_name for m in MEASURED if m.task == task)
