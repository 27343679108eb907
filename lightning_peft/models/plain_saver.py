"""What transformers' `save_pretrained` asks before it writes. Imported for adapted models only.

transformers lets a quantised model's quantizer form the state that is written. `PlainSaver` takes
that place while a model holds adapters or packed weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.models.packed_layers import released_config
from lightning_peft.models.packed_state import is_released, packed_metadata, packed_state
from lightning_peft.models.plain_state import plain_state
from lightning_peft.storage.dtensor import is_sharded

__all__ = ["PlainSaver"]


@dataclass
class _Description:
    """Names the quantizer in transformers' messages."""

    quant_method: str = "lightning_peft"
    modules_to_not_convert: list[str] = field(default_factory=list)


class PlainSaver(HfQuantizer):  # type: ignore[misc]
    """Lets `save_pretrained` write the plain model, or nothing.

    Args:
        replaced: The quantizer of the library that loaded the model, or None if the model is dense.
    """

    def __init__(self, replaced: HfQuantizer | None) -> None:
        config = _Description() if replaced is None else replaced.quantization_config
        super().__init__(config, pre_quantized=True)
        self.replaced = replaced

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Called before anything is written. `get_state_dict_and_metadata` knows the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on any base that they were attached to."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Called by `generate`; a dense model without a quantizer is compiled."""
        return self.replaced is None or bool(self.replaced.is_compileable)

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Called by the model's `dequantize`.

        Raises:
            RuntimeError: always; adapters would be lost.
        """
        raise RuntimeError(
            f"{type(model).__name__}.dequantize: expected a model of transformers alone, got one "
            "with adapters or packed weights of lightning_peft; call merge_and_unload(model)"
        )

    def get_state_dict_and_metadata(
        self, model: nn.Module, safe_serialization: bool | None = None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Called by `save_pretrained`: returns what `from_pretrained` reads.

        Raises:
            RuntimeError: no file of plain weights would compute what the model computes.
        """
        why = self._why_not_plain(model)
        if why:
            raise RuntimeError(
                f"{type(model).__name__}.save_pretrained: expected a model that plain weights can "
                f"hold, got one {why}; nothing was written. Call merge_and_unload(model) first for "
                "a plain model, save_adapter(model, directory) for the adapter alone, or "
                "export_merged for the merged model on disk"
            )
        if self.replaced is not None and _says_quantised(model):
            return packed_state(model), packed_metadata(model)
        return plain_state(model), {}

    def _why_not_plain(self, model: nn.Module) -> str:
        acting = sorted(
            {n for _, m in adapted_modules(model) for n in m._peft.active.acting_names()}
        )
        if acting:
            return f"with adapters {acting} that act and are not merged"
        if self.replaced is not None and not (is_released(model) or not _says_quantised(model)):
            return f"that was loaded quantised by {self.replaced.quantization_config.quant_method}"
        if any(is_sharded(p) for p in model.parameters()):
            return "of which each process holds a part"
        return ""


def _says_quantised(model: nn.Module) -> bool:
    """Whether the config says so: a merge into dense weights takes that off."""
    return released_config(getattr(model, "config", None)) is not None
