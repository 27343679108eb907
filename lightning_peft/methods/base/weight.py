"""Methods that change weights: each lowers to an Edit at every site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.methods.base.method import Method, Targeted
from lightning_peft.methods.base.step import StepContext, overrides_step_hooks
from lightning_peft.methods.tensors import naming_argument

__all__ = ["FromWeight", "InitData", "SiteRule", "WeightMethod"]

#: (method, site) → ValueError where the method has no meaning at this site.
SiteRule = Callable[[Any, Site], None]


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


@dataclass(frozen=True)
class WeightMethod(Targeted):
    """Changes weights: lowers to an Edit at each site."""

    #: Dtype in which `initialise` gets the weight; None for the stored one, without a copy.
    start_dtype: ClassVar[torch.dtype | None] = torch.float32

    #: Rules for the layers that the method takes.
    site_rules: ClassVar[tuple[SiteRule, ...]] = ()

    @property
    def edit_refers_to_tensors(self) -> bool:
        """Whether `edit` only arranges the adapter's tensors and fixed numbers."""
        return False

    def check(self, site: Site) -> None:
        """Raise ValueError where the method has no meaning at this site; nothing is changed yet."""
        for rule in self.site_rules:
            rule(self, site)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Trained tensors at their start, on the CPU or on meta, in fp32."""
        raise TypeError(f"{self.label}: expected a method with `parameters`, found none")

    def initial_tensors(self, site: Site) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`parameters` and `buffers` of a site.

        Raises:
            ValueError: a tensor that is far too large for the layer.
        """
        with naming_argument(self):
            return self.parameters(site), self.buffers(site)

    def initial_shared(self, sites: Sequence[Site]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`shared_buffers` and `shared_parameters`; raises as `initial_tensors` does."""
        with naming_argument(self):
            return self.shared_buffers(sites), self.shared_parameters(sites)

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


class FromWeight(WeightMethod):
    """Base of methods whose `initialise` fills tensors from the weight."""

    @property
    def starts_from_weight(self) -> bool:
        """Always."""
        return True
