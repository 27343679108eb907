"""Placements of trained copies: the parameters that a method selects."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_peft.adapters.placement.inside import inside_targets
from lightning_peft.adapters.placement.placement import CopyPlacement
from lightning_peft.core.modules import base_modules, persistent_buffers
from lightning_peft.core.names import in_adapter
from lightning_peft.core.site import Site
from lightning_peft.layers import PLAIN, ops_for
from lightning_peft.methods.base import SelectMethod
from lightning_peft.storage import held_tensors, storage_of
from lightning_peft.storage.unknown import refuse_unknown_format

__all__ = ["find_copy_placements"]

#: Containers of parameters, which the module around them reads in its forward.
_LISTS = nn.ParameterList | nn.ParameterDict

_Selects = Callable[[str, nn.Parameter, nn.Module], bool]


def find_copy_placements(
    method: SelectMethod, model: nn.Module
) -> tuple[list[CopyPlacement], None]:
    """A placement per module with selected parameters, in the order of `named_modules()`.

    Raises:
        ValueError: no parameter is selected, or a selected weight is quantised.
    """
    selects, inside = method.choice(model), inside_targets(method, model)
    placements = []
    for name, module in base_modules(model).items():
        if in_adapter(name) or not inside(name):
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential | _LISTS):
            continue
        paths = _selected(method, name, module, selects)
        if paths:
            storage = storage_of(module, paths[0])
            site = Site(module, paths[0], name, ops_for(module) or PLAIN, storage)
            counted = method.copies_statistics and getattr(module, "track_running_stats", False)
            statistics = tuple(persistent_buffers(module, recurse=False)) if counted else ()
            placements.append(CopyPlacement(site, "", tuple(paths), statistics))
    if not placements and not method.may_be_empty:
        raise ValueError(
            f"{method.label}: expected at least one parameter to train, found none that it selects "
            f"in {type(model).__name__}; choose another method or widen its choice"
        )
    return placements, None


def _selected(method: SelectMethod, name: str, module: nn.Module, selects: _Selects) -> list[str]:
    """Paths of the floating-point parameters of one module that are selected."""
    paths, quantized = [], held_tensors(module)
    for path, parameter in _read_parameters(module):
        full = f"{name}.{path}" if name else path
        if not selects(full, parameter, module):
            continue
        held = quantized.get(path)
        if held is not None and path == held.weight:
            raise ValueError(
                f"{method.label} on {full!r}: expected a dense weight to train a copy of, got "
                f"{held.storage.label}; a quantised weight takes no gradient: "
                "exclude it, or use an adapter"
            )
        if held is None and parameter.is_floating_point():
            owner, _, leaf = path.rpartition(".")
            refuse_unknown_format(module.get_submodule(owner), leaf, name)
            paths.append(path)
    return paths


def _read_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that the module's own forward reads, those of children it never calls included."""
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return []  # read by its parent
    own = list(module.named_parameters(recurse=False))
    if isinstance(module, nn.MultiheadAttention):
        own += [(f"out_proj.{n}", p) for n, p in module.out_proj.named_parameters(recurse=False)]
    for child, held in module.named_children():
        if isinstance(held, _LISTS):
            own += [(f"{child}.{n}", p) for n, p in held.named_parameters(recurse=False)]
    return own
