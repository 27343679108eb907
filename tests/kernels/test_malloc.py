"""Memory that one step frees is there for the next one."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

STEP = """
import resource, sys
import torch
from lightning_peft_kernels.experts import row_blocks
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.experts.low_rank import add_low_rank

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "not kept":
    row_blocks.keep_freed = lambda: None

def made(experts, layers):
    groups = Groups.counted([2] * experts, 2 * experts, torch.device("cpu"))
    x = torch.randn(2 * experts, 256, requires_grad=True)
    shapes = [(experts, 8, 256), (experts, 256, 8)]
    factors = [[torch.randn(s, requires_grad=True) for s in shapes] for _ in range(layers)]

    def step():
        y = x.clone()
        for A, B in factors:
            y = add_low_rank(y, y, A, B, 0.1, groups)
        y.sum().backward()
        for t in (x, *(t for pair in factors for t in pair)):
            t.grad = None

    return step
"""

#: Page faults of taking and giving back 32 MiB again and again after a small step. Whole steps tell
#: less where nothing is kept: it depends on where the holes of their heap lie.
TAKEN_AGAIN = """
made(experts=64, layers=1)()
for turn in range(8):
    if turn == 1:
        before = faults()
    gradients = [torch.ones(1 << 19) for _ in range(16)]
    del gradients
print(faults() - before)
"""

#: Page faults of eight steps with 16 MiB of gradients each.
STEPS = """
step = made(experts=256, layers=4)
for turn in range(10):
    if turn == 2:
        before = faults()
    step()
print(faults() - before)
"""


def faults(code: str, how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", STEP + code, how],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")


@glibc
def test_what_a_step_frees_is_there_again() -> None:
    assert faults(TAKEN_AGAIN, "kept") < 0.5 * faults(TAKEN_AGAIN, "not kept")


@glibc
def test_a_step_finds_the_memory_of_the_last() -> None:
    pages_of_gradients = 8 * (16 << 20) // resource.getpagesize()
    assert faults(STEPS, "kept") < 0.25 * pages_of_gradients
