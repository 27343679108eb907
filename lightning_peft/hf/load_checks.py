"""Checks of an adapter's file against the model, before the model is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_peft.core.modules import base_modules
from lightning_peft.hf.config import CONFIG
from lightning_peft.hf.keys import PREFIX, Reading
from lightning_peft.hf.source import Source
from lightning_peft.hf.targets import targeted, targeted_weights, tied_with
from lightning_peft.layers import adaptable, parameter_ops
from lightning_peft.methods.base import HFFormat
from lightning_peft.models.target_modules import bypassed

__all__ = ["check_shared", "check_targets"]


def check_shared(fmt: HFFormat, reading: Reading) -> None:
    """Check that the file has every tensor that all layers share.

    Raises:
        ValueError: the keys that are missing.
    """
    missing = [k for n, k in fmt.prefix.items() if n not in (*reading.shared, *fmt.optional)]
    if missing:
        raise ValueError(
            f"adapter file: expected {missing}, which all layers share, found none; nothing was "
            "loaded"
        )


def check_targets(source: Source, reading: Reading) -> None:
    """Check that the config's targets are the layers with tensors; sets `HFEntry.by_weight`.

    Raises:
        ValueError: targets without tensors, tensors without target, or no tensors at all.
    """
    config = source.config
    wants = targeted(config, source.top)
    modules = base_modules(source.top)
    tied = set[str]()
    if config.get("ensure_weight_tying"):
        targets = {e.path for e in reading.entries if wants(e.path, modules[e.path])}
        tied = tied_with(source.top, targets)
    for e in reading.entries:
        e.by_weight = e.path not in tied and not wants(e.path, modules[e.path])
    if not reading.entries:
        raise ValueError(
            f"adapter file: expected tensors named as {list(source.format.tensors.values())} "
            f"behind '{PREFIX}<layer>.', found none, but {sorted(reading.other)[:3]}; nothing was "
            "loaded"
        )
    if config.get("target_modules") is None and not config.get("target_parameters"):
        if "target_modules" not in config:
            raise ValueError(
                f"{CONFIG}: expected 'target_modules', found none among {sorted(config)}"
            )
        return  # the architecture's usual choice when the file was made; the tensors say which
    unread = bypassed(list(modules.items()))
    _check_none_bypassed(reading, unread)
    expected = tied.union(_expected_targets(source, modules, unread))
    have = {e.target for e in reading.entries}
    missing = sorted(expected - have)
    extra = sorted(have - expected)
    if missing or extra:
        raise ValueError(
            f"adapter file: expected tensors for the {len(expected)} layers and weights that "
            "target_modules and target_parameters "
            f"name, got them for {len(have)}; missing: {missing[:10] or 'none'}; extra: "
            f"{extra[:10] or 'none'}; nothing was loaded"
        )


def _check_none_bypassed(reading: Reading, unread: Mapping[str, str]) -> None:
    """Check that no adapted layer is among those whose forward is not always called."""
    adapted = sorted(unread.keys() & {e.path for e in reading.entries})
    if adapted:
        raise ValueError(
            f"adapter file: {adapted[0]}: expected a layer whose change acts on every machine, got "
            f"one left out: {unread[adapted[0]]}; merge the adapter with the library it was made "
            "with; nothing was loaded"
        )


def _expected_targets(
    source: Source, modules: Mapping[str, nn.Module], unread: Mapping[str, str]
) -> Iterator[str]:
    """Yield the names of the layers, and of single weights, that the config targets."""
    wants, named = targeted(source.config, source.top), targeted_weights(source.config)
    for name, module in modules.items():
        if not name or name in unread:
            continue
        if adaptable(module) and wants(name, module):
            yield name
            continue
        ops = parameter_ops(module)
        weights = () if ops is None else ops.parameters(module)
        yield from (f"{name}.{w}" for w in weights if named(f"{name}.{w}"))
