"""The four kinds of method, and the registry.

A method is a frozen dataclass: what the user says, nothing that is computed. Its file holds the
formula and the table of names it has in Hugging Face's format; it never sees a kind of layer,
packed bytes, the trainer or a strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import BlockSite, RouterSite, SequenceSite, Site
from lightning_peft.methods.exchange import HFEntry, HFFormat

__all__ = [
    "BlockMethod",
    "HFEntry",
    "HFFormat",
    "InitData",
    "Method",
    "RouterMethod",
    "SelectMethod",
    "SequenceMethod",
    "StepContext",
    "WeightMethod",
    "overrides_step_hooks",
]


class InitData(StrEnum):
    """The data that a method's initialisation needs; NONE is falsy.

    Attributes:
        NONE: No data.
        INPUTS: Inputs of the layer.
        GRADIENTS: Gradients of the layer's weight.
        COVARIANCE: Second moments of the layer's inputs.
    """

    NONE = ""
    INPUTS = "inputs"
    GRADIENTS = "gradients"
    COVARIANCE = "covariance"

    @property
    def moves_base(self) -> bool:
        """Whether the start takes its change out of the base (`WeightMethod.residual`)."""
        return self in (InitData.GRADIENTS, InitData.COVARIANCE)


def overrides_step_hooks(cls: type[Any], base: type[Any]) -> bool:
    """Whether a class has a hook around the optimizer's step that its base has not."""
    hooks = ("penalty", "after_backward", "after_step")
    return any(getattr(cls, hook) is not getattr(base, hook) for hook in hooks)


@dataclass
class StepContext:
    """What a schedule may see at a step.

    Attributes:
        step: Optimizer steps done so far.
        total_steps: Optimizer steps of the run; None if it is unbounded.
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
        target_modules: ``"all-linear"`` (without the output head), suffixes, a part of a
            vision-language model (``"language"``, ``"vision"``, ``"language+vision"``), or a
            regular expression of full names; None means the architecture's usual choice.
        exclude_modules: Suffixes, a part, or a regular expression.
        layers_to_transform: Numbers of the blocks; None means all.
        layers_pattern: Names of the lists of blocks that the numbers count in, as ``"layers"``;
            None means the outermost lists.
    """

    target_modules: str | list[str] | None = field(default=None, kw_only=True)
    exclude_modules: str | list[str] | None = field(default=None, kw_only=True)
    layers_to_transform: int | list[int] | None = field(default=None, kw_only=True)
    layers_pattern: str | list[str] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class WeightMethod(Targeted):
    """Changes weights: lowers to an Edit at each site."""

    #: Dtype in which `initialise` gets the weight; None for the stored one, without a copy.
    start_dtype: ClassVar[torch.dtype | None] = torch.float32

    @property
    def edit_refers_to_tensors(self) -> bool:
        """Whether `edit` only arranges the adapter's tensors and fixed numbers."""
        return False

    def check(self, site: Site) -> None:
        """Raise ValueError where the method has no meaning at this site; nothing is changed yet."""

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Trained tensors at their start, on the CPU or on meta, in fp32."""
        raise TypeError(f"{self.label}: expected a method with `parameters`, found none")

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Tensors that are kept and saved but not trained (masks, averages)."""
        return {}

    def shared_buffers(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Frozen tensors that all sites share; stored once, with the first adapter."""
        return {}

    def shared_parameters(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Trained tensors that all sites share, at their start; held once, as `shared` is."""
        return {}

    def owners(self, sites: Sequence[Site]) -> Sequence[Mapping[str, int]]:
        """Trained tensors of each site that are those of another: name → number of the owner.

        Sites come in the order of `named_modules()`; an owner comes before the sites that share.
        """
        return [{} for _ in sites]

    @property
    def adapts_tied(self) -> bool:
        """Whether modules that share an adapted embedding's weight are adapted with it, by the same
        trained tensors.
        """
        return False

    def of_tied(self, p: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        """The trained tensors at `site`, as views of those at `site.tied_to`."""
        return p

    def site_buffers(self, sites: Sequence[Site]) -> Sequence[Mapping[str, Tensor]]:
        """Buffers of each site that depend on all sites: its number, a draw that runs over layers.

        Sites come in the order of `named_modules()`. Kept and saved as `buffers` are.
        """
        return [{} for _ in sites]

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
    def needs_data(self) -> InitData:
        """The data that the initialisation needs.

        With `InitData.INPUTS` the tensors A [k, in] and B [out, k] may change their k.
        """
        return InitData.NONE

    def rank(self, site: Site) -> int:
        """Rank of A and B at a site; an initialisation with `InitData.INPUTS` needs it."""
        raise TypeError(f"{self.label}: expected a method with `rank`, found none")

    @property
    def data_options(self) -> Mapping[str, Any]:
        """Options of the initialisation from data, by the names of Hugging Face's settings."""
        return {}

    def from_data(
        self, p: dict[str, Tensor], site: Site, found: Tensor, singular_values: Tensor | None
    ) -> None:
        """Set initial values from data; entries are replaced (``p["A"] = …``).

        Args:
            p: Tensors as attached.
            site: The site.
            found: Principal directions of the inputs [k, in], the mean gradient of the weight
                [out, in], or second moments of the inputs [in, in]; fp32.
            singular_values: Singular values [k] of the directions.
        """
        raise TypeError(f"{self.label}: expected a method with `from_data`, found none")

    def residual(self, p: Mapping[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """The weight that a dense base keeps after an initialisation from data; None leaves it."""
        return None

    def resolved(self, feedforward: Sequence[str]) -> Method:
        """The method with what it takes from the model filled in.

        Args:
            feedforward: Suffixes of the layers that lead out of a feed-forward block, by the
                architectures' table; empty where the architecture is not in it.
        """
        return self

    @property
    def reads_batch(self) -> bool:
        """Whether `edit` reads facts about the batch beside the method's tensors."""
        return False

    @property
    def reads_tokens(self) -> bool:
        """Whether those facts follow from the token ids, by `batch_facts`."""
        return False

    def batch_facts(self, ids: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Facts that `edit` finds among its tensors, [batch, …] each.

        Args:
            ids: Token ids [batch, positions] of this forward.
            before: Facts of the forward that filled the cache; empty without one.
        """
        raise TypeError(f"{self.label}: expected a method with `batch_facts`, found none")

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The change of the weight."""
        raise TypeError(f"{self.label}: expected a method with `edit`, found none")

    def trained_biases(self) -> str:
        """``"none"``, ``"all"`` or ``"adapted"``: biases that are trained too."""
        return "none"

    def trained_tokens(self) -> list[int] | dict[str, list[int]] | None:
        """Token ids whose embeddings are trained too, or layer name → token ids."""
        return None

    def replaced_ids(self, site: Site) -> Sequence[int]:
        """Rows of the vocabulary that `edit` replaces."""
        return ()

    def lr_multipliers(self, site: Site) -> Mapping[str, float]:
        """Tensor → factor on the learning rate of the user's optimizer."""
        return {}

    @property
    def has_step_hooks(self) -> bool:
        """Whether `penalty`, `after_backward` or `after_step` do anything."""
        return overrides_step_hooks(type(self), WeightMethod)

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """A term added to the loss once per optimizer step, as a gradient before clipping."""
        return None

    def after_backward(self, ctx: StepContext) -> None:
        """Called when gradients of a step are complete, before clipping."""

    def after_step(self, ctx: StepContext) -> None:
        """Called after the optimizer's step, gradients still there."""


@dataclass(frozen=True)
class BlockMethod(Targeted):
    """Adds a small module after a layer or parallel to it."""

    mergeable: ClassVar[bool] = False

    @property
    def where(self) -> Literal["branches", "residual", "parallel", "attention"]:
        """Places in a transformer block that ``target_modules=None`` means.

        ``"branches"``: after attention and feed-forward; ``"residual"``: after the residual
        addition; ``"parallel"``: parallel to the feed-forward branch; ``"attention"``: in
        self-attention, whose queries meet the module's keys and values too.
        """
        return "branches"

    def module(self, site: BlockSite) -> nn.Module:
        """The added module, initialised."""
        raise TypeError(f"{self.label}: expected a method with `module`, found none")

    @property
    def top_layers(self) -> int | None:
        """Number of blocks, from the last one back, that it acts in; None for all."""
        return None

    def attention_prompt(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """With ``where="attention"``: positions [1, n, width], and the factor on what they add."""
        raise TypeError(f"{self.label}: expected a method with `attention_prompt`, found none")

    def change(self, module: nn.Module, x: Tensor, site: BlockSite) -> Tensor:
        """The addition to the output; x is the layer's output or input (see `BlockSite.role`)."""
        raise TypeError(f"{self.label}: expected a method with `change`, found none")


@dataclass(frozen=True)
class SequenceMethod(Targeted):
    """Adds positions to the sequence, at the model's boundary or in its attention.

    Attributes:
        insertion: ``"prepend"``: embeddings before the text; ``"add"``: added to the text's
            embeddings; ``"attention"``: keys and values before those of the text.
    """

    mergeable: ClassVar[bool] = False

    @property
    def insertion(self) -> Literal["prepend", "add", "attention"]:
        """How the positions enter the model."""
        return "prepend"

    def module(self, site: SequenceSite) -> nn.Module:
        """The module that holds the trained tensors, initialised."""
        raise TypeError(f"{self.label}: expected a method with `module`, found none")

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """The positions: [n, width], or [n, keys and values of all layers]."""
        raise TypeError(f"{self.label}: expected a method with `prompt_embeddings`, found none")

    def prompts(
        self, module: nn.Module, site: SequenceSite, facts: Mapping[str, Tensor], batch: int
    ) -> Tensor:
        """The positions of a batch: `prompt_embeddings`, or [batch, n, width] if rows differ.

        Args:
            module: As in `prompt_embeddings`; so is `site`.
            facts: What is known about the samples, such as their task.
            batch: Rows of the batch.
        """
        return self.prompt_embeddings(module, site)

    @property
    def keeps_positions(self) -> bool:
        """Whether the output holds the positions of a prompt too."""
        return False

    @property
    def has_step_hooks(self) -> bool:
        """Whether `after_step` does anything."""
        return type(self).after_step is not SequenceMethod.after_step

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """None: no sequence method adds to the loss."""
        return None

    def after_backward(self, ctx: StepContext) -> None:
        """Called when gradients of a step are complete, before clipping."""

    def after_step(self, ctx: StepContext) -> None:
        """Called after the optimizer's step, gradients still there."""

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Make `prompt_embeddings` return `table`.

        Raises:
            ValueError: another shape, or a module that computes its embeddings.
        """
        raise ValueError(f"{self.label}: expected a method whose table can be set, found none")


@dataclass(frozen=True)
class RouterMethod(Targeted):
    """Says how much each of several adapters acts on a token, by a first pass without them."""

    mergeable: ClassVar[bool] = False

    def experts(self) -> Sequence[str]:
        """Names of the adapters, which are attached before."""
        raise TypeError(f"{self.label}: expected a method with `experts`, found none")

    def module(self, site: RouterSite) -> nn.Module:
        """The module that holds the trained tensors, initialised."""
        raise TypeError(f"{self.label}: expected a method with `module`, found none")

    def gates(self, module: nn.Module, hidden: Tensor, site: RouterSite) -> Tensor:
        """Factors [..., layers or 1, experts] from hidden states [..., width] of the first pass."""
        raise TypeError(f"{self.label}: expected a method with `gates`, found none")


@dataclass(frozen=True)
class SelectMethod(Targeted):
    """Trains a subset of the model's own parameters (on a copy: the base keeps its bits)."""

    may_be_empty: ClassVar[bool] = False

    #: Whether a normalisation layer's running statistics are copied with its parameters.
    copies_statistics: ClassVar[bool] = False

    def selects(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """Whether this parameter of `owner` is trained."""
        raise TypeError(f"{self.label}: expected a method with `selects`, found none")

    def choice(self, model: nn.Module) -> Callable[[str, nn.Parameter, nn.Module], bool]:
        """`selects`, for methods whose choice depends on the model."""
        return self.selects
