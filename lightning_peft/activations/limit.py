"""`limit_activations`: any module keeps less for its backward pass, until the limit is removed."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn

from lightning_peft.activations.block_call import BlockCall
from lightning_peft.activations.blocks import find_blocks
from lightning_peft.activations.config import ActivationKind, Activations, as_activations
from lightning_peft.activations.host_memory import HostMemories
from lightning_peft.core.modules import modules_by_name
from lightning_peft.core.names import with_parents

__all__ = ["ActivationLimit", "limit_activations"]

_ATTRIBUTES = ("forward", "_compiled_call_impl")


class ActivationLimit:
    """The blocks of a model that keep less for backward. A context manager that removes itself.

    Attributes:
        activations: What the blocks keep.
        blocks: Names of the blocks.
        memories: Where tensors are moved to.
    """

    def __init__(
        self,
        model: nn.Module,
        activations: Activations,
        memories: HostMemories | None = None,
        *,
        keeps_random_states: bool = True,
    ) -> None:
        self.activations = activations
        self.memories = HostMemories() if memories is None else memories
        self._keeps_random_states = keeps_random_states
        found = find_blocks(model, activations.blocks)
        for name, block in found:
            if any(isinstance(vars(block).get(a), BlockCall) for a in _ATTRIBUTES):
                raise ValueError(
                    f"activations on {name!r}: expected a block without a limit, found that it has "
                    "one; remove that limit first, or use one of PEFT(activations=...) and "
                    "limit_activations"
                )
        _check_not_compiled(model, [name for name, _ in found], activations)
        self._flags = _switched_on(model)
        if self._flags and not activations.recomputes:
            names = [name for name, _ in self._flags]
            raise ValueError(
                f"activations={activations.kind!r}: expected a model that does not checkpoint, "
                f"found gradient_checkpointing switched on in {names[:3]}; call "
                "gradient_checkpointing_disable(), or use 'checkpoint+offload'"
            )
        for _, module in self._flags:
            module.gradient_checkpointing = False
        self.blocks = [name for name, _ in found]
        self._calls = [self._install(name, block, "forward") for name, block in found]

    def _install(self, name: str, block: nn.Module, attribute: str) -> BlockCall:
        inner: Any = vars(block).get(attribute)
        call = BlockCall(
            name, block, self.activations, self.memories, inner, self._keeps_random_states
        )
        setattr(block, attribute, call)
        return call

    def settle(self) -> None:
        """Move the calls of blocks that were compiled in the meantime around the compiled code."""
        for i, call in enumerate(self._calls):
            compiled = vars(call.block).get("_compiled_call_impl")
            if compiled is not None and not isinstance(compiled, BlockCall):
                _uninstall(call)
                self._calls[i] = self._install(call.name, call.block, "_compiled_call_impl")

    def remove(self) -> None:
        """Bring the model back to what it was. A second call does nothing."""
        for call in self._calls:
            _uninstall(call)
        for _, module in self._flags:
            module.gradient_checkpointing = True
        self._calls, self._flags = [], []

    @property
    def moved(self) -> int:
        """Bytes that this thread moved to host memory so far."""
        return self.memories.moved

    def __str__(self) -> str:
        """One line for the report."""
        kinds = {
            "checkpoint": "run again in backward",
            "offload": "saved tensors in host memory",
            "checkpoint+offload": "run again in backward, inputs in host memory",
        }
        n = len(self.blocks)
        first, last = self.blocks[0], self.blocks[-1]
        named = first if n == 1 else f"{first} … {last}"
        blocks = "block" if n == 1 else "blocks"
        return f"activations: {n} {blocks} ({named}) {kinds[self.activations.kind]}"

    def __enter__(self) -> ActivationLimit:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def limit_activations(
    model: nn.Module, activations: Activations | ActivationKind = "checkpoint"
) -> ActivationLimit:
    """Let the blocks of a model keep less for their backward pass.

    Losses and gradients stay the same: checkpointing is non-reentrant, restores random states, and
    works with frozen inputs, in train and in eval mode. Nothing happens without a graph. Call it
    after `attach`, and after ``block.compile()``.

        with limit_activations(model, "checkpoint+offload"):
            model(**batch).loss.backward()

    Args:
        model: Any module.
        activations: What is kept; its kind alone for the default blocks.

    Returns:
        The limit. ``remove()`` brings the model back.

    Raises:
        ValueError: an unknown kind, no blocks of that name, a model that has a limit already, or
            ``"offload"`` on a model that checkpoints itself. The model is unchanged.
    """
    config = as_activations(activations)
    if config is None:
        raise ValueError("activations: expected a kind or Activations(...), got None")
    limit = ActivationLimit(model, config)
    limit.settle()
    return limit


def _check_not_compiled(model: nn.Module, blocks: list[str], activations: Activations) -> None:
    """Raise ValueError if a compiled module holds blocks that offload."""
    if not activations.offloads:
        return
    modules = modules_by_name(model)
    for name in blocks:
        for parent in ("", *with_parents(name)[:-1]):
            compiled = vars(modules[parent]).get("_compiled_call_impl") is not None
            if compiled or hasattr(modules[parent], "_orig_mod"):
                raise ValueError(
                    f"activations={activations.kind!r} on {name!r}: expected blocks outside of "
                    f"graphs, found that {parent or 'the model'!r} is compiled with the block "
                    "inside; compile the blocks instead: for block in blocks: block.compile()"
                )


def _uninstall(call: BlockCall) -> None:
    call.active = False
    for attribute in _ATTRIBUTES:
        if vars(call.block).get(attribute) is call:
            vars(call.block).pop(attribute)
            if call.inner is not None:
                setattr(call.block, attribute, call.inner)


def _switched_on(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the modules that checkpoint by a switch of transformers."""
    return [
        (name or type(module).__name__, module)
        for name, module in modules_by_name(model).items()
        if getattr(module, "gradient_checkpointing", False) is True
    ]
