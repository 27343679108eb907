"""`PEFT`, the callback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft_kernels.dispatch import Backend
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.activations.config import ActivationKind, Activations, as_activations
from lightning_peft.adapters.attach_checks import check_adapter_name
from lightning_peft.adapters.followers import follow_outside
from lightning_peft.callback.arguments import (
    check_export,
    check_paths,
    check_separate_copies,
    check_values,
    methods_by_name,
)
from lightning_peft.callback.attach import attach_once, averaged_parts, find_root
from lightning_peft.callback.base_reading import (
    check_base,
    errors_on_meta,
    packed_device,
    read_meta_base,
)
from lightning_peft.callback.checkpoint_io import PEFTCheckpointIO, install_checkpoint_io
from lightning_peft.callback.compatibility import check_compatible, check_trainer
from lightning_peft.callback.configure_model import unwrap_configure_model, wrap_configure_model
from lightning_peft.callback.data_init import initialize_pending
from lightning_peft.callback.export import check_exportable, export_best
from lightning_peft.callback.finite_gradients import FiniteGradients
from lightning_peft.callback.frozen_base import FrozenBase
from lightning_peft.callback.gradient_checks import (
    GradientWatch,
    check_has_graph,
    enable_input_require_grads,
    unused_layers,
)
from lightning_peft.callback.kernel_check import check_kernels
from lightning_peft.callback.liger import apply_liger
from lightning_peft.callback.memory_plan import check_plan, make_plan
from lightning_peft.callback.merged_ties import refuse_untying
from lightning_peft.callback.method_hooks import TrainerMethodHooks, grad_scale
from lightning_peft.callback.optimizer_setup import (
    finish_optimizers,
    install_optimizer_setup,
    layers_of,
)
from lightning_peft.callback.packed_writes import explain_packed_writes
from lightning_peft.callback.pruning import check_pruning
from lightning_peft.callback.rank_consistency import (
    check_same_batches,
    check_same_configuration,
    verify_consistent_attach,
)
from lightning_peft.callback.reporting import (
    log_configuration,
    print_report,
    print_tokens,
    print_unused_layers,
)
from lightning_peft.callback.resume_state import ResumeState
from lightning_peft.callback.run_backend import RunBackend
from lightning_peft.callback.sigterm import SigtermHandler
from lightning_peft.callback.step_memory import LossForm, StepMemory, check_loss
from lightning_peft.callback.unused_parameters import explain_unused_parameters
from lightning_peft.callback.weight_averaging import rebuild_averages
from lightning_peft.checkpoint.contents import is_attached
from lightning_peft.checkpoint.forms import (
    CheckpointForm,
    DenseBaseReader,
    check_form,
    refuse_unwritable,
)
from lightning_peft.methods.base import Method
from lightning_peft.models.history import note_optimizers, start_history
from lightning_peft.models.saving import save_plainly
from lightning_peft.planner.estimate import Plan
from lightning_peft.report.summary import parameter_report
from lightning_peft.report.tokens import stop_counting
from lightning_peft.storage import Quantization, StorageConfig, as_config
from lightning_peft.strategies import register_strategies
from lightning_peft.trainers.callback_base import TrainerCallback
from lightning_peft.trainers.packages import callbacks_of, is_fitting, is_trial

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.types import STEP_OUTPUT

__all__ = ["PEFT"]

#: Attributes that are pickled. Libraries put callbacks into hyper-parameters and copy them.
_CONFIGURATION = (
    "adapters",
    "quantization",
    "optimizer",
    "modules_to_save",
    "separate_copies",
    "init_from",
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


class PEFT(TrainerCallback):
    """Fine-tunes with adapters: freezes and quantises the base, attaches, saves adapters only.

    The callback works under the Trainer of `lightning` and of `pytorch_lightning`. The
    LightningModule needs no change. Its net may be built in ``__init__``, ``setup`` or
    ``configure_model``.

    Args:
        method: One method, or a list of methods that form a hybrid under one adapter name.
        adapters: Methods by adapter name, instead of `method`. All adapters are active and
            trained, in the given order. Select some with `set_adapter`, or per sample with
            `adapter_names`.
        quantization: Storage of the frozen base: ``Quantization("nf4")``, its kind alone, or the
            configuration of a registered storage.
        optimizer: Name of an optimizer class that replaces the user's. Groups and schedulers stay.
        adapter_name: Name of the adapter that `method` creates.
        modules_to_save: Names or suffixes of modules trained fully. By default, the new layers
            next to a pretrained model, and its fresh head; ``()`` trains none. The classification
            head of a Hugging Face model is added to the names that are given.
        separate_copies: If True, modules in `modules_to_save` that share a tensor (tied embeddings)
            train a copy each, as in peft without ``ensure_weight_tying``. Not with `init_from`,
            whose file says so.
        init_from: Directory or hub id of an adapter to go on training, instead of `method`. Its
            configuration comes from there.
        export_to: Directory to write the adapters of the best checkpoint to when fit ends, or the
            current ones if no checkpoint was written. The Trainer's root process writes it.
            Whether it can be written is checked at the start; ``fast_dev_run`` checks alone.
        root: Dotted path of the submodule to adapt. The default is the LightningModule. Parameters
            outside the root are trained and saved if they require gradients.
        kernels: Backend of the kernels during a run: ``"auto"``, ``"triton"`` or ``"torch"``.
        liger: If True, put liger-kernel's fused layers into the Hugging Face models it knows.
        activations: What blocks keep for backward: ``"checkpoint"`` their inputs, ``"offload"``
            everything, in host memory, ``"checkpoint+offload"`` their inputs, in host memory; or
            `Activations`, which also names the blocks. None keeps everything on the device.
        loss: ``"chunked"`` computes the cross entropy of Hugging Face language models for a few
            tokens at a time, so that logits [tokens, vocabulary] are never formed.
        report: If True, print the report when training starts. The configuration is logged to the
            Trainer's loggers in any case.
        plan: If True, print the memory estimate when training starts. A dict holds arguments of
            `estimate_memory`: ``{"batch_size": 4, "sequence_length": 2048}``. Not with `init_from`.
        checkpoint: What checkpoints hold. ``"adapters"``: what the module's code does not rebuild.
            ``"full"``: also the dense base, under every key of the live module. ``"merged"``: plain
            merged weights for inference, under the keys of the module without adapters.
        fall_back: If True, a damaged checkpoint is replaced by the newest undamaged one in its
            folder, so that unattended restarts go on. If False, it raises and names that one.
        base_from: Folder of safetensors with the weights of a base that the module builds on the
            meta device. They are read a few rows at a time and quantised on the way, under every
            strategy.
        packed_cache: Directory for packed weights of `base_from`: quantised and written on the
            first start, read on later ones. Several ranks and runs may share it.

    Raises:
        ModuleNotFoundError: neither Lightning package is installed.
        ValueError: neither or both of `method` and `adapters`.
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
        self._forget_run()

    def _forget_run(self) -> None:
        """Set the attributes that hold the state of a run to their start values."""
        self.memory_plan: Plan | None = None
        self._resume = ResumeState()
        self._step_hooks: TrainerMethodHooks | None = None
        self._first_step = False
        self._first_epoch = False
        self._notes: list[str] = []
        self._io: PEFTCheckpointIO | None = None
        self._layers: dict[str, list[Any]] = {}
        self._backend = RunBackend(self.kernels)
        self._sigterm = SigtermHandler()
        self._memory = StepMemory(self.activations, self.loss)
        self._frozen_base = FrozenBase()
        self._gradients = GradientWatch()
        self._finite = FiniteGradients()

    def __getstate__(self) -> dict[str, Any]:
        """Called when the callback is pickled or copied: keeps the configuration only."""
        return {name: getattr(self, name) for name in _CONFIGURATION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when the callback is unpickled or copied: starts without a run."""
        super().__setstate__(state)
        self._forget_run()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in order."""
        return list(self.adapters)

    @property
    @override
    def state_key(self) -> str:
        """Key of this callback in checkpoints; it differs between callbacks of one Trainer."""
        return f"PEFT[{','.join(self.names)}]"

    # ---- before the net is built

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a stage begins: checks the Trainer and hooks into attaching and saving."""
        check_trainer(trainer)
        peers = [c for c in callbacks_of(trainer) if isinstance(c, PEFT)]
        check_compatible(trainer, self, peers)
        check_same_configuration(self, trainer)
        self._backend.enter()
        io = install_checkpoint_io(trainer.strategy, lambda: is_fitting(trainer))
        install_optimizer_setup(
            trainer.strategy,
            self,
            initialize_pending,
            lambda t: self._finish_optimizers(t, t.lightning_module),
        )

        def attach(lost: bool) -> None:
            with errors_on_meta(pl_module):
                self._attach(trainer, pl_module, io, lost)

        wrap_configure_model(pl_module, self, attach)

    def _attach(
        self, trainer: pl.Trainer, module: pl.LightningModule, io: PEFTCheckpointIO, lost: bool
    ) -> None:
        root = find_root(module, self.root)
        if not is_attached(root):
            check_base(trainer, root, self.base_from)
            self._make_plan(trainer, root)
            self._layers = layers_of(root, self.root or "")
        if self.liger and not is_attached(root):
            self._notes = apply_liger(root, fused_loss=self.loss is None)
        with verify_consistent_attach(module):
            io.lost += attach_once(
                root,
                self.adapters,
                quantization=self.quantization,
                modules_to_save=self.modules_to_save,
                separate_copies=self.separate_copies,
                device=trainer.strategy.root_device,
                keep_on=packed_device(trainer),
                lost=lost,
                averaged=averaged_parts(module, self.root, self.quantization),
                init_from=self.init_from,
            )
        read_meta_base(trainer, module, self.base_from, self.packed_cache)
        save_plainly(module, around=root)
        follow_outside(module)
        start_history(module)
        self._backend.keep(root)
        self._prepare_form(trainer, module, io)
        self._io, io.started = io, True
        if is_fitting(trainer):
            rebuild_averages(trainer, module)
        self._memory.install(root, predicts=trainer.predicting)

    def _prepare_form(
        self, trainer: pl.Trainer, module: pl.LightningModule, io: PEFTCheckpointIO
    ) -> None:
        refuse_unwritable(module, self.checkpoint)
        if self.checkpoint == "merged":
            refuse_untying(module)
        if self.checkpoint == "full" and self.quantization is not None:
            DenseBaseReader().install(module)
        io.form, io.fall_back = self.checkpoint, self.fall_back

    def _make_plan(self, trainer: pl.Trainer, root: nn.Module) -> None:
        if self.plan is False or self.init_from is not None or not is_fitting(trainer):
            return
        self.memory_plan = make_plan(
            trainer,
            root,
            self.adapters,
            quantization=self.quantization,
            optimizer=self.optimizer,
            liger=self.liger,
            activations=self.activations,
            loss=self.loss,
            modules_to_save=self.modules_to_save,
            given=self.plan if isinstance(self.plan, dict) else {},
        )

    def _finish_optimizers(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        finish_optimizers(module, trainer.strategy, self._layers, self.optimizer)
        note_optimizers(module, trainer.strategy.optimizers)
        self._step_hooks = TrainerMethodHooks(trainer, trainer.strategy.optimizers)

    # ---- training

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit begins: prints the report and restores random states."""
        self._check_not_lost(pl_module)
        if self.export_to is not None:
            check_exportable(pl_module, self.names, self.export_to)
        if self.memory_plan is not None and trainer.is_global_zero:
            print(self.memory_plan)
        self._show(trainer, pl_module)
        self._resume.restore(trainer, find_root(pl_module, self.root))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation begins: raises if the trained adapters were lost."""
        self._check_not_lost(pl_module)
        if not is_fitting(trainer):
            check_same_batches(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when testing begins: raises if the trained adapters were lost."""
        self._check_not_lost(pl_module)
        check_same_batches(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when prediction begins: raises if the trained adapters were lost."""
        self._check_not_lost(pl_module)
        check_same_batches(trainer)

    def _check_not_lost(self, module: pl.LightningModule) -> None:
        if self._io is None or not self._io.lost:
            return
        lost, self._io.lost = self._io.lost, []
        raise RuntimeError(
            f"{type(module).__name__}.configure_model: expected it to keep the net it built "
            f"before, got a new one: the trained adapters {lost} were thrown away with the old "
            "one. Return early from configure_model when the net is there, or give ckpt_path"
        )

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Before the report, whose decisions leave out kernels that the check found wrong.
        found = check_kernels(trainer.strategy.root_device, self.kernels)
        report = parameter_report(find_root(module, self.root))
        report.notes += [*self._notes, *self._memory.lines(), *found]
        if self.report and trainer.is_global_zero:
            print_report(report, f"PEFT {', '.join(self.names)}")
        log_configuration(trainer, find_root(module, self.root), self.names, report)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: lets gradients reach checkpointed blocks.

        It also restores the gradients of an accumulation window that a checkpoint cut.
        """
        self._resume.iterate_again(trainer)
        check_same_batches(trainer)
        check_pruning(trainer, pl_module)
        enable_input_require_grads(pl_module)
        self._resume.restore_gradients(trainer)
        # Not only at the start of an epoch, which a resumed run may be past.
        self._frozen_base.collect(pl_module, find_root(pl_module, self.root))
        self._first_step = self._first_epoch = True
        self._gradients, self._finite = GradientWatch(), FiniteGradients()
        self._sigterm.install(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called when a batch begins: follows blocks that were compiled in the meantime.

        In a resumed run, it restores the size of the accumulation window.
        """
        self._resume.restore_window_size(trainer)
        self._memory.settle()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called when a batch ends: saves a checkpoint and stops if any rank got SIGTERM."""
        self._sigterm.stop_if_requested(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: restores the former SIGTERM handler."""
        self._sigterm.restore()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit ends: exports the adapters of the best checkpoint."""
        if self.export_to is None or is_trial(trainer):  # it would replace a good export
            return
        if trainer.is_global_zero:
            export_best(trainer, pl_module, self.names, self.export_to)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when an epoch begins: checks that the base is still frozen.

        Raises:
            RuntimeError: base parameters were unfrozen, with their names.
        """
        self._frozen_base.collect(pl_module, find_root(pl_module, self.root))
        self._frozen_base.check()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when an epoch ends: lists, once, adapted layers that were not used."""
        if self._first_epoch:
            self._first_epoch = False
            if trainer.is_global_zero:
                print_unused_layers(unused_layers(pl_module))

    @override
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Called before backward: explains a loss that has no graph."""
        check_has_graph(loss)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Called before a step: checks that the base is frozen, and runs step hooks.

        It skips steps with non-finite gradients. In the first steps it also looks for adapters
        without a gradient.
        """
        self._frozen_base.check()
        if not self._finite.before_step(trainer, optimizer):
            return
        if self._step_hooks is not None:
            self._step_hooks.before_step(optimizer, grad_scale(trainer, optimizer))
        self._gradients.check(pl_module, optimizer)
        if self._first_step:
            self._first_step = False
            if self.report and trainer.is_global_zero:
                print_tokens(pl_module)
            stop_counting(pl_module)

    # ---- checkpoints (weights and configuration go through the CheckpointIO)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint is saved: adds random states and optimizer names."""
        self._resume.save(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint is loaded: keeps the state that later hooks restore."""
        self._resume.load(trainer, checkpoint)

    # ---- the end

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Called when a run raises: explains its error if we can, and restores what we replaced."""
        explain_packed_writes(pl_module, exception)
        unwrap_configure_model(pl_module)
        self._backend.leave(pl_module)
        self._memory.remove()
        self._sigterm.restore()
        explain_unused_parameters(exception)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a stage ends: restores `configure_model` and withdraws the backend."""
        unwrap_configure_model(pl_module)
        self._backend.leave(pl_module)
        self._memory.remove()
