"""`recommend`: a method, its settings and a learning rate for a model, from measured tables."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_peft.guideline.measurements import MEASURED, Measured
from lightning_peft.methods.base import Method, Targeted
from lightning_peft.methods.registry import METHODS
from lightning_peft.planner.byte_sizes import parse_bytes, size
from lightning_peft.planner.estimate import estimate_memory
from lightning_peft.planner.plan import Plan

__all__ = ["Recommendation", "recommend"]

#: What people call a task → the tasks of the comparison that say something about it, best first.
TASKS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "classification"),
    "language": ("language",),
    "vision": ("vision",),
    "series": ("series",),
}

#: Ratio of two timings of one step, at most (the control of benchmarks/compare).
TIMING_NOISE = 1.03

#: Choices for memory, in the order in which they are tried: what each costs grows.
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("the base as it is", {}),
    ("the base in NF4", {"quantization": "nf4"}),
    ("NF4 and checkpointing", {"quantization": "nf4", "checkpointing": True}),
    (
        "NF4, checkpointing and 8-bit AdamW",
        {"quantization": "nf4", "checkpointing": True, "optimizer": "adamw_8bit"},
    ),
)


@dataclass(frozen=True)
class Recommendation:
    """An answer of `recommend`. It is false if there is no method to recommend.

    Attributes:
        method: The method, for `PEFT` or `attach`; None for an empty answer.
        learning_rate: Rate of the measured run, or `rate_to_full` times the given rate.
        rate_to_full: Measured rate over the rate of full fine-tuning in the same comparison.
        settings: Further arguments that the memory needs: ``quantization``, ``checkpointing``,
            ``optimizer``.
        plan: Memory of one rank under these settings; None if no memory was given.
        measured: The row of the comparison that the answer rests on.
        why: Reasons, with numbers; for an empty answer, what is missing.
        alternatives: Rows that the measurements cannot tell from the answer.
    """

    method: Method | None
    learning_rate: float | None
    rate_to_full: float | None
    settings: dict[str, Any]
    plan: Plan | None
    measured: Measured | None
    why: tuple[str, ...]
    alternatives: tuple[Measured, ...] = ()

    def __bool__(self) -> bool:
        return self.method is not None

    def __str__(self) -> str:
        if self.method is None:
            return "\n".join(["no recommendation", *(f"- {reason}" for reason in self.why)])
        given = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        lines = [f"{_call(self.method)}, learning rate {self.learning_rate:g}"]
        lines += [given] if given else []
        return "\n".join([*lines, *(f"- {reason}" for reason in self.why)])


def recommend(
    model: Any,
    task: str,
    *,
    memory: int | str | None = None,
    batch_size: int = 1,
    sequence_length: int | None = None,
    full_rate: float | None = None,
) -> Recommendation:
    """Choose a method from the measured comparison, and the storage from the memory it needs.

    The answer is one of the mergeable rows that the comparison cannot tell from its best one: the
    first in the table whose step is within 3 % of the fastest of them, the noise of the timing.

    Args:
        model: What `estimate_memory` takes: a module, a configuration, a path or a hub id.
        task: ``"classification"``, ``"language"``, ``"vision"`` or ``"series"``.
        memory: Memory of one rank, in bytes or as in ``"24GB"``. None leaves the base as it is.
        batch_size: Samples per rank, for the memory.
        sequence_length: Tokens per sample, for the memory; None means the model's usual length.
        full_rate: A learning rate that works for full fine-tuning of this model, if known. The
            answer's rate is then relative to it.

    Returns:
        The recommendation. It is false, and says why, if the task was not measured or nothing fits.

    Raises:
        ValueError: an unknown task, or a number below 1.
    """
    if task not in TASKS:
        raise ValueError(f"recommend: task: expected one of {sorted(TASKS)}, got {task!r}")
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    rows = _rows(task)
    if not rows:
        measured = ", ".join(sorted(t for t in TASKS if _rows(t)))
        return _empty(
            f"no method was measured on {task!r} yet; measured are: {measured or 'none'}",
            "python -m benchmarks.compare.protocol, in a clone, measures the missing tasks",
        )
    equal = [r for r in rows if r.tied]
    chosen = _first_of_the_fastest(equal)
    method = _method(chosen)
    if limit is None:
        return _answer(chosen, equal, rows, method, {}, None, full_rate, ())
    tried: list[str] = []
    for label, settings in STEPS:
        try:
            plan = estimate_memory(
                model, method, batch_size=batch_size, sequence_length=sequence_length, **settings
            )
        except ValueError as error:
            tried.append(f"{label}: {error}")
            continue
        if plan.peak <= limit:
            why = (f"memory: {label} needs {size(plan.peak)} of {size(limit)}", *tried)
            return _answer(chosen, equal, rows, method, settings, plan, full_rate, why)
        tried.append(f"memory: {label} needs {size(plan.peak)}, more than {size(limit)}")
    return _empty(*tried, "use a smaller batch, a shorter sequence, or strategy='peft_fsdp'")


def _rows(task: str) -> list[Measured]:
    """Return the rows of the first task of the comparison that has any."""
    for name in TASKS[task]:
        found = [m for m in MEASURED if m.task == name]
        if found:
            return found
    return []


def _is_packed(row: Measured) -> bool:
    return "NF4" in row.variant


def _first_of_the_fastest(rows: Sequence[Measured]) -> Measured:
    """Return the first row over a dense base whose step is about as fast as the fastest one."""
    dense = [r for r in rows if not _is_packed(r)] or list(rows)
    fastest = min((r.step_ms for r in dense if r.step_ms is not None), default=None)
    if fastest is None:
        return dense[0]
    return next(r for r in dense if r.step_ms is not None and r.step_ms <= TIMING_NOISE * fastest)


def _method(row: Measured) -> Method:
    """Return the method of a row, on all linear layers if it takes target layers."""
    call = ast.parse(row.settings, mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    given = {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
    method: Any = METHODS[call.func.id](**given)
    if isinstance(method, Targeted) and not row.settings.startswith("IA3"):
        method = replace(method, target_modules="all-linear")
    assert isinstance(method, Method)
    return method


def _answer(
    chosen: Measured,
    equal: Sequence[Measured],
    rows: Sequence[Measured],
    method: Method,
    settings: dict[str, Any],
    plan: Plan | None,
    full_rate: float | None,
    memory: tuple[str, ...],
) -> Recommendation:
    others = tuple(r for r in equal if r is not chosen)
    why = [
        f"{chosen.variant} scored {chosen.score:.1f} ({chosen.score_name}) on the task "
        f"{chosen.task!r}: {chosen.to_full:+.1f} to full fine-tuning, 95 % interval "
        f"[{chosen.low:+.1f}, {chosen.high:+.1f}], {chosen.seeds} seeds, "
        f"{chosen.percent:.2g} % trained",
    ]
    if others:
        names = "; ".join(r.variant for r in others)
        step = f", with a step of {chosen.step_ms:.0f} ms" if chosen.step_ms is not None else ""
        why.append(
            f"the measurements cannot tell its score from: {names}; it is the first of the "
            f"fastest{step}"
        )
    why.append(
        f"learning rate {chosen.learning_rate:g} in the measured run, {chosen.rate_to_full:g} "
        "times the rate of full fine-tuning there"
    )
    if "quantization" in settings:
        packed = [r for r in rows if _is_packed(r) and r.settings == chosen.settings]
        why += [f"over NF4: {r.score:.1f}, {r.to_full:+.1f} to full" for r in packed] or [
            f"{chosen.variant} over NF4 was not measured on this task"
        ]
    if chosen.protocol == "exploratory":
        why.append(
            "exploratory: few seeds, and rates chosen on the reported scores; small models on a CPU"
        )
    rate = chosen.learning_rate if full_rate is None else chosen.rate_to_full * full_rate
    return Recommendation(
        method, rate, chosen.rate_to_full, settings, plan, chosen, (*why, *memory), others
    )


def _empty(*why: str) -> Recommendation:
    return Recommendation(None, None, None, {}, None, None, why)


def _call(method: Method) -> str:
    """Return the constructor call with the fields that differ from their defaults."""
    changed = []
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        plain = field.default
        if field.default_factory is not dataclasses.MISSING:
            plain = field.default_factory()
        if value != plain or field.name == "r":
            changed.append(f"{field.name}={value!r}")
    return f"{type(method).__name__}({', '.join(changed)})"
