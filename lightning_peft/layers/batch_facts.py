"""Facts about the batch at hand that a change depends on, found before the layers run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.core.per_thread import PerThread

if TYPE_CHECKING:
    from lightning_peft.methods.base import WeightMethod

__all__ = ["BatchFacts", "BatchObserver"]


class BatchFacts(Mapping[str, Tensor]):
    """Facts of the batch that this thread ran last.

    A thread that ran none, such as one of autograd's that repeats a forward, finds the facts of the
    batch that was run last by any thread.
    """

    def __init__(self) -> None:
        self._own: PerThread[dict[str, Tensor] | None] = PerThread(_nothing)
        self._latest: dict[str, Tensor] = {}

    def replace(self, facts: dict[str, Tensor]) -> None:
        """Set the facts of a batch."""
        self._own.set(facts)
        self._latest = facts

    def _current(self) -> dict[str, Tensor]:
        own = self._own.get()
        return self._latest if own is None else own

    def __getitem__(self, name: str) -> Tensor:
        return self._current()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._current()))

    def __len__(self) -> int:
        return len(self._current())


def _nothing() -> None:
    return None


class BatchObserver:
    """Asks a method for its facts about every batch of token ids that a model is called with.

    They stay until the next forward, so that activation checkpointing finds them in the backward:
    run each backward before the next forward then.

    Attributes:
        facts: By name; what the adapters of the method read. Empty before the first forward.
    """

    def __init__(self, method: WeightMethod, stack: nn.Module) -> None:
        self.method = method
        self.facts = BatchFacts()
        self._handle = stack.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: facts of this batch; with a filled cache they follow from those before."""
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise ValueError(
                f"{self.method.label}: expected input_ids, got {sorted(kwargs)}; where it acts "
                "follows from the tokens"
            )
        past = kwargs.get("past_key_values")
        continued = past is not None and past.get_seq_length() > 0
        before = dict(self.facts) if continued else {}
        found = self.method.batch_facts(ids, before)
        self.facts.replace(found)  # in place: adapters hold this object
