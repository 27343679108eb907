"""What ``quant_type`` of a torchao checkpoint says of one weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from lightning_peft.core.names import join
from lightning_peft.storage.released_format import ReleasedWeight

__all__ = ["FLOAT8_CONFIGS", "INT8_CONFIGS", "TorchAoConfig", "config_of"]

INT8_CONFIGS = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")
FLOAT8_CONFIGS = ("Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig")
_KNOWN = (*INT8_CONFIGS, *FLOAT8_CONFIGS)
_TABLES = ("FqnToConfig", "ModuleFqnToConfig")
_REMEDY = 'load the model dense and give quantization="nf4"'


@dataclass(frozen=True)
class TorchAoConfig:
    """A configuration of torchao.

    Attributes:
        kind: Name of its class.
        data: Its fields.
    """

    kind: str
    data: Mapping[str, Any]

    def require_dtype(self, weight: ReleasedWeight, dtype: torch.dtype) -> None:
        """Raise if the codes have another dtype.

        Raises:
            ValueError: for instance e5m2.
        """
        wanted = str(dtype).removeprefix("torch.")
        given = self.data.get("weight_dtype")
        found = given.get("_data") if isinstance(given, Mapping) else given
        if found not in (None, wanted):
            raise ValueError(
                f"torchao {weight.layer!r} weight_dtype: expected {wanted}, got {found}; {_REMEDY}"
            )

    def block(self, weight: ReleasedWeight) -> tuple[int, int]:
        """Rows and columns that share a scale; 0 means all.

        Raises:
            ValueError: another granularity.
        """
        if self.data.get("group_size"):
            return 1, int(self.data["group_size"])
        found: Any = self.data.get("granularity") or {"_type": "PerRow"}
        if isinstance(found, list):  # of activations and of weights
            found = found[-1]
        kind, values = found.get("_type"), found.get("_data") or {}
        if kind == "PerRow" and values.get("dim", -1) in (-1, len(weight.shape) - 1):
            return 1, 0
        if kind == "PerGroup":
            return 1, int(values["group_size"])
        if kind == "PerTensor" and not weight.experts:
            return 0, 0
        raise ValueError(
            f"torchao {weight.layer!r} granularity: expected a scale per row, group of columns or "
            f"matrix, got {found!r}; {_REMEDY}"
        )


def config_of(weight: ReleasedWeight) -> TorchAoConfig | None:
    """The configuration of one weight; None if it is dense.

    Raises:
        ValueError: a configuration whose weights are not known.
    """
    if weight.config.get("include_input_output_embeddings"):
        raise ValueError(
            "torchao include_input_output_embeddings: expected dense embeddings and a dense head, "
            f"got packed ones; {_REMEDY}"
        )
    kind = weight.config.get("quant_type")
    chosen = kind.get("default") if isinstance(kind, Mapping) else None
    if not isinstance(chosen, Mapping):
        raise ValueError(
            f"torchao quant_type: expected the fields of a configuration of torchao, got {kind!r}; "
            f"{_REMEDY}"
        )
    if chosen.get("_type") in _TABLES:
        found = _listed(weight, chosen.get("_data") or {})
    else:
        found = chosen if weight.name == "weight" else None  # all linear layers are meant
    if found is None:
        return None
    if found.get("_type") not in _KNOWN:
        raise ValueError(
            f"torchao {weight.layer!r}: expected one of {list(_KNOWN)}, got {found.get('_type')!r}"
            f", whose weights are not known; {_REMEDY}"
        )
    return TorchAoConfig(found["_type"], found.get("_data") or {})


def _listed(weight: ReleasedWeight, data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Entry of a table of names, in torchao's order: names, patterns, then the default."""
    table: Mapping[str, Any] = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
    names = (join(weight.layer, weight.name), weight.layer)
    for name in names:
        if name in table:
            return _entry(table[name])
    for pattern, entry in table.items():
        if pattern.startswith("re:") and any(re.fullmatch(pattern[3:], name) for name in names):
            return _entry(entry)
    return _entry(table.get("_default")) if weight.name == "weight" else None


def _entry(found: Any) -> Mapping[str, Any] | None:
    return cast("Mapping[str, Any] | None", found)
