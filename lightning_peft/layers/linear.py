"""Linear layers: `nn.Linear` and its subclasses, and GPT-2's `Conv1D`, whose weight is [in,
out].
"""

from __future__ import annotations

import torch
from lightning_peft_kernels.autograd import in_functorch_transform
from lightning_peft_kernels.dispatch import current_backend, launches
from lightning_peft_kernels.scale.ops import output_scale
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.protocols import WeightLayout
from lightning_peft.core.replaced_rows import ReplacedRows
from lightning_peft.layers.base import MatrixOps
from lightning_peft.layers.example_inputs import is_comparable, random_inputs
from lightning_peft.storage import storage_of
from lightning_peft.storage.packed_linear import AdoptedLinear, PackedLinear

__all__ = ["Conv1DOps", "LinearOps"]


class _FeaturesOps(MatrixOps):
    """Input [..., in], output [..., out]."""

    is_linear = True

    def example_inputs(self, m: nn.Module) -> tuple[Tensor, ...] | None:
        """Four rows of features."""
        storage = storage_of(m, "weight")
        if not is_comparable(m):
            return None
        width = self.shape(m, "weight", storage.shape(m, "weight"))[-1]
        return random_inputs(m, storage.dtype(m, "weight"), (4, width))

    on_activations = MatrixOps.on_activations | {"out_map", "replaced"}

    def put_replaced(
        self, m: nn.Module, x: Tensor, y: Tensor, replaced: ReplacedRows, b: Tensor | None
    ) -> Tensor:
        """Compute the replaced outputs, with their bias, into their places."""
        ids = replaced.ids
        bias = None if b is None else b[ids].to(x.dtype)
        columns = F.linear(x, replaced.rows.to(x.dtype), bias).to(y.dtype)
        if y._base is None and not in_functorch_transform():  # the base call's own output
            return y.index_copy_(-1, ids, columns)
        return y.index_copy(-1, ids, columns)

    def scale_out(self, m: nn.Module, y: Tensor, scale: Tensor) -> Tensor:
        """Y diag(scale); one kernel each way where there is one, which saves passes in backward."""
        if launches("output_scale", y.device, y.dtype, current_backend()):
            return output_scale(y, scale.to(y.dtype))
        return super().scale_out(m, y, scale)


class LinearOps(_FeaturesOps):
    """`nn.Linear`: weight [out, in], input [..., in]."""

    def weight_layout(self, m: nn.Module) -> WeightLayout | None:
        """One weight [out, in]."""
        return WeightLayout(("weight",), False, PackedLinear, AdoptedLinear)


class Conv1DOps(_FeaturesOps):
    """`transformers.pytorch_utils.Conv1D`: weight [in, out], input [..., in]."""

    def weight_layout(self, m: nn.Module) -> WeightLayout | None:
        """One weight [in, out]."""
        return WeightLayout(("weight",), True, PackedLinear, AdoptedLinear)

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Canonical [out, in]."""
        return torch.Size((natural[1], natural[0]))

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """[in, out] → [out, in], a view."""
        return W.mT

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """[out, in] → [in, out], a view."""
        return M.mT

    def functional(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """X W + b."""
        return F.linear(x, W.mT, b)
