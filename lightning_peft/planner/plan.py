"""`Plan`: bytes by part, the largest batch, and what to switch on next."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lightning_peft.activations.config import ActivationKind, Activations
from lightning_peft.methods.lora import LoRA
from lightning_peft.planner.activation_trace import Trace
from lightning_peft.planner.byte_sizes import size
from lightning_peft.planner.example_inputs import NoInputs
from lightning_peft.planner.meta_model import Sizes
from lightning_peft.planner.storage_meter import ACTIVATIONS, BACKWARD, GRADIENTS, LOGITS
from lightning_peft.storage import Quantization, StorageConfig, storage_for

__all__ = ["ALLOWANCES", "NCCL", "OPTIMIZER_BYTES", "Choice", "Plan", "Step"]

# name → (full-size states in the parameter's own dtype, further bytes per element)
OPTIMIZER_BYTES: dict[str, tuple[int, float]] = {
    "adamw": (2, 0.0),
    "adam": (2, 0.0),
    "lion": (1, 0.0),
    "sgd": (0, 0.0),
    "sgd_momentum": (1, 0.0),
    "adamw_8bit": (0, 2 * (1 + 4 / 256)),
    "paged_adamw_8bit": (0, 2 * (1 + 4 / 256)),
    "paged_adamw_32bit": (0, 8.0),
    "lion_8bit": (0, 1 + 4 / 256),
}

NCCL = "NCCL buffers"
#: Bytes that a rank needs besides tensors: torch's kernels with the context of a current GPU, and
#: the channels of a few communicators. These are round figures, not measurements.
ALLOWANCES: dict[str, int] = {"CUDA context": 600 * 10**6, NCCL: 500 * 10**6}

_BUCKET = "communication buckets"
_GATHERED_KV = "gathered keys and values"
_FULL = "fully trained weights"
_STATES = ("base weights", "adapters", _FULL, GRADIENTS, "optimizer state")


@dataclass(frozen=True)
class Choice:
    """The choices that a plan is made for; see `estimate_memory`."""

    method: tuple[Any, ...] | None  # None is plain full fine-tuning
    quantization: StorageConfig | None
    optimizer: str
    precision: str
    batch_size: int
    sequence_length: int
    activations: Activations | None
    loss: str | None
    strategy: str | None
    world_size: int
    liger: bool
    modules_to_save: tuple[str, ...] = ()
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    replicas: int = 1
    context_parallel: int = 1
    allowances: tuple[tuple[str, int], ...] = ()

    @property
    def shards(self) -> int:
        """Number of ranks that share one copy of weights and state."""
        return self.world_size // self.replicas if self.strategy == "fsdp" else 1

    @property
    def label(self) -> str:
        """Method and storage in a few words."""
        if self.method is None:
            return "full fine-tuning"
        names = " + ".join(m.label for m in self.method)
        return (
            names
            if self.quantization is None
            else f"{names} on {storage_for(self.quantization).label}"
        )


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
        return sum(n for part, n in self._fixed.items() if part in _STATES)

    @cached_property
    def _fixed(self) -> dict[str, int]:
        """Parts that do not depend on the batch."""
        s, c = self.sizes, self.choice
        states, further = OPTIMIZER_BYTES[c.optimizer]
        elements = s.trainable * further
        compute = 4 if c.precision == "32-true" else 2
        parts = {
            "base weights": s.base_bytes,
            "adapters": s.adapters,
            _FULL: s.full,
            GRADIENTS: s.trained_bytes,
            "optimizer state": states * s.trained_bytes + math.ceil(elements),
        }
        parts = {part: -(-n // c.shards) for part, n in parts.items()}
        if c.cpu_offload:
            parts = dict.fromkeys(parts, 0)
        parts["dequantise buffers"] = s.dequantised * compute
        parts[_BUCKET] = 0
        if c.strategy == "ddp" and c.world_size > 1:
            parts[_BUCKET] = s.trained_bytes
        elif c.strategy == "fsdp" and c.world_size > 1:
            parts[_BUCKET] = self._gathered()
        parts[_GATHERED_KV] = self._gathered_kv()
        return parts

    def _gathered(self) -> int:
        """Bytes of the units that FSDP has gathered at once, and of gradients on their way."""
        s, c = self.sizes, self.choice
        end, rest = (
            (0, s.rest + s.end) if c.liger else (s.end, s.rest)
        )  # it reads the head's weight
        if not c.reshard_after_forward:
            return s.base_bytes + s.trained_bytes + s.block + s.block_trained
        # This unit and the next, of which one may be the embedding or the head.
        return s.block + max(s.block, end) + rest + s.block_trained

    def _gathered_kv(self) -> int:
        """Bytes of one layer's keys and values of all tokens, received in two steps."""
        c = self.choice
        if c.context_parallel == 1:
            return 0
        compute = 4 if c.precision == "32-true" else 2
        return 2 * 2 * c.batch_size * c.sequence_length * self.sizes.kv_width * compute

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

    def _moments(self, batch_size: float) -> tuple[dict[str, float], dict[str, float]]:
        """Parts at the fullest moment of forward and of backward."""
        line, own = self._trace(self.choice.batch_size), self.choice.batch_size
        if batch_size != own:
            line = line.along(self._trace(2 * own), batch_size / own - 1)
        shards = self.choice.shards
        moments = []
        for traced in (line.forward, line.backward):
            parts: dict[str, float] = dict(self._fixed)
            for part in (ACTIVATIONS, LOGITS, BACKWARD):
                parts[part] = traced.get(part, 0.0)
            if self._fused_loss is not None:
                parts[LOGITS] = self._chunk(batch_size)
            if traced is line.backward:
                # Lightning frees the gradients of the last step right before backward.
                parts[GRADIENTS] = min(parts[GRADIENTS], traced.get(GRADIENTS, 0.0) / shards)
            moments.append(parts)
        return moments[0], moments[1]

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
        fixed = Plan(on_device, self.sizes)._fixed
        return round(moved) + sum(fixed[part] for part in _STATES)

    def require_weights(self, nbytes: int) -> None:
        """The weights alone must fit.

        Raises:
            ValueError: they do not.
        """
        weights = sum(self._fixed[part] for part in ("base weights", "adapters", _FULL))
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

    # ---- beside others

    def changed(self, **changes: Any) -> Plan:
        """The plan of the same model with some of the choice changed."""
        assert self._again is not None  # estimate_memory gives it
        return self._again(replace(self.choice, **changes))

    @cached_property
    def comparison(self) -> dict[str, Plan]:
        """Full fine-tuning, LoRA and QLoRA beside the given choice."""
        lora = (self._lora(),)
        others: dict[str, dict[str, Any]] = {
            "full": {"method": None, "quantization": None, "modules_to_save": ()},
            "LoRA r=16": {"method": lora, "quantization": None},
            "QLoRA r=16": {"method": lora, "quantization": Quantization("nf4")},
        }
        plans = {}
        for name, changes in others.items():
            try:
                plans[name] = self.changed(**changes)
            except ValueError as error:  # has no meaning for this model
                self.notes.append(f"{name}: {error}")
        return {**plans, f"this: {self.choice.label}": self}

    def _lora(self) -> LoRA:
        """LoRA on the layers that the choice names, where it names any."""
        named = [t for m in self.choice.method or () if (t := getattr(m, "target_modules", None))]
        return LoRA(r=16, target_modules=named[0]) if named else LoRA(r=16)

    @cached_property
    def next_steps(self) -> list[Step]:
        """What is not switched on yet, the largest saving first."""
        c = self.choice
        tries: list[tuple[str, dict[str, Any]]] = []
        if c.method is None:
            tries.append(("method=LoRA(r=16)", {"method": (self._lora(),)}))
        elif c.quantization is None:
            tries.append(('quantization="nf4"', {"quantization": Quantization("nf4")}))
        kept = c.activations
        if kept is None or not kept.recomputes:
            kind: ActivationKind = "checkpoint" if kept is None else "checkpoint+offload"
            tries.append((f'activations="{kind}"', {"activations": Activations(kind)}))
        elif not kept.offloads:
            kind = "checkpoint+offload"
            tries.append((f'activations="{kind}"', {"activations": replace(kept, kind=kind)}))
        if not c.liger and c.loss is None:
            tries.append(('loss="chunked"', {"loss": "chunked"}))
        if c.optimizer in ("adamw", "adam"):
            tries.append(('optimizer="adamw_8bit"', {"optimizer": "adamw_8bit"}))
        if c.world_size > 1 and c.strategy != "fsdp":
            tries.append(('strategy="fsdp"', {"strategy": "fsdp"}))
        steps = []
        for what, changes in tries:
            try:
                saving = self.peak - self.changed(**changes).peak
            except ValueError:  # has no meaning for this model
                continue
            if saving > 0:
                steps.append(Step(what, saving))
        return sorted(steps, key=lambda s: -s.saving)

    def __str__(self) -> str:
        """A plain table."""
        plans = self.comparison
        width = max(14, *(len(name) + 2 for name in plans))
        lines = [f"{'':<24}" + "".join(f"{name:>{width}}" for name in plans)]
        for part in self.parts:
            if not any(p.parts[part] for p in plans.values()):
                continue
            lines.append(
                f"{part:<24}" + "".join(f"{size(p.parts[part]):>{width}}" for p in plans.values())
            )
        lines.append(f"{'peak':<24}" + "".join(f"{size(p.peak):>{width}}" for p in plans.values()))
        for name, nbytes in self.choice.allowances:
            lines.append(f"{name:<24}" + f"{size(nbytes):>{width}}" * len(plans))
        if self.budget is not None:
            fits = [_fitting(p, self.budget) for p in plans.values()]
            label = f"batch in {size(self.budget)}"
            lines.append(f"{label:<24}" + "".join(f"{n:>{width}}" for n in fits))
        c = self.choice
        where = f", a rank of {c.world_size} ({c.strategy})" if c.world_size > 1 else ""
        if c.activations is not None:
            where += f", activations {c.activations.kind}"
        where += f", loss {c.loss}" if c.loss is not None else ""
        lines.append(
            f"batch {c.batch_size} × {self.sample}, {c.precision}, {c.optimizer}{where}; "
            f"trained {self.trainable:,} of {self.total:,} = {self.percent:.3f} %"
        )
        for label, (numel, nbytes) in self.sizes.base.items():
            if numel:  # counters and ids are buffers: bytes without a weight
                lines.append(f"base in {label}: {numel:,} weights, {size(nbytes)}")
        if self.host:
            lines.append(f"in host memory: {size(self.host)}")
        lines += [f"next: {s.what} saves {size(s.saving)}" for s in self.next_steps]
        return "\n".join([*lines, *dict.fromkeys(self.notes)])


def _fitting(plan: Plan, budget: int) -> str:
    try:
        return str(plan.largest_batch(budget))
    except ValueError:
        return "-"
