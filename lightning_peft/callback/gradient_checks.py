"""Whether gradients arrive: inputs of a checkpointed model, and the check after the first step."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from lightning_peft.layers.adapted import Adapted, adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.optim.state_pool import local
from lightning_peft.report.tokens import tokens_of

__all__ = [
    "check_has_graph",
    "dead_gradients",
    "enable_input_require_grads",
    "unused_layers",
    "warn_dead",
]


def enable_input_require_grads(model: nn.Module) -> list[str]:
    """Make the embeddings of a checkpointed Hugging Face model start the graph, in whatever order
    it was set up.

    With reentrant checkpointing a block whose inputs need no gradient gives none to the adapters
    inside it.

    Returns:
        Names of the models that got the hook.
    """
    done: list[str] = []
    for name, module in model.named_modules():
        enable = getattr(module, "enable_input_require_grads", None)
        if enable is None or getattr(module, "_require_grads_hooks", None):
            continue
        blocks = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
        if blocks and not any(name.startswith(f"{d}.") or not d for d in done):
            enable()
            done.append(name)
    return done


def check_has_graph(loss: Tensor) -> None:
    """Raise if the loss has no graph, before torch does and with the likely cause.

    Raises:
        RuntimeError: the loss depends on nothing that is trained.
    """
    if not loss.requires_grad:
        raise RuntimeError(
            "loss: expected a gradient, got none: the forward pass ran no adapter inside the "
            "graph. Activation checkpointing with use_reentrant=True cuts it where a block's "
            "input is frozen (use use_reentrant=False); torch.no_grad() or detach() in "
            "training_step does too"
        )


def dead_gradients(model: nn.Module) -> list[str]:
    """One line for everything trained that the first step did not reach.

    An adapter counts as reached when one of its tensors has a gradient that is not zero: at the
    start LoRA's A has a zero gradient, because B is zero. Experts that had no token yet have a zero
    gradient too, and are no fault.
    """
    idle = set(unused_layers(model))
    return [
        f"{name}: {what}"
        for name, module in adapted_modules(model)
        if name not in idle
        for what in _dead_adapters(module)
    ]


def unused_layers(model: nn.Module) -> list[str]:
    """Return the adapted layers that nothing used so far: neither their forward nor a reader.

    A branch that was not taken, a dropped layer or an expert without tokens is no fault.
    """
    return [n for n, module in adapted_modules(model) if not module._peft.telemetry.forward_ran]


def _dead_adapters(module: Adapted) -> list[str]:
    lines = []
    for adapter in adapters_of(module):
        trained = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
        if not trained:
            continue
        absent = [n for n, p in trained.items() if p.grad is None]
        if absent:
            lines.append(f"{_label(adapter)} {', '.join(absent)}: no gradient")
        elif not any(_moves(p.grad) for p in trained.values() if p.grad is not None):
            tokens = tokens_of(module)
            if tokens is not None and not any(tokens):
                continue  # none of its experts was asked yet: said beside the tokens
            asked = "" if tokens is None else f", though its experts had {sum(tokens)} tokens"
            lines.append(f"{_label(adapter)}: zero gradient in every tensor{asked}")
    return lines


def _moves(grad: Tensor) -> bool:
    """Whether anything is not zero; an empty shard says nothing."""
    own = local(grad)
    return not own.numel() or bool(own.count_nonzero())


def _label(adapter: Adapter) -> str:
    return f"{adapter.method.label} {adapter.adapter_name!r}"


def warn_dead(model: nn.Module) -> None:
    """Warn once with the list and the usual causes."""
    lines = dead_gradients(model)
    if lines:
        shown = lines[:20] + ([f"… and {len(lines) - 20} more"] if len(lines) > 20 else [])
        warnings.warn(
            f"after the first step {len(lines)} trained parts got no gradient. Causes: activation "
            "checkpointing with "
            "use_reentrant=True over frozen inputs (use use_reentrant=False), a layer whose weight "
            "another module reads, "
            "a branch that the batch did not take:\n  " + "\n  ".join(shown),
            stacklevel=2,
        )
