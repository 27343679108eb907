"""`PEFT`, the callback: its arguments, and what it does in each hook of the Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.callback.attach import find_root
from lightning_peft.callback.base_reading import errors_on_meta
from lightning_peft.callback.checkpoint_io import install_checkpoint_io
from lightning_peft.callback.compatibility import check_compatible, check_trainer
from lightning_peft.callback.configuration import PEFTConfiguration
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
from lightning_peft.callback.method_hooks import TrainerMethodHooks, grad_scale
from lightning_peft.callback.net_setup import NetSetup
from lightning_peft.callback.optimizer_setup import finish_optimizers, install_optimizer_setup
from lightning_peft.callback.packed_writes import explain_packed_writes
from lightning_peft.callback.pruning import check_pruning
from lightning_peft.callback.rank_consistency import check_same_batches, check_same_configuration
from lightning_peft.callback.reporting import (
    log_configuration,
    print_report,
    print_tokens,
    print_unused_layers,
)
from lightning_peft.callback.resume_state import ResumeState
from lightning_peft.callback.run_backend import RunBackend
from lightning_peft.callback.sigterm import SigtermHandler
from lightning_peft.callback.step_memory import StepMemory
from lightning_peft.callback.unused_parameters import explain_unused_parameters
from lightning_peft.models.history import note_optimizers
from lightning_peft.planner.estimate import Plan
from lightning_peft.report.summary import parameter_report
from lightning_peft.report.tokens import stop_counting
from lightning_peft.trainers.packages import callbacks_of, is_fitting, is_trial

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.types import STEP_OUTPUT

__all__ = ["PEFT"]


class PEFT(PEFTConfiguration):
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
        embeddings: ``"restore"`` writes the resized embeddings that the directory of `init_from`
            holds into the base, as in `load_adapter`. By default they must equal the base's.
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

    @override
    def forget_run(self) -> None:
        """Set the attributes that hold the state of a run to their start values."""
        self._backend = RunBackend(self.kernels)
        self._net = NetSetup(self, self._backend)
        self._memory = StepMemory(self.activations, self.loss)
        self._resume = ResumeState()
        self._step_hooks: TrainerMethodHooks | None = None
        self._first_step = False
        self._first_epoch = False
        self._sigterm = SigtermHandler()
        self._frozen_base = FrozenBase()
        self._gradients = GradientWatch()
        self._finite = FiniteGradients()

    @property
    def memory_plan(self) -> Plan | None:
        """The memory estimate of the run, if `plan` requests one."""
        return self._net.plan

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
                root = self._net.adapt(trainer, pl_module, io, lost)
                self._memory.install(root, predicts=trainer.predicting)

        wrap_configure_model(pl_module, self, attach)

    def _finish_optimizers(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        finish_optimizers(module, trainer.strategy, self._net.layers, self.optimizer)
        note_optimizers(module, trainer.strategy.optimizers)
        self._step_hooks = TrainerMethodHooks(trainer, trainer.strategy.optimizers)

    # ---- training

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit begins: prints the report and restores random states."""
        self._net.check_not_lost(pl_module)
        if self.export_to is not None:
            check_exportable(pl_module, self.names, self.export_to)
        if self.memory_plan is not None and trainer.is_global_zero:
            print(self.memory_plan)
        self._show(trainer, pl_module)
        self._resume.restore(trainer, find_root(pl_module, self.root))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation begins: raises if the trained adapters were lost."""
        self._net.check_not_lost(pl_module)
        if not is_fitting(trainer):
            check_same_batches(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when testing begins: raises if the trained adapters were lost."""
        self._net.check_not_lost(pl_module)
        check_same_batches(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when prediction begins: raises if the trained adapters were lost."""
        self._net.check_not_lost(pl_module)
        check_same_batches(trainer)

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Before the report, whose decisions leave out kernels that the check found wrong.
        found = check_kernels(trainer.strategy.root_device, self.kernels)
        report = parameter_report(find_root(module, self.root))
        report.notes += [*self._net.notes, *self._memory.lines(), *found]
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
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
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
        batch: object,
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
