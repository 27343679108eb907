"""Memory that one step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

#: Page faults of taking and giving back 32 MiB again and again, after a step of a low rank on
#: experts. No more of the step itself: where the holes of its heap lie differs from run to run.
STEPS = """
import resource, sys
import torch
from lightning_peft_kernels import expert_groups
from lightning_peft_kernels.experts_low_rank import add_low_rank

if sys.argv[1] == "not kept":
    expert_groups.keep_freed = lambda: None
groups = expert_groups.Groups.counted([2] * 64, 128, torch.device("cpu"))
A, B = (torch.randn(s, requires_grad=True) for s in ((64, 8, 256), (64, 256, 8)))
x = torch.randn(128, 256)
add_low_rank(x, x, A, B, 0.1, groups).sum().backward()
for turn in range(8):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [torch.ones(1 << 19) for _ in range(16)]
    del gradients
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
def test_what_is_freed_is_there_for_the_next_step() -> None:
    assert faults("kept") < 0.5 * faults("not kept")
