"""The model that is planned for, on the meta device: a copy of a module, or made from a config."""

from __future__ import annotations

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.models.packed_layers import (
    add_config_file,
    declare_packed,
    dense_patterns,
    released_config,
)
from lightning_peft.storage.registry import released_formats

__all__ = ["meta_model"]

_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "hidden_sizes", "embed_dim")


def meta_model(model_or_config: Any) -> nn.Module:
    """A copy on the meta device that may be changed.

    Args:
        model_or_config: A module, a Hugging Face configuration, its dictionary, the path of a
            config.json or of the directory that holds it, or a hub id in the local cache.

    Raises:
        ValueError: an unknown architecture, a configuration without sizes.
    """
    if isinstance(model_or_config, nn.Module):
        return _to_meta(model_or_config)
    config, folder = model_or_config, None
    if isinstance(config, str | Path):  # a path or a hub id
        file = _config_file(Path(config))
        config, folder = _read(file), file.parent
    if isinstance(config, dict):
        config = _config(config)
    if folder is not None:
        add_config_file(config, folder)
    if not isinstance(getattr(config, "model_type", None), str):
        raise ValueError(
            "estimate_memory: expected a module, a Hugging Face configuration or the path of a "
            f"config.json, got {type(model_or_config).__name__}; build the module under "
            'torch.device("meta") and give it'
        )
    return _build(config)


def _to_meta(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    trainer = vars(model).get("_trainer")
    if trainer is not None:
        memo[id(trainer)] = None
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    return copy.deepcopy(model, memo)


def _config_file(path: Path) -> Path:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        file = _cached(str(path)) or file
    if not file.is_file():
        raise ValueError(
            f"model: expected a config.json, a directory with one or a hub id in the local cache, "
            f"found none at {str(path)!r}; give the path of a model saved with save_pretrained, or "
            "download the model first (hf download)"
        )
    return file


def _read(file: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON ({error}); give the model's config.json") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an object of settings, got {type(found).__name__}")
    return found


def _cached(name: str) -> Path | None:
    """The config.json of a hub id in the local cache; nothing is downloaded."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def _config(data: dict[str, Any]) -> Any:
    if find_spec("transformers") is None:
        raise ValueError(
            "plan: expected transformers to read a config.json with, found none; pip install "
            "transformers, or give estimate_memory a module"
        )
    from transformers import CONFIG_MAPPING

    kind = data.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type: expected an architecture that transformers knows, got {kind!r}; update "
            'transformers, or build the module under torch.device("meta") and give it to '
            "estimate_memory"
        )
    kinds = [data, *(v for v in data.values() if isinstance(v, dict))]
    names = set(getattr(CONFIG_MAPPING[kind], "attribute_map", {}).values()) | set(_SIZES)
    if not any(name in part for part in kinds for name in names):
        raise ValueError(
            f"config of {kind!r}: expected its sizes (hidden_size, num_hidden_layers …), found "
            f"only {sorted(data)}; give the model's full config.json"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(data)
    except Exception as error:  # huggingface_hub's own types for a field of a wrong kind
        raise ValueError(
            f"config of {kind!r}: {error}; give the model's full config.json"
        ) from None


def _build(config: Any) -> nn.Module:
    import transformers

    config = copy.deepcopy(config)
    names = [n for n in getattr(config, "architectures", None) or () if hasattr(transformers, n)]
    makers: list[Any] = [getattr(transformers, n) for n in names[:1]]
    both = getattr(config, "is_encoder_decoder", False)
    first = ("Seq2SeqLM", "SpeechSeq2Seq") if both else ("MaskedLM", "CausalLM")
    for auto in (*first, "ImageClassification", ""):
        cls = getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel")
        if type(config) in cls._model_mapping:
            makers.append(cls.from_config)
    if not makers:
        raise ValueError(
            f"model_type: expected an architecture that transformers can build, got "
            f'{config.model_type!r}; build the module under torch.device("meta") and give it'
        )
    try:
        with torch.device("meta"):
            model: nn.Module = makers[0](config)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"config of {config.model_type!r}: expected sizes that make a model, got an error "
            f"({error}); give the model's full config.json"
        ) from error
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    model = model.to(dtype).train()
    released = released_config(config)
    if released is not None and released_formats(released):  # as `load_packed` loads it
        for layer in declare_packed(model, released, dense_patterns(model, released)):
            layer.hold(dtype)
    return model
