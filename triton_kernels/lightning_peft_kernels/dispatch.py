"""Selects the implementation of each op, with a reason.

Each `select_*` function decides from the device, the dtype, the number of tokens, the shape and the
requested backend. The returned `Decision` carries the reason, which the preflight report prints.

The requested backend belongs to a context, not to the process: `use_backend` applies inside its
`with` block, in the current thread or task. Ops read it in forward and hand it to their backward,
which autograd may run in another thread.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

__all__ = [
    "CROSSINGS",
    "EXPERT_ROWS",
    "FLOAT32_TOKENS",
    "Backend",
    "Decision",
    "architecture",
    "checkpoint_contexts",
    "crossing",
    "current_backend",
    "select",
    "select_experts",
    "select_group",
    "select_one_pass",
    "select_product",
    "triton_available",
    "use_backend",
]

Backend = Literal["auto", "triton", "torch"]

# Architecture → (least N, most tokens), first match wins: up to this many tokens the product that
# decodes the weight on the fly beats dequantise + library product. Not measured with these kernels:
# the values are the table that bitsandbytes 0.50.2 calibrated on these chips, cut at the 64 rows
# that these kernels take. If K ≥ N and N < 8448, the tokens of the last row apply.
CROSSINGS: dict[str, tuple[tuple[int, int], ...]] = {
    "sm_80": ((8448, 64), (4224, 16), (0, 4)),
    "sm_90": ((25344, 64), (16896, 48), (8448, 32), (4224, 16), (0, 4)),
    "sm_100": ((8448, 32), (0, 4)),
    "gfx942": ((0, 4),),
}
# q, k, v and gate, up of a Llama block of width 1024, 16 to 1,024 tokens, forward and backward: as
# one product 0.94 to 1.16 of the time (benchmarks/cpu/projections.py, 2026-11-21).
GROUPED_ON_CPU = "no faster as one product"
# Mean rows per expert up to which the grouped product decodes packed experts on the fly. Not
# measured; arithmetic for an H200 (4.3 TB/s, 790 TFLOP/s). Dequantising moves 4.5 bytes per weight:
# 1.05 ps. Decoding takes 9 instructions per weight and tile of 64 rows, 0.27 ps, and the product
# then runs at half the library's rate. Both cost the same near 128 rows; half of that leaves room
# for effects that the sum omits.
EXPERT_ROWS = 64
# fp32 products spill in these kernels, and their tiles exceed an A100's shared memory. Up to four
# tokens no matrix instruction is used.
FLOAT32_TOKENS = 4
_WIDE = "tiles of two bytes per element"
_EVIDENCE = "as calibrated by bitsandbytes, not measured with these kernels"


@dataclass(frozen=True)
class Decision:
    """A selected implementation and the reason for it.

    Attributes:
        backend: ``"triton"`` or ``"torch"``. Products with a packed base use ``"fused"``,
            ``"dequantize"``, ``"scaled_mm"`` or ``"emulated"``; layers that share an input use
            ``"grouped"`` or ``"apart"``.
        reason: One clause for the report.
    """

    backend: Literal[
        "triton", "torch", "fused", "dequantize", "scaled_mm", "emulated", "grouped", "apart"
    ]
    reason: str


_requested: ContextVar[Backend] = ContextVar("lightning_peft_kernels.backend", default="auto")


def current_backend() -> Backend:
    """Return the backend requested in this context.

    A region compiled with `torch.compile` keeps the backend that was requested when it was traced.
    """
    return _requested.get()


# What torch.compiler.assume_constant_result does; that function would import torch._dynamo, which
# takes longer than the rest of this package.
vars(current_backend)["_dynamo_marked_constant"] = True


class use_backend(AbstractContextManager[None]):
    """Request a backend inside a ``with`` block, in the current thread or task.

    Args:
        backend: ``"auto"``, or ``"triton"`` or ``"torch"`` to force one.

    Raises:
        ValueError: The backend is unknown.
    """

    def __init__(self, backend: Backend) -> None:
        if backend not in ("auto", "triton", "torch"):
            raise ValueError(
                f"kernels: expected 'auto', 'triton' or 'torch', got {backend!r}; use 'auto' "
                "unless comparing"
            )
        self.backend = backend
        self._tokens: list[Token[Backend]] = []

    def __enter__(self) -> None:
        self._tokens.append(_requested.set(self.backend))

    def __exit__(self, *exception: object) -> None:
        _requested.reset(self._tokens.pop())


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts that recompute a checkpointed function under the backend of its forward.

    Pass it as ``torch.utils.checkpoint.checkpoint(..., context_fn=checkpoint_contexts)``. Autograd
    recomputes in the thread of the device, where no ``with`` block of the caller applies.
    """
    return nullcontext(), use_backend(current_backend())


@lru_cache(maxsize=1)
def triton_available() -> bool:
    """Whether triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def select(
    op: str, device: torch.device, dtype: torch.dtype, backend: Backend | None = None
) -> Decision:
    """Select the implementation of `op` for tensors on `device` in `dtype`.

    Args:
        op: Name for the reason and for errors.
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        backend: Requested backend; default `current_backend()`.

    Raises:
        RuntimeError: ``"triton"`` is requested but cannot run.
    """
    requested = backend or current_backend()
    if requested == "torch":
        return Decision("torch", "requested")
    blocked = _why_not_triton(device, dtype)
    if blocked is None:
        return Decision(
            "triton", "requested" if requested == "triton" else f"{op} on {device.type}"
        )
    if requested == "triton":
        raise RuntimeError(f"{op}: expected a device for Triton, got {blocked}; use kernels='auto'")
    return Decision("torch", blocked)


def architecture(device: torch.device) -> str:
    """Return the row of `CROSSINGS` for a CUDA or ROCm device.

    A chip without a row of its own uses the nearest older one.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def crossing(architecture: str, shape: Sequence[int]) -> int:
    """Return the most tokens for which a product decodes the weight [N, K] on the fly."""
    N, K = shape
    table = CROSSINGS[architecture]
    if K >= N and N < 8448:
        return table[-1][1]
    return next(tokens for least, tokens in table if least <= N)


def select_product(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    shape: Sequence[int],
    backend: Backend | None = None,
) -> Decision:
    """Select ``"fused"`` or ``"dequantize"`` for x [tokens, K] times a packed W [N, K]."""
    base = select("nf4_small_batch", device, dtype, backend)
    if base.backend == "torch":
        return Decision("dequantize", base.reason)
    if not 1 <= tokens <= 64 or shape[1] % 8:
        return Decision("dequantize", f"{tokens} tokens, K = {shape[1]}")
    if dtype.itemsize > 2 and tokens > FLOAT32_TOKENS:
        return Decision("dequantize", f"{tokens} tokens, {dtype}: {_WIDE}")
    chip = architecture(device)
    most = crossing(chip, shape)
    reason = f"{tokens} tokens, crossing {most} on {chip} ({_EVIDENCE})"
    return Decision("fused" if tokens <= most else "dequantize", reason)


def select_one_pass(
    device: torch.device, dtype: torch.dtype, rank: int, backend: Backend | None = None
) -> Decision:
    """Select whether one pass over dY computes both gradients of a low rank."""
    base = select("rank_gradients", device, dtype, backend)
    if base.backend == "torch":
        return base
    if dtype.itemsize > 2:
        return Decision("torch", f"{dtype}: {_WIDE}")
    most = 16 if torch.version.hip is not None else 32  # above, registers spill or no time is saved
    if rank > most:
        return Decision("torch", f"rank {rank}, one pass up to {most}")
    return Decision("triton", base.reason)


def select_experts(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    experts: int,
    shape: Sequence[int],
    backend: Backend | None = None,
) -> Decision:
    """Select ``"fused"`` or ``"dequantize"`` for grouped rows times packed W [experts, N, K].

    The decision uses the mean number of rows per expert: only the device knows how rows spread.
    """
    base = select("nf4_grouped_linear", device, dtype, backend)
    if base.backend == "torch":
        return Decision("dequantize", base.reason)
    if shape[1] % 2 or dtype.itemsize > 2:
        why = f"K = {shape[1]}" if shape[1] % 2 else f"{dtype}: {_WIDE}"
        return Decision("dequantize", why)
    mean = rows / experts
    reason = f"{mean:.0f} rows per expert, crossing {EXPERT_ROWS} (by arithmetic, not measured)"
    return Decision("fused" if mean <= EXPERT_ROWS else "dequantize", reason)


def select_group(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int | None,
    shapes: Sequence[Sequence[int]],
) -> Decision:
    """Select ``"grouped"`` or ``"apart"`` for packed layers [N_i, K] that share x [tokens, K].

    Args:
        device: Device of x.
        dtype: Dtype of x.
        tokens: Rows of x; None before a call.
        shapes: (N_i, K) of each layer.
    """
    if device.type != "cuda":
        return Decision("apart", f"{device.type}: {GROUPED_ON_CPU}")
    alone = [select_product(device, dtype, tokens or 1 << 20, shape) for shape in shapes]
    if any(decision.backend == "fused" for decision in alone):
        return Decision("apart", f"{tokens} tokens: each product decodes its own weight")
    return Decision("grouped", f"{len(shapes)} layers over one input, one product")


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"{device.type} tensors"
    if not triton_available():
        return "triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype}"
    return None
