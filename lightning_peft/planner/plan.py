"""`Plan`: bytes by part, the largest batch, and what to switch on next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lightning_peft.planner.activation_trace import Trace
from lightning_peft.planner.alternatives import baselines, next_changes
from lightning_peft.planner.byte_sizes import size
from lightning_peft.planner.choice import Choice
from lightning_peft.planner.example_inputs import NoInputs
from lightning_peft.planner.fixed_parts import BUCKETS, STATES, WEIGHTS, fixed_parts
from lightning_peft.planner.gathered_units import gathered_units
from lightning_peft.planner.sizes import Sizes
from lightning_peft.planner.storage_meter import ACTIVATIONS, BACKWARD, GRADIENTS, LOGITS

__all__ = ["Plan", "Step"]

_TRACED = (ACTIVATIONS, LOGITS, BACKWARD)


@dataclass(frozen=True)
class Step:
    """Something to switch on.

    Attributes:
        what: As it is written in code.
        saving: Bytes less at the fullest moment.
    """

    what: str
    saving: int


@dataclass
class Plan:
    """Memory of one rank, by part; nothing was loaded.

    Attributes:
        choice: The choices that the plan is made for.
        sizes: Elements and bytes of the model, on one rank without sharding.
        budget: Bytes that a rank has, if given.
        sample: Size of one sample in words: tokens, or pixels of an image.
        notes: What could not be counted, and why.
    """

    choice: Choice
    sizes: Sizes
    budget: int | None = None
    sample: str = ""
    notes: list[str] = field(default_factory=list)
    _tracer: Callable[[int], Trace] | None = field(default=None, repr=False)
    _again: Callable[[Choice], Plan] | None = field(default=None, repr=False)
    _fused_loss: tuple[int, int, int] | None = field(default=None, repr=False)

    # ---- what is there all the time

    @property
    def trainable(self) -> int:
        """Trained elements."""
        return self.sizes.trainable

    @property
    def total(self) -> int:
        """Logical elements, a 4-bit weight counted as one each."""
        return self.sizes.total

    @property
    def percent(self) -> float:
        """Trained share in percent."""
        return 100.0 * self.trainable / max(1, self.total)

    @property
    def resident(self) -> int:
        """Bytes of weights, adapters, gradients and optimizer state."""
        return sum(n for part, n in self._fixed.items() if part in STATES)

    @cached_property
    def _fixed(self) -> dict[str, int]:
        """Parts that do not depend on the batch."""
        return fixed_parts(self.choice, self.sizes)

    # ---- what a step adds

    def _trace(self, batch_size: int) -> Trace:
        if self._tracer is None:
            return Trace()
        try:
            return self._tracer(batch_size)
        except NoInputs as error:
            self._tracer = None
            self.notes.append(f"activations are not counted: {error}")
            return Trace()

    def _moments(self, batch_size: float) -> list[dict[str, float]]:
        """Parts at the fullest moments of forward and backward, and where FSDP gathers most."""
        line, own = self._trace(self.choice.batch_size), self.choice.batch_size
        if batch_size != own:
            line = line.along(self._trace(2 * own), batch_size / own - 1)
        forward, backward = (
            {**self._fixed, **{part: traced.get(part, 0.0) for part in _TRACED}}
            for traced in (line.forward, line.backward)
        )
        if self._fused_loss is not None:
            forward[LOGITS] = backward[LOGITS] = self._chunk(batch_size)
        # Lightning frees the gradients of the last step right before backward.
        made = line.backward.get(GRADIENTS, 0.0) / self.choice.shards
        backward[GRADIENTS] = min(backward[GRADIENTS], made)
        if self.choice.strategy != "fsdp":
            return [forward, backward]
        gathered = gathered_units(self.choice, self.sizes)
        # Blocks are done when the head arrives: what they need while they run is gone.
        kept = min(forward[ACTIVATIONS], backward[ACTIVATIONS])
        return [
            {**forward, **dict.fromkeys(_TRACED, 0.0), BUCKETS: gathered.start},
            {**forward, ACTIVATIONS: kept, LOGITS: 0.0, BUCKETS: gathered.head},
            {**forward, BUCKETS: gathered.forward},
            {**backward, BUCKETS: gathered.backward},
        ]

    def _chunk(self, batch_size: float) -> float:
        """Bytes of liger's loss: a chunk of logits, the gradient of the hidden states."""
        assert self._fused_loss is not None  # asked by the caller
        hidden, vocabulary, trained = self._fused_loss
        tokens = batch_size * self.choice.sequence_length
        rows: float = 2.0 ** math.ceil(math.log2(max(1.0, tokens / -(-vocabulary // hidden))))
        return 2 * (rows * vocabulary + tokens * hidden) + trained

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the fullest moment; gradients in full."""
        moments = self._moments(self.choice.batch_size)
        fullest = max(moments, key=lambda parts: sum(parts.values()))
        return {k: round(n) for k, n in {**fullest, GRADIENTS: self._fixed[GRADIENTS]}.items()}

    def peak_at(self, batch_size: int) -> int:
        """Bytes at the fullest moment of a step with this batch."""
        return round(max(sum(parts.values()) for parts in self._moments(batch_size)))

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of a step."""
        return self.peak_at(self.choice.batch_size)

    @property
    def allowance(self) -> int:
        """Bytes that a rank needs besides tensors."""
        return sum(n for _, n in self.choice.allowances)

    @property
    def host(self) -> int:
        """Bytes in host memory: activations that were moved there, and offloaded shards."""
        moved = self._trace(self.choice.batch_size).host
        if not self.choice.cpu_offload:
            return round(moved)
        on_device = replace(self.choice, cpu_offload=False)
        fixed = fixed_parts(on_device, self.sizes)
        return round(moved) + sum(fixed[part] for part in STATES)

    def require_weights(self, nbytes: int) -> None:
        """The weights alone must fit.

        Raises:
            ValueError: they do not.
        """
        weights = sum(self._fixed[part] for part in WEIGHTS)
        if nbytes - self.allowance < weights:
            raise ValueError(
                f"memory: expected at least the weights' {size(weights)}, got {size(nbytes)}; "
                "quantise the base, shard it with strategy='fsdp', or give more memory"
            )

    def largest_batch(self, nbytes: int) -> int:
        """Return the largest batch per rank that fits; 0 if one sample does not.

        Args:
            nbytes: Bytes of the device; allowances are taken off.

        Raises:
            ValueError: the weights alone are larger, or activations are not counted.
        """
        self.require_weights(nbytes)
        nbytes -= self.allowance
        if not self._trace(self.choice.batch_size).forward:
            raise ValueError(
                f"largest_batch: activations are not counted ({'; '.join(self.notes)})"
            )
        if self.peak_at(1) > nbytes:
            return 0
        low, high = 1, 2
        while self.peak_at(high) <= nbytes:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_at(middle) <= nbytes else (low, middle)
        return low

    # ---- other choices

    def changed(self, **changes: Any) -> Plan:
        """The plan of the same model with some of the choice changed."""
        return self._for(replace(self.choice, **changes))

    def _for(self, choice: Choice) -> Plan:
        assert self._again is not None  # estimate_memory gives it
        return self._again(choice)

    @cached_property
    def comparison(self) -> dict[str, Plan]:
        """Full fine-tuning, LoRA and QLoRA beside the given choice."""
        plans = {}
        for name, choice in baselines(self.choice).items():
            try:
                plans[name] = self._for(choice)
            except ValueError as error:  # has no meaning for this model
                self.notes.append(f"{name}: {error}")
        return {**plans, f"this: {self.choice.label}": self}

    @cached_property
    def next_steps(self) -> list[Step]:
        """Return the options that are still off and would save memory, the largest saving first."""
        steps = []
        for what, choice in next_changes(self.choice):
            try:
                saving = self.peak - self._for(choice).peak
            except ValueError:  # has no meaning for this model
                continue
            if saving > 0:
                steps.append(Step(what, saving))
        return sorted(steps, key=lambda s: -s.saving)

    # ---- as text

    def __str__(self) -> str:
        """A plain table, the settings, and what to switch on next."""
        lines = [*self._table(), self._settings()]
        for label, (numel, nbytes) in self.sizes.base.items():
            if numel:  # counters and ids are buffers: bytes without a weight
                lines.append(f"base in {label}: {numel:,} weights, {size(nbytes)}")
        if self.host:
            lines.append(f"in host memory: {size(self.host)}")
        lines += [f"next: {s.what} saves {size(s.saving)}" for s in self.next_steps]
        return "\n".join([*lines, *dict.fromkeys(self.notes)])

    def _table(self) -> list[str]:
        """A line per part, with a column per plan of the comparison."""
        plans = self.comparison
        width = max(14, *(len(name) + 2 for name in plans))

        def line(head: str, cells: Iterable[str]) -> str:
            return f"{head:<24}" + "".join(f"{cell:>{width}}" for cell in cells)

        lines = [line("", plans)]
        for part in self.parts:
            if any(p.parts[part] for p in plans.values()):
                lines.append(line(part, (size(p.parts[part]) for p in plans.values())))
        lines.append(line("peak", (size(p.peak) for p in plans.values())))
        for name, nbytes in self.choice.allowances:
            lines.append(line(name, [size(nbytes)] * len(plans)))
        if self.budget is not None:
            budget = self.budget
            fits = (_fitting(p, budget) for p in plans.values())
            lines.append(line(f"batch in {size(budget)}", fits))
        return lines

    def _settings(self) -> str:
        """The choice and the trained share, in one line."""
        c = self.choice
        where = f", a rank of {c.world_size} ({c.strategy})" if c.world_size > 1 else ""
        if c.activations is not None:
            where += f", activations {c.activations.kind}"
        where += f", loss {c.loss}" if c.loss is not None else ""
        return (
            f"batch {c.batch_size} × {self.sample}, {c.precision}, {c.optimizer}{where}; "
            f"trained {self.trainable:,} of {self.total:,} = {self.percent:.3f} %"
        )


def _fitting(plan: Plan, budget: int) -> str:
    try:
        return str(plan.largest_batch(budget))
    except ValueError:
        return "-"
