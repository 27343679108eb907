"""Triton kernel of the pooled 8-bit step."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.codebooks.eight_bit import BLOCK, code_cells, dynamic_map
from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.optim.step_inputs import PooledStep, rows_on

__all__ = ["aot_specs", "pooled_8bit_step_kernel", "step_triton"]

NUM_WARPS = 4


@triton.jit
def _encode(values, table_ptr, OFFSET: tl.constexpr):
    """Return the nearest code of values in [-1, 1] by one lookup, see `code_cells`."""
    bits = values.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((bits + tl.load(table_ptr + (bits >> 16) + OFFSET)) >> 16).to(tl.uint8)


@triton.jit
def pooled_8bit_step_kernel(
    tensor_ptr,
    block_ptr,
    hyper_ptr,
    code1_ptr,
    absmax1_ptr,
    code2_ptr,
    absmax2_ptr,
    map1_ptr,
    map2_ptr,
    cells1_ptr,
    cells2_ptr,
    scale_ptr,
    found_ptr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    LION: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one 256-block of one tensor per program.

    tensor_ptr int64 [T, 4]: addresses of parameter and gradient, elements, first block in the pool;
    block_ptr int32 [programs, 2]: tensor, block within it; hyper_ptr fp32 [T, 7].
    """
    if CHECKED and tl.load(found_ptr) != 0.0:
        return
    pid = tl.program_id(0)
    t = tl.load(block_ptr + 2 * pid).to(tl.int64)
    b = tl.load(block_ptr + 2 * pid + 1).to(tl.int64)
    p_ptr = tl.load(tensor_ptr + 4 * t).to(tl.pointer_type(P_TYPE))
    g_ptr = tl.load(tensor_ptr + 4 * t + 1).to(tl.pointer_type(G_TYPE))
    numel = tl.load(tensor_ptr + 4 * t + 2)
    pool_block = tl.load(tensor_ptr + 4 * t + 3) + b
    decay = tl.load(hyper_ptr + 7 * t)
    step = tl.load(hyper_ptr + 7 * t + 1)
    eps = tl.load(hyper_ptr + 7 * t + 2)
    beta1 = tl.load(hyper_ptr + 7 * t + 3)
    rest1 = tl.load(hyper_ptr + 7 * t + 4)
    beta2 = tl.load(hyper_ptr + 7 * t + 5)
    rest2 = tl.load(hyper_ptr + 7 * t + 6)

    lane = tl.arange(0, BLOCK)
    inside = b * BLOCK + lane < numel
    at = b * BLOCK + lane
    slot = pool_block * BLOCK + lane
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g / tl.load(scale_ptr)
    if MAXIMIZE:
        g = -g
    m = tl.load(map1_ptr + tl.load(code1_ptr + slot).to(tl.int32)) * tl.load(
        absmax1_ptr + pool_block
    )
    p = p * decay
    if LION:
        c = m * beta1 + g * rest1
        p -= step * (tl.where(c > 0, 1.0, 0.0) - tl.where(c < 0, 1.0, 0.0))
        m = m * beta2 + g * rest2
    else:
        v = tl.load(map2_ptr + tl.load(code2_ptr + slot).to(tl.int32))
        v = v * tl.load(absmax2_ptr + pool_block)
        m = m * beta1 + g * rest1
        v = v * beta2 + g * g * rest2
        p -= step * (m / (tl.sqrt(v) + eps))
        absmax2 = tl.max(v, axis=0)
        tl.store(absmax2_ptr + pool_block, absmax2)
        tl.store(code2_ptr + slot, _encode(v * (1.0 / tl.maximum(absmax2, 2e-38)), cells2_ptr, 0))
    absmax1 = tl.max(tl.abs(m), axis=0)
    tl.store(absmax1_ptr + pool_block, absmax1)
    tl.store(code1_ptr + slot, _encode(m * (1.0 / tl.maximum(absmax1, 2e-38)), cells1_ptr, 32768))
    tl.store(p_ptr + at, p.to(P_TYPE), mask=inside)


@lru_cache(maxsize=8)
def _blocks(numels: tuple[int, ...], device: str) -> Tensor:
    """Return (tensor, block within it) of every program, int32 [programs, 2]."""
    counts = torch.tensor([-(-n // BLOCK) for n in numels], dtype=torch.int64, device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    within = torch.arange(int(counts.sum()), device="cpu") - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, within], 1).to(torch.int32).to(device)


def step_triton(work: PooledStep) -> None:
    """Run the step in one launch for all tensors."""
    types: dict[torch.dtype, Any] = {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }
    device = str(work.code1.device)
    grads = [g.contiguous() for g in work.grads]
    numels = tuple([p.numel() for p in work.params])
    table = [
        (p.data_ptr(), g.data_ptr(), n, s // BLOCK)
        for p, g, n, s in zip(work.params, grads, numels, work.starts, strict=True)
    ]
    blocks = _blocks(numels, device)
    lion = work.code2 is None or work.absmax2 is None
    launch(
        pooled_8bit_step_kernel,
        (blocks.shape[0],),
        rows_on(work.code1.device, table, torch.int64),
        blocks,
        work.hyper,
        work.code1,
        work.absmax1,
        work.code1 if work.code2 is None else work.code2,
        work.absmax1 if work.absmax2 is None else work.absmax2,
        dynamic_map(True, device),
        dynamic_map(False, device),
        code_cells(True, device),
        code_cells(False, device),
        work.hyper if work.grad_scale is None else work.grad_scale,
        work.hyper if work.found_inf is None else work.found_inf,
        P_TYPE=types[work.params[0].dtype],
        G_TYPE=types[grads[0].dtype],
        LION=lion,
        MAXIMIZE=work.maximize,
        SCALED=work.grad_scale is not None,
        CHECKED=work.found_inf is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time: AdamW and Lion, fp32 and bf16."""
    pointers = (
        "i64",
        "i32",
        "fp32",
        "u8",
        "fp32",
        "u8",
        "fp32",
        "fp32",
        "fp32",
        "i32",
        "i32",
        "fp32",
        "fp32",
    )
    names = pooled_8bit_step_kernel.arg_names
    signature = {name: f"*{kind}" for name, kind in zip(names, pointers, strict=False)}
    signature.update(dict.fromkeys(names[len(pointers) :], "constexpr"))
    return [
        {
            "name": f"pooled_8bit_step_{'lion' if lion else 'adamw'}_{suffix}",
            "fn": pooled_8bit_step_kernel,
            "signature": signature,
            "constexprs": {
                "P_TYPE": kind, "G_TYPE": kind, "LION": lion, "MAXIMIZE": False, "SCALED": False,
                "CHECKED": True, "BLOCK": BLOCK,
            },
            "attrs": {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
            "num_warps": NUM_WARPS,
            "num_stages": 2,
            "fast": suffix == "fp32",
        }
        for lion in (False, True)
        for suffix, kind in (("fp32", tl.float32), ("bf16", tl.bfloat16))
    ]  # fmt: skip
