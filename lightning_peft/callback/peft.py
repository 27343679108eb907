"""`PEFT`, the callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning_peft_kernels.dispatch import prefer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.callback.attach import attach_once, find_root
from lightning_peft.callback.checkpoint_io import PEFTCheckpointIO, install_checkpoint_io
from lightning_peft.callback.compatibility import refuse_trainer, refuse_unfit
from lightning_peft.callback.configure_model import unwrap_configure_model, wrap_configure_model
from lightning_peft.callback.data_init import initialize_pending
from lightning_peft.callback.gather_rng import gather_rng
from lightning_peft.callback.gradient_checks import (
    enable_input_require_grads,
    refuse_graphless,
    unfrozen_base_parameters,
    warn_dead,
)
from lightning_peft.callback.liger import apply_liger
from lightning_peft.callback.memory_plan import make_plan
from lightning_peft.callback.method_hooks import MethodHooks
from lightning_peft.callback.optimizer_setup import (
    align_optimizer_states,
    finish_optimizers,
    install_optimizer_setup,
    layers_of,
    optimizer_names,
)
from lightning_peft.callback.rank_consistency import (
    require_same_configuration,
    verify_consistent_attach,
)
from lightning_peft.callback.reporting import log_configuration, print_report, print_tokens
from lightning_peft.callback.sigterm import SigtermHandler
from lightning_peft.callback.weight_averaging import rebuild_averages
from lightning_peft.checkpoint.contents import KEY, is_attached
from lightning_peft.checkpoint.rng_state import restore_rng
from lightning_peft.methods.base import Method
from lightning_peft.planner.estimate import Plan
from lightning_peft.report.summary import parameter_report
from lightning_peft.report.tokens import stop_counting
from lightning_peft.storage import Quantization

__all__ = ["PEFT"]


class PEFT(pl.Callback):
    """Fine-tune with adapters: freezes the base, quantises it, attaches, writes and reads
    adapter-only checkpoints.

    The LightningModule knows nothing of it; its net may be built in ``__init__``, ``setup`` or
    ``configure_model``.

    Args:
        method: One method, or a list of them: a hybrid under one adapter name.
        adapters: Methods by adapter name, instead of `method`. All of them act and are trained, in
            the order named; pick
            by `set_adapter`, or by row of the batch with `adapter_names`.
        quantization: How to store the frozen base: ``Quantization("nf4")``, or its kind alone.
        optimizer: Name of the optimizer class to put in place of the user's, keeping groups and
            schedulers.
        adapter_name: Name of the adapter that `method` makes.
        modules_to_save: Names or suffixes of modules trained whole (a fresh head); the
            classification head of a Hugging
            Face model is found by itself.
        root: Dotted path of the submodule to adapt; default the whole module. What lies outside is
            left to the user:
            it is trained and saved if it requires gradients.
        kernels: Which implementation ops run: ``"auto"``, ``"triton"`` or ``"torch"``.
        liger: Put liger-kernel's fused layers into Hugging Face models that it knows, before
            attaching.
        report: Whether to print the report and log the configuration when training starts.
        plan: Whether to print what memory the run takes when training starts; or what to plan with,
            as `estimate_memory` takes it: ``{"batch_size": 4, "sequence_length": 2048}``.

    Raises:
        ValueError: neither or both of `method` and `adapters`.
    """

    def __init__(
        self,
        method: Method | list[Method] | None = None,
        *,
        adapters: dict[str, Method | list[Method]] | None = None,
        quantization: Quantization | str | None = None,
        optimizer: str | None = None,
        adapter_name: str = "default",
        modules_to_save: Sequence[str] = (),
        root: str | None = None,
        kernels: Literal["auto", "triton", "torch"] = "auto",
        liger: bool = False,
        report: bool = True,
        plan: bool | dict[str, Any] = False,
    ) -> None:
        super().__init__()
        self.adapters = _by_name(method, adapters, adapter_name, modules_to_save)
        self.quantization = (
            Quantization(quantization) if isinstance(quantization, str) else quantization  # type: ignore[arg-type]
        )
        self.optimizer = optimizer
        self.modules_to_save = tuple(modules_to_save)
        self.root = root
        self.kernels = kernels
        self.liger = liger
        self.report = report
        self.plan = plan
        self.memory_plan: Plan | None = None
        self._rng: list[dict[str, Any]] | None = None
        self._resumed: dict[str, Any] | None = None
        self._schedules: MethodHooks | None = None
        self._first_step = False
        self._notes: list[str] = []
        self._io: PEFTCheckpointIO | None = None
        self._layers: dict[str, list[Any]] = {}
        self._stop = SigtermHandler()

    @property
    def names(self) -> list[str]:
        """Adapter names, in order."""
        return list(self.adapters)

    @property
    def state_key(self) -> str:
        """One a callback, so that several stand side by side."""
        return f"PEFT[{','.join(self.names)}]"

    # ---- before the net exists

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work; have attaching, saving and optimizers come through us."""
        refuse_trainer(trainer)
        peers = [c for c in trainer.callbacks if isinstance(c, PEFT)]  # type: ignore[attr-defined]
        refuse_unfit(trainer, self, peers)
        require_same_configuration(self)
        io = install_checkpoint_io(trainer.strategy, lambda: trainer.state.fn == TrainerFn.FITTING)
        install_optimizer_setup(
            trainer.strategy,
            self,
            initialize_pending,
            lambda t: self._finish_optimizers(t, t.lightning_module),
        )
        wrap_configure_model(
            pl_module, self, lambda lost: self._attach(trainer, pl_module, io, lost)
        )

    def _attach(
        self, trainer: pl.Trainer, module: pl.LightningModule, io: PEFTCheckpointIO, lost: bool
    ) -> None:
        root = find_root(module, self.root)
        prefer(self.kernels)
        if not is_attached(root):
            self._make_plan(trainer, root)
            self._layers = layers_of(root, self.root or "")
        if self.liger and not is_attached(root):
            self._notes = apply_liger(root)
        with verify_consistent_attach(module):
            io.lost += attach_once(
                root,
                self.adapters,
                quantization=self.quantization,
                modules_to_save=self.modules_to_save,
                device=trainer.strategy.root_device,
                lost=lost,
            )
        self._io, io.started = io, True
        if trainer.state.fn == TrainerFn.FITTING:
            rebuild_averages(trainer, module)

    def _make_plan(self, trainer: pl.Trainer, root: nn.Module) -> None:
        if self.plan is False or trainer.state.fn != TrainerFn.FITTING:
            return
        self.memory_plan = make_plan(
            trainer,
            root,
            self.adapters,
            quantization=self.quantization,
            optimizer=self.optimizer,
            liger=self.liger,
            modules_to_save=self.modules_to_save,
            given=self.plan if isinstance(self.plan, dict) else {},
        )

    def _finish_optimizers(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        finish_optimizers(module, trainer.strategy, self._layers, self.optimizer)
        self._schedules = MethodHooks(module)
        self._schedules.follow(trainer, trainer.strategy.optimizers)

    # ---- training

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report; go on with the random numbers where the checkpoint stopped."""
        self._refuse_lost(pl_module)
        if self.memory_plan is not None and trainer.is_global_zero:
            print(self.memory_plan)
        if self.report:
            self._show(trainer, pl_module)
        if self._rng is not None:
            # Later is too late: the first data iterator draws a seed before on_train_start.
            restore_rng(self._rng[trainer.global_rank], trainer.strategy.root_device)
            self._rng = None
        if self._resumed is not None:  # Lightning loads the optimizers' states after this hook
            align_optimizer_states(trainer, self._resumed)
            self._resumed = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adapters must be the trained ones."""
        self._refuse_lost(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def _refuse_lost(self, module: pl.LightningModule) -> None:
        if self._io is None or not self._io.lost:
            return
        lost, self._io.lost = self._io.lost, []
        raise RuntimeError(
            f"{type(module).__name__}.configure_model: expected it to keep the net it built "
            f"before, got a new one: the trained adapters {lost} were thrown away with the old "
            "one. Return early from configure_model when the net is there, or give ckpt_path"
        )

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        report = parameter_report(find_root(module, self.root))
        report.notes += self._notes
        if trainer.is_global_zero:
            print_report(report, f"PEFT {', '.join(self.names)}")
        log_configuration(trainer, self.adapters, self.quantization, self.modules_to_save, report)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have gradients reach checkpointed blocks, whoever turned checkpointing on and when."""
        enable_input_require_grads(pl_module)
        self._first_step = True
        self._stop.listen(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """On SIGTERM to any process: a checkpoint, then all end."""
        self._stop.obey(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signal back."""
        self._stop.release()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The base must stay frozen.

        Raises:
            RuntimeError: something unfroze it, by name.
        """
        thawed = unfrozen_base_parameters(pl_module, [find_root(pl_module, self.root)])
        if thawed:
            raise RuntimeError(
                f"PEFT: expected a frozen base, found {len(thawed)} of its parameters unfrozen "
                f"({', '.join(thawed[:5])}); adapters replace training them: name the layers in "
                "modules_to_save to train a copy"
            )

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Name the cause of a loss without a graph."""
        refuse_graphless(loss)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """MethodHooks of the methods; once a fit, whether every adapter got a gradient."""
        if self._schedules is not None:
            self._schedules.before_step(trainer, optimizer)
        if self._first_step:
            self._first_step = False
            warn_dead(pl_module)
            if self.report and trainer.is_global_zero:
                print_tokens(pl_module)
            stop_counting(pl_module)

    # ---- checkpoints (weights and configuration go through the CheckpointIO)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the random states of every process, and names to the optimizers' states."""
        if KEY not in checkpoint:
            names = optimizer_names(trainer)
            checkpoint[KEY] = {"rng": gather_rng(trainer), "optimizers": names}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep for `on_fit_start` what can be put back only then."""
        if trainer.state.fn == TrainerFn.FITTING:
            if trainer.strategy.restore_checkpoint_after_setup:  # on_fit_start is over
                align_optimizer_states(trainer, checkpoint)
            else:
                self._resumed = checkpoint
        states = (checkpoint.get(KEY) or {}).get("rng")
        if states is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"PEFT: the checkpoint holds random states of {len(states)} processes, this run "
                f"has {trainer.world_size}; dropout and data order go on from the seed instead"
            )
            return
        if trainer.strategy.restore_checkpoint_after_setup:  # on_fit_start is over
            restore_rng(states[trainer.global_rank], trainer.strategy.root_device)
            return
        self._rng = states

    # ---- the end

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the user's module as it was found."""
        unwrap_configure_model(pl_module)
        self._stop.release()
        self._resumed = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The same."""
        unwrap_configure_model(pl_module)


def _by_name(
    method: Method | list[Method] | None,
    adapters: dict[str, Method | list[Method]] | None,
    adapter_name: str,
    modules_to_save: Sequence[str],
) -> dict[str, list[Method]]:
    if isinstance(modules_to_save, str):
        raise TypeError(
            f"PEFT modules_to_save: expected a list of names, got the string {modules_to_save!r}; "
            f"write [{modules_to_save!r}]"
        )
    if (method is None) == (not adapters) and not (method is None and modules_to_save):
        raise ValueError(
            f"PEFT: expected one of method and adapters, got {method!r} and {adapters!r}; for a "
            "method under a name of its own give adapter_name"
        )
    given = adapters if adapters else {adapter_name: [] if method is None else method}
    return {name: m if isinstance(m, list) else [m] for name, m in given.items()}
