"""Sources of `load_adapter`: a peft directory, a file of another program, or a state dict.

Each is converted to one config, and tensors in the model's present names. The model is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_peft.hf.config import CONFIG, missing_config, read_config
from lightning_peft.hf.error_source import adapter_folder
from lightning_peft.hf.files import checked, read_file, read_tensors
from lightning_peft.hf.import_lora import foreign_adapter
from lightning_peft.hf.legacy_experts import fused_experts
from lightning_peft.hf.legacy_names import current_names
from lightning_peft.hf.method_config import check_known, format_of, method_class
from lightning_peft.hf.outside import OutsideModules, read_outside
from lightning_peft.hf.peft_state import is_peft_state, peft_state
from lightning_peft.hf.recognise import named
from lightning_peft.hf.targets import model_root, ties_embeddings
from lightning_peft.hf.task_heads import Heads, without_heads
from lightning_peft.methods.base import HFFormat, Method

__all__ = ["Source", "read_source"]


@dataclass
class Source:
    """An adapter as read.

    Attributes:
        config: As in adapter_config.json.
        tensors: As in adapter_model.safetensors.
        method: The method that the config describes.
        prefix: Name in the caller's model of the module whose layer names are used.
        top: That module.
        notes: Conclusions that the file does not state.
        outside: Trained modules next to the module `top`.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    method: type[Method]
    prefix: str
    top: nn.Module
    notes: list[str]
    outside: OutsideModules = field(default_factory=OutsideModules)

    @property
    def format(self) -> HFFormat:
        """The method's exchange table."""
        return format_of(self.method)


def read_source(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    adapter_name: str,
    root: str | None,
    alpha: float | None,
    enable_lora: Sequence[bool] | None,
    config: Any = None,
    heads: Heads = "load",
) -> Source:
    """Read the source and convert it.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a format that is not known, or a file that does not fit.
    """
    if isinstance(source, Mapping):
        label, metadata = "state dict", dict[str, str]()
        if is_peft_state(source):
            return _peft_state(model, source, config, root, alpha, adapter_name)
        _check_no_config(config, label)
        tensors = checked(source, label)
    else:
        path = Path(source)
        _check_no_config(config, str(path))
        folder = adapter_folder(path, adapter_name)
        ours = not path.exists() or not named(folder) or any(folder.glob("adapter_model.*"))
        if (folder / CONFIG).is_file() and ours:
            return _peft(model, folder, root, alpha, enable_lora, heads)
        file = _single_file(path)
        tensors, metadata = read_file(file)
        label = str(file)
    found = foreign_adapter(
        model, tensors, label, root=root, alpha=alpha, enable_lora=enable_lora, metadata=metadata
    )
    return Source(found.config, found.tensors, method_class(found.config), "", model, found.notes)


def _peft(
    model: nn.Module,
    folder: Path,
    root: str | None,
    alpha: float | None,
    enable_lora: Sequence[bool] | None,
    heads: Heads,
) -> Source:
    if alpha is not None or enable_lora is not None:
        raise ValueError(
            f"load_adapter: alpha, enable_lora: expected with a loralib file, got a peft directory "
            f"({folder}), which says its own"
        )
    config = read_config(folder)
    method = method_class(config)
    fmt = format_of(method)
    check_known(fmt, config)
    tensors = read_tensors(folder, [fmt.tensors[name] for name in fmt.integers])
    prefix, top = model_root(model, root)
    config, tensors, fused = fused_experts(top, config, tensors)
    config, tensors, note = current_names(top, fmt, config, tensors)
    config, idle = _without_idle_tying(top, config)
    outside, skipped = read_outside(model, folder), ""
    if heads == "skip":
        config, tensors, skipped = without_heads(top, fmt, config, tensors)
    notes = [n for n in (fused, note, idle, skipped, *outside.notes) if n]
    return Source(config, tensors, method, prefix, top, notes, outside)


def _peft_state(
    model: nn.Module,
    source: Mapping[str, Tensor],
    config: Any,
    root: str | None,
    alpha: float | None,
    adapter_name: str,
) -> Source:
    floats = {k: t for k, t in source.items() if not isinstance(t, Tensor) or _is_kept(k, t)}
    prefix, top = model_root(model, root)
    found, tensors, note = peft_state(top, floats, config, alpha, adapter_name)
    method = method_class(found)
    fmt = format_of(method)
    check_known(fmt, found)
    tensors = checked(tensors, "state dict", [fmt.tensors[name] for name in fmt.integers])
    found, tensors, fused = fused_experts(top, found, tensors)
    found, tensors, renamed = current_names(top, fmt, found, tensors)
    found, idle = _without_idle_tying(top, found)
    notes = [n for n in (note, fused, renamed, idle) if n]
    return Source(found, tensors, method, prefix, top, notes)


def _without_idle_tying(top: nn.Module, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Switch ensure_weight_tying off where peft ignores it, and say so."""
    if not config.get("ensure_weight_tying") or ties_embeddings(top):
        return config, ""
    note = "ensure_weight_tying: left out, as in peft: config.tie_word_embeddings is not set"
    return {**config, "ensure_weight_tying": False}, note


def _check_no_config(config: object, label: str) -> None:
    if config is not None:
        raise ValueError(
            f"load_adapter: config: expected with the state dict of a PeftModel, got {label}, "
            "which says its own; leave it out"
        )


def _is_kept(key: str, t: Tensor) -> bool:
    """Whether a tensor is no counter or id of the base (``num_batches_tracked``)."""
    return t.is_floating_point() or (".base_layer." not in key and not key.endswith(_COUNTERS))


_COUNTERS = ("num_batches_tracked", "position_ids", "token_type_ids")


def _single_file(path: Path) -> Path:
    """Return the safetensors file at `path`, or the only one in it.

    Raises:
        FileNotFoundError: no file there.
        ValueError: another format, by its name if it is known.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return path
    known = named(path) if path.exists() else ""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not known and len(files) == 1 and not files[0].name.startswith("adapter_model"):
        return files[0]
    if known or path.is_file() or len(files) > 1:
        got = known or ", ".join(f.name for f in files) or path.name
        raise ValueError(
            f"{path}: expected {CONFIG} of a Hugging Face peft adapter, or one .safetensors file "
            f"of Kohya, diffusers or loralib, found {got}; nothing was loaded"
        )
    raise missing_config(path)
