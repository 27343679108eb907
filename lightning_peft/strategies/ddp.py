"""DDP in which only what is trained is sent."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_peft.checkpoint.contents import is_attached, kept_tensors
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.strategies.fault_guards import Guards

__all__ = ["PEFTDDPStrategy", "may_skip", "reentrant"]

# torch 2.13 renamed the option.
_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class PEFTDDPStrategy(Guards, DDPStrategy):
    """Lightning's DDPStrategy over adapters: frozen tensors never travel, not even at the start.

    Every process builds the base by itself; the PEFT callback compares fingerprints before the
    first step. Unused parameters are looked for where adapters may be left out of a batch (several
    adapters, separate experts). The parent's arguments, given by name, win over what is chosen.
    """

    strategy_name = "peft_ddp"

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        if not any(p.requires_grad for p in model.parameters()):
            raise RuntimeError(
                "peft_ddp: expected something to train, got a model that is frozen whole; add "
                "PEFT(...) to the Trainer's callbacks"
            )
        self._choose(model)
        kept = {id(t) for t in kept_tensors(model).values()} if is_attached(model) else set()
        skip = [n for n, p in model.named_parameters() if not p.requires_grad]
        if kept:
            skip += [n for n, b in model.named_buffers() if id(b) not in kept]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, skip)
        return super()._setup_model(model)

    def _choose(self, model: nn.Module) -> None:
        """Options that the user left open."""
        given = self._ddp_kwargs
        live = any(getattr(m, "track_running_stats", False) for m in model.modules())
        if not {"broadcast_buffers", "forward_sync_buffers"} & set(given):
            given[_BUFFERS] = live
        if "find_unused_parameters" in given or "static_graph" in given:
            return
        skips, cut = may_skip(model), reentrant(model)
        if skips and cut:
            raise RuntimeError(
                f"peft_ddp: expected activation checkpointing without reentrance, as {skips} may "
                f"be left out of a batch, got use_reentrant=True in {cut}; enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        given["find_unused_parameters"] = bool(skips)
        given["static_graph"] = bool(cut)


def may_skip(model: nn.Module) -> str:
    """Which adapters a batch may not reach; "" where all are used always."""
    names: set[str] = set()
    for path, module in adapted_modules(model):
        names.update(module.peft)
        parts = path.split(".")
        if any(a == "experts" and b.isdecimal() for a, b in itertools.pairwise(parts)):
            return "experts"
    return f"adapters {sorted(names)}" if len(names) > 1 else ""


def reentrant(model: nn.Module) -> str:
    """Name of a Hugging Face layer that checkpoints with reentrance; "" where none does."""
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            function: Any = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", False):
                return name or type(module).__name__
    return ""
