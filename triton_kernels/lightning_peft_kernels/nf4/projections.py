"""Projections that share their input (q, k, v; gate, up), each with LoRA, as one op.

    y_i = x W_iᵀ + s_i · drop_i(x) A_iᵀ B_iᵀ + bias_i          i = 1 … g, W_i [N_i, K] packed

The weights are dequantised below each other into one buffer [ΣN, K], so forward is one product. In
backward, dX sums dY_i · W_i in place over the rows of that buffer: one product over all dY would
first have to copy them side by side.
Without dropout the A_i are stacked, so x and dX each take part in one rank-sized product. With
dropout each layer draws its own seed, in order, which gives the mask that the layer would draw by
itself. Each y_i owns its columns of one [M, ΣN] buffer: a strided tensor, but no view for autograd.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import (
    Context,
    Grads,
    KernelFunction,
    add_product,
    apply_or_forward,
    autocast_off,
    flatten_rows,
    gradients_of,
    in_functorch_transform,
    is_double_backward,
)
from lightning_peft_kernels.lora.linear import (
    LoRASpec,
    drop,
    lora_branch_by_torch,
    lora_down,
    lora_up_backward,
    prepare,
    rank_backward,
)
from lightning_peft_kernels.nf4.linear import nf4_lora_linear, nf4_lora_linear_reference
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing
from lightning_peft_kernels.nf4.weight_buffers import stacked_weights

__all__ = ["Projection", "nf4_grouped_projections", "nf4_grouped_projections_reference"]


class Projection(NamedTuple):
    """One of the layers.

    Attributes:
        q: Bytes of W.
        shape: (N, K).
        bias: [N] or None.
        A: [R, K].
        B: [N, R].
        scaling: Number or 0-d tensor.
        dropout_p: Probability of dropping an element of x in the low-rank branch; 0 in evaluation.
    """

    q: Packed4bit
    shape: tuple[int, int]
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float | Tensor
    dropout_p: float = 0.0


def nf4_grouped_projections_reference(
    x: Tensor, layers: Sequence[Projection], *, kind: str = "nf4", block_size: int = 64
) -> list[Tensor]:
    """Compute the layers one after the other in plain torch, without dropout."""
    return [
        nf4_lora_linear_reference(
            x, p.q, p.shape, p.bias, p.A, p.B, p.scaling, kind=kind, block_size=block_size
        )
        for p in layers
    ]


class _Group(NamedTuple):
    """Settings that forward and backward share.

    Attributes:
        packings: Layout of each W_i [N_i, K].
        rows: N_i.
        ranks: R_i.
        specs: Settings of each low rank.
        shares_input: Whether all A multiply the same x: no layer drops elements of its own.
    """

    packings: tuple[Packing, ...]
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    specs: tuple[LoRASpec, ...]
    shares_input: bool

    def weights(self, qs: Sequence[Packed4bit], dtype: torch.dtype) -> Tensor:
        """[W_1; …; W_g], dequantised."""
        weights = list(zip(qs, self.packings, strict=True))
        return stacked_weights(weights, dtype, self.specs[0].backend)


def _down(
    x2: Tensor, As: Sequence[Tensor], group: _Group
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(S_i = s_i · drop_i(x) A_iᵀ, seeds)."""
    if not group.shares_input:
        found = [lora_down(x2, A, spec) for A, spec in zip(As, group.specs, strict=True)]
        return [S for S, _ in found], [seed for _, seed in found]
    S = x2.to(group.specs[0].dtype) @ torch.cat(list(As)).mT
    scaled = list(S.split(group.ranks, dim=1))
    for i, spec in enumerate(group.specs):
        if spec.scaling != 1.0:
            scaled[i] = scaled[i] * spec.scaling
    return scaled, [None] * len(As)


def _up(
    x2: Tensor,
    W: Tensor,
    Ss: Sequence[Tensor],
    Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    group: _Group,
) -> list[Tensor]:
    """y_i = S_i B_iᵀ + x W_iᵀ + bias_i, summed in the order of a single layer."""
    if torch.compiler.is_compiling():  # a graph cannot hold tensors that share memory unseen
        branches = [(S @ B.mT).to(x2.dtype) for S, B in zip(Ss, Bs, strict=True)]
        y = torch.cat(branches, 1).addmm(x2, W.mT)
        return [
            part.clone() if bias is None else part + bias
            for part, bias in zip(y.split(group.rows, 1), biases, strict=True)
        ]
    y = x2.new_empty(x2.shape[0], sum(group.rows))
    # For autograd these parts are tensors of their own, so the caller may change them in place.
    parts: list[Tensor] = list(torch.ops.aten.unsafe_split_with_sizes(y, group.rows, 1))
    for part, S, B in zip(parts, Ss, Bs, strict=True):
        if S.dtype == y.dtype:
            torch.mm(S, B.mT, out=part)
        else:
            part.copy_(S @ B.mT)
    y.addmm_(x2, W.mT)
    for part, bias in zip(parts, biases, strict=True):
        if bias is not None:
            part += bias
    return parts


class _Context(Context, Protocol):
    """What forward saves for backward."""

    group: _Group


class _GroupedProjections(KernelFunction):
    """All layers of a group. Arguments after `qs`: g biases, g A, g B."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        group: _Group,
        qs: tuple[Packed4bit, ...],
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        g, lead = len(group.rows), x.shape[:-1]
        biases, As, Bs = trained[:g], trained[g : 2 * g], trained[2 * g :]
        x2 = flatten_rows(x)
        Ss, seeds = _down(x2, As, group)
        parts = _up(x2, group.weights(qs, x.dtype), Ss, Bs, biases, group)
        ctx.save_for_backward(x, *seeds, *Ss, *As, *Bs, *itertools.chain(*qs))
        ctx.group = group
        if x.ndim != 2:
            for i, part in enumerate(parts):
                parts[i] = torch.ops.aten._unsafe_view(part, (*lead, part.shape[-1]))
        return tuple(parts)

    @staticmethod
    def backward(ctx: _Context, *dYs: Tensor) -> Grads:
        group = ctx.group
        g, needs = len(group.rows), ctx.needs_input_grad
        needs_X, needs_biases = needs[0], needs[3 : 3 + g]
        needs_As, needs_Bs = needs[3 + g : 3 + 2 * g], needs[3 + 2 * g :]
        x, *rest = ctx.saved_tensors
        seeds, Ss, As, Bs, packed = (
            rest[:g], rest[g : 2 * g], rest[2 * g : 3 * g], rest[3 * g : 4 * g], rest[4 * g :],
        )  # fmt: skip
        x2, rows_dYs = flatten_rows(x), list(map(flatten_rows, dYs))
        d_biases: list[Tensor | None] = [None] * g
        if any(needs_biases):
            for i, dY in enumerate(rows_dYs):
                d_biases[i] = dY.sum(0) if needs_biases[i] else None
        W = None
        if needs_X:
            qs = list(itertools.starmap(Packed4bit, zip(*[iter(packed)] * 4, strict=True)))
            W = group.weights(qs, dYs[0].dtype)
        if is_double_backward():
            formula = functools.partial(_by_torch, group, seeds, W)
            wanted = [needs_X, *needs_As, *needs_Bs]
            dX, *d_factors = gradients_of(formula, (x, *As, *Bs), wanted, dYs)
            return dX, None, None, *d_biases, *d_factors
        dSs, dBs = [], []
        each = zip(rows_dYs, Ss, As, Bs, group.specs, needs_Bs, strict=True)
        for dY, S, A, B, spec, needs_B in each:  # dA needs the stacked dS, see below
            dS, _, dB = rank_backward(dY, None, S, None, A, B, spec, False, needs_B, True)
            assert dS is not None  # needs_X was True
            dSs.append(dS)
            dBs.append(dB)
        dAs = _down_backward(dSs, x2, seeds, group, needs_As)
        dX = None
        if W is not None:
            dX = _up_backward(dSs, As, seeds, group).to(dYs[0].dtype)
            # One product per layer on its rows of W: joining all dY would copy them first.
            for dY, part in zip(rows_dYs, W.split(group.rows), strict=True):
                dX = add_product(dX, dY, part)
            dX = dX.view(x.shape)
        return dX, None, None, *d_biases, *dAs, *dBs


def _by_torch(
    group: _Group, seeds: Sequence[Tensor | None], W: Tensor | None, x: Tensor, *factors: Tensor
) -> list[Tensor]:
    """y_i without bias in torch's own operations; without the base if W is None."""
    As, Bs = factors[: len(seeds)], factors[len(seeds) :]
    lows = [
        lora_branch_by_torch(x, A, B, spec, seed)
        for A, B, seed, spec in zip(As, Bs, seeds, group.specs, strict=True)
    ]
    if W is None:
        return lows
    bases = torch.nn.functional.linear(x, W).split(group.rows, -1)
    return [low + base for low, base in zip(lows, bases, strict=True)]


def _down_backward(
    dSs: Sequence[Tensor],
    x2: Tensor,
    seeds: Sequence[Tensor | None],
    group: _Group,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dA_i = dS_iᵀ drop_i(x)."""
    if not any(needs):
        return [None] * len(dSs)
    z = x2.to(group.specs[0].dtype)
    if group.shares_input:
        return list((torch.cat(list(dSs), 1).mT @ z).split(group.ranks))

    def gradient(dS: Tensor, seed: Tensor | None, spec: LoRASpec) -> Tensor:
        if seed is None:
            return dS.mT @ z
        return dS.mT @ drop(z, seed, spec)

    parts = zip(dSs, seeds, group.specs, needs, strict=True)
    return [gradient(dS, seed, spec) if need else None for dS, seed, spec, need in parts]


def _up_backward(
    dSs: Sequence[Tensor], As: Sequence[Tensor], seeds: Sequence[Tensor | None], group: _Group
) -> Tensor:
    """Σ drop_i(dS_i A_i) [M, K]."""
    if group.shares_input:
        return torch.cat(list(dSs), 1) @ torch.cat(list(As))
    parts = zip(dSs, As, seeds, group.specs, strict=True)
    low, *others = (lora_up_backward(dS, A, seed, spec) for dS, A, seed, spec in parts)
    for other in others:
        low = low + other
    return low


def nf4_grouped_projections(
    x: Tensor, layers: Sequence[Projection], *, kind: str = "nf4", block_size: int = 64
) -> list[Tensor]:
    """Compute y_i [..., N_i] of every layer; differentiable in x and every A, B and bias.

    Args:
        x: [..., K] floating.
        layers: At least one; all with the same K and adapters of one dtype.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.

    Raises:
        ValueError: The layers differ in K or in the dtype of their adapters.
    """
    widths, dtypes = {x.shape[-1]}, set()
    for p in layers:
        widths.add(p.shape[1])
        dtypes |= {p.A.dtype, p.B.dtype}
    if len(widths) > 1 or len(dtypes) > 1:
        raise ValueError(
            "nf4_grouped_projections: expected one input width and one adapter dtype, got widths "
            f"{sorted(widths)} and {sorted(map(str, dtypes))}; run these layers one by one"
        )
    if in_functorch_transform():
        return [
            nf4_lora_linear(
                x, p.q, p.shape, p.bias, p.A, p.B, p.scaling,
                kind=kind, block_size=block_size, dropout_p=p.dropout_p,
            )
            for p in layers
        ]  # fmt: skip
    prepared, settings, shares_input = [], [], True
    for p in layers:
        x, A, B, bias, spec = prepare(x, p.A, p.B, p.bias, p.scaling, p.dropout_p)
        packing = Packing(tuple(p.shape), kind, block_size)
        prepared.append((p.q, bias, A, B))
        settings.append((packing, p.shape[0], A.shape[0], spec))
        shares_input = shares_input and not p.dropout_p
    qs, biases, As, Bs = zip(*prepared, strict=True)
    packings, rows, ranks, specs = zip(*settings, strict=True)
    group = _Group(packings, rows, ranks, specs, shares_input)
    with autocast_off(x.device.type):
        ys = apply_or_forward(_GroupedProjections, x, group, qs, *biases, *As, *Bs)
    return list(ys)
