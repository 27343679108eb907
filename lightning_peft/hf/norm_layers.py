"""Trained normalisation layers in a Hugging Face peft directory (``LN_TUNING``).

peft copies each layer as a whole: `<layer>.ln_tuning_layers.<parameter>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.names import in_adapter, join
from lightning_peft.hf.keys import PREFIX
from lightning_peft.hf.targets import compact
from lightning_peft.layers.adapter import Adapter
from lightning_peft.methods.norm_tuning import NormTuning

__all__ = ["add_norm_layers", "split_norm_layers"]

_LAYERS = ".ln_tuning_layers."


def split_norm_layers(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return (parameters by layer name, the other tensors) of a file."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        head, found, leaf = key.removeprefix(PREFIX).rpartition(_LAYERS)
        if found and key.startswith(PREFIX):
            layers.setdefault(head, {})[leaf] = tensor
        else:
            rest[key] = tensor
    return layers, rest


def add_norm_layers(
    top: nn.Module,
    found: Sequence[tuple[str, nn.Module, Adapter]],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Add the layers of `NormTuning` and their names."""
    trained = [(p, m, a) for p, m, a in found if isinstance(a.method, NormTuning)]
    for path, module, adapter in trained:
        state = {k: t for k, t in module.state_dict().items() if not in_adapter(k)}
        for key, value in {**state, **adapter.substitutes()}.items():
            tensors[PREFIX + join(path, _LAYERS.strip("."), key)] = value.detach()
    if trained:
        config["target_modules"] = compact(top, [path for path, _, _ in trained])
