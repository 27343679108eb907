"""`export_merged`: from a base and an adapter on disk to a merged model on disk.

One weight is in memory at a time. A model without weights carries the adapter; each weight is put
into it for the moment in which it is merged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.merge_plan import check_merge, names_to_merge, plan_merge
from lightning_peft.adapters.new_bias import check_no_new_bias
from lightning_peft.core.value_types import shown
from lightning_peft.hf.config import read_config
from lightning_peft.hf.error_source import naming_files
from lightning_peft.hf.files import TENSORS, opened, require_directory
from lightning_peft.hf.hub import ADAPTER_FILES, MODEL_FILES, local_directory
from lightning_peft.hf.joined_files import JoinedFiles
from lightning_peft.hf.load import load_adapter
from lightning_peft.hf.method_config import method_class
from lightning_peft.hf.model_files import ModelFiles
from lightning_peft.hf.provenance import Provenance, read_provenance
from lightning_peft.hf.shards import DTYPES, PlannedTensor, parse_size, write_directory
from lightning_peft.hf.skeleton import skeleton, weightless
from lightning_peft.hf.stored_names import stored_names
from lightning_peft.hf.weight_merge import WeightMerger
from lightning_peft.methods.base import WeightMethod
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.storage import StorageConfig, as_config

__all__ = ["ExportReport", "export_merged"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_NOT_COPIED = ("config.json", "README.md", "adapter_config.json")
#: Files that an adapter directory may hold in a newer version than the base.
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")


@dataclass(frozen=True)
class ExportReport:
    """A merged model on disk.

    Attributes:
        out: The directory.
        merged: Number of tensors that the adapter changed.
        tensors: Number of tensors written.
        nbytes: Their bytes.
        onto: ``"trained"`` or ``"original"``.
        error: ‖W_out − (W_trained + Δ)‖ / ‖Δ‖ over all changed weights, by base: ``"trained"`` and
            ``"original"``. Both are equal for an adapter of a dense base.
    """

    out: Path
    merged: int
    tensors: int
    nbytes: int
    onto: str
    error: dict[str, float]

    def __str__(self) -> str:
        """Lines on the files, then on the error."""
        lines = [
            f"merged {self.merged} of {self.tensors} tensors into {self.out} "
            f"({self.nbytes / 1e9:,.2f} GB)"
        ]
        for base, error in self.error.items():
            chosen = " (written)" if base == self.onto else ""
            lines.append(
                f"error onto the {base} weights: ‖W_out − (W_trained + Δ)‖ / ‖Δ‖ = {error:.2e}"
                f"{chosen}"
            )
        return "\n".join(lines)


def export_merged(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    dtype: str | None = "bfloat16",
    shard_size: str | int = "5GB",
    *,
    onto: Literal["trained", "original"] = "trained",
    quantization: StorageConfig | str | None = None,
    progress: bool = True,
) -> ExportReport:
    """Merge an adapter directory into a model directory, one weight at a time.

    The result holds what the model's own `save_pretrained` would write: safetensors under the
    base's names, their index, config and tokenizer. `from_pretrained` and servers load it. No
    accelerator is used. The directory appears when it is complete.

    Args:
        adapter: A peft directory, or a hub id.
        base: The model's directory with its original weights, or a hub id.
        out: The directory to write; absent or empty.
        dtype: Dtype of the floating tensors; None keeps the base's.
        shard_size: Most bytes per file: ``"5GB"`` is 5 · 10⁹.
        onto: For an adapter that was trained on a quantised base: ``"trained"`` adds it to the
            dequantised weights, which is the model that was evaluated; ``"original"`` to the
            weights of the base directory. The report states the error of both.
        quantization: How the base was quantised in training, if the adapter directory does not
            say so (`save_adapter` does).
        progress: If True, show a progress bar.

    Raises:
        FileNotFoundError: no adapter or no model there, or missing shards.
        FileExistsError: `out` is not empty.
        ValueError: an adapter of another architecture or another base; a base that is quantised
            on disk.
        RuntimeError: the method has no merged form.
        OSError: the disk is too full.
    """
    _check_paths(adapter=adapter, base=base, out=out)
    target = Path(out)
    size, to = parse_size(shard_size), _dtype(dtype)
    _check_out(target, onto)
    source = local_directory(adapter, ADAPTER_FILES)
    folder = local_directory(base, MODEL_FILES)
    config = _config(folder)
    stored = ModelFiles(folder)
    model, files, provenance = _with_adapter(source, folder, stored)
    merger = _merger(model, files, provenance, as_config(quantization), onto, to)
    untied = bool(merger.untied)
    planned = [
        PlannedTensor(name, to_dtype, files.tensors[key].shape, form)
        for name, key, to_dtype, form in _tensors(files, merger, to)
    ]

    def fill(directory: Path) -> None:
        _copy_files(folder, source, directory)
        _write_config(directory, config, to, untied)

    write_directory(target, planned, size, fill, _bar(progress))
    errors = merger.error
    return ExportReport(
        target,
        len(merger.changes),
        len(planned),
        sum(t.nbytes for t in planned),
        onto,
        {"trained": errors["trained"].relative, "original": errors["original"].relative},
    )


# ---- checks


def _check_paths(**given: object) -> None:
    """Raise TypeError for what is no path, such as a model in memory."""
    for name, path in given.items():
        if not isinstance(path, str | Path):
            raise TypeError(
                f"export_merged: {name}: expected a directory or a hub id, got {shown(path)}; it "
                "merges files: a model in memory is for merge_and_unload(model)"
            )


def _dtype(given: str | None) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else None
    if given is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ValueError(
        f"export_merged: dtype: expected a floating dtype such as 'bfloat16', or None, got "
        f"{shown(given)}"
    )


def _check_out(out: Path, onto: str) -> None:
    if onto not in ("trained", "original"):
        raise ValueError(
            f"export_merged: onto: expected 'trained' or 'original', got {shown(onto)}"
        )
    require_directory(out.absolute().parent, "export_merged")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = f"{sum(1 for _ in out.iterdir())} files" if out.is_dir() else "a file"
        raise FileExistsError(
            f"{out}: expected a directory that is absent or empty, found {found}; remove it, or "
            "export elsewhere"
        )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        found = "an adapter" if (folder / "adapter_config.json").is_file() else "none"
        raise FileNotFoundError(
            f"{folder}: expected the directory of a model with config.json, found {found}; give "
            "the base that the adapter was trained on"
        )
    try:
        config: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got something else ({error}); download it again"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: expected an object of settings, got {type(config).__name__}; download it "
            "again"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise ValueError(
            f"{folder}: expected original weights, got ones quantised on disk by {method}; give "
            "the model that they were quantised from"
        )
    return config


# ---- the model without weights


def _with_adapter(
    source: Path, folder: Path, stored: ModelFiles
) -> tuple[nn.Module, JoinedFiles, Provenance]:
    """The skeleton of the base with the adapter attached, and the files as it reads them."""
    # An initialisation that rewrites the base writes into every adapted weight.
    with naming_files(source):
        cls = method_class(read_config(source))
    weights = issubclass(cls, WeightMethod) and not issubclass(cls, TrainableTokens)
    rewrites = weights and bool(getattr(cls(), "rewrites_base", False))
    model = weightless(skeleton(folder), writable=rewrites)
    files = JoinedFiles(stored, model)
    file = source / TENSORS
    provenance = read_provenance(file) if file.is_file() else Provenance()
    if file.is_file():
        _fill_copied(model, file, files)
    load_adapter(model, source)
    return model, files, provenance


def _fill_copied(model: nn.Module, file: Path, files: JoinedFiles) -> None:
    """Read the weights that an adapter file holds a copy of: `load_adapter` compares them."""
    with opened(file) as handle:
        keys = {key.removeprefix("base_model.model.") for key in handle.keys()}  # noqa: SIM118
    names = stored_names(model, files)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        wrapped = f"{owner}.base_layer.{leaf}"
        if keys & {name, wrapped} and names.get(name) in files.tensors:
            parameter.data = files.read(names[name]).float()


def _merger(
    model: nn.Module,
    files: JoinedFiles,
    provenance: Provenance,
    quantization: StorageConfig | None,
    onto: str,
    to: torch.dtype | None,
) -> WeightMerger:
    config = quantization or provenance.quantization
    plan = plan_merge(model, names_to_merge(model, None))
    check_merge(plan, None)
    check_no_new_bias(plan, "export_merged")
    return WeightMerger(
        model, files, stored_names(model, files), plan, provenance, config, onto, to
    )


def _tensors(
    files: JoinedFiles, merger: WeightMerger, to: torch.dtype | None
) -> Iterator[tuple[str, str, torch.dtype, Callable[[], Tensor]]]:
    """(key to write, key to read, dtype, how to form it) of every tensor."""
    for key, stored in files.stored.items():
        own = DTYPES[stored.dtype]
        written = to if to is not None and own.is_floating_point else own
        yield key, key, written, merger.former(key)
    for key, stored_key, form in merger.untied_tensors():
        own = DTYPES[files.tensors[stored_key].dtype]
        yield key, stored_key, to if to is not None else own, form


# ---- files besides the weights


def _copy_files(base: Path, adapter: Path, directory: Path) -> None:
    """Copy tokenizer, generation settings and code; a tokenizer of the adapter counts."""
    own = [p for p in sorted(adapter.glob("*")) if p.name.startswith(_TOKENIZER) and p.is_file()]
    for path in [*sorted(base.iterdir()), *own]:
        skipped = path.name in _NOT_COPIED or path.name.startswith(".")
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not skipped and not weights:
            shutil.copyfile(path, directory / path.name)


def _write_config(
    directory: Path, config: dict[str, Any], dtype: torch.dtype | None, untied: bool
) -> None:
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and part.get(key) is not None:
                part[key] = str(dtype).removeprefix("torch.")
        if untied and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    if untied:
        config["tie_word_embeddings"] = False
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, "utf-8")


def _bar(shown: bool) -> Callable[[Iterable[PlannedTensor]], Iterable[PlannedTensor]]:
    if not shown:
        return lambda tensors: tensors

    def progress(tensors: Iterable[PlannedTensor]) -> Iterable[PlannedTensor]:
        from rich.progress import track

        return track(tensors, description="merging", transient=True)

    return progress
