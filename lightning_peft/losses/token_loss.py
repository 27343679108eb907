"""Cross entropy of one chunk of tokens, and its gradient, without further copies of the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenLoss"]


@dataclass(frozen=True)
class TokenLoss:
    """Cross entropy as `torch.nn.functional.cross_entropy` defines it, in float32.

    Attributes:
        ignore_index: Label of tokens that do not count.
        label_smoothing: Share of the label that is spread over the vocabulary, from 0 to 1.
        weight: Weight per class, float32 [vocabulary]; None for equal weights.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Tensor | None = None

    def token_weights(self, labels: Tensor) -> Tensor:
        """Return what each token counts in the mean, float32: 0 where it is ignored."""
        counted = labels != self.ignore_index
        if self.weight is None:
            return counted.float()
        return self.weight[labels.where(counted, 0)] * counted

    def __call__(
        self, logits: Tensor, labels: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss of each token [N], and the gradient of their sum in the logits [N, V].

        With shifted logits z and probabilities p, a smoothing of ε and class weights w of sum W:
        `loss = (1 - ε) w_y (log Σ exp z - z_y) + ε/V (W log Σ exp z - Σ w z)`.

        Args:
            logits: [N, V], any floating dtype; unchanged.
            labels: [N], int64.
            with_gradient: Whether to return the gradient, in float32.
        """
        if logits.dtype == torch.float64:
            logits = logits.float()
        counted = labels != self.ignore_index
        target = labels.where(counted, 0)[:, None]
        highest = logits.detach().amax(-1, keepdim=True).float()
        p = torch.sub(logits, highest)  # float32 by promotion: the only large buffer
        at_label = p.gather(-1, target)[:, 0]
        smoothing = self.label_smoothing
        spread = None
        if smoothing:
            spread = p.sum(-1) if self.weight is None else p @ self.weight
        total = p.exp_().sum(-1, keepdim=True)
        log_total = total.log()[:, 0]
        own = self.token_weights(labels) * (1.0 - smoothing)
        loss = own * (log_total - at_label)
        zero = loss.new_zeros(())
        vocabulary = logits.shape[-1]
        share = smoothing / vocabulary
        even = smoothing if self.weight is None else share * self.weight.sum().to(loss.device)
        if spread is not None:
            smooth = even * log_total - share * spread
            loss = loss + smooth.where(counted, zero)
        loss = loss.where(counted, zero)
        if not with_gradient:
            return loss, None
        scale = own + even * counted
        p.mul_(scale[:, None] / total)
        p.scatter_add_(-1, target, -own[:, None])
        if smoothing:
            each = counted[:, None].float() * share
            p.sub_(each if self.weight is None else each * self.weight)
        return loss, p
