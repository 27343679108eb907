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
        source: The paper: its id at arXiv or OpenReview.
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
    Advice("ALoRA", ("generation",), 0.5, True, False,
           "several short jobs on one text: the base's cache is reused up to the invocation tokens",
           "arXiv:2504.12397"),
    Advice("KaSA", ("classification", "generation"), 0.5, False, True,
           "LoRA on a base without its smallest singular triplets, which carry noise",
           "arXiv:2412.06071"),
    Advice("VeLoRA", ("classification", "generation"), 0.5, True, True,
           "LoRA with less memory for activations, at inexact gradients", "arXiv:2405.17991"),
    Advice("MonteCLoRA", ("classification", "generation"), 0.5, True, True,
           "less sensitive to the learning rate than LoRA, by sampled low-rank factors",
           "arXiv:2411.04358"),
    Advice("HRA", _ALL, 0.5, True, True,
           "between low rank and OFT: a product of reflections, orthogonal by construction",
           "arXiv:2405.17484"),
    Advice("RoAd", ("classification", "generation"), 0.1, True, True,
           "cheap by row: rotations of pairs of outputs, two element-wise products per layer",
           "arXiv:2409.00119"),
    Advice("DeLoRA", ("vision", "generation"), 0.5, True, True,
           "bounds the distance to the base: robust to the learning rate and to long training",
           "arXiv:2503.18225"),
    Advice("GraLoRA", ("generation",), 1.0, True, True,
           "LoRA in blocks: higher ranks without the interference of outlier channels",
           "arXiv:2505.20355"),
    Advice("HiRA", ("generation",), 0.8, True, True,
           "high-rank changes in proportion to the weight; zeros of a pruned base stay zero",
           "OpenReview:TwJrTz9cRS"),
    Advice("PEANuT", ("generation",), 0.5, True, True,
           "a small network of the weight in place of a product of two matrices",
           "arXiv:2410.01870"),
    Advice("SHiRA", ("vision", "generation"), 1.5, True, True,
           "1 to 2 % of the weights, switched quickly and fused with less interference",
           "arXiv:2406.13175"),
    Advice("VBLoRA", ("classification", "generation"), 0.01, True, True,
           "files below a hundredth of LoRA's: all layers share one bank of vectors",
           "arXiv:2405.15179"),
    Advice("UniLoRA", ("classification", "generation"), 0.01, True, True,
           "one trained vector for the model, spread over all factors", "arXiv:2506.00799"),
    Advice("TinyLoRA", ("generation",), 0.001, True, True,
           "reasoning by reinforcement learning from very few trained numbers",
           "arXiv:2602.04118"),
    Advice("RandLoRA", _ALL, 0.5, True, True,
           "full-rank changes from random bases, at a higher cost per step", "arXiv:2502.00987"),
    Advice("PVeRA", ("vision",), 0.02, True, True,
           "VeRA with a variance: samples for uncertainty, merges by the mean",
           "arXiv:2512.07703"),
    Advice("C3A", ("classification", "generation"), 0.1, True, True,
           "high rank from few numbers, by circular convolutions", "arXiv:2407.19342"),
    Advice("FourierFT", ("classification", "vision", "generation"), 0.001, True, True,
           "a thousand spectral coefficients per layer", "arXiv:2405.03003"),
    Advice("GLoRA", ("vision", "generation"), 0.5, True, True,
           "weight and bias scaled and shifted by layer-wise forms that a search chooses",
           "arXiv:2306.07967"),
    Advice("OSF", ("classification", "generation"), 50.0, True, True,
           "learning one task after another: gradients keep out of the large singular directions",
           "arXiv:2504.07097"),
    Advice("Lily", ("vision", "generation"), 0.3, True, False,
           "factors shared across layers and mixed by a router", "arXiv:2407.09946"),
    Advice("Poly", ("classification", "generation"), 0.5, True, False,
           "many tasks at once: skills that the tasks share", "arXiv:2202.13914"),
    Advice("MultitaskPrompt", ("classification", "generation"), 0.035, True, False,
           "many tasks at once: a shared prompt, with a low-rank factor per task",
           "arXiv:2303.02861"),
    Advice("XLoRA", ("generation",), 0.1, False, False,
           "mixes trained adapters per token; every forward costs two", "arXiv:2402.07148"),
    Advice("AdaptionPrompt", ("generation",), 0.02, True, False,
           "instructions from 1.2 M trained numbers on a 7B model; starts as the base",
           "arXiv:2303.16199"),
    Advice("Cartridge", ("generation",), 0.1, True, False,
           "one long text asked about often: its trained keys and values in place of the text",
           "arXiv:2506.06266"),
    Advice("CPT", ("classification",), 0.01, True, False,
           "few examples: their embeddings, moved within a ball", "arXiv:2410.17222"),
    Advice("NormTuning", ("classification", "generation"), 0.05, False, True,
           "adapts language models to images by normalisation layers alone", "arXiv:2312.11420"),
    Advice("BEFT", ("classification", "generation"), 0.01, True, True,
           "biases of value projections alone", "arXiv:2509.15974"),
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
