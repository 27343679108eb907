"""Incremental PCA of a stream of rows, and the distribution of a rank budget over layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lightning_peft.models.modules import fork_seeded_rng

__all__ = ["IncrementalPCA", "seeded", "share_ranks"]

_SEED = 42  # randomised SVD gives the same factors in every run


def seeded(device: torch.device) -> AbstractContextManager[None]:
    """Context in which torch draws from a fixed seed; outside it, nothing was drawn."""
    return fork_seeded_rng(_SEED, device)


class IncrementalPCA:
    """Principal components of batches of rows (Ross et al. 2008), one batch at a time.

    The former components, weighted by their singular values, represent all earlier rows. One more
    row corrects for the shift of the mean.

    Args:
        count: Components to keep.
        threshold: Cosine to the former component above which a component counts as settled.

    Attributes:
        components: [count, features], None before the first batch.
        singular_values: Singular values [count].
        shares: Share of the total variance that each component explains [count].
        settled: Whether each component stopped turning [count].
    """

    def __init__(self, count: int, threshold: float) -> None:
        self.count = count
        self.threshold = threshold
        self.components: Tensor | None = None
        self.singular_values = torch.zeros(0)
        self.shares = torch.zeros(0)
        self.settled = torch.zeros(count, dtype=torch.bool)
        self._rows = 0
        self._mean = torch.zeros(0)
        self._spread = torch.zeros(0)  # sum of squares around the mean, by feature

    def add(self, x: Tensor) -> None:
        """Add rows [n, features]; a batch with fewer rows than components is ignored."""
        if x.shape[0] < self.count:
            return
        x = x.detach().float()
        n, own = x.shape[0], x.mean(0, dtype=torch.float64)
        spread = (x - own).square().sum(0, dtype=torch.float64)
        former = self.components
        if former is None:
            mean, total = own, n
            stack = x - own.to(x.dtype)
        else:
            total = self._rows + n
            mean = (self._mean * self._rows + own * n) / total
            spread += self._spread + (self._mean - own).square() * (self._rows * n / total)
            shift = (self._rows * n / total) ** 0.5 * (self._mean - own)
            kept = self.singular_values.unsqueeze(-1) * former
            stack = torch.cat([kept.double(), (x - own).double(), shift.unsqueeze(0)])
        with seeded(x.device):
            _, S, V = torch.svd_lowrank(stack, q=2 * self.count, niter=4)
        V = V.mT * _signs(V)
        self.components, self.singular_values = V[: self.count], S[: self.count]
        self.shares = S[: self.count].square() / spread.sum()
        self._rows, self._mean, self._spread = total, mean, spread
        if former is not None:
            cosine = torch.cosine_similarity(self.components, former.to(V.dtype))
            self.settled = (cosine >= self.threshold).cpu()

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k components [k, features] and their singular values [k]."""
        assert self.components is not None  # at least one batch was added
        return self.components[:k], self.singular_values[:k]


def _signs(V: Tensor) -> Tensor:
    """Signs [k, 1] that make the largest entry of each column positive."""
    largest = V.abs().argmax(0, keepdim=True)
    return V.gather(0, largest).sign().mT


def share_ranks(
    found: Mapping[str, IncrementalPCA],
    owner: Mapping[str, str],
    most: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """Layer → rank, from the `budget` components that explain most of their layer's variance.

    Args:
        found: Components by the layer that owns them.
        owner: Layer → the layer whose components it shares; an owner maps to itself.
        most: Layer → largest rank.
        budget: Sum of the ranks.
    """
    layers: Sequence[str] = [
        name for name, own in owner.items() for _ in found[own].shares[: most[own]]
    ]
    shares = [found[own].shares[: most[own]].cpu().double() for own in owner.values()]
    order = torch.cat(shares).argsort(descending=True)[:budget].tolist()
    counts = Counter(layers[i] for i in order)
    ranks = {name: counts.get(name, 0) for name in owner}
    for name, own in owner.items():  # a tie may give the owner less; only its list was checked
        if ranks[own] < ranks[name]:
            ranks[own], ranks[name] = ranks[name], ranks[own]
    return ranks
