"""`load_packed`: a released checkpoint with its weights packed as they are in the files.

transformers dequantises some formats where its kernels are missing, and others always. Here its
loader builds the model, renames, merges experts and ties weights as in `from_pretrained`, but every
packed weight gets parameters of the file's dtypes, and our storages compute with them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lightning_peft.storage.tensor_files import TensorFiles

__all__ = ["load_packed"]

M = TypeVar("M", bound=nn.Module)


def load_packed(model_class: type[M], directory: str | Path, **options: Any) -> M:
    """Load a quantised checkpoint of transformers without dequantising it, on any device.

    The layers are those of the dense model: adapters, files and merges are those that fit the
    dequantised model too. `attach`, `PEFT` and `save_pretrained` work as with a dense model.

    Args:
        model_class: `AutoModelForCausalLM`, or any class with `from_pretrained`.
        directory: Local directory with config.json and safetensors.
        options: Further arguments of `from_pretrained`, such as ``dtype`` or ``device_map``.

    Returns:
        The model in evaluation mode, as `from_pretrained` returns it.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: no config.json or safetensors, or a shard is missing.
        ValueError: the checkpoint is not quantised, its format is not known, a file is damaged, or
            a tensor is missing or has another shape or values that no encoder writes.
    """
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "load_packed: expected transformers, whose loader builds the model, found none; pip "
            "install transformers"
        )
    from lightning_peft.hf.packed_quantizer import loaded

    folder = Path(directory)
    _require_files(folder)
    model: M = loaded(model_class, folder, options)
    return model


def _require_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"load_packed: expected a local directory with config.json, got {str(folder)!r}; "
            "download the checkpoint with huggingface_hub.snapshot_download"
        )
    from safetensors import SafetensorError

    try:
        TensorFiles(folder)
    except SafetensorError as error:
        raise ValueError(
            f"load_packed {folder}: expected whole safetensors files, got one that cannot be read "
            f"({error}); download it again"
        ) from None
