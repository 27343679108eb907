"""Quantizer by which transformers' loader builds a model with packed weights.

transformers asks a quantizer, registered under a name of ours through its own extension point,
which parameters a model has and which names in the files they come from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_peft.core.modules import modules_by_name
from lightning_peft.hf.packed_checks import check_shapes
from lightning_peft.hf.packed_conversions import by_outputs_last, written_conversions
from lightning_peft.hf.packed_files import dtypes_of, metadata_of, open_slices, shapes_of
from lightning_peft.models.packed_layers import (
    PackedLayer,
    add_config_file,
    declare_packed,
    dense_patterns,
    released_config,
)
from lightning_peft.models.packed_state import packed_metadata, packed_state
from lightning_peft.storage.block_scaled import BlockScaledStorage
from lightning_peft.storage.registry import released_formats, released_methods
from lightning_peft.storage.tensor_files import TensorFiles

__all__ = ["PackedQuantizer", "loaded"]

_METHOD = "lightning_peft"
#: Settings that tell apart the formats of one ``quant_method``.
_KINDS = ("quant_algo", "format", "config_groups", "checkpoint_format")


@register_quantization_config(_METHOD)
class _PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Carries the checkpoint's own ``quantization_config``."""

    def __init__(
        self,
        released: Mapping[str, Any],
        files: Sequence[str] = (),
        quant_method: str = _METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.released, self.files = dict(released), list(files)
        self.modules_to_not_convert: list[str] = []


def loaded(model_class: Any, folder: Path, options: Mapping[str, Any]) -> Any:
    """The model of a directory with packed weights; see `load_packed`."""
    given = dict(options)
    config = given.pop("config", None) or AutoConfig.from_pretrained(folder)
    add_config_file(config, folder)
    released = released_config(config)
    if released is None:
        raise ValueError(
            f"load_packed {folder}: expected a checkpoint with a quantization_config, got a dense "
            f"one; load it with {model_class.__name__}.from_pretrained"
        )
    if not released_formats(released):
        if released.get("quant_method") in released_methods():
            told = {key: released[key] for key in _KINDS if key in released}
            raise ValueError(
                f"load_packed {folder}: expected a kind of {released['quant_method']!r} that a "
                f"storage reads, got {told}; load the model dequantised, or with the library of "
                "this format"
            )
        raise ValueError(
            f"load_packed {folder}: expected quant_method in {released_methods()}, got "
            f"{released.get('quant_method')!r}; load the model dequantised, or with the library of "
            "this format"
        )
    files = TensorFiles(folder).files
    config.quantization_config = {
        "quant_method": _METHOD,
        "released": released,
        "files": [str(file) for file in files],
    }
    config._name_or_path = str(folder)
    wants_info = bool(given.pop("output_loading_info", False))
    try:
        with ExitStack() as opened:
            model, info = _concrete(model_class, config).from_pretrained(
                None,
                config=config,
                state_dict=open_slices(files, opened),
                output_loading_info=True,
                **given,
            )
    except torch.OutOfMemoryError:
        raise
    # transformers draws initial values for tensors that the files lack. Torch draws no codes: it
    # raises RuntimeError for fp8, and its subclass NotImplementedError for integers.
    except RuntimeError as error:
        raise ValueError(
            f"load_packed {folder}: expected the tensors that its quantization_config describes, "
            f"got an error of transformers' loader ({error}); shards are missing, or belong to "
            "another model: download the checkpoint again"
        ) from error
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.hf_quantizer.finish(model, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return (model, info) if wants_info else model


def _concrete(model_class: Any, config: Any) -> Any:
    """The class that an `AutoModelFor…` builds for a config; any other class itself.

    Raises:
        ValueError: the auto class has no model of this kind.
    """
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    if type(config) not in mapping:
        raise ValueError(
            f"load_packed: expected a config that {model_class.__name__} knows, got "
            f"{type(config).__name__}; give another auto class, or the model's own class"
        )
    found = mapping[type(config)]
    classes = list(found) if isinstance(found, list | tuple) else [found]
    named = [c for c in classes if c.__name__ in (config.architectures or ())]
    return (named or classes)[0]


@register_quantizer(_METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Declares the packed parameters, and holds them after loading."""

    def __init__(self, quantization_config: _PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.released: dict[str, Any] = quantization_config.released
        self.formats: list[BlockScaledStorage] = released_formats(self.released)
        self.serialized_names = {
            weight: list(names)
            for storage in self.formats
            for weight, names in storage.file_names.items()
        }
        self._layers: list[PackedLayer] = []
        self._renamings: list[Any] = []
        self._dense: list[Any] = []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Called on the meta model."""
        skip = dense_patterns(model, self.released)
        files = self.quantization_config.files
        dtypes = dtypes_of(files)
        self._layers = declare_packed(model, self.released, skip, dtypes)
        shapes = shapes_of(files)
        check_shapes(self._layers, {self._renamed(key): shape for key, shape in shapes.items()})
        self._require_dense(model, shapes)
        # transformers reads the files of other checkpoints ahead, in threads: all experts would be
        # in memory before the first ones are stacked.
        self.pre_quantized = False
        return model

    def _renamed(self, key: str) -> str:
        for storage in self.formats:
            for pattern, replacement in storage.renamings:
                key = re.sub(pattern, replacement, key)
        return key

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Called when the files were read; `finish` follows, which knows what was missing."""
        model.config.quantization_config = self.released
        return model

    def finish(self, model: Any, missing: Collection[str], unexpected: Collection[str]) -> None:
        """Hold the weights, and keep the conversions by which transformers saves the model.

        Args:
            model: As transformers loaded it.
            missing: Parameters without a tensor in the files.
            unexpected: Tensors in the files without a parameter.

        Raises:
            ValueError: a tensor is missing, or has values that no encoder writes.
        """
        self.pre_quantized = True
        self._require_all(missing)
        self._require_dense(model, unexpected)
        metadata = metadata_of(self.quantization_config.files)
        dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else None
        for layer in self._layers:
            layer.hold(dtype or torch.get_default_dtype(), metadata)
        self._layers = []
        # `export` knows the files' names; transformers only splits experts again.
        read = [c for c in model._weight_conversions if all(c is not r for r in self._renamings)]
        model._weight_conversions = written_conversions(read, self.formats, self._dense)

    def _require_all(self, missing: Collection[str]) -> None:
        absent = [name for layer in self._layers for name in layer.shapes if name in missing]
        if absent:
            raise ValueError(
                f"load_packed: expected the tensors of every packed layer in the files, found none "
                f"for {len(absent)}: {', '.join(absent[:6])}; the quantization_config does not "
                "belong to these files, or shards are missing: download the checkpoint again"
            )

    def _require_dense(self, model: nn.Module, names: Collection[str]) -> None:
        """Raise if the files hold a layer packed that the model holds densely.

        Its codes would be read as weights. Experts that a file holds one by one belong to the
        module that the model has for all of them.

        Args:
            model: With the packed layers declared.
            names: Tensors in the files.

        Raises:
            ValueError: a layer with companions of codes is not declared.
        """
        packed, modules = {layer.name for layer in self._layers}, modules_by_name(model)
        wrong = set()
        for name in names:
            layer, _, leaf = self._renamed(name).rpartition(".")
            if not leaf.startswith("weight_"):
                continue
            inside = layer not in modules
            while layer and layer not in modules:
                layer = layer.rpartition(".")[0]
            is_layer = not inside or bool(modules[layer]._parameters)
            if layer and is_layer and layer not in packed:
                wrong.add(layer)
        if wrong:
            raise ValueError(
                "load_packed: expected dense tensors of the layers that the quantization_config "
                f"leaves out, got packed ones for {', '.join(sorted(wrong)[:6])}; the config does "
                "not belong to these files, or this model cannot hold these layers packed: "
                "download the checkpoint again, or load the model dequantised"
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Names in the files → parameters; companions of experts are merged as their codes."""
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)
        self._renamings = [WeightRenaming(a, b) for s in self.formats for a, b in s.renamings]
        self._dense = [c for c in weight_conversions if isinstance(c, WeightConverter)]
        has_experts = any(
            len(s) > 2 for layer in self._layers for _, s, _ in layer.weights.values()
        )
        if has_experts and any(s.outputs_last for s in self.formats):
            updated = [by_outputs_last(c) for c in updated]
        return self._renamings + updated

    def get_state_dict_and_metadata(
        self, model: nn.Module, safe_serialization: bool | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called by `save_pretrained` of a model without adapters."""
        return packed_state(model), packed_metadata(model)

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """The packed weights are written as they were read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are trained on the packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The products are ops that `torch.compile` traces."""
        return True
