"""Triton kernels in the interpreter, each file in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "script",
    [
        "interpret_nf4.py",
        "interpret_decode.py",
        "interpret_output_scale.py",
        "interpret_dropout.py",
    ],
)
def test_interpreter(script):
    pytest.importorskip("triton")
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
