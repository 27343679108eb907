"""The call of one block, which keeps less for backward than the block itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lightning_peft.activations.caches import without_caches
from lightning_peft.activations.config import Activations
from lightning_peft.activations.host_memory import HostMemories
from lightning_peft.activations.saved_tensors import moving_saved_tensors
from lightning_peft.activations.stateful_buffers import (
    Restored,
    buffer_versions,
    check_unchanged,
    running_statistics,
)

__all__ = ["BlockCall"]


class BlockCall:
    """Runs a block so that it keeps its input, or has its saved tensors moved.

    It is an attribute of the block: ``forward``, inside the block's hooks (FSDP2 gathers there), or
    ``_compiled_call_impl`` around the code that `nn.Module.compile` made, so that the second run is
    the compiled one too. Without a graph it does nothing.

    Attributes:
        inner: What stood in the attribute before; None for the forward of the class.
        keeps_random_states: Whether the second run draws the same dropout masks.
        active: False once the limit is removed.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        activations: Activations,
        memories: HostMemories,
        inner: Callable[..., Any] | None,
        keeps_random_states: bool = True,
    ) -> None:
        self.name = name
        self.block = block
        self.activations = activations
        self.memories = memories
        self.inner = inner
        self.keeps_random_states = keeps_random_states
        self.active = True

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._run)

    @property
    def _run(self) -> Callable[..., Any]:
        if self.inner is not None:
            return self.inner
        found: Callable[..., Any] = type(self.block).forward.__get__(self.block)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if not self.active or not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        args, kwargs = without_caches(args, kwargs)
        if torch.compiler.is_compiling():
            return self._trace(args, kwargs)
        return self._in_graph(args, kwargs)

    def _in_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        at = _stream(leaves)
        trained = any(p.requires_grad for p in self.block.parameters())
        if at is None or not (trained or any(_needs_graph(leaf) for leaf in leaves)):
            return self._run(*args, **kwargs)
        stream, leaves[at] = leaves[at], None
        del args, kwargs

        def run(stream: Tensor) -> Any:
            own = [*leaves]
            own[at] = stream
            args, kwargs = tree_unflatten(own, spec)
            return self._run(*args, **kwargs)

        shared = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with self._moving(stream.device, shared):
            return self._checkpointed(run, stream) if self.activations.recomputes else run(stream)

    def _moving(self, device: torch.device, shared: list[Tensor]) -> AbstractContextManager[object]:
        if not self.activations.offloads:
            return nullcontext()
        memory = self.memories.of(device)
        return moving_saved_tensors(memory, self.block, shared, self.activations.min_bytes)

    def _checkpointed(self, run: Callable[[Tensor], Any], stream: Tensor) -> Any:
        before = buffer_versions(self.block)

        def contexts() -> tuple[AbstractContextManager[None], Restored]:
            return nullcontext(), Restored(running_statistics(self.block))

        out = checkpoint(
            run,
            stream,
            use_reentrant=False,
            preserve_rng_state=self.keeps_random_states,
            context_fn=contexts,
        )
        check_unchanged(self.block, before, self.name)
        return out

    def _trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run inside a graph that torch.compile traces: hooks of saved tensors break it there."""
        if self.activations.offloads:
            return _outside_graphs(self._in_graph, args, kwargs)
        return checkpoint(self._run, *args, use_reentrant=False, **kwargs)


def _call(run: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    return run(args, kwargs)


_outside_graphs: Callable[[Callable[..., Any], Any, Any], Any] = torch.compiler.disable(
    _call, reason="torch.compile does not trace hooks of saved tensors"
)


def _needs_graph(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _stream(leaves: list[Any]) -> int | None:
    """Return the index of the tensor that flows through the blocks; others are shared by them.

    It is the first floating tensor that requires a gradient, else the first floating tensor.
    """
    floating = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
    return next((i for i in floating if leaves[i].requires_grad), next(iter(floating), None))
