"""Protocols of a site: how a layer kind applies an Edit, and where a weight is stored."""

from lightning_peft.core.protocols.layer_ops import LayerOps
from lightning_peft.core.protocols.storage import Reason, Storage, StoredTensor
from lightning_peft.core.protocols.weight_layout import WeightLayout

__all__ = ["LayerOps", "Reason", "Storage", "StoredTensor", "WeightLayout"]
