"""Directories and hub ids: a hub id becomes the directory of `huggingface_hub`'s cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ADAPTER_FILES", "MODEL_FILES", "local_directory", "upload"]

#: Files of an adapter, and files of a model, that are worth downloading.
ADAPTER_FILES = ("adapter_config.json", "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")


def local_directory(source: str | Path, files: Sequence[str] = ADAPTER_FILES) -> Path:
    """Return a directory for a path or a hub id such as ``"org/name"`` or ``"org/name@revision"``.

    A hub id is looked up in the local cache first, so that an offline machine can use it.

    Raises:
        FileNotFoundError: neither a path nor a hub id that is cached or can be downloaded.
    """
    path = Path(source)
    name, _, revision = str(source).partition("@")
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{source}: expected a directory, or huggingface_hub to look up a hub id, found "
            "neither; pip install huggingface_hub, or give a directory"
        ) from None
    return Path(_download(snapshot_download, name, revision or None, files))


def _download(download: object, name: str, revision: str | None, files: Sequence[str]) -> str:
    assert callable(download)
    settings = {"revision": revision, "allow_patterns": list(files)}
    try:
        return str(download(name, local_files_only=True, **settings))
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        return str(download(name, **settings))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: expected a directory, or a hub id that is in the local cache or can be "
            f"downloaded, found neither ({reason}); check the name, download it on a machine with "
            "network (hf download), or give a directory"
        ) from None


def upload(directory: Path, name: str) -> None:
    """Upload a directory to the hub; the repository is created if it is absent.

    Raises:
        ModuleNotFoundError: huggingface_hub is missing.
        OSError: no network, no such name or no right to write; the directory stays.
    """
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "push_to_hub: expected huggingface_hub, found none; pip install huggingface_hub"
        ) from None
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"push_to_hub={name!r}: expected a repository that can be written, got an error "
            f"({reason}); the adapter is in {directory}: log in (hf auth login) and upload it "
            f"(hf upload {name} {directory})"
        ) from error
