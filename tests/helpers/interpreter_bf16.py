"""Triton's interpreter with bf16 as a chip computes it, for scripts that check kernels in bf16.

The interpreter of Triton 3.7 truncates to bf16, and `tl.dot` multiplies the bits of bf16 operands
as integers. Here numbers are rounded to the nearest even one, and products are those of the values.
Import nothing of Triton before ``TRITON_INTERPRET=1`` is set.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["use_bf16"]


def _widen(bits: Any) -> Any:
    """Return the fp32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: Any) -> Any:
    """Return the bits of the nearest bf16 values, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest.astype(np.uint16))


def use_bf16() -> None:
    """Correct the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return _widen(values).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return _round(values)
        return convert(values, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_widen(t.data), tl.float32) for t in (a, b))
        return dot(self, a, b, *more)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
