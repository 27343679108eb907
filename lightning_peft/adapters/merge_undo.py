"""The changes that a merge makes, each with what takes it back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.class_swap import swap_in, swap_out
from lightning_peft.core.protocols import Storage
from lightning_peft.layers.adapted import Adapted, adapters_of
from lightning_peft.layers.adapted_state import UndoStep
from lightning_peft.storage import storage_of

__all__ = [
    "AddedBias",
    "MadeDense",
    "Overwritten",
    "Untied",
    "UntiedConfig",
    "WrittenWeight",
    "make_dense",
    "overwrite",
    "write_weight",
]


@dataclass
class WrittenWeight:
    """A weight written through its storage.

    Attributes:
        module: The module that holds the weight.
        path: Path of the weight.
        storage: The storage it was written through.
        bits: Stored bits from before, on the CPU.
    """

    module: nn.Module
    path: str
    storage: Storage
    bits: Any

    def undo(self) -> None:
        """Restore the stored bits."""
        self.storage.restore(self.module, self.path, self.bits)


def write_weight(
    module: nn.Module, path: str, storage: Storage, natural: Tensor, steps: list[UndoStep]
) -> None:
    """Write a weight through its storage; the step is listed before."""
    steps.append(WrittenWeight(module, path, storage, storage.snapshot(module, path)))
    storage.write(module, path, natural)


@dataclass
class MadeDense:
    """A packed weight replaced by a dense one.

    Attributes:
        module: The module that holds the weight.
        path: Path of the weight.
        storage: The storage of the packed weight.
        pack_again: Puts the packed weight back; None if it was not replaced yet.
    """

    module: Adapted
    path: str
    storage: Storage
    pack_again: Callable[[], None] | None = None

    def undo(self) -> None:
        """Put the packed weight back."""
        if self.pack_again is not None:
            with _without_adapters(self.module):
                self.pack_again()
        _bind_storage(self.module, self.path, self.storage)


def make_dense(
    module: Adapted, path: str, storage: Storage, natural: Tensor, steps: list[UndoStep]
) -> None:
    """Replace a packed weight by a dense one."""
    step = MadeDense(module, path, storage)
    steps.append(step)
    with _without_adapters(module):
        step.pack_again = storage.to_dense(module, path, natural)
    _bind_storage(module, path, storage_of(module, path))


@contextmanager
def _without_adapters(module: Adapted) -> Iterator[None]:
    """Within it the module has the class underneath, which a storage may replace."""
    swap_out(module, Adapted)
    try:
        yield
    finally:
        swap_in(module, Adapted)


def _bind_storage(module: Adapted, path: str, storage: Storage) -> None:
    for adapter in adapters_of(module):
        if adapter.site.parameter == path:
            adapter.site.storage = storage


@dataclass
class Overwritten:
    """A dense parameter with other values.

    Attributes:
        parameter: The parameter.
        bits: Its values from before, on the CPU.
    """

    parameter: Tensor
    bits: Tensor

    def undo(self) -> None:
        """Copy the old values back."""
        self.parameter.data.copy_(self.bits)


def overwrite(parameter: Tensor, value: Tensor, steps: list[UndoStep]) -> None:
    """Copy other values into a dense parameter; the step is listed before."""
    steps.append(Overwritten(parameter, parameter.detach().to("cpu", copy=True)))
    parameter.data.copy_(value)


@dataclass
class AddedBias:
    """A bias given to a layer that had none.

    Attributes:
        owner: The module that holds the bias.
        leaf: Name of the bias.
    """

    owner: nn.Module
    leaf: str

    def undo(self) -> None:
        """Remove the bias."""
        self.owner.register_parameter(self.leaf, None)


@dataclass
class Untied:
    """A tied parameter replaced by one of the module's own.

    Attributes:
        owner: The module that holds the parameter.
        leaf: Name of the parameter.
        parameter: The tied parameter.
    """

    owner: nn.Module
    leaf: str
    parameter: nn.Parameter

    def undo(self) -> None:
        """Tie the parameter again."""
        self.owner._parameters[self.leaf] = self.parameter


@dataclass
class UntiedConfig:
    """A Hugging Face config that no longer says that embeddings are tied.

    Attributes:
        config: The config.
    """

    config: Any

    def undo(self) -> None:
        """Set the flag again."""
        self.config.tie_word_embeddings = True
