"""One method at one site: its tensors, and what it rewrote in the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site

__all__ = ["Adapter", "BaseRewrite"]


@dataclass
class BaseRewrite:
    """A base weight that an adapter's initialisation replaced (PiSSA's residual …).

    Attributes:
        original: Stored bits from before, on the CPU.
        written: Stored bits after, on the CPU while the adapter is switched off.
        active: Whether the replaced weight is in the module.
    """

    original: Any
    written: Any = None
    active: bool = True


class Adapter(nn.Module):
    """One method at one site: its tensors, and the way to its Edit.

    Attributes:
        method: The frozen dataclass.
        site: Where it acts; not a submodule.
        adapter_name: The name it was attached under.
        shared: Tensors held by the root for all sites; not owned.
        rewrite: What its initialisation did to the base weight, if anything.
        paths: For trained copies: our parameter name → path of the parameter in the module.
        tap: A hook on another module (`InputTap`, `EncoderMaskHook`), None without one.
        waiting: Whether it is to start from data and has not yet.
    """

    method: Any
    site: Site
    adapter_name: str
    shared: Mapping[str, Tensor]
    rewrite: BaseRewrite | None

    def __init__(self, method: Any, site: Site, adapter_name: str) -> None:
        super().__init__()
        self.method = method
        self.site = site
        self.adapter_name = adapter_name
        self.shared = {}
        self.rewrite = None
        self.paths: dict[str, str] = {}
        self.tap: Any = None
        self.waiting = bool(getattr(method, "needs_data", ""))

    @property
    def kind(self) -> str:
        """``"weight"``, ``"block"``, ``"sequence"`` or ``"select"`` (a trained copy of
        parameters).
        """
        kind: str = self.method.kind
        return kind

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the method's own names."""
        return {**self.shared, **self._parameters, **self._buffers}  # type: ignore[dict-item]

    def copies(self) -> dict[str, Tensor]:
        """Trained copies by the path of what they stand for."""
        return {path: self._parameters[name] for name, path in self.paths.items()}  # type: ignore[misc]

    def edit(self) -> Edit:
        """The change of the site's weight at this moment."""
        edit: Edit = self.method.edit(self.tensors(), self.site)
        return edit

    def extra_repr(self) -> str:
        """Method and tensor shapes, for print(model)."""
        shapes = ", ".join(
            f"{n} {list(t.shape)}" for n, t in self.tensors().items() if t is not None
        )
        return f"{self.method.label}: {shapes}"
