"""A checkpoint file is whole or absent."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.rng_state import restore_rng, rng_state
from tests.helpers.forks import run_function
from tests.helpers.nets import Plain, peft, trainer

DATA: dict[str, Any] = {"state_dict": {"a": torch.arange(1000.0)}, "epoch": 3}


def test_round_trip_leaves_nothing_beside(tmp_path: Path) -> None:
    atomic_file.write(DATA, tmp_path / "deep" / "a.ckpt")
    read = atomic_file.read(tmp_path / "deep" / "a.ckpt")
    assert torch.equal(read["state_dict"]["a"], DATA["state_dict"]["a"])
    assert os.listdir(tmp_path / "deep") == ["a.ckpt"]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_keeps_the_former_file(
    stage: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    atomic_file.write(DATA, path)
    former = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, stage, fail)
    said = r"expected 4,000 bytes and more.*free" if code == errno.ENOSPC else r"."
    with pytest.raises(OSError, match=said) as caught:
        atomic_file.write(DATA, path)
    assert caught.value.errno == code
    assert path.read_bytes() == former
    assert os.listdir(tmp_path) == ["a.ckpt"]


def write_beyond_the_limit(path: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    atomic_file.write({"state_dict": {"a": torch.zeros(10)}}, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        atomic_file.write({"state_dict": {"a": torch.zeros(100_000)}}, path)
    except (OSError, RuntimeError) as error:
        print("failed:", type(error).__name__)


def test_a_write_that_the_system_cuts_off(tmp_path: Path) -> None:
    """A real short write, by a file-size limit, in a process of its own."""
    folder = tmp_path / "files"
    folder.mkdir()
    target = f"{__name__}:write_beyond_the_limit"
    assert "failed:" in run_function(target, [str(folder / "a.ckpt")], tmp_path)
    assert atomic_file.read(folder / "a.ckpt")["state_dict"]["a"].numel() == 10
    assert os.listdir(folder) == ["a.ckpt"]


def test_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    host = atomic_file._HOST
    dead = tmp_path / f".a.ckpt.tmp-{host}-{done.stdout.strip()}"
    alive = tmp_path / f".b.ckpt.tmp-{host}-{os.getppid()}"
    elsewhere = tmp_path / f".c.ckpt.tmp-another_host-{done.stdout.strip()}"
    for file in (dead, alive, elsewhere):
        file.write_bytes(b"half")
    atomic_file.write(DATA, tmp_path / "a.ckpt")
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, elsewhere.name, "a.ckpt"])


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_names_the_newest_other(keep: float, tmp_path: Path) -> None:
    for name in ("old.ckpt", "new.ckpt", "cut.ckpt"):
        atomic_file.write(DATA, tmp_path / name)
    os.utime(tmp_path / "old.ckpt", (1, 1))
    whole = (tmp_path / "cut.ckpt").read_bytes()
    size = int(keep if keep >= 1 else keep * len(whole))
    (tmp_path / "cut.ckpt").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"cut\.ckpt: expected a whole.*new\.ckpt"):
        atomic_file.read(tmp_path / "cut.ckpt")


def test_a_truncated_file_in_the_trainer(tmp_path: Path) -> None:
    it = trainer(peft(), max_epochs=1, folder=tmp_path)
    it.fit(Plain())
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"last\.ckpt: expected a whole.*epoch=0\.ckpt"):
        trainer(peft(), max_epochs=2).fit(Plain(), ckpt_path=last)


def test_other_content_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"expected a checkpoint \(a dict\), got list"):
        atomic_file.read(tmp_path / "list.ckpt")
    with pytest.raises(FileNotFoundError, match="found no such file"):
        atomic_file.read(tmp_path / "absent.ckpt")


def test_random_states_are_plain_and_exact(tmp_path: Path) -> None:
    import random

    import numpy as np

    torch.save(rng_state(), tmp_path / "rng")
    want = torch.rand(3), random.random(), np.random.rand(3).tolist(), np.random.randn()
    restore_rng(torch.load(tmp_path / "rng", weights_only=True))
    got = torch.rand(3), random.random(), np.random.rand(3).tolist(), np.random.randn()
    assert torch.equal(got[0], want[0])
    assert got[1:] == want[1:]
