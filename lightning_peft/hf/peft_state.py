"""State dicts of a living `PeftModel`: without adapter names and the base's own tensors.

Both ``peft_model.state_dict()`` and ``get_peft_model_state_dict(peft_model)`` are read. Neither
holds the scale: the config of the model does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.hf.config import check_config
from lightning_peft.hf.keys import PREFIX
from lightning_peft.hf.method_config import format_of, method_class
from lightning_peft.methods.base import HFFormat

__all__ = ["is_peft_state", "peft_state"]

_ROOT = "base_model."
_LORA_A = ".lora_A"
#: Parts of a name between a module and its own tensor.
_WRAPPERS = re.compile(r"(\.(?:token_adapter|base_layer))+\.(?=[^.]+$)")


def is_peft_state(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a `PeftModel`."""
    return bool(tensors) and all(key.startswith(_ROOT) for key in tensors)


def peft_state(
    top: nn.Module,
    tensors: Mapping[str, Tensor],
    config: Any,
    alpha: float | None,
    adapter_name: str,
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return (config, tensors, note) as a directory of peft has them.

    Args:
        top: The base.
        tensors: A state dict.
        config: peft's config of the adapter, or the dict of it; None for plain LoRA with `alpha`.
        alpha: lora_alpha, if there is no config.
        adapter_name: The adapter to read, if the state dict has several.

    Raises:
        ValueError: no scale, several adapters of other names, or a config that does not fit.
    """
    if config is not None and alpha is not None:
        raise ValueError(
            "load_adapter: alpha: expected without config, which says its own, got "
            f"alpha={alpha}; leave one out"
        )
    plain = _lora_config(tensors, alpha) if config is None else _as_dict(config)
    check_config("load_adapter: config", plain)
    fmt = format_of(method_class(plain))
    found = _shared_once(fmt, _of_adapter(tensors, _name(fmt, tensors, adapter_name)))
    if config is None:
        plain |= _lora_ranks(found)
    own: dict[str, Tensor] = {
        **dict(top.named_parameters(remove_duplicate=False)),
        **dict(top.named_buffers(remove_duplicate=False)),
    }
    kept, equal = {}, 0
    for key, tensor in found.items():
        base = own.get(_WRAPPERS.sub(".", key.removeprefix(PREFIX)))
        trained = not key.startswith(PREFIX) or base is None or _is_saved(plain, key)
        if not trained and base is not None and _equal(base, tensor):
            equal += 1
        else:
            kept[key] = tensor
    return plain, kept, f"{equal} tensors equal to the base, left out" if equal else ""


def _shared_once(fmt: HFFormat, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the layers' references to tensors that all layers share."""
    shared = {f".{key.rpartition('.')[2]}": key for key in fmt.prefix.values() if key in tensors}
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not any(
            key.endswith(leaf) and key != whole and torch.equal(tensor, tensors[whole])
            for leaf, whole in shared.items()
        )
    }


def _equal(base: Tensor, tensor: Tensor) -> bool:
    return base.shape == tensor.shape and torch.equal(base.detach().cpu().to(tensor.dtype), tensor)


def _is_saved(config: Mapping[str, Any], key: str) -> bool:
    """Whether the key is of a trained copy."""
    saved = config.get("modules_to_save") or ()
    path = key.removeprefix(PREFIX).rpartition(".")[0]
    return bool(saved) and any(
        part.endswith(tuple(saved)) for part in (path, *_parents(path)) if part
    )


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [join(*parts[:i]) for i in range(1, len(parts))]


def _as_dict(config: Any) -> dict[str, Any]:
    """Return the config as JSON has it: enumerations are strings, sets are lists."""
    given = config if isinstance(config, Mapping) else config.to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(dict(given), default=_plain))
    return plain


def _plain(value: object) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _name(fmt: HFFormat, tensors: Mapping[str, Tensor], adapter_name: str) -> str:
    """Return the adapter's name in the keys; "" if they have none."""
    names: set[str] = set()
    for suffix in {*fmt.tensors.values(), *fmt.lookup.values()}:
        head, dot, tail = suffix.partition(".")
        pattern = re.compile(rf"\.{re.escape(head)}\.([\w-]+){re.escape(dot + tail)}")
        names |= {m[1] for m in (re.search(rf"{pattern.pattern}$", k) for k in tensors) if m}
        if not dot:  # `hada_w1_a` has no part after the name
            continue
        names -= {tail}
    if not names:
        keys = [k for k in tensors if ".modules_to_save." in k]
        names = {k.partition(".modules_to_save.")[2].partition(".")[0] for k in keys}
    if len(names) > 1 and adapter_name not in names:
        raise ValueError(
            f"load_adapter: adapter_name: expected one of the adapters in the state dict "
            f"{sorted(names)}, got {adapter_name!r}; give its name"
        )
    return adapter_name if len(names) > 1 else next(iter(names), "")


def _of_adapter(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one adapter, and those of none, without its name."""
    others = {
        part
        for key in tensors
        for part in re.findall(r"\.(?:lora_[AB]|modules_to_save)\.([\w-]+)\.", key)
        if part not in (name, "weight", "bias")
    }
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if "original_module" in parts or "trainable_tokens_original" in key:
            continue
        if others.intersection(parts[-2:]) and name not in parts[-2:]:
            continue
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            if parts[at + 1] != name:
                continue
            parts = parts[:at] + parts[at + 2 :]
        elif name and parts[-1] == name:
            parts = parts[:-1]
        elif name and len(parts) > 1 and parts[-2] == name:
            parts = parts[:-2] + parts[-1:]
        found[".".join(parts)] = tensor.detach()
    return found


def _lora_config(tensors: Mapping[str, Tensor], alpha: float | None) -> dict[str, Any]:
    if alpha is None or not any(_LORA_A in key for key in tensors):
        raise ValueError(
            "state dict: expected config= with a state dict of a PeftModel, which does not hold "
            "the scale, got none; give config=peft_model.peft_config['default'], or for plain LoRA "
            "alpha= of its lora_alpha; nothing was loaded"
        )
    return {"peft_type": "LORA", "r": 1, "lora_alpha": alpha, "target_modules": []}


def _lora_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return r, its pattern and the targets, by the shapes of A."""
    ranks = {
        key.removeprefix(PREFIX).partition(_LORA_A)[0]: tensor.shape[0]
        for key, tensor in tensors.items()
        if _LORA_A in key
    }
    r = Counter(ranks.values()).most_common(1)[0][0]
    return {
        "r": r,
        "rank_pattern": {re.escape(path): n for path, n in ranks.items() if n != r},
        "target_modules": sorted(ranks),
    }
