"""bitsandbytes' product of few tokens with a packed weight, on the bytes that we store.

Its kernels take up to 1,536 tokens and its rule, measured on T4 to B200 and on RDNA and CDNA, says
up to how many tokens they beat dequantise and multiply on a chip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_peft_kernels.codebooks.eight_bit import dynamic_map
from lightning_peft_kernels.nf4.bitsandbytes_library import bitsandbytes_library
from lightning_peft_kernels.nf4.packed import Packed4bit

__all__ = ["MOST_RULED", "fused_tokens", "multiply"]

#: Tokens that its kernels take at most, as its rule does.
MOST_RULED = 1536
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Rule = Callable[[int | None, torch.dtype, int, int, int], bool]


def fused_tokens(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int], block_size: int
) -> int | None:
    """Return the most tokens for which bitsandbytes' rule multiplies W [N, K] in its kernel.

    None without bitsandbytes for this device.
    """
    if device.type != "cuda" or dtype not in _DTYPES:
        return None
    return _fused_tokens(device, dtype, int(shape[0]), int(shape[1]), block_size)


# A traced graph reads it as a constant, as `dispatch.current_backend`.
vars(fused_tokens)["_dynamo_marked_constant"] = True


@cache
def _fused_tokens(
    device: torch.device, dtype: torch.dtype, N: int, K: int, block_size: int
) -> int | None:
    rule = _rule()
    if rule is None:
        return None
    if K % block_size:
        return 0
    refused = (m for m in range(1, MOST_RULED + 1) if not rule(device.index, dtype, m, N, K))
    return next(refused, MOST_RULED + 1) - 1


@cache
def _rule() -> _Rule | None:
    """Return the function by which `torch.ops.bitsandbytes.gemm_4bit` decides."""
    try:
        if not getattr(bitsandbytes_library(), "compiled_with_cuda", False):
            return None
        from bitsandbytes.backends.cuda import ops
    except (ImportError, AttributeError, OSError):
        return None
    rule: _Rule | None = getattr(ops, "_gemm_4bit_use_custom_fn", None)
    return rule


def multiply(
    x: Tensor, q: Packed4bit, shape: Sequence[int], bias: Tensor | None, kind: str, block_size: int
) -> Tensor:
    """Compute x Wᵀ + bias [M, N] with bitsandbytes' op.

    Args:
        x: [M, K] in fp32, bf16 or fp16.
        q: Bytes of W, K a multiple of `block_size`.
        shape: [N, K].
        bias: [N] in x's dtype, or None.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.
    """
    packed, absmax = q.packed.reshape(-1, 1), q.absmax.reshape(-1)
    nested = q.absmax2 is not None
    y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x, packed, list(shape), q.absmax2 if nested else absmax, block_size, kind, bias=bias,
        absmax_8bit=absmax if nested else None,
        absmax_code=dynamic_map(True, str(x.device)) if nested else None,
        absmax_offset=q.offset if nested else None,
    )  # fmt: skip
    return y
