"""Refuses steps that would train the base: somebody unfroze it after adapters were attached."""

from __future__ import annotations

from torch import nn

from lightning_peft.adapters.new_layers import new_parameters
from lightning_peft.adapters.state_dict import trained_tensors

__all__ = ["FrozenBase"]


class FrozenBase:
    """The parameters of the base inside an adapted root, collected once per epoch.

    Lightning calls a callback's `on_train_epoch_start` before the module's own, and a module may
    change flags inside `training_step`. So the flags are checked before every step.
    """

    def __init__(self) -> None:
        self._parameters: list[tuple[str, nn.Parameter]] = []

    def collect(self, module: nn.Module, root: nn.Module) -> None:
        """Find the base's parameters inside `root`, with their names in `module`."""
        ours = {id(t) for t in trained_tensors(module).values()}
        ours |= {id(p) for p in new_parameters(module)}
        inside = {id(p) for p in root.parameters()} - ours
        self._parameters = [(n, p) for n, p in module.named_parameters() if id(p) in inside]

    def check(self) -> None:
        """Raise if one of the parameters requires a gradient.

        Raises:
            RuntimeError: with the names.
        """
        if not any(p.requires_grad for _, p in self._parameters):
            return
        thawed = [name for name, p in self._parameters if p.requires_grad]
        raise RuntimeError(
            f"PEFT: expected a frozen base, found {len(thawed)} of its parameters unfrozen "
            f"({', '.join(thawed[:5])}); nothing was trained by this step. Adapters replace "
            "training the base: name the layers in modules_to_save to train a copy, or leave a "
            "part that you train yourself out of the adapted root with root="
        )
