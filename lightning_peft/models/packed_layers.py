"""Layers of a meta model whose weights a released checkpoint holds packed.

First the dense meta parameters are replaced by those of the files. Once these have values, or for a
plan without values, the storages hold them and the layers get their forward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lightning_peft.core.class_swap import swap_in
from lightning_peft.core.modules import modules_by_name
from lightning_peft.core.names import join
from lightning_peft.core.protocols import WeightLayout
from lightning_peft.layers import ops_for
from lightning_peft.storage.block_scaled import BlockScaledStorage
from lightning_peft.storage.registry import released_formats
from lightning_peft.storage.released_format import DeclaredWeight, ReleasedWeight

__all__ = ["PackedLayer", "add_config_file", "declare_packed", "dense_patterns", "released_config"]

_Weights = Mapping[str, tuple[BlockScaledStorage, torch.Size, DeclaredWeight]]


class PackedLayer:
    """A layer whose weights are declared.

    Args:
        name: Name of the layer.
        module: The layer.
        layout: Its weights.
        weights: Storage, canonical shape and tensors of each weight, by name.
    """

    def __init__(
        self, name: str, module: nn.Module, layout: WeightLayout, weights: _Weights
    ) -> None:
        self.name, self.module, self.layout, self.weights = name, module, layout, weights
        for _, _, declared in weights.values():
            for key, shape, dtype in declared.tensors.values():
                empty = torch.empty(shape, dtype=dtype, device="meta")
                module._parameters[key] = nn.Parameter(empty, requires_grad=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the declared tensors by their names in the model."""
        declared = (d for _, _, d in self.weights.values())
        return {
            join(self.name, key): shape for d in declared for key, shape, _ in d.tensors.values()
        }

    @property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the module's other parameters, such as biases, by their names in the model."""
        declared, parameters = self.shapes, self.module._parameters.items()
        named = {join(self.name, key): tuple(p.shape) for key, p in parameters if p is not None}
        return {name: shape for name, shape in named.items() if name not in declared}

    def hold(self, dtype: torch.dtype, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
        """Check the tensors, hold them and swap the forward.

        Args:
            dtype: Dtype that the model computes in.
            metadata: Name of a weight → what the files say of it.

        Raises:
            ValueError: a tensor is missing or has values that no encoder writes.
        """
        specs = []
        for name, (storage, shape, declared) in self.weights.items():
            keys = {role: key for role, (key, _, _) in declared.tensors.items()}
            try:
                keys = storage.repack(self.module, name, keys)
                spec = storage.spec(
                    self.module, name, shape, declared.layout, keys,
                    transposed=self.layout.transposed, adopted=False,
                )  # fmt: skip
                spec.metadata = metadata.get(join(self.name, name), "")
            except ValueError as error:
                raise ValueError(f"{self.name!r}: {error}") from None
            specs.append((storage, name, spec))
        swap_in(self.module, self.layout.forward)
        for storage, name, spec in specs:
            storage.hold(self.module, name, spec)
            storage.set_compute_dtype(self.module, dtype)


def released_config(config: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` of a Hugging Face config or of its text model; None without."""
    for holder in (config, getattr(config, "text_config", None)):
        found = getattr(holder, "quantization_config", None)
        if found is not None:
            released = dict(found if isinstance(found, Mapping) else found.to_dict())
            if released.get("quant_method") == "modelopt":  # older files: one level down
                released |= released.pop("quantization", None) or {}
            return released
    return None


def add_config_file(config: Any, folder: Path) -> None:
    """Give a config the settings that Model Optimizer writes to a file of their own; in place.

    Args:
        config: Hugging Face configuration.
        folder: Its directory, with ``hf_quant_config.json`` if the settings are there.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / "hf_quant_config.json"
    if released_config(config) is None and file.is_file():
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{file}: expected JSON, got an error of its reader ({error}); download it again"
            ) from None
        config.quantization_config = {"quant_method": "modelopt", **told}


def dense_patterns(model: Any, released: Mapping[str, Any]) -> list[str]:
    """Patterns of the layers that a checkpoint holds densely, under the names of the model.

    A checkpoint that does not list them leaves out the output head, and what the model keeps in
    fp32.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.quantizers.base import HfQuantizer

    lists = [storage.skipped(released) for storage in released_formats(released)]
    given = [list(patterns) for patterns in lists if patterns is not None]
    listed: list[str] | None = None
    if given:
        renamings, listed = get_model_conversion_mapping(model), []
        for pattern in dict.fromkeys(p for patterns in given for p in patterns):
            renamed = f"{pattern}."
            for renaming in renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            listed.append(renamed.removesuffix("."))
    fp32 = model._keep_in_fp32_modules
    found: list[str] = HfQuantizer.get_modules_to_not_convert(model, listed, fp32)
    return found


def declare_packed(
    model: nn.Module,
    released: Mapping[str, Any],
    skip: Sequence[str],
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> list[PackedLayer]:
    """Replace the parameters of every layer that the checkpoint holds packed; in place.

    Args:
        model: On the meta device.
        released: The checkpoint's ``quantization_config``.
        skip: Patterns of layers that it holds densely.
        dtypes: Dtype of its tensors by the last part of their name.

    Raises:
        ValueError: a setting of the configuration that is not known.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    formats, found = released_formats(released), []
    for name, module in modules_by_name(model).items():
        ops = ops_for(module)
        layout = None if ops is None else ops.weight_layout(module)
        if layout is None or not should_convert_module(name, list(skip)):
            continue
        weights = _declared(name, module, layout, formats, released, dtypes)
        if weights:
            found.append(PackedLayer(name, module, layout, weights))
    return found


def _declared(
    name: str,
    module: nn.Module,
    layout: WeightLayout,
    formats: Sequence[BlockScaledStorage],
    released: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
) -> _Weights:
    found = {}
    for weight in layout.names:
        natural = module.get_parameter(weight).shape
        *lead, one, two = natural
        shape = torch.Size((*lead, two, one)) if layout.transposed else natural
        asked = ReleasedWeight(name, weight, shape, released, dtypes)
        for storage in formats:
            declared = storage.declare(asked)
            if declared is not None:
                found[weight] = (storage, shape, declared)
                break
    return found
