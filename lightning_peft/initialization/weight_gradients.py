"""Mean gradients of layers' weights, for LoRA-GA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import first_argument
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["weight_gradients"]


class _GradientSums:
    """Sums of the weight gradients by adapter, on the CPU.

    A gradient is formed from the layer's input and the gradient of its output, so the weight itself
    needs no gradient and may be packed.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def add(self, adapter: WeightAdapter, x: Tensor, dy: Tensor) -> None:
        """Add dYᵀ X of one call."""
        key = id(adapter)
        G = (dy.detach().flatten(0, -2).float().mT @ x.flatten(0, -2).float()).cpu()
        self._sums[key] = self._sums[key].add_(G) if key in self._sums else G
        self._counts[key] = self._counts.get(key, 0) + 1

    def __contains__(self, adapter: WeightAdapter) -> bool:
        return id(adapter) in self._sums

    def pop_mean(self, adapter: WeightAdapter) -> Tensor:
        """The mean over the calls; its sum is released."""
        return self._sums.pop(id(adapter)).div_(self._counts[id(adapter)])


def weight_gradients(
    adapters: Sequence[WeightAdapter], batches: Sequence[Any], run: Callable[[Any], Any]
) -> Iterator[tuple[Tensor, None]]:
    """The mean gradient [out, in] of every adapter's weight.

    Args:
        adapters: Adapters of one method.
        batches: Batches; each is used once.
        run: Runs the model on a batch and returns the loss.

    Raises:
        ValueError: a layer got no gradient, `run` returns no loss.
    """
    sums = _GradientSums()
    with ExitStack() as stack, torch.enable_grad():
        for adapter in adapters:
            hook = _gradient_hook(adapter, sums)
            handle = adapter.site.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            torch.autograd.backward(_loss(run(batch)))
    missing = [a.site.label for a in adapters if a not in sums]
    if missing:
        raise ValueError(
            f"init='lora_ga': expected a gradient in every adapted layer, found none in "
            f"{missing[:5]}; exclude layers that do not run, and use use_reentrant=False with "
            "activation checkpointing"
        )
    return ((sums.pop_mean(a), None) for a in adapters)


def _gradient_hook(adapter: WeightAdapter, sums: _GradientSums) -> Callable[..., Tensor]:
    """A forward hook that adds the weight's gradient when the output's gradient is known."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x: Tensor = first_argument(args, kwargs).detach()
        if not y.requires_grad:  # without a graph up to here, start one
            y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        y.register_hook(lambda dy: sums.add(adapter, x, dy))
        return y

    return hook


def _loss(output: object) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(
            "init='lora_ga': expected the step to return a loss (a scalar tensor, or one under "
            f"'loss'), got {type(loss).__name__}"
        )
    return loss
