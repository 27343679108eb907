"""Comparison of a module's output before and after a merge: merge equals forward, or is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.adapters.merge_plan import ModuleMerge
from lightning_peft.layers.mixed_batch import without_mixed_batch
from lightning_peft.models.modules import evaluating
from lightning_peft.models.outputs import relative_change

__all__ = ["OutputCheck"]

#: Relative difference of outputs that rounding explains, by the dtype of the output.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: Added for storages that multiply in fewer bits than their output has (int8, FP8).
_LOW_PRECISION = 0.1


class OutputCheck:
    """Runs a module on a small random input before the merge, and again after it.

    Layers of kinds without an example input, and those on meta, are not compared; the report says
    so. Hooks are not called.
    """

    def __init__(self, part: ModuleMerge, *, compares: bool) -> None:
        self._part = part
        self._inputs = part.module._peft.ops.example_inputs(part.module) if compares else None
        self._before = self._run()
        storages = [a.site.storage for a in part.edits()]
        self._low_precision = any(s.is_quantized for s in storages)

    def difference(self, weight_error: float) -> float | None:
        """Return the relative difference of the outputs; None if they cannot be compared.

        Args:
            weight_error: Relative loss of the weight by requantising.

        Raises:
            RuntimeError: the difference is more than rounding and `weight_error` explain.
        """
        before, after = self._before, self._run()
        if before is None or after is None:
            return None
        found = relative_change(after, before)
        allowed = _ROUNDING.get(before.dtype, _LOW_PRECISION) + 4 * weight_error
        if self._low_precision:
            allowed += _LOW_PRECISION
        if not found <= allowed:
            methods = ", ".join(sorted({a.method.label for a in self._part.adapters}))
            staying = [
                name
                for name in self._part.module._peft.active.acting_names()
                if name in self._part.module.peft
            ]
            raise RuntimeError(
                f"merge {self._part.label!r}: expected the same output as before, got one that "
                f"differs by {found:.1e} (relative; {allowed:.0e} is rounding): {methods} on "
                f"{type(self._part.module).__name__} cannot be merged"
                + (f" below {staying}, which stay and read the weight" if staying else "")
                + "; the layer is as before: keep it attached, or merge all adapters together"
            )
        return found

    def _run(self) -> Tensor | None:
        if self._inputs is None:
            return None
        module = self._part.module
        with torch.no_grad(), evaluating(module), without_mixed_batch():
            device = self._inputs[0].device.type
            with torch.autocast(device, enabled=False):
                y = type(module).forward(module, *self._inputs)
        first = y[0] if isinstance(y, tuple) else y
        return first.detach().clone() if isinstance(first, Tensor) else None
