"""Adapters that train copies of a module's own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import parameter_at
from lightning_peft.core.site import Site
from lightning_peft.layers.adapted_state import ActiveAdapters
from lightning_peft.layers.adapter import Adapter

if TYPE_CHECKING:
    from lightning_peft.methods.base import SelectMethod

__all__ = ["CopyAdapter"]


class CopyAdapter(Adapter):
    """Trains copies of the module's own parameters; the base keeps its bits.

    Attributes:
        paths: Name of each copy → path of the parameter that it replaces.
        statistics: Names of running statistics that are copied too.
    """

    method: SelectMethod
    statistics: tuple[str, ...] = ()

    def __init__(
        self,
        method: SelectMethod,
        site: Site,
        adapter_name: str,
        paths: Sequence[str],
        copies: dict[int, nn.Parameter],
    ) -> None:
        """Copy the parameters at `paths`.

        Args:
            method: The method.
            site: The module and its main parameter.
            adapter_name: Name to attach under.
            paths: Paths of the parameters inside the module.
            copies: Copies made so far by id of the original, so that tied parameters stay tied.
        """
        super().__init__(method, site, adapter_name)
        self.paths = {path.replace(".", "__"): path for path in paths}
        for key, path in self.paths.items():
            original = parameter_at(site.module, path)
            if id(original) not in copies:
                copies[id(original)] = nn.Parameter(original.detach().clone())
            self.register_parameter(key, copies[id(original)])

    def copies(self) -> dict[str, Tensor]:
        """Trained copies by the path of the parameter that each one replaces."""
        own: dict[str, Any] = self._parameters
        return {path: own[name] for name, path in self.paths.items()}

    def copy_statistics(self, names: Sequence[str]) -> None:
        """Copy these running statistics: training moves the copy, and the base keeps its own."""
        self.statistics = tuple(names)
        for name in names:
            self.register_buffer(name, self.site.module.get_buffer(name).detach().clone())

    def substitutes(self) -> dict[str, Tensor]:
        """Everything that the module reads in place of its own: copies, and statistics."""
        own: dict[str, Any] = self._buffers
        return {**self.copies(), **{name: own[name] for name in self.statistics}}

    def activate(self, active: ActiveAdapters) -> None:
        """Act in place of the module's parameters."""
        active.trained_copies.append(self)

    def keep_function_of_base(self) -> None:
        """Hold the module's own parameters, in a copy of another module's adapter."""
        with torch.no_grad():
            for key, tensor in self.initial_tensors(None).items():
                (self.get_buffer if key in self.statistics else self.get_parameter)(key).copy_(
                    tensor
                )

    def initial_tensors(self, seed: int | None) -> dict[str, Tensor]:
        """The parameters and statistics that were copied."""
        module = self.site.module
        parameters = {key: parameter_at(module, path) for key, path in self.paths.items()}
        return {**parameters, **{name: module.get_buffer(name) for name in self.statistics}}
