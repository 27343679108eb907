"""Everything that a plugin needs to add a method, a layer kind, a storage or a kernel.

A method lowers to an `Edit`, a layer kind applies an `Edit`, and a storage holds the frozen weight.
Each extension is one file that ends in one registration: `register_method`, `register_layer` or
`register_storage`. CONTRIBUTING.md has a recipe for each.
"""

from lightning_peft.core.edit import Edit, apply_edits
from lightning_peft.core.protocols import LayerOps, Reason, Storage, StoredTensor, WeightLayout
from lightning_peft.core.rotation import Rotation
from lightning_peft.core.site import BlockSite, SequenceSite, Site
from lightning_peft.core.terms import Dense, Kronecker, LowRank, NotMergeable, Term
from lightning_peft.layers import register_layer
from lightning_peft.layers.base import MatrixOps
from lightning_peft.methods.base import (
    BlockMethod,
    Method,
    SelectMethod,
    SequenceMethod,
    StepContext,
    WeightMethod,
)
from lightning_peft.methods.checks import match_pattern, require, require_ranks
from lightning_peft.methods.exchange import HFEntry, HFFormat
from lightning_peft.methods.registry import register as register_method
from lightning_peft.methods.tensors import empty_like_site
from lightning_peft.models.pretrained import register_pretrained
from lightning_peft.storage import QuantizedStorage, StorageConfig, register_storage
from lightning_peft.storage.packed import QuantizedWeightSpec

__all__ = [
    "BlockMethod",
    "BlockSite",
    "Dense",
    "Edit",
    "HFEntry",
    "HFFormat",
    "Kronecker",
    "LayerOps",
    "LowRank",
    "MatrixOps",
    "Method",
    "NotMergeable",
    "QuantizedStorage",
    "QuantizedWeightSpec",
    "Reason",
    "Rotation",
    "SelectMethod",
    "SequenceMethod",
    "SequenceSite",
    "Site",
    "StepContext",
    "Storage",
    "StorageConfig",
    "StoredTensor",
    "Term",
    "WeightLayout",
    "WeightMethod",
    "apply_edits",
    "empty_like_site",
    "match_pattern",
    "register_layer",
    "register_method",
    "register_pretrained",
    "register_storage",
    "require",
    "require_ranks",
]
