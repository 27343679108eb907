"""From the net that the user's code built to one that is ready to run: planned and adapted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_peft.adapters.followers import follow_outside
from lightning_peft.callback.attach import attach_once, averaged_parts, find_root
from lightning_peft.callback.base_reading import check_base, packed_device, read_meta_base
from lightning_peft.callback.checkpoint_io import PEFTCheckpointIO
from lightning_peft.callback.configuration import PEFTConfiguration
from lightning_peft.callback.liger import apply_liger
from lightning_peft.callback.memory_plan import make_plan
from lightning_peft.callback.merged_ties import refuse_untying
from lightning_peft.callback.optimizer_setup import LayerParameters, layers_of
from lightning_peft.callback.rank_consistency import verify_consistent_attach
from lightning_peft.callback.run_backend import RunBackend
from lightning_peft.callback.weight_averaging import rebuild_averages
from lightning_peft.checkpoint.description import is_attached
from lightning_peft.checkpoint.forms import DenseBaseReader, refuse_unwritable
from lightning_peft.models.history import start_history
from lightning_peft.models.saving import save_plainly
from lightning_peft.planner.estimate import Plan
from lightning_peft.trainers.packages import is_fitting

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["NetSetup"]


class NetSetup:
    """Adapts the net of one run as a configuration says.

    Args:
        configuration: Arguments of `PEFT`.
        backend: Backend that the adapted modules request.

    Attributes:
        plan: Memory estimate of the run; None if none was requested.
        notes: Lines for the report.
        layers: What the user's optimizers may refer to: parameters before the adapters.
    """

    def __init__(self, configuration: PEFTConfiguration, backend: RunBackend) -> None:
        self._given, self._backend = configuration, backend
        self._io: PEFTCheckpointIO | None = None
        self.plan: Plan | None = None
        self.notes: list[str] = []
        self.layers: LayerParameters = {}

    def adapt(
        self, trainer: pl.Trainer, module: pl.LightningModule, io: PEFTCheckpointIO, lost: bool
    ) -> nn.Module:
        """Plan and attach, read a base on the meta device, and prepare checkpoints.

        Args:
            trainer: Trainer of the run.
            module: Module whose net was built.
            io: Plugin that reads and writes the checkpoints.
            lost: Whether the user's `configure_model` replaced adapted layers.

        Returns:
            The adapted root.
        """
        given = self._given
        root = find_root(module, given.root)
        if not is_attached(root):
            self._before_attaching(trainer, root)
        with verify_consistent_attach(module):
            io.lost += attach_once(
                root,
                given.adapters,
                quantization=given.quantization,
                modules_to_save=given.modules_to_save,
                separate_copies=given.separate_copies,
                device=trainer.strategy.root_device,
                keep_on=packed_device(trainer),
                lost=lost,
                averaged=averaged_parts(module, given.root, given.quantization),
                init_from=given.init_from,
                embeddings=given.embeddings,
            )
        read_meta_base(trainer, module, given.base_from, given.packed_cache)
        save_plainly(module, around=root)
        follow_outside(module)
        start_history(module)
        self._backend.keep(root)
        self._prepare_checkpoints(module, io)
        if is_fitting(trainer):
            rebuild_averages(trainer, module)
        return root

    def _before_attaching(self, trainer: pl.Trainer, root: nn.Module) -> None:
        given = self._given
        check_base(trainer, root, given.base_from)
        self._make_plan(trainer, root)
        self.layers = layers_of(root, given.root or "")
        if given.liger:
            self.notes = apply_liger(root, fused_loss=given.loss is None)

    def _make_plan(self, trainer: pl.Trainer, root: nn.Module) -> None:
        given = self._given
        if given.plan is False or given.init_from is not None or not is_fitting(trainer):
            return
        self.plan = make_plan(
            trainer,
            root,
            given.adapters,
            quantization=given.quantization,
            optimizer=given.optimizer,
            liger=given.liger,
            activations=given.activations,
            loss=given.loss,
            modules_to_save=given.modules_to_save,
            given=given.plan if isinstance(given.plan, dict) else {},
        )

    def _prepare_checkpoints(self, module: pl.LightningModule, io: PEFTCheckpointIO) -> None:
        form = self._given.checkpoint
        refuse_unwritable(module, form)
        if form == "merged":
            refuse_untying(module)
        if form == "full" and self._given.quantization is not None:
            DenseBaseReader().install(module)
        io.form, io.fall_back, io.started = form, self._given.fall_back, True
        self._io = io

    def check_not_lost(self, module: pl.LightningModule) -> None:
        """Check, once, that no trained adapters went with a net that was replaced.

        Raises:
            RuntimeError: with their names.
        """
        if self._io is None or not self._io.lost:
            return
        lost, self._io.lost = self._io.lost, []
        raise RuntimeError(
            f"{type(module).__name__}.configure_model: expected it to keep the net it built "
            f"before, got a new one: the trained adapters {lost} were thrown away with the old "
            "one. Return early from configure_model when the net is there, or give ckpt_path"
        )
