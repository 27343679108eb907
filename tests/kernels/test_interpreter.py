"""Triton kernels in the interpreter, each script in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tests.helpers.distributed.once import made_once

HERE = Path(__file__).parent
SCRIPTS = [
    "nf4/interpreter_script.py",
    "nf4/small_batch_interpreter_script.py",
    "experts/interpreter_script.py",
    "experts/low_rank_interpreter_script.py",
    "block_scaled/interpreter_script.py",
    "scale/interpreter_script.py",
    "dropout/interpreter_script.py",
    "lora/interpreter_script.py",
]
#: Whose kernels loop up to a size.
LOOPS = (
    "nf4/small_batch_interpreter_script.py",
    "experts/interpreter_script.py",
    "lora/interpreter_script.py",
)


def older(module, *version):
    return tuple(int(part) for part in module.__version__.split(".")[:2]) < version


def interpret(scripts, arguments, folder):
    """The logs of the scripts, run one after the other by one job."""
    job = [sys.executable, str(HERE / "interpreter_job.py"), str(folder)]
    subprocess.run(
        [*job, *(str(HERE / script) for script in scripts), "--", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        timeout=280,
        check=True,
    )
    return [(folder / f"{position}.log").read_text() for position in range(len(scripts))]


def check(log):
    printed, _, status = log.rpartition("\n")
    assert status == "0", printed[-3000:]
    assert printed.strip().endswith(("cases equal", "agrees"))


def skip_if_too_old(script):
    triton = pytest.importorskip("triton")
    # A loop whose bounds are known at run time: triton 3.6 makes an int of an array [1] there,
    # which numpy 2.4 refuses; triton 3.7 takes the one element out first.
    if script in LOOPS and older(triton, 3, 7) and not older(numpy, 2, 4):
        pytest.skip(f"triton {triton.__version__}'s interpreter does not run on numpy 2.4")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """What each script printed on a sample of its cases."""
    pytest.importorskip("triton")
    folder = made_once(
        tmp_path_factory, "interpreter", lambda folder: interpret(SCRIPTS, ["sample"], folder)
    )
    return {
        script: (folder / f"{position}.log").read_text() for position, script in enumerate(SCRIPTS)
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_interpreter(script, logs):
    skip_if_too_old(script)
    check(logs[script])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_interpreter_on_every_case(script, tmp_path):
    skip_if_too_old(script)
    (log,) = interpret([script], [], tmp_path)
    check(log)
