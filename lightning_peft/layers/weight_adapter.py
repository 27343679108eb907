"""Adapters that change one weight through an Edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import changes_weight
from lightning_peft.layers.adapted_state import ActiveAdapters
from lightning_peft.layers.adapter import Adapter, SiteRNG, default_cpu
from lightning_peft.layers.batch_facts import BatchObserver
from lightning_peft.layers.mixed_batch import current_facts, current_gates, current_mixed_batch

if TYPE_CHECKING:
    from lightning_peft.methods.base import WeightMethod

__all__ = ["BaseRewrite", "WeightAdapter", "check_replaced", "initial_shared"]


@dataclass
class BaseRewrite:
    """A base weight that an adapter's initialisation replaced (PiSSA's residual …).

    Attributes:
        original_bits: Stored bits from before, on the CPU.
        rewritten_bits: Stored bits from after, on the CPU while the adapter is switched off.
        active: Whether the rewritten weight is in the module.
    """

    original_bits: Any
    rewritten_bits: Any = None
    active: bool = True


class WeightAdapter(Adapter):
    """Changes one weight through an Edit.

    Attributes:
        shared_buffers: Frozen tensors that all sites of the method share; not owned.
        shared_trained: Trained tensors that all sites of the method share; not owned.
        tied_trained: Trained tensors of the adapter at `Site.tied_to`; not owned.
        borrowed: Name of a trained tensor → parameters of the adapter that owns it.
        observer: The hook that finds the facts of a batch; the method's first adapter holds it.
        facts: Facts about the batch at hand, for methods that read them (`BatchObserver`).
        rewrite: The base weight that the initialisation replaced, None if it replaced none.
        awaits_data: Whether the adapter still waits for its initialisation from data.
    """

    method: WeightMethod
    shared_buffers: Mapping[str, Tensor]
    shared_trained: Mapping[str, Tensor]
    tied_trained: Mapping[str, Any]
    borrowed: dict[str, Mapping[str, Any]]
    observer: BatchObserver | None
    facts: Mapping[str, Tensor]
    rewrite: BaseRewrite | None

    def __init__(self, method: WeightMethod, site: Site, adapter_name: str) -> None:
        super().__init__(method, site, adapter_name)
        self.shared_buffers = {}
        self.shared_trained = {}
        self.tied_trained = {}
        self.borrowed = {}
        self.observer = None
        self.facts = {}
        self.rewrite = None
        self.awaits_data = bool(method.needs_data)

    @classmethod
    def build(cls, method: WeightMethod, site: Site, adapter_name: str) -> WeightAdapter:
        """The adapter with its initial tensors, on the CPU or on meta."""
        adapter = cls(method, site, adapter_name)
        parameters, buffers = adapter._draw(None)
        for key, tensor in {**parameters, **buffers}.items():
            if key in buffers:
                adapter.register_buffer(key, tensor)
            else:
                adapter.register_parameter(key, nn.Parameter(tensor))
        return adapter

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the method's own names, shared and tied ones included."""
        own: dict[str, Any] = {**self._parameters, **self._buffers}
        for name, held in self.borrowed.items():
            own[name] = held[name]
        if self.tied_trained:
            own |= self.method.of_tied(self.tied_trained, self.site)
        return {**self.shared_buffers, **self.shared_trained, **own}

    def edit(self) -> Edit:
        """The change of the site's weight at this moment."""
        tensors = self.tensors()
        if self.method.reads_batch:
            tensors |= self._facts_of_rows()
        edit, gates = self.method.edit(tensors, self.site), current_gates()
        return edit if gates is None else gates.on(edit, self.adapter_name, self.site)

    def _facts_of_rows(self) -> dict[str, Tensor]:
        """Facts of the rows that are under this adapter."""
        facts = {**self.facts, **current_facts()}
        mix = current_mixed_batch()
        if mix is None:
            return facts
        return {k: t[mix.index(self.adapter_name, len(t), t.device)] for k, t in facts.items()}

    def activate(self, active: ActiveAdapters) -> None:
        """Act as an edit of the weight."""
        active.edits.append(self)

    def initial_tensors(self, seed: int | None) -> dict[str, Tensor]:
        """Parameters and buffers as the method draws them, on the CPU."""
        parameters, buffers = self._draw(seed)
        return {k: t for k, t in {**parameters, **buffers}.items() if k not in self.borrowed}

    def borrow(self, name: str, owner: WeightAdapter) -> None:
        """Use the owner's trained tensor of this name in place of one of its own."""
        del self._parameters[name]
        self.borrowed[name] = owner._parameters

    def _draw(self, seed: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters, then buffers, from one random stream."""
        with SiteRNG(self.site, self.adapter_name, seed), torch.no_grad(), default_cpu():
            return self.method.initial_tensors(self.site)

    def values_from_weight(self, values: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """Replace entries of `values` by those that need the weight.

        Args:
            values: Initial tensors; changed in place.
            site: The site to initialise for.
            W: Canonical weight [*batch, out, in].

        Returns:
            The weight that the base keeps, None if the base stays as it is.
        """
        with SiteRNG(site, self.adapter_name, None), torch.no_grad():
            return self.method.initialise(values, site, W)

    def initialize_from_weight(self, original: Tensor | None) -> None:
        """Set the tensors that need the weight, and rewrite the base if the method does.

        Args:
            original: The weight before it was packed; None reads the stored weight.
        """
        site = self.site
        W = site.weight(self.method.start_dtype) if original is None else original
        values = dict(self.tensors())
        base = self.values_from_weight(values, site, W)
        with torch.no_grad():
            for key, tensor in self.tensors().items():
                tensor.copy_(values[key])
            if base is not None:
                self.rewrite = BaseRewrite(site.storage.snapshot(site.module, site.parameter))
                site.write(base)

    def why_not_mergeable(self) -> str:
        """Reason why the change has no matrix; "" if it has one."""
        return "" if self.method.mergeable else "its change depends on the input"

    def switch_base(self, acts: bool, *, was_interrupted: bool = False) -> None:
        """Put the rewritten or the original base into the module, bit for bit.

        Args:
            acts: Whether the adapter acts.
            was_interrupted: Whether an earlier call may have failed halfway. The bits are then
                written again.
        """
        rewrite, site = self.rewrite, self.site
        if rewrite is None or (rewrite.active == acts and not was_interrupted):
            return
        # Each bit pattern that is not in the module is held, at every moment.
        if acts and not rewrite.active:
            site.storage.restore(site.module, site.parameter, rewrite.rewritten_bits)
            rewrite.active = True
            rewrite.rewritten_bits = None
        elif not acts:
            if rewrite.active:
                rewrite.rewritten_bits = site.storage.snapshot(site.module, site.parameter)
                rewrite.active = False
            site.storage.restore(site.module, site.parameter, rewrite.original_bits)

    @property
    def has_hooks(self) -> bool:
        """Whether the adapter finds the facts of a batch."""
        return self.observer is not None

    def keep_function_of_base(self) -> None:
        """Let a copied adapter start at the base.

        Its initial change is subtracted from the base if the original's was. Otherwise trained
        tensors that change the weight already, as random ones do, become zero.
        """
        if self.rewrite is None:
            self._start_at_zero()
            return
        site = self.site
        with torch.no_grad():
            base = site.weight(site.wide_dtype).clone()
            for term in self.edit().terms:
                base -= term.matrix().to(base)
            self.rewrite = BaseRewrite(site.storage.snapshot(site.module, site.parameter))
            site.write(base)

    def _start_at_zero(self) -> None:
        with torch.no_grad():
            changes = [term.matrix() for term in self.edit().terms if changes_weight(term)]
            if changes and bool(torch.stack(changes).sum(0).any()):
                for t in (*self._parameters.values(), *self.shared_trained.values()):
                    if t is not None:
                        t.zero_()

    def remove_hooks(self) -> None:
        """Remove the hook that finds the facts of a batch."""
        if self.observer is not None:
            self.observer.remove()

    @property
    def can_reset(self) -> bool:
        """Whether the initialisation left the base alone and needed no data."""
        return self.rewrite is None and (self.awaits_data or not self.method.needs_data)


def check_replaced(adapters: Sequence[WeightAdapter]) -> None:
    """Raise ValueError if two adapters that act together replace one row of a weight."""
    owners: dict[int, str] = {}
    for adapter in adapters:
        ids = adapter.method.replaced_ids(adapter.site)
        shared = sorted(owners.keys() & set(ids))
        if shared:
            raise ValueError(
                f"{adapter.site.quoted}: expected adapters that train different tokens, got "
                f"{shared[:5]} in both {owners[shared[0]]!r} and {adapter.adapter_name!r}; "
                "activate one of them with set_adapter"
            )
        owners |= dict.fromkeys(ids, adapter.adapter_name)


def initial_shared(
    method: WeightMethod, sites: Sequence[Site], adapter_name: str, seed: int | None
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Initial values of the tensors that all sites share: frozen and trained ones, on the CPU."""
    with SiteRNG(sites[0], adapter_name, seed), torch.no_grad():
        return method.initial_shared(sites)
