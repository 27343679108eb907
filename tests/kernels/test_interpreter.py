"""Triton kernels in the interpreter, each file in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

HERE = Path(__file__).parent
#: Whose kernels loop up to a size.
LOOPS = (
    "nf4/small_batch_interpreter_script.py",
    "experts/interpreter_script.py",
    "lora/interpreter_script.py",
)


def older(module, *version):
    return tuple(int(part) for part in module.__version__.split(".")[:2]) < version


@pytest.mark.parametrize(
    "script",
    [
        "nf4/interpreter_script.py",
        "nf4/small_batch_interpreter_script.py",
        "experts/interpreter_script.py",
        "scale/interpreter_script.py",
        "dropout/interpreter_script.py",
        "lora/interpreter_script.py",
    ],
)
def test_interpreter(script):
    triton = pytest.importorskip("triton")
    # A loop whose bounds are known at run time: triton 3.6 makes an int of an array [1] there,
    # which numpy 2.4 refuses; triton 3.7 takes the one element out first.
    if script in LOOPS and older(triton, 3, 7) and not older(numpy, 2, 4):
        pytest.skip(f"triton {triton.__version__}'s interpreter does not run on numpy 2.4")
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(("cases equal", "agrees"))
