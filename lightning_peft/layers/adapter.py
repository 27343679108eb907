"""The base of all adapters. An adapter is one method at one site, with its tensors."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.registry import membership_of
from lightning_peft.core.site import Site
from lightning_peft.layers.adapted_state import ActiveAdapters, AdaptedState, state_of

if TYPE_CHECKING:
    from lightning_peft.methods.base import Method

__all__ = ["Adapter", "ModuleAdapter", "SiteRNG"]


class Adapter(nn.Module, ABC):
    """One method at one site.

    Attributes:
        method: The method, a frozen dataclass.
        site: The place it acts on; not a submodule.
        adapter_name: The name it was attached under.
        follows: Whether it is the frozen copy of another adapter, on a teacher that code of the
            user's updates by averaging. It is saved, but never trained.
    """

    method: Method
    site: Site
    adapter_name: str
    follows: bool = False

    def __init__(self, method: Method, site: Site, adapter_name: str) -> None:
        super().__init__()
        self.method = method
        self.site = site
        self.adapter_name = adapter_name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Called by `.to()`, `.half()` and the like: the counted bytes no longer hold."""
        self.forget_size()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forget_size(self) -> None:
        """Have the elements and bytes of this adapter name counted again; call after a resize."""
        registry = membership_of(self.site.module)
        entry = None if registry is None else registry.adapters.get(self.adapter_name)
        if entry is not None:
            entry.size = None

    @property
    def state(self) -> AdaptedState:
        """State of the module that this adapter is attached to."""
        return state_of(self.site.module)

    @abstractmethod
    def activate(self, active: ActiveAdapters) -> None:
        """Enter the list of acting adapters of this kind."""

    @abstractmethod
    def initial_tensors(self, seed: int | None) -> Mapping[str, Tensor]:
        """Initial values by key of the adapter's state dict; None takes torch's initial seed."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the method's own names."""
        own: dict[str, Any] = {**self._parameters, **self._buffers}
        return own

    def copies(self) -> dict[str, Tensor]:
        """Trained copies by the path of the parameter that each one replaces."""
        return {}

    def substitutes(self) -> dict[str, Tensor]:
        """Tensors that the module reads in place of its own, by path."""
        return self.copies()

    def switch_base(self, acts: bool, *, was_interrupted: bool = False) -> None:
        """Put the base weight that belongs to an acting or an idle adapter into the module."""

    @property
    def can_reset(self) -> bool:
        """Whether `initial_tensors` gives all that attaching gave."""
        return True

    def why_not_mergeable(self) -> str:
        """Reason why the adapter has no merged form; "" if it has one."""
        return "" if self.method.mergeable else "it does not change weights"

    @property
    def has_hooks(self) -> bool:
        """Whether the adapter has hooks on other modules."""
        return False

    def keep_function_of_base(self) -> None:
        """Rewrite the base so that the layer computes the same as without this adapter.

        Called on a copy of an adapter whose initialisation rewrote the base of the original.
        """

    def remove_hooks(self) -> None:
        """Remove the adapter's hooks from other modules."""

    def extra_repr(self) -> str:
        """Method and tensor shapes, for print(model)."""
        shapes = ", ".join(
            f"{n} {list(t.shape)}" for n, t in self.tensors().items() if t is not None
        )
        return f"{self.method.label}: {shapes}"


class ModuleAdapter(Adapter):
    """An adapter whose tensors are those of a module that the method builds.

    Attributes:
        block: The module.
    """

    block: nn.Module

    def __init__(self, method: Method, site: Site, adapter_name: str) -> None:
        super().__init__(method, site, adapter_name)
        self.block = self._seeded_module(None)

    @abstractmethod
    def build_module(self) -> nn.Module:
        """A new module with initial values."""

    def _seeded_module(self, seed: int | None) -> nn.Module:
        with SiteRNG(self.site, self.adapter_name, seed), default_cpu():
            return self.build_module()

    def initial_tensors(self, seed: int | None) -> dict[str, Tensor]:
        """Tensors of a newly built module."""
        new = self._seeded_module(seed).state_dict()
        return {f"block.{key}": tensor for key, tensor in new.items()}


def default_cpu() -> AbstractContextManager[object]:
    """Create tensors on the CPU within the block, whatever the caller's default device is.

    A device context sends every call of torch through Python, so none is entered where the CPU is
    the default already.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


class SiteRNG:
    """Random stream of one adapter at one site; torch's own stream is left untouched.

    The values depend on seed, adapter name and site, not on the order of drawing.
    """

    def __init__(self, site: Site, adapter_name: str, seed: int | None) -> None:
        base = torch.initial_seed() if seed is None else seed
        self.seed = zlib.crc32(f"{base}/{adapter_name}/{site.label}".encode())

    def __enter__(self) -> None:
        self.before = torch.random.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.random.set_rng_state(self.before)
