"""Whether gradients arrive: inputs of a checkpointed model, and the check after the first step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.layers.adapted import Adapted, adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.optim.state_pool import local
from lightning_peft.report.tokens import tokens_of

__all__ = [
    "GradientWatch",
    "check_has_graph",
    "dead_gradients",
    "enable_input_require_grads",
    "unused_layers",
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
            "training_step does too. A loss of a part without adapters (the discriminator of a "
            "GAN) has no gradient either: name its layers in target_modules, or the part in "
            "modules_to_save"
        )


class GradientWatch:
    """Warns of trained adapters that the first steps of their optimizer do not reach.

    A missing gradient is reported in the first step. A gradient of zero is reported if it stays
    zero for `ZERO_STEPS` steps: behind a head that starts at zero, the first one always is. Every
    optimizer is watched for its own parameters, since several may step in turn.
    """

    ZERO_STEPS = 3

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._zero: dict[int, set[str]] = {}

    def check(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Look at the gradients of one optimizer before it steps."""
        key = id(optimizer)
        step = self._steps.get(key, 0) + 1
        if step > self.ZERO_STEPS or (step > 1 and not self._zero[key]):
            return
        self._steps[key] = step
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        absent, zero = _unreached(model, own)
        self._zero[key] = self._zero[key] & set(zero) if step > 1 else set(zero)
        last = step == self.ZERO_STEPS
        _warn([*(absent if step == 1 else ()), *(sorted(self._zero[key]) if last else ())], step)


def dead_gradients(model: nn.Module) -> list[str]:
    """One line for every trained adapter without a gradient, or with a gradient of zero."""
    absent, zero = _unreached(model, None)
    return absent + zero


def _unreached(model: nn.Module, own: set[int] | None) -> tuple[list[str], list[str]]:
    """Return lines for adapters without a gradient, and for those whose gradient is zero.

    An adapter counts as reached when one of its tensors has a gradient that is not zero: at the
    start LoRA's A has a zero gradient, because B is zero. Experts that had no token yet have a zero
    gradient too, and are no fault.

    Args:
        model: The model after a backward pass.
        own: Ids of the parameters to look at; None for all.
    """
    absent: list[str] = []
    zero: list[str] = []
    for name, module in adapted_modules(model):
        telemetry = module._peft.telemetry
        for adapter in adapters_of(module):
            trained = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
            if own is not None:
                trained = {n: p for n, p in trained.items() if id(p) in own}
            if not trained:
                continue
            missing = [n for n, p in trained.items() if p.grad is None]
            if missing and not telemetry.forward_ran:
                continue  # not used: listed once, at the end of the first epoch
            if missing:
                absent.append(
                    f"{name}: {_label(adapter)} {', '.join(missing)}: no gradient: {_cause(module)}"
                )
            elif not any(_moves(p.grad) for p in trained.values() if p.grad is not None):
                tokens = tokens_of(module)
                if tokens is not None and not any(tokens):
                    continue  # none of its experts had a token yet; the report on tokens says so
                had = "" if tokens is None else f", though its experts had {sum(tokens)} tokens"
                zero.append(f"{name}: {_label(adapter)}: zero gradient in every tensor{had}")
    return absent, zero


def unused_layers(model: nn.Module) -> list[str]:
    """Return the adapted layers that nothing used so far: neither their forward nor a reader.

    A branch that was not taken, a dropped layer or an expert without tokens is no fault.
    """
    return [
        n or "the module itself, whose forward nothing called"
        for n, module in adapted_modules(model)
        if not module._peft.telemetry.forward_ran
    ]


def _cause(module: Adapted) -> str:
    if module._peft.telemetry.ran_in_graph:
        return "its output does not reach the loss"
    return (
        "its forward ran only without a graph: activation checkpointing with use_reentrant=True "
        "over frozen inputs (use use_reentrant=False), torch.no_grad() or detach()"
    )


def _moves(grad: Tensor) -> bool:
    """Whether anything is not zero; an empty shard says nothing."""
    own = local(grad)
    return not own.numel() or bool(own.count_nonzero())


def _label(adapter: Adapter) -> str:
    return f"{adapter.method.label} {adapter.adapter_name!r}"


def _warn(lines: Sequence[str], step: int) -> None:
    if not lines:
        return
    shown = [*lines[:20], *([f"… and {len(lines) - 20} more"] if len(lines) > 20 else [])]
    when = "the first step" if step == 1 else f"{step} steps"
    parts = "part" if len(lines) == 1 else "parts"
    warnings.warn(
        f"PEFT: {len(lines)} trained {parts} got no gradient after {when}:\n  "
        + "\n  ".join(shown),
        stacklevel=4,
    )
