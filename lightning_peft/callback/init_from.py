"""Going on from an adapter directory: `PEFT(init_from=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lightning_peft.hf.base_copies import Embeddings
from lightning_peft.hf.hub import ADAPTER_FILES, local_directory
from lightning_peft.hf.load import load_adapter
from lightning_peft.storage import StorageConfig

__all__ = ["continue_adapter"]


def continue_adapter(
    root: nn.Module,
    source: str | Path,
    *,
    adapter_name: str,
    quantization: StorageConfig | None,
    modules_to_save: Sequence[str] | None,
    embeddings: Embeddings,
    device: torch.device | None,
) -> None:
    """Attach the adapter of a directory or hub id with its trained values.

    Args:
        root: What to adapt.
        source: The directory or hub id.
        adapter_name: Name to attach under.
        quantization: How to store the base.
        modules_to_save: Modules to train fully besides those of the directory, as in `attach`.
        embeddings: What to do with the embeddings in the directory, as in `load_adapter`.
        device: Where to quantise.

    Raises:
        FileNotFoundError: no adapter there.
        RuntimeError: the base has no values yet.
    """
    if any(p.device.type == "meta" for p in root.parameters()):
        raise RuntimeError(
            f"PEFT(init_from={str(source)!r}): expected a base with values, found parameters on "
            "the meta device; build the model outside of torch.device('meta'), or resume from a "
            "checkpoint with ckpt_path"
        )
    load_adapter(
        root,
        local_directory(source, ADAPTER_FILES),
        adapter_name=adapter_name,
        quantization=quantization,
        modules_to_save=modules_to_save,
        embeddings=embeddings,
        device=device,
    )
