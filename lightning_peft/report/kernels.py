"""The kernels of each group of layers, with reasons: a column and lines of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_peft_kernels.launch import FAILURES
from torch import nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.modules import base_modules
from lightning_peft.core.protocols import Reason
from lightning_peft.core.site import Site
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.storage import held_tensors
from lightning_peft.storage.dtensor import is_sharded

if TYPE_CHECKING:
    from lightning_peft.report.summary import Group

__all__ = ["KernelWords", "groups_over_one_input", "kernel_lines", "replaced_lines"]

_LOW_RANK = frozenset({"low_rank"})


class KernelWords:
    """Describes the kernel of each adapter, with one Edit per method, layer kind and shape."""

    def __init__(self) -> None:
        self._edits: dict[tuple[int, type[Any], torch.Size], Edit] = {}

    def of(self, adapter: Adapter) -> str:
        """Return the fused kernel and its dequantisation, or why none runs; "" without an edit."""
        if not isinstance(adapter, WeightAdapter):
            return ""
        site = adapter.site
        if site.device.type == "meta":
            return "decided when the weights are there"
        held = site.storage.iter_tensors(site.module, site.parameter)
        if any(is_sharded(t.tensor) for t in held):
            return "decided when the weights are gathered"  # an edit may need to read them
        key = id(adapter.method), type(site.ops), site.shape
        if key not in self._edits:
            with torch.no_grad():
                self._edits[key] = adapter.edit()
        if site.batch_shape:
            return _on_experts(self._edits[key], site)
        why = _why_not_fused(self._edits[key], site)
        parts = ("fused", _wide_ranks(adapter), _product_kernel(site))
        return why or "; ".join(filter(None, parts))


def _why_not_fused(edit: Edit, site: Site) -> str:
    form = edit.form() - {"dropout"}
    if form == {"low_rank", "out_scale"}:  # the scale is a pass of its own, behind the fused layer
        if site.has_bias:
            return "a bias that is not scaled: layer, edit and scale one after the other"
        form = _LOW_RANK
    if edit.fused_linear_term is not None and not site.storage.is_quantized:
        form = _LOW_RANK
    found = site.storage.fused(form, site.module, site.parameter)
    return str(found) if isinstance(found, Reason) else ""


def _wide_ranks(adapter: WeightAdapter) -> str:
    """Say that products of the adapter run in its wider dtype; "" if it is as wide as the base."""
    base = adapter.site.dtype
    found = {t.dtype for t in adapter.parameters() if t.dtype.itemsize > base.itemsize}
    if not base.is_floating_point or not found:
        return ""
    wide = str(min(found, key=str)).removeprefix("torch.")
    name = str(base).removeprefix("torch.")
    return f"low rank in {wide} unless autocast is on (`.to(torch.{name})` is faster)"


def _on_experts(edit: Edit, site: Site) -> str:
    if not edit.on_experts:
        size = site.shape.numel() * site.dtype.itemsize
        return f"W' of all experts formed in every forward: {size:,} bytes"
    return "; ".join(filter(None, ("grouped products", _product_kernel(site))))


def _product_kernel(site: Site) -> str:
    """Describe how a quantised weight is multiplied with its input."""
    return site.storage.product_kernel(site.module, site.parameter)


def kernel_lines(groups: Sequence[Group]) -> list[str]:
    """Return one line per implementation, with its layers if there are several."""
    by_words: dict[str, list[str]] = {}
    for group in groups:
        if group.fused:
            by_words.setdefault(group.fused, []).append(group.layers)
    if len(by_words) == 1:
        return [f"kernels: {next(iter(by_words))}"]
    return [
        f"kernels: {', '.join(dict.fromkeys(layers))}: {words}"
        for words, layers in by_words.items()
    ]


def replaced_lines(lines: Sequence[str]) -> list[str]:
    """Return one line per kernel that a device of this process refused, with the reason.

    Args:
        lines: Lines of the groups of layers; a refusal that one of them names is left out.
    """
    return [
        f"kernels: {op} ({configuration}) does not run on {device}: {reason}"
        for (op, configuration, device), reason in FAILURES.items()
        if not any(f"{op} does not run on {device}: {reason}" in line for line in lines)
    ]


def groups_over_one_input(model: nn.Module) -> list[str]:
    """Return one line per kind of group of packed layers that read one tensor."""
    lines: dict[str, None] = {}
    for _, module in adapted_modules(model):
        group = module._peft.projection_group
        if group is None or not group.members or group.members[0] is not module:
            continue
        if not held_tensors(module):
            continue
        names = _names(model, group.members)
        why = group.reason_apart()
        how = f"one by one ({why})" if why else "one dequantisation and one product"
        lines[f"{', '.join(names)} read one input: {how}"] = None
    return list(lines)


def _names(model: nn.Module, members: tuple[nn.Module, ...]) -> list[str]:
    found = {id(m): name.rpartition(".")[2] for name, m in base_modules(model).items()}
    return [found.get(id(m), type(m).__name__) for m in members]
