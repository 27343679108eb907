"""Damaged checkpoint files: found by the checksums of the archive, before anything is read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["DamagedCheckpointError", "damage_of", "newest_undamaged"]


_FOLDER = 0x10  # of the attributes in the archive's directory, which no checksum covers


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read.

    Attributes:
        newest: The newest undamaged checkpoint in the same folder; None if there is none.
    """

    def __init__(self, path: Path, why: str) -> None:
        self.newest = newest_undamaged(path)
        advice = (
            f"the newest undamaged checkpoint here is {self.newest}; take that one"
            if self.newest
            else "no undamaged checkpoint is in its folder"
        )
        reason = (why.splitlines() or ["it ends too early"])[0][:120]
        size = sum(file.stat().st_size for file in _files(path))
        super().__init__(
            f"{path}: expected a whole checkpoint, got one that cannot be read "
            f"({size:,} bytes: {reason}); {advice}"
        )


def damage_of(path: Path) -> str:
    """Return why a file or folder of shards is damaged; "" if every checksum is right.

    Files in torch's format before 1.6 have no checksums.
    """
    for file in _files(path):
        if file.stat().st_size == 0:
            return "it is empty"
        if not _looks_like_archive(file):
            continue
        try:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
                folders = [e.filename for e in archive.infolist() if e.external_attr & _FOLDER]
        except Exception as error:  # zipfile raises many kinds on damaged directories
            return f"{type(error).__name__}: {error}"
        if bad is not None:
            return f"the checksum of {bad} is wrong"
        if folders:  # torch would read nothing, and leave uninitialised memory
            return f"{folders[0]} is marked as a folder"
    return ""


def newest_undamaged(path: Path) -> Path | None:
    """Return the newest other checkpoint in the folder whose checksums are right."""
    candidates = (
        other
        for other in path.parent.glob(f"*{path.suffix}")
        if other != path and not other.name.startswith(".") and _is_candidate(other)
    )
    for other in sorted(candidates, key=_age, reverse=True):
        if not damage_of(other):
            return other
    return None


def _age(path: Path) -> tuple[float, bool]:
    # A link to the same file comes after the file.
    return path.stat().st_mtime, path.name.startswith("sigterm")


def _is_candidate(path: Path) -> bool:
    return _looks_like_archive(path) if path.is_file() else (path / "meta.pt").is_file()


def _looks_like_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _files(path: Path) -> Iterable[Path]:
    return sorted(path.glob("*.pt")) if path.is_dir() else [path]
