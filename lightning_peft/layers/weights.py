"""Modules whose forward reads its weights itself: MultiheadAttention, LSTM, GRU, RNN, routers.

The class of the reader is swapped, and around its own forward each weight is shadowed by W'. Keys
stay as they are (`torch.nn.utils.parametrize` would rename them). An edit that needs the input
(dropout, rows under different adapters) has no meaning here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.layers.adapted import Adapter
from lightning_peft.layers.matrix import MatrixOps
from lightning_peft.layers.rows import current_rows

__all__ = ["MultiheadAttentionOps", "RecurrentOps", "RouterOps", "WeightsOps", "is_router"]


class WeightsOps(MatrixOps):
    """Edits on the weight, for a reader of any number of [out, in] weights."""

    on_activations = frozenset()

    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[Adapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The module's own forward, reading W' and b'."""
        if current_rows() is not None:
            raise ValueError(
                f"{adapters[0].site.name}: expected a layer whose rows can be told apart, got "
                f"{type(m).__name__}, whose adapters act on the weight; run the adapters one after "
                "the other"
            )
        with self.shadowed(m, self.edited(m, adapters)):
            return run(*args, **kwargs)

    def edited(self, m: nn.Module, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """W' (and b' where it differs) by path, in the dtype of the weights."""
        by_weight: dict[str, list[Adapter]] = {}
        for adapter in adapters:
            by_weight.setdefault(adapter.site.parameter, []).append(adapter)
        tensors: dict[str, Tensor] = {}
        for path, group in by_weight.items():
            site = group[0].site
            edits = [a.edit() for a in group]
            W = site.edited(edits).to(site.dtype)
            tensors[path] = self.from_matrix(m, path, W)
            b_path = self.bias(m, path)
            b = None if b_path is None else _attribute(m, b_path)
            edited = b
            for e in edits:
                edited = e.edited_bias(edited)
            if edited is not b and edited is not None:
                if b_path is None:
                    raise ValueError(
                        f"{site.label}: expected a bias to edit, got a layer without one; exclude "
                        "it"
                    )
                tensors[b_path] = edited.to(site.dtype)
        return tensors


class MultiheadAttentionOps(WeightsOps):
    """`nn.MultiheadAttention`: in_proj_weight [3e, e] (or q, k, v apart), out_proj.weight [e,
    e].
    """

    def parameters(self, m: Any) -> Sequence[str]:
        """The projections that this module has."""
        if m.in_proj_weight is not None:
            return ("in_proj_weight", "out_proj.weight")
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")

    def bias(self, m: Any, name: str) -> str | None:
        """out_proj.bias, or in_proj_bias where the input projections are one weight."""
        if name == "out_proj.weight":
            return "out_proj.bias" if m.out_proj.bias is not None else None
        return "in_proj_bias" if name == "in_proj_weight" and m.in_proj_bias is not None else None

    def hf_refusal(self, m: Any, name: str) -> str:
        """peft knows only one joint input projection."""
        return (
            ""
            if m.in_proj_weight is not None
            else "peft takes no kdim or vdim other than embed_dim"
        )

    def hf_pack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """Half of B for the output projection: peft 0.21 adds that delta twice (once itself, once
        by the wrapped projection), in forward and in merge.
        """
        return t / 2 if name == "out_proj.weight" and layout == "up" else t

    def hf_unpack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """Inverse of `hf_pack`, exact."""
        t = super().hf_unpack(m, name, layout, t)
        return t * 2 if name == "out_proj.weight" and layout == "up" else t

    def hf_places(self, m: nn.Module, adapted: Sequence[str]) -> dict[str, str]:
        """The output projection stands inside peft's wrapper."""
        return {n: "base_layer.out_proj" if n == "out_proj.weight" else "" for n in adapted}


class RecurrentOps(WeightsOps):
    """LSTM, GRU, RNN: every weight_ih and weight_hh (and weight_hr of a projected LSTM)."""

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """All matrices, layer by layer."""
        return tuple(
            n for n, p in m._parameters.items() if n.startswith("weight_") and p is not None
        )

    def hf_refusal(self, m: nn.Module, name: str) -> str:
        """None of them in peft."""
        return f"peft adapts no {type(m).__name__}"

    def bias(self, m: nn.Module, name: str) -> str | None:
        """bias_ih for weight_ih and so on."""
        path = name.replace("weight_", "bias_")
        return path if m._parameters.get(path) is not None else None

    @contextmanager
    def shadowed(self, m: Any, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """As any module; the flat list that the kernels take is shadowed too.

        Its weak references are blanked for the while: the module would find tensors that it has not
        seen and make the list anew from its attributes.
        """
        with super().shadowed(m, tensors):
            attributes = vars(m)
            before = {k: attributes[k] for k in ("_flat_weights", "_flat_weight_refs")}
            attributes["_flat_weights"] = [getattr(m, n) for n in m._flat_weights_names]
            attributes["_flat_weight_refs"] = [None] * len(m._flat_weights_names)
            try:
                yield
            finally:
                attributes.update(before)


def is_router(module: nn.Module) -> bool:
    """A mixture's router that is no Linear: one matrix [experts, in] and how many to choose."""
    weight = module._parameters.get("weight")
    chooses = hasattr(module, "top_k") and not isinstance(module, nn.Linear)
    return chooses and weight is not None and weight.dim() == 2


class RouterOps(WeightsOps):
    """A router's matrix, where it is named: `"all-linear"` leaves routers alone."""

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """The matrix; a bias over the experts is not an edit's business."""
        return ("weight",)

    def bias(self, m: nn.Module, name: str) -> str | None:
        """The router's, where it has one."""
        return "bias" if m._parameters.get("bias") is not None else None

    def hf_by_parameter(self, m: nn.Module, name: str) -> bool:
        """Always: no layer that peft knows."""
        return True


def _attribute(m: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    value = getattr(m.get_submodule(owner) if owner else m, leaf)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(m).__name__}.{path}: expected a tensor, got {type(value).__name__}")
    return value
