"""Memory that one step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

#: Page faults of eight steps of a low rank on 256 experts, each with 32 MiB of gradients.
STEPS = """
import resource, sys
import torch
from lightning_peft_kernels import expert_groups
from lightning_peft_kernels.experts_low_rank import add_low_rank

if sys.argv[1] == "not kept":
    expert_groups.keep_freed = lambda: None
groups = expert_groups.Groups.counted([2] * 256, 512, torch.device("cpu"))
factors = [
    [torch.randn(s, requires_grad=True) for s in ((256, 8, 256), (256, 256, 8))] for _ in range(8)
]
x = torch.randn(512, 256, requires_grad=True)
for step in range(10):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x.clone()
    for A, B in factors:
        y = add_low_rank(y, y, A, B, 0.1, groups)
    y.sum().backward()
    for factor in (*factors, [x]):
        for t in factor:
            t.grad = None
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_a_step_finds_the_memory_of_the_last() -> None:
    assert faults("kept") < 0.5 * faults("not kept")
