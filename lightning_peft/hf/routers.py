"""Adapters that mix others in a Hugging Face peft directory: X-LoRA and Arrow.

peft 0.21 writes no tensor of X-LoRA's classifier, but reads one under
`base_model.internal_xlora_classifier.layers.<i>.weight` and `bias`. Its config numbers the adapters
"0", "1" … and names their directories. An Arrow directory is LoRA's with an ``arrow_config``, which
names the adapters; its own tensors take no part in the forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.activation import set_adapter
from lightning_peft.adapters.route import route
from lightning_peft.core.registry import registries_in
from lightning_peft.hf.exported_adapters import FoundAdapters, exported_method, find_adapters
from lightning_peft.layers.router_adapter import RouterAdapter
from lightning_peft.report.summary import Report

__all__ = ["add_router", "attached_experts", "experts_of", "load_arrow", "split_router"]

_HEAD = "base_model.internal_xlora_classifier."


def split_router(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (tensors of the classifier by its own names, the other tensors) of a file."""
    own = {k.removeprefix(_HEAD): t for k, t in tensors.items() if k.startswith(_HEAD)}
    return own, {k: t for k, t in tensors.items() if not k.startswith(_HEAD)}


def add_router(
    found: FoundAdapters, directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Add the classifier, and the directories below `directory` of the adapters that it mixes."""
    for _, _, adapter in found:
        if isinstance(adapter, RouterAdapter):
            tensors.update({_HEAD + k: t.detach() for k, t in adapter.tensors().items()})
            places = [directory if n == "default" else directory / n for n in _experts(adapter)]
            config["adapters"] = {str(i): str(p.absolute()) for i, p in enumerate(places)}
            config["hidden_size"] = adapter.site.width


def experts_of(model: nn.Module, found: FoundAdapters, prefix: str) -> list[str]:
    """Return the names of the adapters that a router among `found` mixes.

    Raises:
        ValueError: one of them is not LoRA, which alone peft mixes.
    """
    names = [n for _, _, a in found if isinstance(a, RouterAdapter) for n in _experts(a)]
    for name in names:
        method, fmt = exported_method(find_adapters(model, name, prefix)[0])
        if fmt.peft_type != "LORA":
            raise ValueError(
                f"save_adapter: expected LoRA adapters, which alone peft's XLORA mixes, got "
                f"{method.label} as {name!r}; keep the router with adapter_state_dict()"
            )
    return names


def _experts(adapter: RouterAdapter) -> list[str]:
    return list(adapter.method.experts())


def attached_experts(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Return the names of the attached adapters that the config's ``adapters`` mean, in its order.

    These are the keys of the mapping, or the last parts of the paths.

    Raises:
        ValueError: no mapping of names to paths, or adapters that are not attached.
    """
    given = config.get("adapters")
    if not isinstance(given, dict) or not given or not all(map(_is_name, given.values())):
        raise ValueError(
            "adapter_config.json: adapters: expected the names of adapters with their "
            f"directories, got {given!r}"
        )
    known = {n for _, _, registry in registries_in(model) for n in registry.adapters}
    choices = [list(given), [Path(path).name for path in given.values()]]
    for names in choices:
        if set(names) <= known and len(set(names)) == len(names):
            return names
    raise ValueError(
        f"adapter_config.json: adapters: expected adapters attached as {choices[0]} or as "
        f"{choices[1]}, attached are {sorted(known) or 'none'}; load each of "
        f"{list(given.values())} first with load_adapter(model, path, adapter_name=...)"
    )


def load_arrow(model: nn.Module, config: Mapping[str, Any], adapter_name: str) -> Report:
    """Attach and activate the Arrow adapter of a directory, made from attached adapters.

    Raises:
        ValueError: values of other types; adapters that are not attached, as `route` says.
    """
    given = config["arrow_config"]
    fields = given if isinstance(given, dict) else {}
    names, general = fields.get("task_adapter_names"), fields.get("gks_adapter_names") or []
    top_k, temperature = fields.get("top_k", 3), fields.get("router_temperature", 1.0)
    if not (
        _are_names(names)
        and names
        and _are_names(general)
        and type(top_k) is int
        and isinstance(temperature, int | float)
    ):
        raise ValueError(
            "adapter_config.json: arrow_config: expected task_adapter_names, gks_adapter_names, "
            f"top_k and router_temperature, got {given!r}; nothing was loaded"
        )
    general = general if fields.get("use_gks") else []
    known = {n for _, _, registry in registries_in(model) for n in registry.adapters}
    absent = sorted({*names, *general} - known)
    if absent:
        raise ValueError(
            f"adapter_config.json: arrow_config: expected adapters attached as {names + general}, "
            f"{absent} are not; load each first with load_adapter(model, path, adapter_name=...)"
        )
    report = route(
        model, names, adapter_name, top_k=top_k, temperature=temperature, general=general
    )
    set_adapter(model, adapter_name)
    report.notes.append(
        f"{adapter_name}: Arrow's directions are exact, those of peft 0.21 are estimates by power "
        "iteration from a random start; outputs differ where an estimate is poor"
    )
    return report


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)
