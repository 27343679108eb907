"""Checks before the first step that all ranks train the same adapters over the same base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_peft.callback.configuration import PEFTConfiguration
from lightning_peft.core.collectives import check_same_on_all_ranks, raise_on_all_ranks
from lightning_peft.methods.registry import to_dict
from lightning_peft.storage import config_to_dict
from lightning_peft.storage.dtensor import is_sharded
from lightning_peft.strategies.rank_consistency import check_same_model
from lightning_peft.trainers.packages import is_fitting, package_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["check_same_batches", "check_same_configuration", "verify_consistent_attach"]

#: Packages whose version may change names, shapes or bytes of what ranks exchange.
_COMPARED = ("lightning-peft", "triton", "transformers", "bitsandbytes")


def check_same_configuration(peft: PEFTConfiguration, trainer: pl.Trainer) -> None:
    """Compare the arguments of the callback and the versions of packages between ranks.

    Raises:
        RuntimeError: on every rank, with the differences.
    """
    if trainer.world_size == 1:
        return
    package = package_of(trainer)
    said = {
        f"adapter {name!r}, method {i}, {key}": str(value)
        for name, methods in peft.adapters.items()
        for i, method in enumerate(methods)
        for key, value in to_dict(method).items()
    }
    said |= {
        "quantization": str(config_to_dict(peft.quantization)),
        "optimizer": str(peft.optimizer),
        "modules_to_save": str(peft.modules_to_save),
        "separate_copies": str(peft.separate_copies),
        "init_from": str(peft.init_from),
        "embeddings": peft.embeddings,
        "root": str(peft.root),
        "torch": torch.__version__,
        "lightning": "" if package is None else f"{package.name} {package.version}",
        **{name: _installed(name) for name in _COMPARED},
    }
    check_same_on_all_ranks(
        said, "PEFT", "start every process from the same script and environment"
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def verify_consistent_attach(module: nn.Module) -> Iterator[None]:
    """Run the block on every rank; an error on one rank raises on all. Then compare the models.

    Raises:
        RuntimeError: on every rank, with the first tensors that differ.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, "PEFT attach")
    check_same_model(module)


def check_same_batches(trainer: pl.Trainer) -> None:
    """Raise on every rank if the ranks of a starting stage have different numbers of batches.

    Every training step waits for all ranks. Over a sharded model every forward does. The ranks with
    more batches would hang.

    Raises:
        RuntimeError: with the numbers.
    """
    if trainer.world_size == 1:
        return
    counts: dict[str, object] = {}
    if is_fitting(trainer):
        counts["batches per epoch"] = trainer.num_training_batches
    if any(is_sharded(p) for p in trainer.lightning_module.parameters()):
        counts |= _evaluated(trainer)
    check_same_on_all_ranks(
        counts, "dataloaders", "use a DistributedSampler, drop_last=True, or limit the batches"
    )


def _evaluated(trainer: pl.Trainer) -> dict[str, object]:
    """Numbers of the batches that the running stage evaluates, by what they are."""
    stages: tuple[tuple[str, str, object], ...] = (
        ("fit", "batches per validation", trainer.num_val_batches),
        ("validate", "batches of validate", trainer.num_val_batches),
        ("test", "batches of test", trainer.num_test_batches),
        ("predict", "batches of predict", trainer.num_predict_batches),
    )
    return {name: count for stage, name, count in stages if trainer.state.fn == stage}
