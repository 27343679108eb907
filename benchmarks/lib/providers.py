"""One linear layer with LoRA by each library, from the same weights: what the rows compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_peft_kernels.fp8.linear import fp8_lora_linear
from lightning_peft_kernels.fp8.products import e4m3_scale, select_fp8
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit
from torch import Tensor, nn


@dataclass
class Candidate:
    """A layer to time.

    Attributes:
        run: x → y.
        trained: A and B, none for the plain linear layer.
        autocast: Whether it runs under bf16 autocast.
        held: Frozen tensors, which are there whether or not a graph is.
    """

    run: Callable[[Tensor], Tensor]
    trained: list[Tensor]
    autocast: bool = False
    held: tuple[Tensor, ...] = ()


class _UsualFast(torch.autograd.Function):
    """The usual fast algorithm: dequantise, multiply, add the low rank in place; S is not saved, so
    backward reads x and dY again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, weights: Any, s: float) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        y = x2 @ weights().t()
        y.addmm_(x2 @ A.t(), B.t(), alpha=s)
        ctx.save_for_backward(x2, A, B)
        ctx.weights, ctx.s, ctx.leading = weights, s, x.shape[:-1]
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        x2, A, B = ctx.saved_tensors
        dY2 = dY.reshape(-1, dY.shape[-1])
        dA = (dY2 @ B).t() @ x2 * ctx.s
        dB = dY2.t() @ (x2 @ A.t()) * ctx.s
        dX = dY2 @ ctx.weights()
        dX.addmm_(dY2 @ B, A, alpha=ctx.s)
        return dX.view(*ctx.leading, -1), dA, dB, None, None


def candidates(N: int, K: int, r: int, device: torch.device) -> dict[str, Candidate | str]:
    """By name; a string says why one is not measured."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    W = (torch.randn(N, K) / K**0.5).to(dtype).to(device)
    q = quantize_4bit(W)
    s, shape = 2.0, (N, K)
    held = tuple(t for t in q if t is not None)

    def factors(dtype: torch.dtype = dtype) -> list[Tensor]:
        torch.manual_seed(1)
        A, B = torch.randn(r, K) / K**0.5, torch.randn(N, r) * 0.02
        return [t.to(device, dtype).requires_grad_() for t in (A, B)]

    made: dict[str, Candidate | str] = {}
    A, B = factors()
    made["bf16 linear without LoRA"] = Candidate(
        lambda x: nn.functional.linear(x, W), [], held=(W,)
    )
    A1, B1 = factors()
    made["usual fast algorithm"] = Candidate(
        lambda x: _UsualFast.apply(x, A1, B1, lambda: dequantize_4bit(q, shape, dtype), s),
        [A1, B1],
        held=held,
    )
    for autocast in (False, True):
        name = f"peft + bitsandbytes, {'autocast' if autocast else 'fp32 adapters'}"
        made[name] = _peft(W, factors(torch.float32), r, s, autocast)
    made["torchao NF4"] = _torchao(W, factors(), s)
    made["ours"] = Candidate(
        lambda x: nf4_lora_linear(x, q, shape, None, A, B, s), [A, B], held=held
    )
    A2, B2 = factors()
    decision = select_fp8(shape, device)
    if decision.backend == "dequantize":
        made["ours, fp8"] = decision.reason
    else:
        scale = e4m3_scale(q)
        made["ours, fp8"] = Candidate(
            lambda x: fp8_lora_linear(x, q, shape, scale, None, A2, B2, s),
            [A2, B2],
            held=(*held, scale),
        )
    return made


def _peft(W: Tensor, factors: list[Tensor], r: int, s: float, autocast: bool) -> Candidate | str:
    try:
        import bitsandbytes
        import peft
    except ImportError as error:
        return str(error)
    N, K = W.shape
    model = nn.Module()
    model.proj = bitsandbytes.nn.Linear4bit(
        K, N, bias=False, compute_dtype=W.dtype, quant_type="nf4"
    )
    model.proj.weight = bitsandbytes.nn.Params4bit(
        W.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    model.to(W.device)
    config = peft.LoraConfig(r=r, lora_alpha=int(s * r), target_modules=["proj"])
    layer = peft.inject_adapter_in_model(config, model).proj
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for parameter, value in zip(trained, factors, strict=True):
        parameter.data = value.detach().clone()
    layer.train()
    return Candidate(layer, trained, autocast)


def _torchao(W: Tensor, factors: list[Tensor], s: float) -> Candidate | str:
    try:
        from torchao.dtypes.nf4tensor import linear_nf4, to_nf4
    except ImportError as error:
        return str(error)
    A, B = factors
    try:
        packed = to_nf4(W)
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return Candidate(lambda x: linear_nf4(x, packed) + (x @ A.t()) @ B.t() * s, [A, B])
