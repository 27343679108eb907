"""Comparison of a module's output before and after a merge: merge equals forward, or is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.adapters.merge_plan import ModuleMerge
from lightning_peft.core.class_swap import base_class
from lightning_peft.core.edit import apply_edits
from lightning_peft.layers.example_inputs import has_own_forward
from lightning_peft.layers.mixed_batch import without_mixed_batch
from lightning_peft.models.modules import evaluating
from lightning_peft.models.outputs import relative_change

__all__ = ["OutputCheck"]

#: Relative difference of outputs that rounding explains, by the dtype of the output.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: Relative difference of outputs that products in 8 bits explain.
_EIGHT_BITS = 0.1


class OutputCheck:
    """Runs a module on a small random input before the merge, and again after it.

    Layers of kinds without an example input, those on meta, and those whose own forward does not
    take such an input are not compared; the report says so. Hooks are not called.
    """

    def __init__(self, part: ModuleMerge, *, compares: bool) -> None:
        self._part = part
        module = part.module
        self._inputs = module._peft.ops.example_inputs(module) if compares else None
        self._before = self._run()
        staying = [a for a in module._peft.active.edits if a not in part.adapters]
        self._read_by_staying = {a.site.parameter for a in staying} if compares else set()
        self._effective = self._effective_values()
        kernels = [a.site.storage.product_kernel(module, a.site.parameter) for a in part.edits()]
        self._eight_bits = any(kernel.startswith("fp8") for kernel in kernels)

    def difference(self, weight_error: float) -> float | None:
        """Return the relative difference of the outputs; None if they cannot be compared.

        Args:
            weight_error: Relative loss of the weight by requantising.

        Raises:
            RuntimeError: the difference is more than rounding and `weight_error` explain.
        """
        for (path, what), value in self._effective_values().items():
            allowed = _ROUNDING[torch.float32] + 4 * weight_error
            change = relative_change(value, self._effective[path, what])
            self._require(change, allowed, f"effective {what}")
        before, after = self._before, self._run()
        if before is None or after is None:
            return None
        found = relative_change(after, before)
        allowed = self._rounding(before.dtype) + 4 * weight_error
        self._require(found, allowed + (_EIGHT_BITS if self._eight_bits else 0.0), "output")
        return found

    def _rounding(self, dtype: torch.dtype) -> float:
        """Return the difference that rounding explains for an output of this dtype.

        An adapter computes in the dtype of its own tensors: an fp32 adapter rounds an fp64 output.
        """
        tensors = [t for a in self._part.edits() for t in a.tensors().values()]
        dtypes = {dtype, *(t.dtype for t in tensors if t.is_floating_point())}
        return max(_ROUNDING.get(d, _EIGHT_BITS) for d in dtypes)

    def _require(self, found: float, allowed: float, what: str) -> None:
        if found <= allowed:
            return
        module = self._part.module
        methods = ", ".join(sorted({a.method.label for a in self._part.adapters}))
        staying = [n for n in module._peft.active.acting_names() if n in module.peft]
        own = ""
        if has_own_forward(module) and not staying:
            own = (
                f", whose forward computes more than the product with its weight "
                f"({base_class(module).__name__}.forward), so the adapter acts beside it"
            )
        raise RuntimeError(
            f"merge {self._part.label!r}: expected the same {what} as before, got one that differs "
            f"by {found:.1e} (relative; {allowed:.0e} is rounding): {methods} on "
            f"{type(module).__name__} cannot be merged"
            + (f" below {staying}, which stay and read the weight" if staying else own)
            + "; the layer is as before: keep it attached, or merge all adapters together"
        )

    def _effective_values(self) -> dict[tuple[str, str], Tensor]:
        """Return W' and b' in fp32 or fp64 of each weight that an adapter acts on which stays."""
        active = self._part.module._peft.active
        found: dict[tuple[str, str], Tensor] = {}
        with torch.no_grad():
            for path in self._read_by_staying:
                acting = [a for a in active.edits if a.site.parameter == path]
                site = acting[0].site
                edits = [a.edit() for a in acting]
                start = site.weight(site.wide_dtype)
                copied = self._copy_of(path)
                if copied is not None:
                    start = site.ops.to_canonical(site.module, path, copied)
                found[path, "weight"] = apply_edits(site, edits, start).clone()
                bias = site.ops.bias(site.module, path)
                b = self._copy_of(bias)
                b = site.bias(site.wide_dtype) if b is None else b
                for edit in edits:
                    b = edit.edited_bias(b)
                if b is not None:
                    found[path, "bias"] = b.clone()
        return found

    def _copy_of(self, path: str | None) -> Tensor | None:
        """Return the trained copy that acts in place of a parameter, in fp32 or fp64."""
        active = self._part.module._peft.active
        copies = [c[path] for a in active.trained_copies if path in (c := a.copies())]
        if not copies:
            return None
        copied = copies[-1].detach()
        return copied if copied.dtype == torch.float64 else copied.float()

    def _run(self) -> Tensor | None:
        if self._inputs is None:
            return None
        module = self._part.module
        if not has_own_forward(module):
            return self._outputs()
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        try:
            return self._outputs()
        except Exception:  # the class takes inputs of another form than its base
            return None
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)

    def _outputs(self) -> Tensor | None:
        module, inputs = self._part.module, self._inputs
        assert inputs is not None
        plainly = torch.autocast(inputs[0].device.type, enabled=False)
        with torch.no_grad(), evaluating(module), without_mixed_batch(), plainly:
            y = type(module).forward(module, *inputs)
        first = y[0] if isinstance(y, tuple) else y
        return first.detach().clone() if isinstance(first, Tensor) else None
