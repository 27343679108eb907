"""Clusters of a weight's rows, as AdaMSS in peft finds them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["row_clusters"]


def row_clusters(X: Tensor, n: int) -> Tensor:
    """Cluster of each row, by peft's call of scikit-learn: int64."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "AdaMSS: expected scikit-learn, whose k-means peft uses, found none; run pip install "
            "scikit-learn"
        ) from error
    means = KMeans(n_clusters=n, init="random", n_init=1, max_iter=10, random_state=123456789)
    return torch.from_numpy(means.fit_predict(X.float().numpy())).long()
