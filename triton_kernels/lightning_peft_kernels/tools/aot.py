"""Compiles every Triton kernel and configuration ahead of time; needs no GPU.

    python -m lightning_peft_kernels.tools.aot [--fast] [--only NAME] [--csv FILE]

prints kernel, target, registers, shared memory, spills and the kind of matrix instruction. It exits
with an error if a row breaks a rule: nothing spills, shared memory fits the chip, and matrix
products of 64 rows and more use `wgmma` on sm_90.

Each compilation runs in its own process, forked from one that has imported Triton: an LLVM error
ends its process. A module with kernels lists them in `aot_specs()`, with the keys
    name, fn, signature (every argument, in order), constexprs, attrs, num_warps, num_stages,
and optionally options (compiler), gemm (must use `wgmma`), rows or rank (of a product, by which
`targets` leaves a configuration out or changes its stages), only (``"cuda"`` or ``"hip"``), fast.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightning_peft_kernels.tools.targets import TARGETS, stages_for, why_left_out

__all__ = [
    "Row",
    "broken",
    "compile_kernel",
    "compile_one",
    "cuobjdump",
    "spec",
    "specs",
    "table",
]

MODULES = (
    "lightning_peft_kernels.nf4.dequantize_triton",
    "lightning_peft_kernels.nf4.quantize_triton",
    "lightning_peft_kernels.fp8.quantize_rows_triton",
    "lightning_peft_kernels.nf4.small_batch_triton",
    "lightning_peft_kernels.nf4.k_parts_triton",
    "lightning_peft_kernels.nf4.pair_table_triton",
    "lightning_peft_kernels.experts.grouped_linear_triton",
    "lightning_peft_kernels.experts.dequantize_active_triton",
    "lightning_peft_kernels.experts.low_rank_triton",
    "lightning_peft_kernels.block_scaled.decode_triton",
    "lightning_peft_kernels.scale.triton",
    "lightning_peft_kernels.lora.rank_gradients_triton",
    "lightning_peft_kernels.dropout.triton",
    "lightning_peft_kernels.optim.adamw_8bit_triton",
)


@dataclass
class Row:
    """One kernel on one target.

    Attributes:
        kernel: Name and configuration.
        target: One of `TARGETS`.
        registers: Per thread (vector registers on AMD); -1 if compiling failed.
        shared: Bytes per block.
        spills: Bytes per thread: stack and local memory (scratch on AMD).
        matrix: Matrix instruction used, or "-".
        instructions: Static count of machine instructions; 0 on AMD.
        outcome: "ok", "skipped: reason", or the error.
        gemm: If True, a matrix instruction over full warp groups is expected.
    """

    kernel: str
    target: str
    registers: int = -1
    shared: int = 0
    spills: int = 0
    matrix: str = "-"
    instructions: int = 0
    outcome: str = "ok"
    gemm: bool = False


def spec(
    name: str,
    fn: Any,
    types: Sequence[str],
    constexprs: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    **more: Any,
) -> dict[str, Any]:
    """Return one entry of an `aot_specs()`.

    Args:
        name: Kernel and configuration.
        fn: The `@triton.jit` function; its constexprs follow its other arguments.
        types: Types of the other arguments, in order: ``"*bf16"``, ``"i32"``, ``"fp32"`` …
        constexprs: Value by name.
        num_warps: Warps per program.
        num_stages: Stages of software pipelining.
        more: options, gemm, rows, rank, only, fast.
    """
    names = [n for n in fn.arg_names if n not in constexprs]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constexprs, "constexpr")
    # Pointers and sizes of real weights are multiples of 16; without this, vector access vanishes.
    aligned = [i for i, kind in enumerate(types) if kind != "fp32"]
    return {
        "name": name,
        "fn": fn,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i in aligned},
        "num_warps": num_warps,
        "num_stages": num_stages,
        **more,
    }


def specs() -> list[dict[str, Any]]:
    """Return the entries of every module of `MODULES`."""
    return [s for module in MODULES for s in importlib.import_module(module).aot_specs()]


def broken(row: Row) -> str:
    """Return the rule that a row breaks, or ""."""
    if row.outcome.startswith("skipped"):
        return ""
    if row.outcome != "ok":
        return row.outcome
    limit = TARGETS[row.target].shared
    if row.spills:
        return f"{row.spills} bytes spilled"
    if row.shared > limit:
        return f"{row.shared} bytes of shared memory, {limit} on the chip"
    if row.gemm and row.target == "sm_90" and row.matrix != "wgmma":
        return f"expected wgmma, got {row.matrix}"
    return ""


def compile_one(spec: dict[str, Any], target: str) -> Row:
    """Compile in this process and read the binary."""
    row = Row(spec["name"], target, gemm=bool(spec.get("gemm")))
    at = TARGETS[target]
    reason = why_left_out(spec, at.chip)
    if reason:
        row.outcome = f"skipped: {reason}"
        return row
    kernel = compile_kernel(spec, target)
    row.shared = int(kernel.metadata.shared)
    if at.backend == "cuda":
        _read_cubin(row, kernel.asm["cubin"], kernel.asm["ptx"])
    else:
        _read_amdgcn(row, kernel.asm["amdgcn"])
    return row


def compile_kernel(spec: Mapping[str, Any], target: str) -> Any:
    """Compile one configuration for a target; return Triton's compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    at = TARGETS[target]
    source = ASTSource(
        fn=spec["fn"],
        signature=spec["signature"],
        constexprs=spec["constexprs"],
        attrs=spec["attrs"],
    )
    options = {"num_warps": spec["num_warps"], "num_stages": stages_for(spec, at.chip)}
    options.update(spec.get("options", {}))
    return triton_compile(
        source, target=GPUTarget(at.backend, at.architecture, at.lanes), options=options
    )


def _read_cubin(row: Row, cubin: bytes, ptx: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        sass = cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        row.outcome = "cuobjdump gave no resource usage"
        return
    row.registers = int(found[1])
    row.spills = int(found[2]) + int(found[3])
    row.instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE))
    for name, needle in (
        ("tcgen05", "tcgen05.mma"),
        ("wgmma", "wgmma.mma_async"),
        ("mma", "mma.sync"),
    ):
        if needle in ptx:
            row.matrix = name
            return


def cuobjdump(flag: str, path: str) -> str:
    """Return what NVIDIA's disassembler, which comes with Triton, says of a binary."""
    import triton

    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [str(binary), flag, path], capture_output=True, text=True, check=True
    ).stdout


def _read_amdgcn(row: Row, text: str) -> None:
    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    row.registers = number(r"\.vgpr_count:\s+(\d+)")
    row.spills = number(r"\.vgpr_spill_count:\s+(\d+)") * 4 + number(r"; ScratchSize: (\d+)")
    row.matrix = "mfma" if "v_mfma" in text else "-"


def _child(pipe: Connection, index: int, target: str, cache: str) -> None:
    import os

    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    spec = specs()[index]
    try:
        pipe.send(compile_one(spec, target))
    except Exception as error:  # the parent reports it as this row's outcome
        lines = str(error).strip().splitlines() or [""]
        row = Row(spec["name"], target, gemm=bool(spec.get("gemm")))
        row.outcome = f"{type(error).__name__}: {lines[-1][:160]}"
        pipe.send(row)


def _isolated(index: int, spec: dict[str, Any], target: str) -> Row:
    """Compile in a forked process; a crash becomes the row's outcome."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as cache:
        child = context.Process(target=_child, args=(theirs, index, target, cache))
        child.start()
        theirs.close()
        try:
            row: Row = ours.recv()
        except EOFError:
            row = Row(spec["name"], target, outcome="the compiler ended its process")
        child.join()
    return row


def table(
    *, fast: bool = False, only: str = "", targets: Iterable[str] = tuple(TARGETS)
) -> Iterator[Row]:
    """Compile and yield rows, one after the other.

    Args:
        fast: If True, only specs marked `fast`.
        only: Part of the name of a spec.
        targets: Targets to compile for.
    """
    import torch
    import triton  # noqa: F401  imported once, before forking

    torch.set_num_threads(1)
    for index, spec in enumerate(specs()):
        if (fast and not spec.get("fast")) or only not in spec["name"]:
            continue
        for target in targets:
            yield _isolated(index, spec, target)


def main() -> int:
    """Print the table, write it to a file, and report broken rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one configuration per kernel")
    parser.add_argument("--only", default="", help="part of the name of a kernel")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    options = parser.parse_args()
    import triton

    rows = []
    form = "{:<58} {:<7} {:>5} {:>7} {:>6} {:>6} {:<8} {}"
    print(form.format("kernel", "target", "regs", "shared", "spill", "sass", "matrix", "outcome"))
    for row in table(fast=options.fast, only=options.only, targets=options.targets):
        rows.append(row)
        outcome = broken(row) or row.outcome
        print(
            form.format(
                row.kernel, row.target, row.registers, row.shared, row.spills, row.instructions,
                row.matrix, outcome,
            ),
            flush=True,
        )  # fmt: skip
    if options.csv:
        with options.csv.open("w", newline="") as file:
            names = [f.name for f in fields(Row) if f.name != "gemm"]
            out = csv.DictWriter(file, [*names, "triton"], extrasaction="ignore")
            out.writeheader()
            out.writerows({**asdict(row), "triton": triton.__version__} for row in rows)
    bad = [row for row in rows if broken(row)]
    print(f"{len(rows)} rows, {len(bad)} broken")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
