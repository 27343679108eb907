"""The four kinds of method, and the registry.

A method is a frozen dataclass: what the user says, nothing that is computed. Its file holds the
formula and the table of names it has in Hugging Face's format; it never sees a kind of layer,
packed bytes, the trainer or a strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import BlockSite, SequenceSite, Site
from lightning_peft.methods.exchange import HFEntry, HFFormat

__all__ = [
    "BlockMethod",
    "HFEntry",
    "HFFormat",
    "Method",
    "SelectMethod",
    "SequenceMethod",
    "StepContext",
    "WeightMethod",
]


@dataclass
class StepContext:
    """What a schedule may see at a step.

    Attributes:
        step: Optimizer steps done so far.
        total_steps: Optimizer steps of the whole run; None where it is unbounded.
        entries: (site, tensors) of every place where the method is attached; tensors include
            buffers.
        grad_scale: Factor that gradients carry at this moment (GradScaler's), 1.0 without one.
    """

    step: int
    total_steps: int | None
    entries: Sequence[tuple[Site, Mapping[str, Tensor]]]
    grad_scale: float = 1.0


class Method:
    """Common to all methods. No dataclass itself: command-line parsers take subclasses of ordinary
    classes only.
    """

    kind: ClassVar[str] = ""
    hf: ClassVar[HFFormat | None] = None
    mergeable: ClassVar[bool] = True

    #: Row of the architectures' table that `target_modules=None` means.
    default_targets: ClassVar[str] = "lora"

    @property
    def label(self) -> str:
        """The name that reports and errors use."""
        return type(self).__name__


@dataclass(frozen=True)
class Targeted(Method):
    """Which modules.

    Attributes:
        target_modules: ``"all-linear"`` (without the output head), suffixes, or a regular
            expression of whole names; None means the architecture's usual choice.
        exclude_modules: Suffixes or a regular expression.
        layers_to_transform: Numbers of the blocks; None means all.
    """

    target_modules: str | list[str] | None = field(default=None, kw_only=True)
    exclude_modules: str | list[str] | None = field(default=None, kw_only=True)
    layers_to_transform: int | list[int] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class WeightMethod(Targeted):
    """Changes weights: lowers to an Edit at each site."""

    kind: ClassVar[str] = "weight"

    def check(self, site: Site) -> None:
        """Raise ValueError where the method has no meaning at this site; nothing is changed yet."""

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Trained tensors at their start, on the CPU or on meta, in fp32."""
        raise TypeError(f"{self.label}: expected a method with `parameters`, found none")

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Tensors that are kept and saved but not trained (masks, averages)."""
        return {}

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Frozen tensors that all sites share; held once at the root."""
        return {}

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """Start values that need the weight.

        Args:
            p: What `parameters` and `buffers` returned; values are replaced in place (``p["A"] =
                …``).
            site: The site.
            W: Canonical weight [*batch, out, in] in fp32, before any quantisation.

        Returns:
            The weight to store instead (PiSSA's residual), or None to leave it.
        """
        return None

    @property
    def rewrites_base(self) -> bool:
        """Whether `initialise` replaces the weight, from its value before any quantisation."""
        return False

    @property
    def starts_from_weight(self) -> bool:
        """Whether `initialise` is called at all: it needs the weight as the layer reads it."""
        return self.rewrites_base

    @property
    def needs_data(self) -> str:
        """What a start that needs batches is made of: ``"inputs"`` of the layer (its tensors A
        [k, in] and B [out, k] then change their k), ``"gradients"`` of its weight, or ``""``.
        """
        return ""

    @property
    def data_options(self) -> Mapping[str, Any]:
        """How a start from data is made, by the names of Hugging Face's settings."""
        return {}

    def from_data(
        self, p: dict[str, Tensor], site: Site, found: Tensor, singular_values: Tensor | None
    ) -> None:
        """Start values from data; values are replaced in place (``p["A"] = …``).

        Args:
            p: Tensors as attached.
            site: The site.
            found: Principal directions of the inputs [k, in], or the mean gradient of the weight
                [out, in]; fp32.
            singular_values: Singular values [k] of the directions.
        """
        raise TypeError(f"{self.label}: expected a method with `from_data`, found none")

    def residual(self, p: Mapping[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """The weight that a dense base keeps beside a start from data; None leaves it."""
        return None

    def resolved(self, feedforward: Sequence[str]) -> Method:
        """The method with what it takes from the model filled in.

        Args:
            feedforward: Suffixes of the layers that lead out of a feed-forward block, by the
                architectures' table; empty where the architecture is not in it.
        """
        return self

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The change of the weight."""
        raise TypeError(f"{self.label}: expected a method with `edit`, found none")

    def trained_biases(self) -> str:
        """``"none"``, ``"all"`` or ``"adapted"``: biases trained beside the edit."""
        return "none"

    def rates(self, site: Site) -> Mapping[str, float]:
        """Tensor → factor of the learning rate that the user's optimizer has for it."""
        return {}

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """A term added to the loss once per optimizer step, as a gradient before clipping."""
        return None

    def after_backward(self, ctx: StepContext) -> None:
        """Called when gradients of a step are complete, before clipping."""

    def after_step(self, ctx: StepContext) -> None:
        """Called after the optimizer's step, gradients still there."""


@dataclass(frozen=True)
class BlockMethod(Targeted):
    """Adds a small module behind (or beside) a layer."""

    kind: ClassVar[str] = "block"
    mergeable: ClassVar[bool] = False

    @property
    def where(self) -> str:
        """Places of a transformer block where none are named: ``"branches"``, ``"residual"`` or
        ``"beside"`` the feed-forward branch.
        """
        return "branches"

    def module(self, site: BlockSite) -> nn.Module:
        """The added module, initialised."""
        raise TypeError(f"{self.label}: expected a method with `module`, found none")

    def change(self, module: nn.Module, x: Tensor, site: BlockSite) -> Tensor:
        """What is added to the output; x is that output, or the input (`BlockSite.role`)."""
        raise TypeError(f"{self.label}: expected a method with `change`, found none")


@dataclass(frozen=True)
class SequenceMethod(Targeted):
    """Adds positions to the sequence, at the model's boundary or in its attention.

    Attributes:
        acts: ``"prepend"``: embeddings before the text; ``"add"``: added to the text's embeddings;
            ``"attention"``: keys and values before those of the text.
    """

    kind: ClassVar[str] = "sequence"
    mergeable: ClassVar[bool] = False

    @property
    def acts(self) -> str:
        """How the positions enter."""
        return "prepend"

    def module(self, site: SequenceSite) -> nn.Module:
        """The module that holds the trained tensors, initialised."""
        raise TypeError(f"{self.label}: expected a method with `module`, found none")

    def table(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """The positions: [n, width], or [n, Σ of the layers' keys and values]."""
        raise TypeError(f"{self.label}: expected a method with `table`, found none")

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Make `table` return this one.

        Raises:
            ValueError: another shape, or a module that computes its table.
        """
        raise ValueError(f"{self.label}: expected a method whose table can be set, found none")


@dataclass(frozen=True)
class SelectMethod(Targeted):
    """Trains a subset of the model's own parameters (on a copy: the base keeps its bits)."""

    kind: ClassVar[str] = "select"
    may_be_empty: ClassVar[bool] = False

    def selects(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """Whether this parameter of `owner` is trained."""
        raise TypeError(f"{self.label}: expected a method with `selects`, found none")

    def choice(self, model: nn.Module) -> Callable[[str, nn.Parameter, nn.Module], bool]:
        """`selects`, for methods whose choice depends on the whole model."""
        return self.selects
