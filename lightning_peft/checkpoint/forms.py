"""Forms of a checkpoint: adapters alone, with the dense base, or merged into plain weights.

Some libraries read their own files back with a strict `load_state_dict`. They need a file that
holds every key: of the live adapted module ("full"), or of the module without adapters ("merged").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_peft.adapters.merge import merge, unmerge
from lightning_peft.checkpoint.description import FORMAT, KEY
from lightning_peft.checkpoint.kept import live_tensors
from lightning_peft.core.names import join, strip_compile
from lightning_peft.core.value_types import shown
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.models.plain_state import dense_base, plain_state
from lightning_peft.storage import held_tensors
from lightning_peft.storage.dtensor import is_sharded

__all__ = [
    "CheckpointForm",
    "DenseBaseReader",
    "check_form",
    "form_of",
    "full_state",
    "merged_checkpoint",
    "refuse_merged",
    "refuse_unwritable",
    "without_base",
]

CheckpointForm = Literal["adapters", "full", "merged"]


def check_form(form: str) -> None:
    """Raise ValueError for an unknown form."""
    if form not in get_args(CheckpointForm):
        raise ValueError(
            f"PEFT checkpoint: expected one of {list(get_args(CheckpointForm))}, got {shown(form)}"
        )


def form_of(checkpoint: Mapping[str, Any]) -> str:
    """Return the form that a checkpoint was written in."""
    entry = checkpoint.get(KEY)
    return str(entry.get("form", "adapters")) if isinstance(entry, Mapping) else "adapters"


def refuse_unwritable(model: nn.Module, form: CheckpointForm) -> None:
    """Raise where a form other than the default cannot be written for this model.

    Raises:
        ValueError: the model is sharded, or an adapter has no merged form.
    """
    if form == "adapters":
        return
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"PEFT checkpoint={form!r}: expected a model that each process holds completely, got a "
            "sharded one; leave checkpoint='adapters' and convert the file afterwards"
        )
    if form == "merged":
        for name, module in adapted_modules(model):
            for adapter in adapters_of(module):
                why = adapter.why_not_mergeable()
                if why:
                    raise ValueError(
                        f"PEFT checkpoint='merged': expected adapters that can be merged, got "
                        f"{adapter.method.label} on {name or 'the model'!r}: {why}; use 'full'"
                    )


# ---- full


def full_state(model: nn.Module, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state under every key of the live model: the dense base, and the kept tensors."""
    dense, packed = dense_base(model)
    canonical: dict[int, str] = {}
    live = live_tensors(model)
    for key, tensor in live.items():
        if isinstance(tensor, Tensor):
            canonical.setdefault(id(tensor), strip_compile(key))
    full: dict[str, Any] = {}
    for key, tensor in live.items():
        if key in packed:
            continue
        value = kept.get(strip_compile(key), kept.get(canonical.get(id(tensor), ""), tensor))
        full[key] = value.detach() if isinstance(value, Tensor) else value
    return full | dense


def without_base(checkpoint: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a full state that a file of adapters would hold."""
    listed = checkpoint[KEY].get("tensors")
    names = set(listed) if isinstance(listed, list) else set()
    plain = {strip_compile(key): value for key, value in state.items()}
    return {key: value for key, value in plain.items() if key in names}


class DenseBaseReader:
    """Load hook: a live packed layer accepts its own weight in dense form.

    With it, `load_state_dict(strict=True)` of a full file passes on a quantised live module. The
    packed bits stay; a dense weight other than theirs is an error.
    """

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Called before a state dict is loaded: puts the packed tensors in its place."""
        for name, inner in module.named_modules(remove_duplicate=False):
            for held in held_tensors(inner).values():
                given = state_dict.get(prefix + join(name, held.weight))
                storage = held.storage
                if (
                    not isinstance(given, Tensor)
                    or not given.is_floating_point()
                    or given.shape != storage.shape(inner, held.weight)
                ):
                    continue
                own = storage.read(inner, held.weight, storage.dtype(inner, held.weight))
                if not torch.equal(own, given.to(own)):
                    error_msgs.append(
                        f"{join(name, held.weight)}: expected the base that is packed here, got "
                        "other values; build the module from the same pretrained weights"
                    )
                state = inner.state_dict(keep_vars=True)
                own_keys = {k for k, h in held_tensors(inner).items() if h.weight == held.weight}
                state_dict |= {prefix + join(name, k): state[k] for k in own_keys if k in state}

    def install(self, module: nn.Module) -> None:
        """Register the hook, once per module."""
        hooks = module._load_state_dict_pre_hooks.values()
        if not any(isinstance(getattr(h, "hook", h), DenseBaseReader) for h in hooks):
            module.register_load_state_dict_pre_hook(self)


# ---- merged


def merged_checkpoint(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with plain merged weights. Training cannot continue from it.

    The live model is the same afterwards, bit for bit.

    Raises:
        RuntimeError: the merged weights would not compute the same.
    """
    written = {
        k: v for k, v in checkpoint.items() if k not in ("optimizer_states", "lr_schedulers")
    }
    written["state_dict"] = _merged_state(model)
    versions = (checkpoint.get(KEY) or {}).get("versions")
    written[KEY] = {"format": FORMAT, "form": "merged", "versions": versions}
    return written


def _merged_state(model: nn.Module) -> dict[str, Any]:
    merged = any(m._peft.active.merged for _, m in adapted_modules(model))
    if not merged:
        merge(model, into="dense", keep_base=True)
    try:
        return {
            key: t.detach().clone() if isinstance(t, Tensor) else t
            for key, t in plain_state(model).items()
        }
    finally:
        if not merged:
            unmerge(model)


def refuse_merged(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise ValueError for a file of merged weights: adapters would act on them a second time."""
    if form_of(checkpoint) == "merged":
        raise ValueError(
            f"{source}: expected a checkpoint with adapters, got merged weights "
            "(checkpoint='merged'), which are for inference; read it into a plain module with its "
            "class's load_from_checkpoint, and train on from a file of checkpoint='adapters' or "
            "'full'"
        )
