"""DDP that sends only trained tensors, for a Trainer and for Fabric."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_peft.checkpoint.description import is_attached
from lightning_peft.checkpoint.kept import kept_tensors
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.strategies.base_reading import meta_tensors
from lightning_peft.strategies.fault_guards import FabricGuards, TrainerGuards
from lightning_peft.strategies.rank_consistency import check_same_model

if TYPE_CHECKING:
    from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
    from lightning.pytorch.strategies import DDPStrategy
else:
    FabricDDPStrategy = DDPStrategy = object

__all__ = ["FabricDDP", "TrainerDDP", "may_skip", "reentrant"]

# torch 2.13 renamed the option.
_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class TrainerDDP(TrainerGuards, DDPStrategy):
    """DDP over adapters: frozen tensors are never sent, not even at the start.

    Every rank builds the base itself, and the PEFT callback compares fingerprints before the first
    step. DDP looks for unused parameters if a batch may skip adapters (several adapters, experts
    that are separate modules). Arguments of Lightning's DDPStrategy override these choices.
    """

    strategy_name = "peft_ddp"

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        prepare_for_ddp(model, self._ddp_kwargs)
        return super()._setup_model(model)


class FabricDDP(FabricGuards, FabricDDPStrategy):
    """DDP over adapters under Fabric: frozen tensors are never sent, not even at the start.

    Call `attach` before `fabric.setup`. Every rank builds the base itself; `fabric.setup` compares
    fingerprints. Arguments of Fabric's DDPStrategy override the options that this one chooses.
    """

    strategy_name = "peft_ddp"

    @override
    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """Wrap the module in DDP, without its frozen tensors."""
        check_same_model(module)
        prepare_for_ddp(module, self._ddp_kwargs)
        return super().setup_module(module)


def prepare_for_ddp(model: nn.Module, given: dict[str, Any]) -> None:
    """Have DDP ignore frozen tensors, and choose the options that the user left open.

    Args:
        model: The module to wrap.
        given: Keyword arguments of DistributedDataParallel, extended in place.

    Raises:
        RuntimeError: nothing is trained, or reentrant checkpointing over adapters that a batch may
            skip.
    """
    if empty := meta_tensors(model):
        raise RuntimeError(
            f"peft_ddp: expected weights, got {len(empty)} tensors on the meta device "
            f"({', '.join(empty[:3])}); give PEFT(base_from=<folder of safetensors>), or call "
            "read_base(model, folder) before fabric.setup"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(
            "peft_ddp: expected something to train, got a model that is completely frozen; add "
            "PEFT(...) to the Trainer's callbacks, or call attach(model, method) before "
            "fabric.setup"
        )
    _choose_options(model, given)
    kept = {id(t) for t in kept_tensors(model).values()} if is_attached(model) else set()
    skip = [n for n, p in model.named_parameters() if not p.requires_grad]
    if kept:
        skip += [n for n, b in model.named_buffers() if id(b) not in kept]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, skip)


def _choose_options(model: nn.Module, given: dict[str, Any]) -> None:
    live = any(getattr(m, "track_running_stats", False) for m in model.modules())
    if not {"broadcast_buffers", "forward_sync_buffers"} & set(given):
        given[_BUFFERS] = live
    if "find_unused_parameters" in given or "static_graph" in given:
        return
    skips, cut = may_skip(model), reentrant(model)
    if skips and cut:
        raise RuntimeError(
            f"peft_ddp: expected activation checkpointing without reentrance, as a batch may skip "
            f"{skips}, got use_reentrant=True in {cut}; enable it with "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    given["find_unused_parameters"] = bool(skips)
    given["static_graph"] = bool(cut)


def may_skip(model: nn.Module) -> str:
    """Return which adapters a batch may skip; "" if every batch uses all of them."""
    names: set[str] = set()
    for path, module in adapted_modules(model):
        names.update(module.peft)
        parts = path.split(".")
        if any(a == "experts" and b.isdecimal() for a, b in itertools.pairwise(parts)):
            return "experts"
    return f"adapters {sorted(names)}" if len(names) > 1 else ""


def reentrant(model: nn.Module) -> str:
    """Return the name of a Hugging Face layer with reentrant checkpointing; "" if none has it."""
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            function: Any = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", False):
                return name or type(module).__name__
    return ""
