"""Adapters that decide how much others act: a pass without them, then one with factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.registry import AdapterRegistry, membership_of
from lightning_peft.core.site import RouterSite
from lightning_peft.layers.adapted_state import ActiveAdapters
from lightning_peft.layers.adapter import ModuleAdapter
from lightning_peft.layers.gates import Gates
from lightning_peft.layers.mixed_batch import chosen_adapters, current_mixed_batch

if TYPE_CHECKING:
    from lightning_peft.methods.base import RouterMethod

__all__ = ["RouterAdapter", "forward_routed"]


class RouterAdapter(ModuleAdapter):
    """Finds factors on the adapters that its method names, from the model's hidden states."""

    method: RouterMethod
    site: RouterSite

    def build_module(self) -> nn.Module:
        """The method's module at this site."""
        return self.method.module(self.site)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the method's module by their names there."""
        return dict(self.block.state_dict(keep_vars=True))

    def activate(self, active: ActiveAdapters) -> None:
        """Act as the router of the module."""
        active.routers.append(self)

    def why_not_mergeable(self) -> str:
        """The factors depend on the text."""
        return "how much each adapter acts depends on the text"

    def registry(self) -> AdapterRegistry:
        """The registry that the experts are attached in.

        Raises:
            RuntimeError: an expert was detached.
        """
        found = membership_of(self.site.module)
        assert found is not None  # attach noted it
        gone = [n for n in self.method.experts() if n not in found.adapters]
        if gone:
            raise RuntimeError(
                f"{self.method.label}: expected the adapters {list(self.method.experts())}, found "
                f"that {gone} are not attached; load them, or detach {self.adapter_name!r}"
            )
        return found

    def gates(self, hidden: Tensor) -> Gates:
        """Factors for these hidden states [batch, positions, width]."""
        dtype = next(self.block.parameters()).dtype
        autocast = torch.is_autocast_enabled(hidden.device.type)
        values = self.method.gates(self.block, hidden if autocast else hidden.to(dtype), self.site)
        layers = {id(m): i for i, m in enumerate(self.site.layers)}
        return Gates(values, layers, {n: i for i, n in enumerate(self.method.experts())})


def forward_routed(
    router: RouterAdapter, run: Callable[..., Any], arguments: Mapping[str, Any]
) -> Any:
    """Run the model twice: without adapters, and with the experts times the factors found.

    Args:
        router: The acting router.
        run: The model's own forward.
        arguments: Its arguments by name.

    Raises:
        RuntimeError: a filled cache, rows under different adapters, or a model without hidden
            states [batch, positions, width].
    """
    label, past = router.method.label, arguments.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise RuntimeError(
            f"{label}: expected the whole text in every forward, since the factors follow from "
            "hidden states without adapters, got a filled cache; call generate(use_cache=False)"
        )
    if current_mixed_batch() is not None:
        raise RuntimeError(
            f"{label}: expected one set of adapters for all rows, got adapter_names(...); run the "
            "router alone"
        )
    registry = router.registry()
    first = {**arguments, "use_cache": False}
    first.pop("past_key_values", None)
    with torch.no_grad(), chosen_adapters(((registry, ()),)):
        output = run(**first)
    hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise RuntimeError(
            f"{label}: expected hidden states [batch, positions, width] from "
            f"{type(router.site.module).__name__}, got {type(output).__name__}; attach to a text "
            "model of transformers"
        )
    experts = tuple(router.method.experts())
    with chosen_adapters(((registry, experts),), router.gates(hidden)):
        return run(**arguments)
