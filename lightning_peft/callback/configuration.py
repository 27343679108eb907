"""The arguments of `PEFT`: checked, kept as attributes, and all that is pickled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft_kernels.dispatch import Backend
from typing_extensions import override

from lightning_peft.activations.config import ActivationKind, Activations, as_activations
from lightning_peft.adapters.attach_checks import check_adapter_name
from lightning_peft.callback.arguments import (
    check_embeddings,
    check_export,
    check_paths,
    check_separate_copies,
    check_values,
    methods_by_name,
)
from lightning_peft.callback.memory_plan import check_plan
from lightning_peft.callback.step_memory import LossForm, check_loss
from lightning_peft.checkpoint.forms import CheckpointForm, check_form
from lightning_peft.hf.base_copies import Embeddings
from lightning_peft.methods.base import Method
from lightning_peft.storage import Quantization, StorageConfig, as_config
from lightning_peft.strategies import register_strategies
from lightning_peft.strategies.base_reading import check_cache
from lightning_peft.trainers.callback_base import TrainerCallback

__all__ = ["PEFTConfiguration"]

#: Attributes that are pickled. Libraries put callbacks into hyper-parameters and copy them.
_CONFIGURATION = (
    "adapters",
    "quantization",
    "optimizer",
    "modules_to_save",
    "separate_copies",
    "init_from",
    "embeddings",
    "export_to",
    "root",
    "kernels",
    "liger",
    "activations",
    "loss",
    "report",
    "plan",
    "checkpoint",
    "fall_back",
    "base_from",
    "packed_cache",
)


class PEFTConfiguration(TrainerCallback):
    """A callback with the arguments of `PEFT`, which describes them, and without its hooks.

    Raises:
        ModuleNotFoundError: neither Lightning package is installed.
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or neither or both of `method` and `adapters`.
    """

    def __init__(
        self,
        method: Method | list[Method] | None = None,
        *,
        adapters: dict[str, Method | list[Method]] | None = None,
        quantization: Quantization | StorageConfig | str | None = None,
        optimizer: str | None = None,
        adapter_name: str = "default",
        modules_to_save: Sequence[str] | None = None,
        separate_copies: bool = False,
        init_from: str | Path | None = None,
        embeddings: Embeddings = "check",
        export_to: str | Path | None = None,
        root: str | None = None,
        kernels: Backend = "auto",
        liger: bool = False,
        activations: Activations | ActivationKind | None = None,
        loss: LossForm | None = None,
        report: bool = True,
        plan: bool | dict[str, Any] = False,
        checkpoint: CheckpointForm = "adapters",
        fall_back: bool = False,
        base_from: str | Path | None = None,
        packed_cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        register_strategies()
        check_paths(
            init_from=init_from,
            export_to=export_to,
            base_from=base_from,
            packed_cache=packed_cache,
        )
        check_cache("PEFT", base_from, packed_cache)
        check_values(
            optimizer=optimizer,
            adapter_name=adapter_name,
            modules_to_save=modules_to_save,
            separate_copies=separate_copies,
            root=root,
            liger=liger,
            report=report,
            plan=plan,
            fall_back=fall_back,
        )
        self.adapters = methods_by_name(method, adapters, adapter_name, modules_to_save, init_from)
        for name in self.adapters:
            check_adapter_name(name)
        check_export(export_to, self.adapters, checkpoint)
        self.quantization = as_config(quantization)
        self.optimizer = optimizer
        self.modules_to_save = None if modules_to_save is None else tuple(modules_to_save)
        check_separate_copies(separate_copies, init_from)
        self.separate_copies = separate_copies
        self.init_from = init_from
        check_embeddings(embeddings, init_from)
        self.embeddings: Embeddings = embeddings
        self.export_to = export_to
        self.root = root
        self.kernels = kernels
        self.liger = liger
        self.activations = as_activations(activations)
        check_loss(loss)
        self.loss: LossForm | None = loss
        self.report = report
        check_plan(plan)
        self.plan = plan
        check_form(checkpoint)
        self.checkpoint: CheckpointForm = checkpoint
        self.fall_back = fall_back
        self.base_from = base_from
        self.packed_cache = packed_cache
        self.forget_run()

    def forget_run(self) -> None:
        """Called when there is no run: the callback was created, copied or unpickled."""

    def __getstate__(self) -> dict[str, Any]:
        """Called when the callback is pickled or copied: keeps the configuration only."""
        return {name: getattr(self, name) for name in _CONFIGURATION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when the callback is unpickled or copied: starts without a run."""
        super().__setstate__(state)
        self.forget_run()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in order."""
        return list(self.adapters)

    @property
    @override
    def state_key(self) -> str:
        """Key of this callback in checkpoints; it differs between callbacks of one Trainer."""
        return f"PEFT[{','.join(self.names)}]"
