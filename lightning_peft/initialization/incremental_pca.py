"""IncrementalPCA directions of a stream of rows, and how a budget of ranks is shared by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["IncrementalPCA", "seeded", "share_ranks"]

_SEED = 42  # the factors of a randomised SVD are then the same in every run


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Within it torch draws from a fixed seed; outside it nothing has been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        yield


class IncrementalPCA:
    """Incremental principal components (Ross et al. 2008): one batch of rows after the other.

    The former components, weighted by their singular values, stand for all rows seen before; one
    more row corrects for the shift of the mean.

    Args:
        count: Components to keep.
        threshold: Cosine to the former component from which one counts as settled.

    Attributes:
        components: [count, features], None before the first batch.
        singular_values: Singular values [count].
        shares: Part of the whole variance that each component explains [count].
        settled: Which components stopped turning [count].
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
        """Take in rows [n, features]; fewer rows than components are left out."""
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
    """Layer → rank: the `budget` components that explain most of their own layer's variance.

    Args:
        found: The components, by the layer that has them.
        owner: Layer → the layer whose input it shares; itself where it has its own.
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
    for name, own in owner.items():  # a tie may leave the owner with less; its list is the checked
        if ranks[own] < ranks[name]:
            ranks[own], ranks[name] = ranks[name], ranks[own]
    return ranks
