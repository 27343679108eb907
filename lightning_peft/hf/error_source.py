"""Errors about an adapter on disk say where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_peft.hf.config import CONFIG
from lightning_peft.hf.files import TENSORS

__all__ = ["adapter_folder", "naming_files"]

#: First words of messages from checks that get the content without its path.
_CONTENT = "adapter file"


def adapter_folder(directory: Path, adapter_name: str) -> Path:
    """Return the folder of an adapter: peft writes all but "default" into folders by name."""
    inner = directory / adapter_name
    return inner if (inner / CONFIG).is_file() else directory


@contextmanager
def naming_files(source: object, adapter_name: str = "default") -> Iterator[None]:
    """Within the block, messages begin with the path of the adapter, or of the file in it.

    The checks see what the files hold, and call them adapter_config.json or the adapter file.

    Args:
        source: A directory or a file; of anything else, messages stay as they are.
        adapter_name: Name that the adapter is looked up under.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if isinstance(source, str | Path):
            error.args = (_with_path(str(error), Path(source), adapter_name), *error.args[1:])
        raise


def _with_path(message: str, source: Path, adapter_name: str) -> str:
    folder = adapter_folder(source, adapter_name)
    for start, name in ((CONFIG, CONFIG), (_CONTENT, TENSORS)):
        if message.startswith(f"{start}: "):
            file = folder / name if folder.is_dir() else folder
            return f"{file}: {message.removeprefix(f'{start}: ')}"
    named = str(folder) in message or message.startswith("load_adapter: ")  # of its arguments
    return message if named else f"{folder}: {message}"
