"""The adapted forward of a layer with one input and one weight: Linear, Conv1D, convolution,
embedding.

Composition is an onion with exactly one base call: the outermost edit maps the input first
(`in_scale`, `rotation`), then the base runs, then each edit adds its terms and `out_scale`,
innermost first. A part that the kind of layer
cannot do on activations takes the weight path: W' is formed, used and dropped, and formed again in
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning_peft_kernels.autograd import transformed
from lightning_peft_kernels.dispatch import preference
from lightning_peft_kernels.dropout.ops import dropout
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft.core.edit import (
    Edit,
    FusedLinearTerm,
    apply_edits,
    concat_ranks,
    low_rank_terms,
)
from lightning_peft.core.protocols import Reason
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.hf_layout import HFLayout
from lightning_peft.layers.mixed_batch import current_mixed_batch
from lightning_peft.layers.projection_groups.group import output_of_group

__all__ = ["MatrixOps"]


class MatrixOps(HFLayout):
    """Defaults for layers whose weight is [out, in] and whose input ends in `in`."""

    #: Parts of an Edit that act on activations here.
    on_activations: frozenset[str] = frozenset({"in_scale", "rotation", "out_scale"})

    #: Whether the input is ids (embedding) rather than features.
    is_embedding: bool = False

    # ---- geometry: identity for Linear, overridden by the other kinds
    def parameters(self, m: nn.Module) -> Sequence[str]:
        """Paths of the weights that may be edited."""
        return ("weight",)

    def bias(self, m: nn.Module, name: str) -> str | None:
        """Path of the bias, None where the layer has none."""
        return "bias" if getattr(m, "bias", None) is not None else None

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Canonical [out, in]."""
        return natural

    def channels(self, m: nn.Module, name: str, natural: torch.Size) -> int:
        """Input features."""
        return self.shape(m, name, natural)[-1]

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Natural → canonical."""
        return W

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """Canonical → natural."""
        return M

    def supports(self, part: str) -> bool:
        """Whether a part of an Edit acts on activations here."""
        return part in self.on_activations

    @property
    def features_last(self) -> bool:
        """Whether inputs are [..., in_features], so that a rotation can act on them."""
        return "rotation" in self.on_activations

    # ---- actions
    @contextmanager
    def substituted(self, m: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the module (or its children, for dotted paths) read these tensors as its parameters.

        An entry in the instance's `__dict__` is found before `nn.Module.__getattr__` looks for the
        parameter.
        """
        undo: list[tuple[dict[str, Any], str]] = []
        try:
            for path, tensor in tensors.items():
                owner, _, leaf = path.rpartition(".")
                attributes = vars(m.get_submodule(owner) if owner else m)
                attributes[leaf] = tensor
                undo.append((attributes, leaf))
            yield
        finally:
            for attributes, leaf in undo:
                attributes.pop(leaf, None)

    def functional(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer with another weight and bias."""
        return F.linear(x, W, b)

    def low_rank(self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: Any) -> Tensor:
        """scaling · (x Aᵀ) Bᵀ; the scale goes to the thin side."""
        return F.linear(F.linear(x, A) * scaling, B)

    def scale_in(self, m: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
        """X diag(scale)."""
        return x * scale

    def scale_in_matrix(self, m: nn.Module, M: Tensor, scale: Tensor) -> Tensor:
        """M diag(scale)."""
        return M * scale

    def per_output(self, m: nn.Module, v: Tensor) -> Tensor:
        """[out] shaped so that it broadcasts against the layer's output."""
        return v

    def scale_out(self, m: nn.Module, y: Tensor, scale: Tensor) -> Tensor:
        """diag(scale) y, `scale` [out]."""
        return y * self.per_output(m, scale).to(y.dtype)

    # ---- forward
    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[Adapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Adapted forward; see the module's docstring."""
        x, args = (args[0], args[1:]) if args else (kwargs.pop(next(iter(kwargs))), ())
        if not torch.compiler.is_compiling():
            y = output_of_group(m, x)
            if y is not None:
                return y
        edits = [a.edit() for a in adapters]
        mixed = current_mixed_batch() is not None
        fused_linear_term = edits[0].fused_linear_term if len(edits) == 1 and not mixed else None
        if fused_linear_term is not None:
            found = self._forward_fused_linear(m, adapters[0], fused_linear_term, x)
            if found is not None:
                return found
        if not mixed and all(e.only_low_rank for e in edits):
            fused = self._fused(m, adapters, edits, x)
            if fused is not None:
                return fused
        forms = [e.form() for e in edits]
        if not mixed and len(edits) == 1 and forms[0] - {"dropout"} == _SCALED_LOW_RANK:
            scaled = self._fused_then_scaled(m, adapters[0], edits[0], x)
            if scaled is not None:
                return scaled
        if any(not self.supports(part) for form in forms for part in form & _WEIGHT_PARTS):
            if mixed:
                raise ValueError(
                    f"{adapters[0].site.label}: expected edits that act on activations when rows "
                    f"of a batch are under different adapters, got {adapters[0].method.label} on "
                    f"{type(m).__name__}; run the adapters one after the other with set_adapter"
                )
            return self._forward_materialized(m, adapters, edits, x)
        if not mixed and len(edits) == 1 and forms[0] == _OUT_SCALE:
            e = edits[0]
            if e.scale_bias or self._bias(m) is None:
                y = run(x, *args, **kwargs)
                return self.scale_out(m, y, e.out_scale)  # type: ignore[arg-type]
        return self._forward_composed(m, run, adapters, edits, x, args, kwargs)

    def _forward_fused_linear(
        self, m: Any, adapter: Adapter, term: FusedLinearTerm, x: Tensor
    ) -> Tensor | None:
        """Base and change in one function; None unless the layer is a plain dense linear one, all
        is of one dtype and torch's own formulas are not asked for.
        """
        site = adapter.site
        if (
            preference() == "torch"
            or transformed()
            or site.storage.label != "dense"
            or torch.is_autocast_enabled(x.device.type)
        ):
            return None
        if isinstance(site.storage.fused(_LOW_RANK, m, site.parameter), Reason):
            return None
        W, b, dtype = self.to_canonical(m, site.parameter, m.weight), m.bias, x.dtype
        if W.requires_grad or (b is not None and b.requires_grad) or dtype.itemsize < 4:
            return None
        if W.dtype != dtype or any(t.dtype != dtype for t in adapter.tensors().values()):
            return None
        return term.fused_linear(x, W, b)

    def _fused(
        self, m: nn.Module, adapters: Sequence[Adapter], edits: Sequence[Edit], x: Tensor
    ) -> Tensor | None:
        p = edits[0].dropout
        if len(edits) > 1 and any(e.dropout != p for e in edits):
            return None
        site = adapters[0].site
        kernel = site.storage.fused(_DROPPED_LOW_RANK if p else _LOW_RANK, m, site.parameter)
        if isinstance(kernel, Reason):
            return None
        term = concat_ranks(low_rank_terms(edits))
        return kernel(m, x, term.A, term.B, term.scaling, p if m.training else 0.0)

    def _fused_then_scaled(
        self, m: nn.Module, adapter: Adapter, edit: Edit, x: Tensor
    ) -> Tensor | None:
        """DoRA's form: the fused layer, then one pass for the scale. None with a bias, which is not
        scaled: a fused one would be rounded into the sum before.
        """
        if self._bias(m) is not None or not self.supports("out_scale") or edit.out_scale is None:
            return None
        u = self._fused(m, [adapter], [replace(edit, out_scale=None)], x)
        return None if u is None else self.scale_out(m, u, edit.out_scale)

    def _forward_materialized(
        self, m: nn.Module, adapters: Sequence[Adapter], edits: Sequence[Edit], x: Tensor
    ) -> Tensor:
        site = adapters[0].site

        def run(x: Tensor) -> Tensor:
            W = apply_edits(site, [a.edit() for a in adapters])
            b = self._bias(m)
            for e in edits:
                b = e.edited_bias(b)
            dtype = torch.promote_types(W.dtype, x.dtype) if x.is_floating_point() else W.dtype
            W = W.to(dtype)
            y = self.functional(
                m,
                x.to(dtype) if x.is_floating_point() else x,
                self.from_canonical(m, site.parameter, W),
                None if b is None else b.to(dtype),
            )
            return y.to(x.dtype if x.is_floating_point() else site.dtype)

        if not torch.is_grad_enabled():
            return run(x)
        y: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return y

    def _forward_composed(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[Adapter],
        edits: Sequence[Edit],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        mix = current_mixed_batch()
        rows = [
            None if mix is None else mix.index(a.adapter_name, x.shape[0], x.device)
            for a in adapters
        ]
        inputs: list[Tensor] = [x] * len(edits)
        for i in reversed(range(len(edits))):  # the outermost edit maps the input first
            e = edits[i]
            z = _pick(x, rows[i])
            if e.in_scale is not None:
                z = self.scale_in(m, z, e.in_scale.to(z.dtype))
            if e.rotation is not None:
                z = e.rotation.apply(z).to(z.dtype)
            if e.in_scale is not None or e.rotation is not None:
                x = _put(x, rows[i], z)
            inputs[i] = z
        y: Tensor = run(x, *args, **kwargs)
        # The bias that is in y at this moment, for edits that must not scale it; by adapter when
        # rows differ.
        biases: dict[str, Tensor | None] = {
            a.adapter_name if mix else "": self._bias(m) for a in adapters
        }
        for adapter, e, z, r in zip(adapters, edits, inputs, rows, strict=True):
            v, of = _pick(y, r), adapter.adapter_name if mix else ""
            b = biases[of]
            keep = (
                None
                if b is None or e.scale_bias or e.out_scale is None
                else self.per_output(m, b).to(v.dtype)
            )
            for term in e.terms:
                v = v + term.apply(self, adapter.site, _drop(z, e.dropout, m.training)).to(v.dtype)
            if e.bias is not None and (e.scale_bias or e.out_scale is None):
                v = v + self.per_output(m, e.bias).to(v.dtype)
            if e.out_scale is not None:
                if keep is None:
                    v = self.scale_out(m, v, e.out_scale)
                else:
                    # The bias stays: (v - b) scale + b, so written that a scale of 1 changes no
                    # bit.
                    scale = self.per_output(m, e.out_scale).to(v.dtype)
                    v = v + (v - keep) * (scale - 1)
            if e.bias is not None and not (e.scale_bias or e.out_scale is None):
                v = v + self.per_output(m, e.bias).to(v.dtype)
            if adapter is not adapters[-1]:  # for those that follow
                biases[of] = e.edited_bias(b)
            y = _put(y, r, v)
        return y

    def _bias(self, m: nn.Module) -> Tensor | None:
        path = self.bias(m, "weight")
        return None if path is None else getattr(m, path)


_LOW_RANK = frozenset({"low_rank"})
_DROPPED_LOW_RANK = frozenset({"low_rank", "dropout"})
_OUT_SCALE = frozenset({"out_scale"})
_SCALED_LOW_RANK = frozenset({"low_rank", "out_scale"})
_WEIGHT_PARTS = frozenset({"in_scale", "rotation", "out_scale"})


def _pick(t: Tensor, rows: Tensor | None) -> Tensor:
    return t if rows is None else t[rows]


def _put(t: Tensor, rows: Tensor | None, value: Tensor) -> Tensor:
    return value if rows is None else t.index_copy(0, rows, value.to(t.dtype))


def _drop(x: Tensor, p: float, training: bool) -> Tensor:
    return dropout(x, p) if p and training and x.is_floating_point() else x
