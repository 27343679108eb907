"""Checks for incompatible Trainer options. They run in `setup`, before the model is modified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_peft.callback.configuration import PEFTConfiguration
from lightning_peft.trainers.packages import (
    OLDEST,
    callbacks_of,
    is_instance_of,
    is_supported,
    package_of,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["check_compatible", "check_trainer"]

# By class name: each package has its own class, and not every version has all of them.
_PRECISIONS = {
    "BitsandbytesPrecision": (
        "it quantises the same layers; leave the plugin out and give "
        "PEFT(quantization=Quantization('nf4'))"
    ),
    "TransformerEnginePrecision": (
        "it replaces the layers that adapters sit in; use precision='bf16-true'"
    ),
    "DeepSpeedPrecision": "it is untested with adapters; use strategy='peft_ddp' or 'peft_fsdp'",
    "XLAPrecision": "it is untested with adapters; use a CPU or CUDA accelerator",
}
_STRATEGIES = {
    "DeepSpeedStrategy": "it is untested with adapters; use strategy='peft_ddp' or 'peft_fsdp'",
    "FSDPStrategy": (
        "it needs one dtype and one requires_grad per unit, and writes the base; use "
        "strategy='peft_fsdp'"
    ),
    "ModelParallelStrategy": "it shards before adapters are there; use strategy='peft_fsdp'",
}


def check_trainer(trainer: object) -> None:
    """Raise unless the Trainer is of a supported version of `lightning` or `pytorch_lightning`.

    Raises:
        TypeError: the trainer is of neither package.
        RuntimeError: the package is too old.
    """
    package = package_of(trainer)
    if package is None:
        raise TypeError(
            "PEFT: expected a Trainer of lightning or pytorch_lightning, got "
            f"{type(trainer).__module__}.{type(trainer).__name__}; give the callback to one of "
            "these Trainers, or use attach(model, method) in a loop of your own"
        )
    if not is_supported(package.name):
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(
            f"PEFT: expected {package.name} {oldest} or later, got {package.version}; upgrade it, "
            "or, if another package pins it, leave PEFT out: call attach(module, method) before "
            "fit, and save_checkpoint(module, path) after it"
        )


def check_compatible(
    trainer: pl.Trainer, peft: PEFTConfiguration, peers: Sequence[PEFTConfiguration]
) -> None:
    """Raise if another part of the Trainer works against adapters.

    Args:
        trainer: The Trainer.
        peft: The callback that checks.
        peers: Every PEFT callback of the Trainer, `peft` included.

    Raises:
        ValueError: with the part, the reason and what to use instead.
    """
    _check_names(peft, peers)
    _check_backends(peers)
    _check_forms(peers)
    _check_launcher(trainer.strategy)
    for name, why in _PRECISIONS.items():
        if is_instance_of(trainer.precision_plugin, name):
            raise ValueError(f"PEFT: expected another precision plugin than {name}: {why}")
    if not getattr(trainer.strategy, "knows_peft", False):
        for name, why in _STRATEGIES.items():
            if is_instance_of(trainer.strategy, name):
                strategy = type(trainer.strategy).__name__
                raise ValueError(f"PEFT: expected another strategy than {strategy}: {why}")
    for callback in callbacks_of(trainer):
        if is_instance_of(callback, "BaseFinetuning") and peft.root is None:
            raise ValueError(
                f"PEFT: expected no {type(callback).__name__} in the same Trainer: it unfreezes "
                "layers of the base, which adapters keep as it is; leave it out, name the layers "
                "in PEFT(modules_to_save=[…]), or keep what it unfreezes out of PEFT(root=…)"
            )
        if is_instance_of(callback, "BaseFinetuning") and trainer.world_size > 1:
            raise ValueError(
                f"PEFT: expected one process with {type(callback).__name__}, got "
                f"{trainer.world_size}: DDP and FSDP send no gradients of parameters that are "
                "unfrozen after the start; train the part from the start, or on one process"
            )
        averages = ("WeightAveraging", "StochasticWeightAveraging")
        if peft.checkpoint == "merged" and any(is_instance_of(callback, a) for a in averages):
            raise ValueError(
                f"PEFT checkpoint='merged': expected no {type(callback).__name__}, whose average "
                "is not what the live model merges; use checkpoint='full'"
            )


def _check_names(peft: PEFTConfiguration, peers: Sequence[PEFTConfiguration]) -> None:
    for other in peers:
        twice = sorted(set(peft.names) & set(other.names)) if other is not peft else []
        if twice:
            raise ValueError(
                f"PEFT: expected one callback per adapter name, got two with {twice}; give one of "
                "them another adapter_name"
            )
        a, b = peft.root or "", other.root or ""
        if a != b and (not a or not b or a.startswith(f"{b}.") or b.startswith(f"{a}.")):
            raise ValueError(
                "PEFT: expected callbacks with the same root or with separate ones, got "
                f"{a or None!r} and {b or None!r}; name the smaller one in both, or use "
                "target_modules"
            )


def _check_backends(peers: Sequence[PEFTConfiguration]) -> None:
    requested = sorted({other.kernels for other in peers} - {"auto"})
    if len(requested) > 1:
        raise ValueError(
            f"PEFT kernels: expected one backend for all callbacks of a Trainer, got {requested}; "
            "give every callback the same, or leave it out"
        )


def _check_forms(peers: Sequence[PEFTConfiguration]) -> None:
    forms = sorted({other.checkpoint for other in peers})
    if len(forms) > 1:
        raise ValueError(
            f"PEFT checkpoint: expected one form for all callbacks of a Trainer, got {forms}; give "
            "every callback the same"
        )


def _check_launcher(strategy: pl.strategies.Strategy) -> None:
    if is_instance_of(strategy.launcher, "_MultiProcessingLauncher"):
        raise ValueError(
            "PEFT: expected processes that are started as scripts, got a strategy that spawns or "
            f"forks them ({type(strategy.launcher).__name__}): the adapters stay in the workers "
            "and are lost when they end; use strategy='ddp'"
        )
