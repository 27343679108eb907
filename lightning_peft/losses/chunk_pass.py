"""One pass over chunks of tokens: the head runs, the loss is computed, gradients are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.losses.token_loss import TokenLoss

__all__ = ["Head", "Reduction", "Step", "chunk_tokens_for", "chunked_loss"]

Reduction = Literal["mean", "sum", "none"]
#: Hidden states [*, features] → logits [*, vocabulary].
Head = Callable[[Tensor], Tensor]
#: Logits → logits, row by row.
Step = Callable[[Tensor], Tensor]

#: Float32 logits of one chunk in bytes: on the CPU, whose caches are small, and elsewhere.
_CPU_BYTES, _BYTES = 2**25, 2**28
_CHUNKS, _FEWEST = 8, 64
#: Elements of a gradient that are scaled at once.
_SCALED = 2**24


def chunk_tokens_for(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Return the number of tokens per chunk: an eighth of them, within bounds of memory."""
    most = (_CPU_BYTES if device.type == "cpu" else _BYTES) // (4 * vocabulary)
    return max(_FEWEST, min(-(-tokens // _CHUNKS), most))


def chunked_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    loss: TokenLoss,
    reduction: Reduction,
    *,
    vocabulary: int,
    steps: Sequence[Step] = (),
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the loss of a head's logits, chunk by chunk.

    Args:
        hidden: Hidden states [*, features]. With three axes, chunks keep the first one, so that
            each row of a batch keeps its place.
        head: Computes logits [*, vocabulary].
        labels: Class indices [*], int64.
        loss: Loss per token.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"`` for [*].
        vocabulary: Number of classes, which decides the size of chunks.
        steps: What happens to the logits before the loss.
        chunk_tokens: Tokens per chunk; None for the default.

    Raises:
        TypeError: labels are not int64.
        ValueError: shapes that do not fit, labels outside of the vocabulary, or reduction "none"
            with a head that trains something.
    """
    _check(hidden, labels)
    if chunk_tokens is None:
        chunk_tokens = chunk_tokens_for(labels.numel(), vocabulary, hidden.device)
    counted = loss.token_weights(labels).sum()
    one, zero = torch.ones_like(counted), torch.zeros_like(counted)
    scale = torch.where(counted > 0, 1.0 / counted, zero) if reduction == "mean" else one
    # The range of float16 needs the factor of a gradient scaler, which is known in backward.
    first, later = (one, scale) if _runs_in_half(hidden) else (scale, one)
    run = _Pass(head, loss, steps, hidden, labels, first)
    for place in _places(labels, chunk_tokens):
        run.add(place)
    value = run.losses if reduction == "none" else run.losses.sum()
    if reduction == "mean":
        value = value / counted  # NaN if no token counts, as in torch; gradients are zero
    if run.hidden_gradient is None and not run.trained:
        return value
    if run.trained and reduction == "none":
        raise ValueError(
            "chunked loss with reduction='none': expected a head that trains nothing, got one that "
            f"trains {len(run.trained)} tensors; use 'mean' or 'sum', or plain cross_entropy"
        )
    leaves = [leaf for leaf, _ in run.trained.values()]
    sums = [total for _, total in run.trained.values()]
    known = value, later, run.hidden_gradient, sums
    attached: Tensor = _WithGradients.apply(*known, hidden, *leaves)  # type: ignore[no-untyped-call]
    return attached


def _check(hidden: Tensor, labels: Tensor) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}; give class indices")
    if hidden.dim() < 1 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: expected {list(hidden.shape[:-1])}, one per hidden state of "
            f"{list(hidden.shape)}, got {list(labels.shape)}"
        )


def _runs_in_half(hidden: Tensor) -> bool:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return hidden.dtype == torch.float16


def _places(labels: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, ...]]:
    """Yield the index of each chunk, along the second axis of several and the only axis of one."""
    axis = min(labels.dim() - 1, 1)
    if axis < 0:
        yield ()
        return
    length = labels.shape[axis]
    per_step = max(1, chunk_tokens // max(1, labels.numel() // max(1, length)))
    before = (slice(None),) * axis
    for start in range(0, length, per_step):
        yield (*before, slice(start, start + per_step))


class _Pass:
    """Losses and gradients of the chunks so far.

    Attributes:
        losses: Loss per token, float32, shape of the labels.
        hidden_gradient: Gradient of the scaled sum of losses in the hidden states; None if not
            needed.
        trained: Trained tensors behind the head and the gradient of the scaled sum, by id.
    """

    def __init__(
        self,
        head: Head,
        loss: TokenLoss,
        steps: Sequence[Step],
        hidden: Tensor,
        labels: Tensor,
        scale: Tensor,
    ) -> None:
        self._head, self._loss, self._steps = head, loss, steps
        self._hidden, self._labels, self._scale = hidden, labels, scale
        self._in_graph = torch.is_grad_enabled()
        self.losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        needed = self._in_graph and hidden.requires_grad
        empty = torch.zeros if labels.numel() == 0 else torch.empty
        self.hidden_gradient = (
            empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needed else None
        )
        self.trained: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, place: tuple[slice, ...]) -> None:
        """Run one chunk."""
        # Strided inputs take other products, which round the bias in a step of its own.
        x = self._hidden[place].detach().contiguous()
        if self.hidden_gradient is not None:
            x.requires_grad_()
        logits = self._head(x)
        for step in self._steps:
            logits = step(logits)
        y = self._labels[place]
        flat = logits.detach().reshape(-1, logits.shape[-1])
        _check_range(y, flat.shape[-1], self._loss.ignore_index)
        with torch.no_grad():
            losses, gradient = self._loss(flat, y.reshape(-1), logits.requires_grad)
            self.losses[place] = losses.view(y.shape)
            if gradient is None:
                return
            # The graph may begin in front of this chunk, and serve the next ones.
            leaves = [leaf for leaf in _leaves(logits) if leaf is not x]
            wanted = [*([x] if x.requires_grad else []), *leaves]
            found = torch.autograd.grad(
                logits,
                wanted,
                gradient.mul_(self._scale).view(logits.shape).to(logits.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            if self.hidden_gradient is not None:
                self.hidden_gradient[place] = found[0]
            for leaf, part in zip(leaves, found[len(found) - len(leaves) :], strict=True):
                self._sum(leaf, part)

    def _sum(self, leaf: Tensor, part: Tensor | None) -> None:
        """Add to a gradient in float32, however the tensor is held."""
        if part is None:
            return
        if id(leaf) in self.trained:
            self.trained[id(leaf)][1].add_(part)
        else:
            wide = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
            self.trained[id(leaf)] = leaf, wide


def _check_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ValueError for labels outside of the vocabulary; accelerators do not wait for it."""
    if labels.device.type != "cpu" or type(labels) is not Tensor or not labels.numel():
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bad.any():
        raise ValueError(
            f"labels: expected class indices below {vocabulary} or ignore_index={ignore_index}, "
            f"got {int(labels[bad][0])}"
        )


def _leaves(output: Tensor) -> list[Tensor]:
    """Return the trained tensors behind an output, each once."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        waiting += [parent for parent, _ in node.next_functions]
    return list(found.values())


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known: backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        scale: Tensor,
        hidden_gradient: Tensor | None,
        sums: list[Tensor],
        hidden: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(scale, hidden_gradient, *sums)
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale, hidden_gradient, *sums = ctx.saved_tensors
        factor = gradient * scale
        of_hidden = None if hidden_gradient is None else _scaled(hidden_gradient, factor)
        of_leaves = [
            (total * factor).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return (None, None, None, None, of_hidden, *of_leaves)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return the product in the gradient's dtype, computed in float32 a part at a time."""
    if factor.dim():
        factor = factor.unsqueeze(-1)  # one factor per token
    if gradient.dtype == torch.float32:
        return gradient * factor
    out = torch.empty_like(gradient)
    features = gradient.shape[-1]
    flat, target = gradient.view(-1, features), out.view(-1, features)
    rows = max(1, _SCALED // max(1, features))
    factors = factor.reshape(-1, 1).expand(len(flat), 1)
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        target[part] = flat[part].float() * factors[part]
    return out
