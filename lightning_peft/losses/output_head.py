"""Output heads that defer their logits, until they are restored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import modules_by_name
from lightning_peft.core.per_thread import PerThread
from lightning_peft.losses.chunk_pass import Reduction, Step, chunk_tokens_for, chunked_loss
from lightning_peft.losses.deferred_logits import DeferredLogits
from lightning_peft.losses.token_loss import TokenLoss
from lightning_peft.models.modules import hf_models, output_embeddings
from lightning_peft.storage import storage_of

__all__ = ["ChunkedLoss", "chunk_losses"]


class _Request:
    """A loss that the head's forward is to compute: inside the hooks of the head, where FSDP2 has
    gathered its weights.
    """

    def __init__(
        self, labels: Tensor, loss: TokenLoss, reduction: str, steps: Sequence[Step]
    ) -> None:
        self.labels, self.loss, self.reduction, self.steps = labels, loss, reduction, steps


class _HeadForward:
    """The ``forward`` of a head, which can compute a loss instead of logits.

    Attributes:
        inner: The instance's forward before; None for the forward of the class.
    """

    def __init__(self, head: nn.Module, device: torch.device | None) -> None:
        self.head, self.vocabulary = head, _vocabulary(head)
        self.device = device
        self.inner: Callable[..., Any] | None = vars(head).get("forward")

    @property
    def _run(self) -> Callable[..., Any]:
        if self.inner is not None:
            return self.inner
        found: Callable[..., Any] = type(self.head).forward.__get__(self.head)
        return found

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute logits, or the loss that is requested."""
        request = kwargs.pop("_loss", None)
        if request is None:
            return self._run(*args, **kwargs)
        return chunked_loss(
            args[0],
            self._run,
            request.labels,
            request.loss,
            cast(Reduction, request.reduction),
            vocabulary=self.vocabulary,
            steps=request.steps,
            chunk_tokens=None if self.device is None else self._chunk_tokens(request.labels),
        )

    def _chunk_tokens(self, labels: Tensor) -> int:
        assert self.device is not None  # asked by the caller
        return chunk_tokens_for(labels.numel(), self.vocabulary, self.device)


class _HeadCall:
    """The call of a head in place of `nn.Module.__call__`: it defers without running hooks.

    It is the attribute ``_compiled_call_impl``, which copies and pickles of a module leave out.
    """

    def __init__(self, head: nn.Module, forward: _HeadForward, has_labels: PerThread[bool]) -> None:
        self.head, self.vocabulary = head, forward.vocabulary
        self.inner: Callable[..., Any] | None = vars(head).get("_compiled_call_impl")
        self._has_labels = has_labels

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return deferred logits in training and beside labels, else logits."""
        wanted = torch.is_grad_enabled() or self._has_labels.get()
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if not wanted or not alone or torch.compiler.is_compiling():
            return self._call(*args, **kwargs)
        hidden = args[0]
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        return DeferredLogits(self, hidden, dtype)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        run: Callable[..., Any] = self.head._call_impl if self.inner is None else self.inner
        return run(*args, **kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [*, vocabulary] of hidden states [*, features]."""
        found: Tensor = self._call(hidden)
        return found

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        loss: TokenLoss,
        reduction: str,
        steps: Sequence[Step],
    ) -> Tensor:
        """Return the loss of labels [*]."""
        request = _Request(labels, loss, reduction, steps)
        found: Tensor = self.head._call_impl(hidden, _loss=request)
        return found


class ChunkedLoss:
    """The output heads of a model that defer. A context manager that removes itself.

    Attributes:
        heads: Names of the heads.

    Args:
        model: The model.
        device: Device whose chunk size is used; None for that of the hidden states.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        found = _heads(model)
        self.heads = list(found)
        for name, head in found.items():
            if isinstance(vars(head).get("_compiled_call_impl"), _HeadCall):
                raise ValueError(
                    f"loss='chunked' on {name!r}: expected a head that computes its logits, found "
                    "one that defers them already; use one of PEFT(loss='chunked') and chunk_losses"
                )
        self._has_labels: PerThread[bool] = PerThread(bool)
        self._handles: list[Any] = []
        self._calls: list[tuple[_HeadForward, _HeadCall]] = []
        for head in found.values():
            forward = _HeadForward(head, device)
            call = _HeadCall(head, forward, self._has_labels)
            head.forward = forward
            head._compiled_call_impl = call
            self._calls.append((forward, call))
        for _, net in hf_models(model):
            before = net.register_forward_pre_hook(self._enter, with_kwargs=True)
            after = net.register_forward_hook(self._leave, always_call=True)
            self._handles += [before, after]

    def _enter(self, net: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        self._has_labels.set(kwargs.get("labels") is not None)

    def _leave(self, net: nn.Module, args: object, output: object) -> None:
        self._has_labels.set(False)

    def remove(self) -> None:
        """Bring the model back to what it was. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for forward, call in self._calls:
            for attribute, ours in (("forward", forward), ("_compiled_call_impl", call)):
                if vars(call.head).get(attribute) is ours:
                    vars(call.head).pop(attribute)
                    if ours.inner is not None:
                        setattr(call.head, attribute, ours.inner)
        self._handles, self._calls = [], []

    def __str__(self) -> str:
        """One line for the report."""
        return f"loss: {', '.join(self.heads)} in chunks of tokens; logits only where they are read"

    def __enter__(self) -> ChunkedLoss:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def chunk_losses(model: nn.Module) -> ChunkedLoss:
    """Let the output heads of the Hugging Face models inside defer their logits.

    In a forward with gradients or with labels, the head returns `DeferredLogits`, and cross entropy
    runs over chunks of tokens: the loss that the model computes from ``labels=``, and your own
    ``F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ...)``. Whatever else reads the logits
    computes them.

        with chunk_losses(model):
            model(input_ids=ids, labels=ids).loss.backward()

    Args:
        model: A module with a Hugging Face model that has an output head over a vocabulary.

    Returns:
        The heads. ``remove()`` brings the model back.

    Raises:
        ValueError: no such model, or heads that defer already. The model is unchanged.
    """
    return ChunkedLoss(model)


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    names = {id(m): n for n, m in modules_by_name(model).items()}
    found: dict[str, nn.Module] = {}
    kinds: list[str] = []
    for _, net in hf_models(model):
        kinds.append(type(net).__name__)
        head = output_embeddings(net)
        if head is not None and id(head) in names:
            found[names[id(head)]] = head
    if not found:
        raise ValueError(
            "loss='chunked': expected a Hugging Face model with output embeddings, such as a "
            f"causal one, got {kinds or type(model).__name__}; in a model of your own call "
            "chunked_cross_entropy(hidden, head, labels) in place of the head and the loss"
        )
    return found


def _vocabulary(head: nn.Module) -> int:
    return int(storage_of(head, "weight").shape(head, "weight")[0])
