"""Reads the base of a model that was built on the meta device, after adapters were attached."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_peft.checkpoint.description import is_attached
from lightning_peft.checkpoint.packed_cache import PackedCache
from lightning_peft.core.collectives import raise_on_all_ranks
from lightning_peft.core.names import in_adapter
from lightning_peft.models.history import note_read
from lightning_peft.models.streamed_fingerprint import FingerprintSampler
from lightning_peft.storage.base_files import BaseFiles
from lightning_peft.storage.materialize import materialize
from lightning_peft.storage.streaming import stream_base
from lightning_peft.strategies.sharded_init import (
    start_after_base,
    start_before_base,
    starts_from_weights,
)

__all__ = ["check_cache", "meta_tensors", "read_base", "read_into"]


def check_cache(owner: str, base_from: str | Path | None, packed_cache: str | Path | None) -> None:
    """Raise if there is a cache and no base to fill it from.

    Raises:
        ValueError: with the argument that is missing.
    """
    if packed_cache is not None and base_from is None:
        raise ValueError(
            f"{owner} packed_cache: expected base_from beside it, got {packed_cache} alone, which "
            "would not be used; give base_from=<folder of safetensors>, or leave packed_cache out"
        )


def meta_tensors(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers without memory, those of adapters included."""
    return [
        name
        for named in (model.named_parameters(), model.named_buffers())
        for name, t in named
        if t.device.type == "meta"
    ]


def read_base(
    model: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    packed_cache: str | Path | None = None,
) -> None:
    """Read the base of an adapted model that was built on the meta device.

    Weights are read a few rows at a time and quantised on the way, so the dense model is never in
    memory. On several processes every rank calls it, before DDP wraps the model.

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        attach(model, LoRA(r=16), quantization="nf4")
        read_base(model, folder, device="cuda")

    Args:
        model: The model, with adapters attached.
        folder: Holds ``*.safetensors``; names are the model's, or those of one submodule.
        device: Where the model's tensors go.
        packed_cache: Directory for packed weights. They are written there once, and read on later
            starts with the same base and quantisation.

    Raises:
        FileNotFoundError: no safetensors in the folder.
        ValueError: no adapters, a base that is in memory already, tensors that are missing or have
            another shape, or an incomplete cache; the model is unchanged. Or damaged bytes in
            the cache, or a weight that is NaN or infinite and cannot be packed, with the file and
            the tensor; build the model again.
        RuntimeError: another rank failed, or ranks read different files.
    """
    if not is_attached(model):
        raise ValueError(
            f"read_base: expected a model with adapters, got {type(model).__name__} without; call "
            "attach(model, method) before"
        )
    if not any(not in_adapter(name) for name in meta_tensors(model)):
        raise ValueError(
            f"read_base: expected a base on the meta device, got {type(model).__name__} in memory; "
            "build it inside `with torch.device('meta'):`, or leave base_from out"
        )
    place = torch.device(device)
    read_into(model, folder, place=place, device=place, packed_cache=packed_cache)


def read_into(
    model: nn.Module,
    folder: str | Path,
    *,
    place: torch.device,
    device: torch.device,
    packed_cache: str | Path | None = None,
) -> None:
    """Give a model memory and read its base; sharded or not.

    Args:
        model: The model, with adapters attached.
        folder: Folder of safetensors.
        place: Where the model's tensors go.
        device: A device that the process group can send from.
        packed_cache: As in `read_base`.
    """
    error: Exception | None = None
    try:
        base = BaseFiles(model, Path(folder))
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, f"base_from {folder}")
    cache = None if packed_cache is None else PackedCache(packed_cache, base)
    materialize(model, place)
    start_before_base(model, device)
    sampler = FingerprintSampler(model)
    if cache is not None:
        sampler.take(cache.hashes)
    after = starts_from_weights(model, device)
    stream_base(model, base, after=after, through=sampler.around, cache=cache)
    if cache is not None:
        cache.check()
    sampler.finish(device)
    if cache is not None:
        cache.finish(sampler.hashes)
    start_after_base(model, device)
    note_read(model)
