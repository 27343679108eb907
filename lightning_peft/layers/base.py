"""The adapted forward of a layer with one input and one weight: Linear, Conv1D, convolution,
embedding.

Edits compose like nested functions around a single base call. Input maps (`in_scale`, `rotation`)
run outermost first; terms and `out_scale` run innermost first. If a layer cannot apply an edit to
activations, it materialises W', uses it and recomputes it in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_peft_kernels.dispatch import checkpoint_contexts
from lightning_peft_kernels.dropout.ops import dropout
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

from lightning_peft.core.edit import Edit, apply_edits
from lightning_peft.core.modules import own_tensor, required_tensor
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.replaced_rows import ReplacedRows
from lightning_peft.layers.base_forward import run_base
from lightning_peft.layers.fused_forward import forward_fused
from lightning_peft.layers.group_outputs import output_of_group
from lightning_peft.layers.mixed_batch import MixedBatch, current_mixed_batch
from lightning_peft.layers.weight_adapter import WeightAdapter, check_replaced

__all__ = ["MatrixOps"]


class MatrixOps(LayerOps):
    """Base of layer kinds with one input.

    The defaults are those of a weight [out, in] and an input [..., in]. A kind overrides the
    members that differ.
    """

    #: Parts of an Edit that act on activations here.
    on_activations: frozenset[str] = frozenset({"in_scale", "rotation", "out_scale"})

    #: Whether the input is ids (embedding) rather than features.
    is_embedding: bool = False

    #: Whether "all-linear" selects layers of this kind.
    is_linear: bool = False

    # ---- geometry: identity for Linear, overridden by the other kinds
    def parameters(self, m: nn.Module) -> Sequence[str]:
        """Return the paths of the weights that may be edited."""
        return ("weight",)

    def bias(self, m: nn.Module, name: str) -> str | None:
        """Return the path of the bias, or None if the layer has no bias."""
        return "bias" if own_tensor(m, "bias") is not None else None

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Return the canonical shape [out, in]."""
        return natural

    def channels(self, m: nn.Module, name: str, natural: torch.Size) -> int:
        """Return the number of input features."""
        return self.shape(m, name, natural)[-1]

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Return the weight in canonical form."""
        return W

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """Return a canonical matrix in the weight's own form."""
        return M

    def supports(self, part: str) -> bool:
        """Return whether a part of an Edit acts on activations here."""
        return part in self.on_activations

    @property
    def features_last(self) -> bool:
        """Whether inputs are [..., in_features], so that a rotation can act on them."""
        return "rotation" in self.on_activations

    @property
    def is_one_product(self) -> bool:
        """Whether the kind is linear and leaves `forward` as it is."""
        return self.is_linear and type(self).forward is MatrixOps.forward

    # ---- actions
    @contextmanager
    def substituted(self, m: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the module, or its children for dotted paths, read these tensors as parameters.

        Python finds an entry in the instance's `__dict__` before `nn.Module.__getattr__` looks for
        the parameter.
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
        """Return the layer's output with another weight and bias."""
        return F.linear(x, W, b)

    def low_rank(
        self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        """Return `scaling · (x Aᵀ) Bᵀ`, with the scale on the thin side."""
        return F.linear(F.linear(x, A) * scaling, B)

    def scale_in(self, m: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
        """Return `x diag(scale)`."""
        return x * scale

    def scale_in_matrix(self, m: nn.Module, M: Tensor, scale: Tensor) -> Tensor:
        """Return `M diag(scale)`."""
        return M * scale

    def per_output(self, m: nn.Module, v: Tensor) -> Tensor:
        """Return a vector [out] in a shape that broadcasts against the layer's output."""
        return v

    def scale_out(self, m: nn.Module, y: Tensor, scale: Tensor) -> Tensor:
        """Return `diag(scale) y`, with `scale` [out]."""
        return y * self.per_output(m, scale).to(y.dtype)

    def put_replaced(
        self, m: nn.Module, x: Tensor, y: Tensor, replaced: ReplacedRows, b: Tensor | None
    ) -> Tensor:
        """Return the output y with that of the replaced rows; b is the bias inside y."""
        raise TypeError(f"{type(self).__name__}: expected an embedding or a linear layer")

    # ---- forward
    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[WeightAdapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the layer's output under all edits; see the module's docstring."""
        x, args = (args[0], args[1:]) if args else (kwargs.pop(next(iter(kwargs))), ())
        if not torch.compiler.is_compiling():
            y = output_of_group(m, x)
            if y is not None:
                return y
        edits = [a.edit() for a in adapters]
        mix = current_mixed_batch()
        if mix is None and len(adapters) > 1:
            check_replaced(adapters)
        if mix is None:
            y = forward_fused(self, m, adapters, edits, x)
            if y is not None:
                return y
        forms = [e.form() for e in edits]
        if not all(self.supports(part) for form in forms for part in form & _WEIGHT_PARTS):
            if mix is not None:
                raise ValueError(
                    f"{adapters[0].site.label}: expected edits that act on activations when rows "
                    f"of a batch are under different adapters, got {adapters[0].method.label} on "
                    f"{type(m).__name__}; run the adapters one after the other with set_adapter"
                )
            return self._forward_materialized(m, adapters, edits, x)
        if mix is None and len(edits) == 1 and forms[0] == _OUT_SCALE:
            scale = edits[0].out_scale
            if scale is not None and (edits[0].scale_bias or self.bias_of(m) is None):
                return self.scale_out(m, run_base(self, m, run, x, args, kwargs), scale)

        def base(z: Tensor) -> Tensor:
            y: Tensor = run_base(self, m, run, z, args, kwargs)
            return y

        return self._forward_composed(m, base, adapters, edits, x, mix)

    def _forward_materialized(
        self, m: nn.Module, adapters: Sequence[WeightAdapter], edits: Sequence[Edit], x: Tensor
    ) -> Tensor:
        site = adapters[0].site

        def run(x: Tensor) -> Tensor:
            W = apply_edits(site, [a.edit() for a in adapters])
            b = self.bias_of(m)
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
        compiling = torch.compiler.is_compiling()
        y: Tensor = checkpoint(
            run, x, use_reentrant=False, preserve_rng_state=False,
            context_fn=noop_context_fn if compiling else checkpoint_contexts,
        )  # fmt: skip
        return y

    # ---- edits around one base call
    def _forward_composed(
        self,
        m: nn.Module,
        base: Callable[[Tensor], Tensor],
        adapters: Sequence[WeightAdapter],
        edits: Sequence[Edit],
        x: Tensor,
        mix: MixedBatch | None,
    ) -> Tensor:
        """Map the input through every edit, call the base, map the output back."""
        rows = [
            None if mix is None else mix.index(a.adapter_name, x.shape[0], x.device)
            for a in adapters
        ]
        x, inputs = self._map_inputs(m, edits, rows, x)
        y = base(x)
        # The bias inside y at each step: under a mix the rows of each adapter have their own.
        names = [a.adapter_name if mix is not None else "" for a in adapters]
        biases: dict[str, Tensor | None] = dict.fromkeys(names, self.bias_of(m))
        last = len(edits) - 1
        for i, (name, e) in enumerate(zip(names, edits, strict=True)):
            v = self._add_terms(m, adapters[i], e, inputs[i], _pick(y, rows[i]))
            v = self._scale_output(m, e, v, biases[name])
            if e.replaced is not None:
                b = e.edited_bias(biases[name])
                v = self.put_replaced(m, inputs[i], v, e.replaced, b)
            y = _put(y, rows[i], v)
            if i < last:
                biases[name] = e.edited_bias(biases[name])
        return y

    def _map_inputs(
        self,
        m: nn.Module,
        edits: Sequence[Edit],
        rows: Sequence[Tensor | None],
        x: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (the base's input, the input of each edit's terms); outermost edit first."""
        inputs: list[Tensor] = [x] * len(edits)
        for i in reversed(range(len(edits))):
            e = edits[i]
            inputs[i] = z = _pick(x, rows[i])
            if e.in_scale is not None:
                z = self.scale_in(m, z, e.in_scale.to(z.dtype))
            if e.rotation is not None:
                z = e.rotation.apply(z).to(z.dtype)
            if z is not inputs[i]:
                inputs[i], x = z, _put(x, rows[i], z)
        return x, inputs

    def _add_terms(
        self, m: nn.Module, adapter: WeightAdapter, edit: Edit, x: Tensor, y: Tensor
    ) -> Tensor:
        """Return y + Σ term(x), with the edit's dropout on x."""
        for term in edit.terms:
            y = y + term.apply(self, adapter.site, _drop(x, edit.dropout, m.training)).to(y.dtype)
        return y

    def _scale_output(self, m: nn.Module, edit: Edit, y: Tensor, bias: Tensor | None) -> Tensor:
        """Return y with the edit's bias, `out_scale` and `out_map`.

        Args:
            m: The layer.
            edit: The edit.
            y: Output of the layer with the edit's terms.
            bias: The bias inside y; `out_scale` leaves it alone unless `scale_bias` is set.
        """
        keeps_bias = edit.out_scale is not None and not edit.scale_bias
        if edit.bias is not None and not keeps_bias:
            y = y + self.per_output(m, edit.bias).to(y.dtype)
        if edit.out_scale is not None:
            if bias is None or not keeps_bias:
                y = self.scale_out(m, y, edit.out_scale)
            else:
                # (y - b) scale + b, in a form in which a scale of 1 changes no bit
                scale = self.per_output(m, edit.out_scale).to(y.dtype)
                y = y + (y - self.per_output(m, bias).to(y.dtype)) * (scale - 1)
        if edit.bias is not None and keeps_bias:
            y = y + self.per_output(m, edit.bias).to(y.dtype)
        return y if edit.out_map is None else edit.out_map.apply(y).to(y.dtype)

    def bias_of(self, m: nn.Module) -> Tensor | None:
        """Return the bias, or None if the layer has no bias."""
        path = self.bias(m, "weight")
        return None if path is None else self.own(m, path)

    def own(self, m: nn.Module, name: str) -> Tensor:
        """Return a weight or bias as the layer's own forward reads it."""
        return required_tensor(m, name)


_OUT_SCALE = frozenset({"out_scale"})
_WEIGHT_PARTS = frozenset({"in_scale", "rotation", "out_scale", "out_map", "replaced"})


def _pick(t: Tensor, rows: Tensor | None) -> Tensor:
    return t if rows is None else t[rows]


def _put(t: Tensor, rows: Tensor | None, value: Tensor) -> Tensor:
    return value if rows is None else t.index_copy(0, rows, value.to(t.dtype))


def _drop(x: Tensor, p: float, training: bool) -> Tensor:
    return dropout(x, p) if p and training and x.is_floating_point() else x
