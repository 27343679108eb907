"""QuantAwareLoRA: LoRA that is trained, at the end, on the weight that merging will write.

W' = W + s B A;   from a share of the run on   W' = Q(W + s B A)   with dW'/dA, dW'/dB as before.

Q quantises and dequantises as the layer's storage does. Merging LoRA into NF4 rounds every weight
to one of 16 values of its block, which moves the output by more than the adapter can ignore; here
the last part of training runs on the rounded weight, and merging finds nothing left to round.

Source: straight-through gradient, Bengio et al. 2013, arXiv:1308.3432; fake quantisation in
training, Jacob et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense, LowRank
from lightning_peft.methods.base import StepContext
from lightning_peft.methods.checks import require
from lightning_peft.methods.limits import between
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register

__all__ = ["QuantAwareLoRA"]

# Flag → its version and value. Reading it in a forward would have the host wait for the device.
_FLAGS = WeakIdKeyDictionary()


@register
@dataclass(frozen=True)
class QuantAwareLoRA(LoRA):
    """LoRA for a quantised base that is to be merged back into its quantised storage.

    From `start` on every forward dequantises, adds, quantises and dequantises a layer's weight
    once: slower than LoRA by about the cost of quantising the layers, and W' is held for the
    backward. On a dense layer Q rounds to the weight's dtype. Merge with
    ``merge(model, into="storage")``.

    Attributes:
        r, alpha, dropout, …: As for LoRA; dropout must be 0, Q(W + s B A) has no input to drop.
        start: Share of the optimizer steps of the run after which the weight is rounded. 0 rounds
            from the first step, 1 never.

    Raises:
        ValueError: as LoRA; start outside [0, 1]; dropout; a start from data.
    """

    start: float = 0.75

    limits = {"start": between(0, 1)}
    hf = None  # what it computes is not W + s B A: merge it

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            self.dropout == 0.0,
            f"{self.label}: expected dropout = 0, got {self.dropout}: the rounded weight depends "
            "on no input",
        )
        require(
            not self.needs_data,
            f"{self.label}: expected a start that needs no data, got init = {self.init!r}",
        )

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """LoRA's, and rounding [1]: 1 once the weight is rounded."""
        return {**super().buffers(site), "rounding": torch.full((1,), float(self.start == 0.0))}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """W + s B A, and what rounding adds to it, which has no gradient of its own."""
        plain = super().edit(p, site)
        # A branch on a buffer: before `start` nothing is quantised, and the fused kernels run.
        if not _is_set(p["rounding"]):
            return plain
        # What merging forms, in fp32: under autocast B A would be rounded before Q rounds it.
        with torch.no_grad(), torch.autocast(site.device.type, enabled=False):
            (term,) = plain.terms
            assert isinstance(term, LowRank)  # LoRA's, without a start from data
            W = site.weight(torch.float32)
            exact = W + term.matrix().float()
            change = site.quantization_roundtrip(exact) - exact
        return Edit(terms=(term, Dense(change)), bias=plain.bias)

    def after_step(self, ctx: StepContext) -> None:
        """Begin to round."""
        if ctx.total_steps is not None and ctx.step >= self.start * ctx.total_steps:
            for _, p in ctx.entries:
                _set(p["rounding"])


def _set(flag: Tensor) -> None:
    """Set a flag, once; no forward has to read it from its device."""
    if _FLAGS.get(flag) != (flag._version, True):
        flag.fill_(1.0)
        _FLAGS[flag] = flag._version, True


def _is_set(flag: Tensor) -> bool:
    """Whether a flag is set; read from its device once, and again after it was written."""
    if torch.compiler.is_compiling() or flag.is_inference():
        return bool(flag)
    version, value = _FLAGS.get(flag, (None, False))
    if version != flag._version:
        version, value = flag._version, bool(flag)
        _FLAGS[flag] = version, value
    return bool(value)
