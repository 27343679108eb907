"""`AdapterMonitor`: speed, memory, and norms of gradients and updates, per adapter."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.callback.peft import PEFT
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.trainers.callback_base import TrainerCallback
from lightning_peft.trainers.packages import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.types import STEP_OUTPUT

__all__ = ["AdapterMonitor"]


class AdapterMonitor(TrainerCallback):
    """Logs what a run of adapters does to the Trainer's loggers, every `log_every_n_steps`.

    Logged are ``peft/tokens_per_second`` (for batches with ids) or ``peft/samples_per_second``,
    ``peft/peak_memory`` in bytes next to ``peft/planned_memory`` (with ``PEFT(plan=True)``), and
    per adapter ``peft/<name>/gradient_norm`` and ``peft/<name>/update_norm``, the norm of the
    change by one optimizer step. Norms stay on the device until they are logged.

    Args:
        figure: File for a figure of the logged values when fit ends, if matplotlib is installed;
            None for no figure.
    """

    def __init__(self, figure: str | Path | None = None) -> None:
        super().__init__()
        self.figure = figure
        self._forget_run()

    def _forget_run(self) -> None:
        """Set the attributes that hold the state of a run to their start values."""
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._adapters: dict[str, list[nn.Parameter]] = {}
        self._pending: dict[str, Tensor] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._seen = 0
        self._unit = "samples"
        self._since = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: finds the adapters and starts the clock."""
        self._forget_run()
        for _, module in adapted_modules(pl_module):
            for adapter in adapters_of(module):
                trained = [p for p in adapter.parameters() if p.requires_grad]
                self._adapters.setdefault(adapter.adapter_name, []).extend(trained)
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        self._since = time.perf_counter()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Called before a step: in a step that is logged, keeps gradients' norms and values."""
        if not _logs(trainer, trainer.global_step + 1):
            return
        for name, parameters in self._adapters.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                self._pending[f"peft/{name}/gradient_norm"] = _norm(gradients)
            self._before[name] = [p.detach().clone() for p in parameters]

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Called when a batch ends: counts its samples, and logs in a step that is due."""
        size, self._unit = _size(batch)
        self._seen += size * trainer.world_size
        if not self._before:
            return
        for name, before in self._before.items():
            parameters = self._adapters[name]
            changes = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
            self._pending[f"peft/{name}/update_norm"] = _norm(changes)
        self._before = {}
        self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        values = {name: float(value) for name, value in self._pending.items()}
        self._pending = {}
        now = time.perf_counter()
        values[f"peft/{self._unit}_per_second"] = self._seen / max(now - self._since, 1e-9)
        self._seen, self._since = 0, now
        values |= _memory(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        for name, value in values.items():
            self.history.setdefault(name, []).append((trainer.global_step, value))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit ends: draws the figure."""
        if self.figure is not None and self.history and trainer.is_global_zero:
            _draw(self.history, Path(self.figure))


def _logs(trainer: pl.Trainer, step: int) -> bool:
    settings: Any = trainer  # Lightning's logger connector sets the attribute
    return step % max(1, int(settings.log_every_n_steps)) == 0


def _norm(tensors: list[Tensor]) -> Tensor:
    """Norm over all tensors, on their device: no wait for it."""
    norms = [torch.linalg.vector_norm(t.detach().float()) for t in tensors]
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return total


def _size(batch: object) -> tuple[int, str]:
    """Tokens of a batch with ids, else its samples."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor):
        return ids.numel(), "tokens"
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    first = next((t for t in _tensors(parts)), None)
    if first is None:
        return 1, "samples"
    tokens = first.ndim == 2 and not first.is_floating_point()
    return (first.numel(), "tokens") if tokens else (first.shape[0], "samples")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.ndim else []
    if isinstance(value, Mapping):
        return _tensors(list(value.values()))
    if isinstance(value, list | tuple):
        return [t for part in value for t in _tensors(part)]
    return []


def _memory(trainer: pl.Trainer) -> dict[str, float]:
    """Peak memory of the device, next to what the planner predicted."""
    found: dict[str, float] = {}
    device = trainer.strategy.root_device
    if device.type == "cuda":
        found["peft/peak_memory"] = float(torch.cuda.max_memory_allocated(device))
    plans = [c.memory_plan for c in callbacks_of(trainer) if isinstance(c, PEFT)]
    peaks = [plan.peak for plan in plans if plan is not None]
    return found | ({"peft/planned_memory": float(sum(peaks))} if peaks else {})


def _draw(history: Mapping[str, list[tuple[int, float]]], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(7, 2.2 * len(history)), layout="constrained")
    axes: Any = figure.subplots(len(history), 1, squeeze=False, sharex=True)
    for axis, (name, points) in zip(axes[:, 0], history.items(), strict=True):
        axis.plot(*zip(*points, strict=True), marker=".")
        axis.set_title(name.removeprefix("peft/"), fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("step")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
