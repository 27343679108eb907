"""Reading a Hugging Face peft directory: everything is checked against the model before it is
changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attach import Planned, attach, detach, plan_attach
from lightning_peft.adapters.placement.weights import adaptable
from lightning_peft.hf.config import CONFIG, method_fields
from lightning_peft.hf.keys import PREFIX, Reading, bias_key, joined, read_keys, tensor_prefix
from lightning_peft.hf.prompts import table_of
from lightning_peft.hf.source import read_source
from lightning_peft.hf.targets import exact_targets, targeted, targeted_weights
from lightning_peft.layers import ops_for
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.methods.base import HFEntry, HFFormat, Method, SequenceMethod, WeightMethod
from lightning_peft.methods.modules_to_save import ModulesToSave, TrainedBias
from lightning_peft.models.target_modules import bypassed
from lightning_peft.report.summary import Report
from lightning_peft.storage import Quantization

__all__ = ["load_adapter"]

#: What is copied after attaching: (module, weight or path of the copy, our tensor name) → value.
_Values = dict[tuple[int, str, str], Tensor]


def load_adapter(
    model: nn.Module,
    directory: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    quantization: Quantization | None = None,
    root: str | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> Report:
    """Attach the adapter of a Hugging Face peft directory, in place.

    Layer names from before transformers 5 are mapped to those that the model has now. LoRA files
    of Kohya's scripts, diffusers and loralib are read where every tensor has a certain place and
    scale, and refused by name otherwise. Nothing is ever unpickled.

    Strict where peft is lax: a missing, extra, misshapen or non-finite tensor raises, and so does
    an option whose effect is not known. ``directory/<adapter_name>`` is taken where it exists, as
    peft writes it.

    Args:
        model: The base, or a module (a LightningModule) that holds it.
        directory: With adapter_config.json and adapter_model.safetensors; or a .safetensors file
            (or a directory with one) of Kohya, diffusers or loralib; or a state dict of theirs.
        adapter_name: Name to attach under.
        quantization: Quantise the frozen base too.
        root: Name of the module inside `model` whose layer names the file uses. None means the one
            Hugging Face
            model in it, or else `model`.
        alpha: lora_alpha of a loralib file, which does not hold it.
        enable_lora: What loralib's MergedLinear was made with, where some parts are off.

    Returns:
        The report of what matched; its notes say how many tensors went into how many layers.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: anything in the files that does not fit; the model is as before.
        RuntimeError: the adapter's name is taken.
    """
    source = read_source(model, directory, adapter_name, root, alpha, enable_lora)
    config, fmt, prefix, top = source.config, source.format, source.prefix, source.top
    reading = read_keys(fmt, source.tensors, top, prefix, config.get("modules_to_save") or ())
    reading.notes += source.notes
    _require_targets(config, fmt, top, reading)
    fields = method_fields(source.method, config, reading.entries)
    if reading.entries:
        fields["target_modules"] = exact_targets(model, [e.site for e in reading.entries])
    method = source.method(**fields)
    saved = _saved_modules(fmt, config, top, prefix, reading)
    planned, _, _ = plan_attach(model, [method], [joined(prefix, name) for name in saved])
    values = _values(method, fmt, config, planned, reading, prefix, saved)
    if isinstance(method, SequenceMethod):
        reading.shared = table_of(method, fmt, config, planned, reading.shared)
    _require_base(top, reading, fmt.saved_prefix)
    report = attach(
        model,
        method,
        adapter_name=adapter_name,
        quantization=quantization,
        modules_to_save=[joined(prefix, name) for name in saved],
    )
    try:
        count = _copy(model, adapter_name, values, reading.shared)
    except ValueError:
        detach(model, adapter_name)
        raise
    layers = len({e.path for e in reading.entries})
    report.notes += [
        f"{adapter_name}: {count} tensors loaded into {layers} of {layers} layers",
        *reading.notes,
    ]
    return report


def _require_targets(
    config: Mapping[str, Any], fmt: HFFormat, top: nn.Module, reading: Reading
) -> None:
    """Layers and weights by the config's rules = those with tensors; entries learn which it is."""
    if not fmt.tensors:
        return
    wants, named = targeted(config, top), targeted_weights(config)
    modules = dict(top.named_modules())
    for e in reading.entries:
        e.by_weight = not wants(e.path, modules[e.path])
    if not reading.entries:
        raise ValueError(
            f"adapter file: expected tensors named as {list(fmt.tensors.values())} behind "
            f"'{PREFIX}<layer>.', found none; nothing would be adapted"
        )
    if config.get("target_modules") is None and not config.get("target_parameters"):
        if "target_modules" not in config:
            raise ValueError(
                f"{CONFIG}: expected 'target_modules', found none among {sorted(config)}"
            )
        return  # the architecture's usual choice when the file was made; the tensors say which
    unread = bypassed(list(modules.items()))
    adapted = sorted(unread.keys() & {e.path for e in reading.entries})
    if adapted:
        raise ValueError(
            f"adapter file: {adapted[0]}: expected a layer whose change acts on every machine, got "
            f"one left out: {unread[adapted[0]]}; merge the adapter with the library it was made "
            "with; nothing was loaded"
        )
    layers = {n: ops_for(m) for n, m in modules.items() if n and n not in unread and adaptable(m)}
    expected = {n for n in layers if wants(n, modules[n])}
    for name, ops in layers.items():
        weights = () if ops is None or name in expected else ops.parameters(modules[name])
        expected |= {f"{name}.{w}" for w in weights if named(f"{name}.{w}")}
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


# ---- trained copies of whole modules


def _saved_modules(
    fmt: HFFormat, config: Mapping[str, Any], top: nn.Module, prefix: str, reading: Reading
) -> dict[str, dict[str, Tensor]]:
    """Module → its tensors in the file. Found by name and by tensors: the name alone matches by its
    mere ending.
    """
    wanted = tuple(config.get("modules_to_save") or ())
    adapted = {e.path for e in reading.entries}
    saved: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for name, module in top.named_modules():
        if not wanted or not name or not name.endswith(wanted) or name in adapted:
            continue
        if any(name.startswith(f"{outer}.") for outer in saved):
            continue
        expected = {k: t for k, t in module.state_dict().items() if "peft" not in k.split(".")}
        head = f"{fmt.saved_prefix}{name}."
        found = {k[len(head) :]: t for k, t in reading.other.items() if k.startswith(head)}
        parameters = {n for n, _ in module.named_parameters()}
        problems += [f"missing {head}{k}" for k in expected if k not in found]
        for key, tensor in found.items():
            if key not in expected:
                problems.append(f"extra {head}{key}")
            elif tensor.shape != expected[key].shape:
                problems.append(
                    f"{head}{key}: expected shape {list(expected[key].shape)}, got "
                    f"{list(tensor.shape)}"
                )
            elif key not in parameters and not torch.equal(tensor, expected[key].to(tensor)):
                problems.append(f"{head}{key}: a buffer that differs from the base's")
        saved[name] = {k: t for k, t in found.items() if k in parameters}
        for key in found:
            del reading.other[head + key]
    if problems:
        raise ValueError(
            "adapter file: modules_to_save: nothing was loaded:\n  " + "\n  ".join(problems[:20])
        )
    return {name: found for name, found in saved.items() if found}


# ---- values


def _values(
    method: Method,
    fmt: HFFormat,
    config: Mapping[str, Any],
    planned: list[Planned],
    reading: Reading,
    prefix: str,
    saved: Mapping[str, Mapping[str, Tensor]],
) -> _Values:
    """What goes where, everything compared with what attaching will make."""
    values: _Values = {}
    problems: list[str] = []
    entries = {(id(e.site.module), e.site.parameter): e for e in reading.entries}
    adapted: dict[int, list[str]] = {}
    for _, parameter in entries:
        adapted.setdefault(_, []).append(parameter)
    for which, _, placement in planned:
        module = placement.module
        path = placement.name[len(prefix) :].removeprefix(".") if prefix else placement.name
        if isinstance(which, ModulesToSave):
            owner = next(n for n in saved if path == n or path.startswith(f"{n}."))
            for p in placement.paths:
                values[id(module), p, "copy"] = saved[owner][joined(path, p)[len(owner) + 1 :]]
        elif isinstance(which, TrainedBias):
            for p in placement.paths:
                key = bias_key(module, path, p, adapted.get(id(module), ()))
                inside = [n for n in saved if path == n or path.startswith(f"{n}.")]
                tensor = (
                    saved[inside[0]].get(joined(path, p)[len(inside[0]) + 1 :])
                    if inside  # it stands in the file once, with its module
                    else reading.other.pop(key, None)
                )
                shape = module.get_parameter(p).shape
                if tensor is None:
                    problems.append(f"missing {key}")
                elif tensor.shape != shape:
                    problems.append(
                        f"{key}: expected shape {list(shape)}, got {list(tensor.shape)}"
                    )
                else:
                    values[id(module), p, "copy"] = tensor
        elif fmt.tensors:
            entry = entries.pop((id(module), placement.site.parameter), None)
            if entry is None:
                problems.append(
                    f"missing {tensor_prefix(path, '')}: no tensors for {placement.site.label}"
                )
                continue
            start = _start(which, placement)
            for name, tensor in _unpacked(method, fmt, config, entry, start, problems).items():
                values[id(module), entry.site.parameter, name] = tensor
    problems += [
        f"extra {e.path}: not among the layers that are attached" for e in entries.values()
    ]
    if problems:
        raise ValueError(
            f"adapter file: {len(problems)} differences; nothing was loaded:\n  "
            + "\n  ".join(problems[:20])
        )
    return values


def _start(method: Any, placement: Any) -> dict[str, Tensor]:
    if placement.paths:
        return {p.replace(".", "__"): placement.module.get_parameter(p) for p in placement.paths}
    if isinstance(method, WeightMethod):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return method.parameters(placement.site)
    return {}


def _unpacked(
    method: Any,
    fmt: HFFormat,
    config: Mapping[str, Any],
    entry: HFEntry,
    start: Mapping[str, Tensor],
    problems: list[str],
) -> dict[str, Tensor]:
    site = entry.site
    try:
        tensors = dict(entry.tensors)
        if fmt.unpack is not None:
            tensors = dict(fmt.unpack(method, site, tensors, config))
    except (ValueError, KeyError, RuntimeError) as error:
        problems.append(f"{entry.path}: {entry.names_and_shapes()}: {error}")
        return {}
    extra = (
        set(tensors)
        - set(start)
        - set(method.buffers(site) if isinstance(method, WeightMethod) else ())
    )
    problems += [f"missing {entry.path}.{_named(fmt, site, k)}" for k in start if k not in tensors]
    problems += [f"extra {entry.path}.{_named(fmt, site, k)}" for k in sorted(extra)]
    for name, tensor in tensors.items():
        if name in start and tensor.shape != start[name].shape:
            packed = site.ops.hf_pack(
                site.module, site.parameter, fmt.layouts.get(name, ""), start[name]
            )
            got = entry.shapes.get(_named(fmt, site, name), tuple(tensor.shape))
            problems.append(
                f"{entry.path}.{_named(fmt, site, name)}: expected shape {list(packed.shape)}, got "
                f"{list(got)}"
            )
    return tensors


def _named(fmt: HFFormat, site: Any, name: str) -> str:
    return fmt.name(site, name) if name in fmt.tensors else name


def _require_base(top: nn.Module, reading: Reading, saved_prefix: str) -> None:
    """What is left must be copies of the base (peft saves embeddings beside their adapter): equal,
    or it raises.
    """
    problems = []
    parameters = dict(top.named_parameters()) | dict(top.named_buffers())
    for key, tensor in reading.other.items():
        head = PREFIX if key.startswith(PREFIX) else saved_prefix
        name = re.sub(r"(\.base_layer)+\.(?=[^.]+$)", ".", key.removeprefix(head))
        base = parameters.get(name)
        if not key.startswith(head) or base is None:
            problems.append(f"extra {key}")
        elif base.shape != tensor.shape:
            problems.append(
                f"{key}: a copy of the base of shape {list(tensor.shape)}, the base has "
                f"{list(base.shape)}"
            )
        elif not torch.equal(base.detach().cpu().to(tensor.dtype), tensor):
            problems.append(f"{key}: a copy of the base that differs from this one")
        else:
            reading.notes.append(f"{key}: equal to the base, left out")
    if problems:
        raise ValueError(
            "adapter file: expected the base model it was trained on and no further tensors; "
            "nothing was loaded:\n  " + "\n  ".join(problems[:20])
        )


def _copy(
    model: nn.Module, adapter_name: str, values: _Values, shared: Mapping[str, Tensor]
) -> int:
    """Copy into the attached tensors; shared ones are compared by shape first."""
    live: list[tuple[Tensor, Tensor]] = []
    tables: list[tuple[Any, Tensor]] = []
    missing = dict(shared)
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module, adapter_name):
            for name, path in adapter.paths.items():
                key = (id(module), path, "copy")
                if key in values:
                    live.append((getattr(adapter, name), values[key]))
            if adapter.kind == "sequence" and "P" in missing:
                tables.append((adapter, missing.pop("P")))
            for name, tensor in adapter.tensors().items():
                value = values.get((id(module), adapter.site.parameter, name))
                if value is not None:
                    live.append((tensor, value))
                elif name in missing and missing[name].shape == tensor.shape:
                    live.append((tensor, missing.pop(name)))
    if missing:
        raise ValueError(
            "adapter file: expected no tensors besides the adapter's, got "
            f"{ {k: list(t.shape) for k, t in missing.items()} }; nothing was loaded"
        )
    with torch.no_grad():
        for tensor, value in live:
            tensor.copy_(value)
        for adapter, table in tables:
            adapter.method.load_prompt_embeddings(adapter.block, table, adapter.site)
    return len(live) + len(tables)
