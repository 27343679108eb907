"""A folder in the place of a file or folder: at every moment one of the two can be read."""

from __future__ import annotations

import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.checkpoint import atomic_file
from tests.helpers.lightning_package import pl


def make(path: Path, kind: str, text: str) -> None:
    if kind == "folder":
        path.mkdir()
        for i in range(3):
            (path / f"piece-{i}").write_text(text)
    else:
        path.write_text(text)


def text_of(path: Path) -> str:
    """What a checkpoint says, whole."""
    if path.is_file():
        return path.read_text()
    said = {(path / f"piece-{i}").read_text() for i in range(3)}
    assert len(said) == 1
    return said.pop()


def publish_and_die(temporary: Path, target: Path, at: int, exchange: bool) -> bool:
    """Replace `target` in a forked process that kills itself before event number `at`; whether it
    came to its end before that."""
    pid = os.fork()
    if pid == 0:
        events = count()

        def fatal(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(events) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        os.replace, os.rmdir, os.unlink = map(fatal, (os.replace, os.rmdir, os.unlink))  # type: ignore[assignment]
        atomic_file._exchange = fatal(atomic_file._exchange) if exchange else lambda *_: False
        atomic_file._sync_directory = fatal(atomic_file._sync_directory)
        atomic_file.remove = fatal(atomic_file.remove)
        try:
            atomic_file.publish(temporary, target)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "no exchange"])
@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["file", "folder"])
def test_a_kill_at_any_moment_leaves_one_whole(
    old: str, new: str, exchange: bool, tmp_path: Path
) -> None:
    for at in count():
        folder = tmp_path / str(at)
        folder.mkdir()
        target, temporary = folder / "last.ckpt", folder / ".last.ckpt.tmp"
        make(target, old, "old")
        make(temporary, new, "new")
        ended = publish_and_die(temporary, target, at, exchange)
        atomic_file.recover(target)
        assert text_of(target) in ("old", "new")
        if ended:
            break
        # the next save goes through, whatever was left
        atomic_file.remove(temporary)
        make(temporary, new, "newer")
        atomic_file.publish(temporary, target)
        assert text_of(target) == "newer"
        assert [p.name for p in folder.iterdir()] == ["last.ckpt"]
    assert text_of(target) == "new"
    assert at > 1
    assert [p.name for p in folder.iterdir()] == ["last.ckpt"]


def test_names_are_exchanged_in_one_call(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    make(a, "folder", "a")
    make(b, "file", "b")
    if not atomic_file._exchange(a, b):
        pytest.skip("this file system exchanges no names")
    assert text_of(a) == "b"
    assert text_of(b) == "a"
    with pytest.raises(OSError, match="No such file"):
        atomic_file._exchange(a, tmp_path / "nowhere")


def test_a_checkpoint_that_stood_aside_is_found_when_it_is_read(tmp_path: Path) -> None:
    from lightning_peft.callback.checkpoint_io import AtomicCheckpointIO

    atomic_file.write({"a": 1}, tmp_path / ".last.ckpt.former")
    reader = AtomicCheckpointIO(pl.plugins.io.TorchCheckpointIO(), own_rows=lambda: None)
    assert reader.load_checkpoint(tmp_path / "last.ckpt") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
