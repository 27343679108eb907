"""Every decision about a launch on a chip that is not there: a launch that fits, or why not.

`run_cells` runs the public ops on CPU tensors, which live on the fake chip. A cell is one op with
one dtype and shape class; its line says which kernels were launched with how much shared memory, or
which implementation ran instead and why.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from lightning_peft_kernels.block_scaled.decode import decode_blocks
from lightning_peft_kernels.block_scaled.encode import encode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, Element
from lightning_peft_kernels.dispatch import Backend, Decision, select, use_backend
from lightning_peft_kernels.dropout.ops import seeded_dropout
from lightning_peft_kernels.experts.grouped_linear import nf4_grouped_linear
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.experts.low_rank import add_low_rank
from lightning_peft_kernels.experts.selection import select_experts
from lightning_peft_kernels.fp8.linear import fp8_lora_linear
from lightning_peft_kernels.fp8.products import select_fp8
from lightning_peft_kernels.launch import FAILURES
from lightning_peft_kernels.lora.linear import lora_linear
from lightning_peft_kernels.lora.selection import select_one_pass
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.packed import Packing
from lightning_peft_kernels.nf4.selection import select_pairs, select_product
from lightning_peft_kernels.nf4.small_batch import multiply_few
from lightning_peft_kernels.optim.adamw_8bit import pooled_8bit_step
from lightning_peft_kernels.optim.step_inputs import PooledStep
from lightning_peft_kernels.scale.ops import output_scale
from torch import Tensor

from tests.helpers.fake_gpu import FakeDriver, use_fake_gpu

__all__ = ["FIELDS", "Cell", "cells", "run_cells", "run_layer", "run_refused", "run_strided"]

CPU = torch.device("cpu")
FIELDS = ("chip", "cell", "kernels", "shared", "limit", "stages", "instead")
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Cell:
    """One op in one configuration.

    Attributes:
        name: Op, configuration and dtype.
        run: Calls the op.
        decision: What the dispatch selects for it.
        fast: Whether it is the op's one configuration of the fast set.
    """

    name: str
    run: Callable[[], object]
    decision: Callable[[], Decision]
    fast: bool = False


def _packed(*lead: int, N: int, K: int, nested: bool = True) -> Packed4bit:
    blocks = N * K // 64
    scales = torch.zeros(*lead, blocks, dtype=torch.uint8 if nested else torch.float32)
    second = torch.zeros(*lead, -(-blocks // 256)) if nested else None
    offset = torch.zeros(*lead, 1) if nested else None
    return Packed4bit(torch.zeros(*lead, N * K // 2, dtype=torch.uint8), scales, second, offset)


def _quantize(dtype: torch.dtype, block_size: int) -> object:
    return quantize_4bit(torch.ones(32, 4096, dtype=dtype), block_size=block_size)


def _dequantize(dtype: torch.dtype, nested: bool) -> object:
    return dequantize_4bit(_packed(N=128, K=256, nested=nested), (128, 256), dtype)


def _decode(dtype: torch.dtype, element: Element) -> object:
    layout = BlockLayout(element, 1, 32)
    q = encode_blocks(torch.ones(2, 128, 256), layout)
    return decode_blocks(q, (128, 256), layout, dtype)


def _scale(dtype: torch.dtype) -> None:
    u, g, bias = (torch.ones(s, dtype=dtype, requires_grad=True) for s in ((64, 256), 256, 256))
    output_scale(u, g, bias).sum().backward()


def _lora(dtype: torch.dtype, rank: int) -> None:
    x, W = torch.ones(128, 64, dtype=dtype, requires_grad=True), torch.ones(512, 64, dtype=dtype)
    A, B = (torch.ones(s, dtype=dtype, requires_grad=True) for s in ((rank, 64), (512, rank)))
    lora_linear(x, W, None, A, B, 2.0).sum().backward()


def _few_tokens(dtype: torch.dtype, tokens: int, backend: Backend) -> None:
    N, K = 8448, 256
    with use_backend(backend):
        nf4_linear(torch.ones(tokens, K, dtype=dtype), _packed(N=N, K=K), (N, K), None)


def _pairs(dtype: torch.dtype, tokens: int) -> None:
    shape, how = (8448, 256), select_pairs(CPU, dtype, tokens, (8448, 256))
    x, q = torch.ones(tokens, 256, dtype=dtype), _packed(N=8448, K=256)
    multiply_few(x, q, Packing(shape, "nf4", 64), None, None, None, "auto", how)


def _groups(rows: int) -> Groups:
    return Groups(torch.arange(1, 9, dtype=torch.int32) * rows, 8 * rows, has_unassigned_rows=False)


def _experts(dtype: torch.dtype, rows: int) -> None:
    x = torch.ones(8 * rows, 256, dtype=dtype, requires_grad=True)
    nf4_grouped_linear(x, _packed(8, N=128, K=256), (128, 256), _groups(rows)).sum().backward()


def _expert_ranks(dtype: torch.dtype, rank: int, rows: int) -> None:
    X, y = torch.ones(8 * rows, 64, dtype=dtype), torch.ones(8 * rows, 256, dtype=dtype)
    A, B = (torch.ones(8, *s, dtype=dtype, requires_grad=True) for s in ((rank, 64), (256, rank)))
    add_low_rank(y.clone(), X, A, B, 1.0, _groups(rows), in_place=True).sum().backward()


def _fp8(dtype: torch.dtype) -> None:
    x, A, B = (
        torch.ones(s, dtype=dtype, requires_grad=True) for s in ((32, 256), (8, 256), (128, 8))
    )
    q = _packed(N=128, K=256)
    fp8_lora_linear(x, q, (128, 256), torch.ones(1), None, A, B).sum().backward()


def _step(dtype: torch.dtype, lion: bool) -> None:
    state: list[Tensor] = [torch.zeros(512, dtype=torch.uint8), torch.zeros(2)]
    second = [None, None] if lion else [t.clone() for t in state]
    p, hyper = torch.ones(512, dtype=dtype), torch.ones(1, 7)
    pooled_8bit_step(PooledStep([p], [p.clone()], [0], hyper, *state, *second, None, None))


def cells() -> Iterator[Cell]:
    """Yield the cells; the same on every chip."""
    for name, dtype in FLOATS.items():
        plain = partial(select, device=CPU, dtype=dtype)
        fast = name == "fp16"
        for block in (64, 4096):
            yield Cell(
                f"quantize block {block} {name}", partial(_quantize, dtype, block),
                partial(plain, "quantize_4bit"), fast and block == 64,
            )  # fmt: skip
        for nested in (True, False):
            yield Cell(
                f"dequantize {'nested' if nested else 'plain'} {name}",
                partial(_dequantize, dtype, nested), partial(plain, "dequantize_4bit"),
                fast and nested,
            )  # fmt: skip
        for element in ("e4m3", "e2m1", "uint4"):
            yield Cell(
                f"decode {element} {name}", partial(_decode, dtype, element),
                partial(plain, "decode_blocks"), fast and element == "e4m3",
            )  # fmt: skip
        yield Cell(f"scale {name}", partial(_scale, dtype), partial(plain, "output_scale"), fast)
        drop = partial(
            seeded_dropout, torch.ones(64, 64, dtype=dtype), torch.zeros(1, dtype=torch.int64), 0.5
        )
        yield Cell(f"dropout {name}", drop, partial(plain, "seeded_dropout"), fast)
        for lion in (False, True):
            yield Cell(
                f"8-bit {'Lion' if lion else 'AdamW'} {name}", partial(_step, dtype, lion),
                partial(plain, "pooled_8bit_step"), fast and not lion,
            )  # fmt: skip
        yield Cell(
            f"fp8 layer {name}", partial(_fp8, dtype), partial(select_fp8, (128, 256), CPU), fast
        )
        for rank in (8, 32, 64):
            one_pass = partial(select_one_pass, CPU, dtype, rank)
            yield Cell(
                f"LoRA gradients rank {rank} {name}", partial(_lora, dtype, rank), one_pass,
                fast and rank == 8,
            )  # fmt: skip
            for rows in (4, 40):
                yield Cell(
                    f"experts' LoRA rank {rank}, {rows} rows {name}",
                    partial(_expert_ranks, dtype, rank, rows),
                    partial(select_one_pass, CPU, dtype, rank, None, "expert_low_rank"),
                    fast and rank == 8 and rows == 40,
                )  # fmt: skip
        for tokens in (1, 4, 5, 17, 64):
            ours: Backend = "auto" if tokens == 1 else "triton"
            yield Cell(
                f"{tokens} tokens {name}", partial(_few_tokens, dtype, tokens, ours),
                partial(select_product, CPU, dtype, tokens, (8448, 256), ours),
                fast and tokens in (1, 64),
            )  # fmt: skip
        yield Cell(
            f"pairs {name}", partial(_pairs, dtype, 8),
            partial(select_pairs, CPU, dtype, 8, (8448, 256)), fast,
        )  # fmt: skip
        for rows in (1, 12, 40, 65):
            yield Cell(
                f"experts, {rows} rows {name}", partial(_experts, dtype, rows),
                partial(select_experts, CPU, dtype, 8 * rows, 8, (128, 256)),
                fast and rows == 40,
            )  # fmt: skip


def run_cells(chip: str, file: str, fast: bool = False) -> None:
    """Run the cells on a chip in this process; write a table and print its name at the end."""
    driver = use_fake_gpu(chip)
    Groups.on_host = property(lambda self: False)  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    with Path(file).open("w", newline="") as out:
        table = csv.DictWriter(out, FIELDS)
        table.writeheader()
        for cell in cells():
            if cell.fast or not fast:
                table.writerow(_run(cell, chip, driver))
    print("ran", chip, file=sys.stdout, flush=True)


def _run(cell: Cell, chip: str, driver: FakeDriver) -> dict[str, object]:
    driver.launched.clear()
    FAILURES.clear()
    cell.run()
    found = driver.launched
    decision = cell.decision()
    taken = decision.backend in ("triton", "fused", "pairs", "scaled_mm")
    failed = [f"{op} ({name}): {reason}" for (op, name, _), reason in FAILURES.items()]
    if not taken:
        failed.append(f"{decision.backend}: {decision.reason}")
    return {
        "chip": chip,
        "cell": cell.name,
        "kernels": " ".join(dict.fromkeys(one.kernel.strip("_") for one in found)),
        "shared": max((one.shared for one in found), default=0),
        "limit": driver.gpu.shared,
        "stages": max((one.stages for one in found), default=0),
        "instead": "; ".join(failed),
    }


def run_strided(chip: str) -> None:
    """Give ops strided vectors and rows; kernels must receive them without gaps."""
    driver = use_fake_gpu(chip)
    q, every_other = _packed(N=64, K=64), slice(None, None, 2)

    def strided(*shape: int) -> Tensor:
        return torch.ones(*shape[:-1], 2 * shape[-1], dtype=torch.bfloat16)[..., every_other]

    u, vector = strided(32, 64), strided(64)
    op = torch.ops.lightning_peft
    op.output_scale(u.contiguous(), vector, vector)
    op.output_scale_backward(u.contiguous(), u.contiguous(), vector)
    op.nf4_small_batch(
        strided(3, 64), *q, [64, 64], strided(3, 8), strided(64, 8), vector, "nf4", 64
    )
    op.seeded_dropout(u, torch.zeros(1, dtype=torch.int64), 0.5)
    op.rank_gradients(u, strided(32, 8), strided(64, 8), 1.0)
    op.quantize_rows_e4m3(u)
    for one in driver.launched:
        strides = [a.stride() for a in one.arguments if isinstance(a, Tensor)]
        whole = [a.is_contiguous() for a in one.arguments if isinstance(a, Tensor)]
        assert all(whole), (one.kernel, strides)
    print(*sorted({one.kernel for one in driver.launched}), flush=True)


def run_layer(chip: str) -> None:
    """Print the launches of one adapted NF4 layer, forward and backward."""
    driver = use_fake_gpu(chip)
    x, A, B = (
        torch.ones(s, dtype=torch.bfloat16, requires_grad=True)
        for s in ((128, 256), (8, 256), (128, 8))
    )
    y = nf4_lora_linear(x, _packed(N=128, K=256), (128, 256), None, A, B, 0.5)
    forward = len(driver.launched)
    y.sum().backward()
    names = [one.kernel.strip("_") for one in driver.launched]
    print(" ".join(names[:forward]), "|", " ".join(names[forward:]), flush=True)


def run_refused(chip: str) -> None:
    """Train a layer with a kernel that the selection allows and the chip refuses."""
    driver = use_fake_gpu(chip)
    driver.utils.gpu = replace(driver.gpu, shared=16_384)  # CHIPS keeps the larger limit
    given = [torch.randn(s, dtype=torch.float16) for s in ((128, 64), (8, 64), (512, 8))]
    W = torch.randn(512, 64, dtype=torch.float16)
    found = {}
    backends: tuple[Backend, ...] = ("auto", "torch")
    for backend in backends:
        x, A, B = (t.clone().requires_grad_() for t in given)
        with use_backend(backend), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                lora_linear(x, W, None, A, B, 2.0).square().mean().backward()
        found[backend] = [t.grad for t in (x, A, B)]
        print(backend, len(said), *(str(one.message) for one in said), flush=True)
    for ours, want in zip(found["auto"], found["torch"], strict=True):
        assert ours is not None
        assert want is not None
        assert torch.equal(ours, want)
    assert not driver.launched
    print(select_one_pass(CPU, torch.float16, 8).reason, flush=True)
