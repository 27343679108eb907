"""Where and in what shape Hugging Face peft keeps the tensors of an adapted layer.

Defaults are those of plain matrices; a kind of layer overrides what differs. `layout` is what a
method's table says about a tensor's axes: ``"down"`` [r, in], ``"up"`` [out, r], ``"out"`` [out],
``"in"`` [channels], ``"vector"`` one of both as [out, 1] or [1, channels], or ``""`` for axes that
no kind of layer changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

__all__ = ["HFLayout"]


class HFLayout:
    """Exchange hooks of a layer kind."""

    def hf_refusal(self, m: nn.Module, name: str) -> str:
        """Why no peft file can hold an adapter of this weight that acts alike; "" where one can."""
        return ""

    def hf_places(self, m: nn.Module, adapted: Sequence[str]) -> dict[str, str]:
        """Weight → path below the module under which its tensors stand; "" for the module itself.

        For instance ``"base_layer.out_proj"``, where peft's wrapper stands between.

        Args:
            m: The module.
            adapted: All weights of it that carry this adapter: peft nests wrappers, so places
                depend on the set.
        """
        return dict.fromkeys(adapted, "")

    def hf_found(self, m: nn.Module, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
        """Place → weight, from what a file holds below this module.

        Args:
            m: The module.
            found: By place, tensors by their names in the file, still in the file's shapes.

        Raises:
            ValueError: a place that this kind of layer does not have.
        """
        parameters: Sequence[str] = self.parameters(m)  # type: ignore[attr-defined]
        places = {place: name for name, place in self.hf_places(m, parameters).items()}
        unknown = sorted(set(found) - set(places))
        if unknown:
            raise ValueError(
                f"{type(m).__name__}: expected tensors at {sorted(places)} below the module, got "
                f"{unknown}"
            )
        return {place: places[place] for place in found}

    def hf_by_parameter(self, m: nn.Module, name: str) -> bool:
        """Whether the config names this weight under ``target_parameters``."""
        return False

    def hf_swaps(self, m: nn.Module, name: str) -> bool:
        """Whether peft takes the weight for its transpose, so that ΔW = B A is (Bᵀ)(Aᵀ) there."""
        return False

    def hf_rank(self, m: nn.Module, name: str, r: int) -> int:
        """The rank that peft's config states for a canonical rank r."""
        return r

    def hf_pack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """Canonical → peft's shape."""
        return t

    def hf_unpack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """peft's shape → canonical.

        Raises:
            ValueError: the shape or the content has no canonical equal; says what was expected.
        """
        if layout == "vector":
            if t.ndim != 2 or 1 not in t.shape:
                raise ValueError(f"expected shape [n, 1] or [1, n], got {list(t.shape)}")
            return t
        ndim = {"down": 2, "up": 2, "out": 1}.get(layout)
        if ndim is not None and t.ndim != ndim:
            raise ValueError(f"expected {ndim} axes, got shape {list(t.shape)}")
        return t
