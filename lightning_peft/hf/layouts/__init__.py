"""Tensor layouts of Hugging Face peft, one per layer kind.

`layout_for` finds the layout by the type of the layer's ops. A kind without a layout can be
attached, trained and merged; only saving and loading peft files refuses it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.core.protocols import LayerOps
from lightning_peft.hf.layouts.attention import MultiheadAttentionLayout
from lightning_peft.hf.layouts.base import MatrixLayout, UnknownLayout
from lightning_peft.hf.layouts.conv import ConvLayout
from lightning_peft.hf.layouts.experts import ExpertsLayout, RouterLayout
from lightning_peft.hf.layouts.parameters import ParametersLayout
from lightning_peft.hf.layouts.recurrent import RecurrentLayout
from lightning_peft.layers.conv import ConvOps
from lightning_peft.layers.direct_parameters import DirectParametersOps
from lightning_peft.layers.embedding import EmbeddingOps
from lightning_peft.layers.experts.ops import ExpertsOps
from lightning_peft.layers.linear import Conv1DOps, LinearOps
from lightning_peft.layers.multihead_attention import MultiheadAttentionOps
from lightning_peft.layers.recurrent import RecurrentOps
from lightning_peft.layers.router import RouterOps

__all__ = ["MatrixLayout", "layout_for"]

#: Type of the ops → layout. Looked up by the exact type: a derived kind may lay out its weight
#: differently, so it does not inherit a layout.
_LAYOUTS: dict[type[LayerOps], type[MatrixLayout[Any]]] = {
    LinearOps: MatrixLayout,
    Conv1DOps: MatrixLayout,
    EmbeddingOps: MatrixLayout,
    ConvOps: ConvLayout,
    MultiheadAttentionOps: MultiheadAttentionLayout,
    RecurrentOps: RecurrentLayout,
    ExpertsOps: ExpertsLayout,
    RouterOps: RouterLayout,
    DirectParametersOps: ParametersLayout,
}


def layout_for(
    ops: LayerOps, module: nn.Module, peft_version: str | None = None
) -> MatrixLayout[Any]:
    """Return the peft layout of a module whose layer kind is served by `ops`.

    Args:
        ops: How an Edit acts on the module.
        module: The module.
        peft_version: As in the config of a file that is read; None for the version written here.
    """
    layout = _LAYOUTS.get(type(ops), UnknownLayout)(ops, module)
    layout.peft_version = peft_version
    return layout
