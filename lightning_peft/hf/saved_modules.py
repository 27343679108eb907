"""Modules that an adapter's file holds completely: ``modules_to_save``, and their tied copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import base_modules, persistent_buffers
from lightning_peft.core.names import in_adapter, join
from lightning_peft.hf.files import BATCHES
from lightning_peft.hf.keys import Reading
from lightning_peft.hf.source import Source
from lightning_peft.hf.targets import tied_with
from lightning_peft.hf.vocabulary import resize_advice

__all__ = ["has_separate_copies", "saved_modules"]


def saved_modules(source: Source, reading: Reading) -> dict[str, dict[str, Tensor]]:
    """Map each module of ``modules_to_save`` to its tensors, taken out of `reading`.

    A module counts if its name matches and the file has tensors for it: peft matches names by
    their ending alone.

    Raises:
        ValueError: missing, extra or misshapen tensors, or a buffer that differs from the base's.
    """
    wanted = tuple(source.config.get("modules_to_save") or ())
    modules = [(n, m) for n, m in base_modules(source.top).items() if n]
    matched = {n for n, _ in modules if wanted and n.endswith(wanted)}
    # What is inside of an adapted layer, such as an attention's output projection, has no copy.
    matched -= _inside({e.path for e in reading.entries}, matched)
    if source.config.get("ensure_weight_tying"):  # peft saves the tied modules too
        matched |= tied_with(source.top, matched)
    saved: dict[str, dict[str, Tensor]] = {}
    problems = [
        f"{name}: expected modules that are not inside of each other, got one inside of another: "
        "peft trains two copies and writes one"
        for name in sorted(_inside(matched, matched, itself=False))
    ]
    for name, module in modules:
        if name not in matched:
            continue
        head = f"{source.format.saved_prefix}{name}."
        found = {k[len(head) :]: t for k, t in reading.other.items() if k.startswith(head)}
        for key in found:
            del reading.other[head + key]
        found = _once(module, found)
        problems += _copy_problems(source.top, module, head, found)
        parameters = {n for n, _ in module.named_parameters()}
        copied = parameters | _statistics(module)
        saved[name] = {k: t for k, t in found.items() if k in copied}
    if problems:
        raise ValueError(
            "adapter file: modules_to_save: nothing was loaded:\n  " + "\n  ".join(problems[:20])
        )
    return {name: found for name, found in saved.items() if found}


def _inside(outer: Iterable[str], names: Iterable[str], *, itself: bool = True) -> set[str]:
    """The names that are those of outer modules, or of modules inside of them."""
    parts = tuple(f"{name}." for name in outer)
    return {n for n in names if n.startswith(parts) or (itself and f"{n}." in parts)}


#: Parts of peft's wrapper of a trained module.
_COPY, _ORIGINAL = "modules_to_save", "original_module"


def _once(module: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what peft writes twice: with bias="all" also the biases inside of its wrapper.

    Those of the original module do not act. Those of the copy are kept if they say something else.
    """
    own = module.state_dict().keys()
    kept: dict[str, Tensor] = {}
    for key, tensor in found.items():
        wrapped, _, rest = key.partition(".")
        if key in own or wrapped not in (_COPY, _ORIGINAL):
            kept[key] = tensor
        elif wrapped == _COPY:
            # Inside of a trained module the adapter's name is left in.
            once = found.get(rest, found.get(rest.partition(".")[2]))
            if once is None or not torch.equal(once, tensor):
                kept[key] = tensor
    return kept


def has_separate_copies(source: Source, saved: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether the file has separate copies of tensors that modules of the model share.

    With ``ensure_weight_tying`` peft trains one copy and writes it once per module; without it, it
    trains one copy per module. Files that do not state the option have separate copies if these
    differ.

    Raises:
        ValueError: copies that should be tied differ.
    """
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, found in saved.items():
        parameters = dict(source.top.get_submodule(name).named_parameters())
        for key, tensor in found.items():
            if key in parameters:
                groups.setdefault(id(parameters[key]), []).append((join(name, key), tensor))
    shared = [group for group in groups.values() if len(group) > 1]
    differing = [g for g in shared if any(not torch.equal(g[0][1], t) for _, t in g[1:])]
    tied = source.config.get("ensure_weight_tying")
    if tied and differing:
        raise ValueError(
            "adapter file: expected equal copies of tied weights with ensure_weight_tying = true, "
            f"got others for {[name for name, _ in differing[0]]}; set it to false in "
            "adapter_config.json to load them as separate copies"
        )
    return bool(differing) or (tied is False and bool(shared))


def _copy_problems(
    top: nn.Module, module: nn.Module, head: str, found: Mapping[str, Tensor]
) -> list[str]:
    """Return the differences between a module's own tensors and those that a file has for it."""
    expected = {k: t for k, t in module.state_dict().items() if not in_adapter(k)}
    parameters = {n for n, _ in module.named_parameters()}
    copied = parameters | _statistics(module)
    needed = [k for k in expected if k.rpartition(".")[2] != BATCHES]
    problems = [f"missing {head}{k}" for k in needed if k not in found]
    for key, tensor in found.items():
        if key not in expected:
            problems.append(f"extra {head}{key}")
        elif tensor.shape != expected[key].shape:
            shapes = f"shape {list(expected[key].shape)}, got {list(tensor.shape)}"
            advice = resize_advice(top, module, expected[key].shape, tensor.shape)
            problems.append(f"{head}{key}: expected {shapes}{advice}")
        elif key not in copied and not torch.equal(tensor, expected[key].to(tensor)):
            problems.append(f"{head}{key}: a buffer that differs from the base's")
    return problems


def _statistics(module: nn.Module) -> set[str]:
    """Running statistics that attaching copies with the parameters next to them."""
    return {
        join(name, key)
        for name, inner in module.named_modules()
        if getattr(inner, "track_running_stats", False)
        and inner._parameters.get("weight") is not None
        for key in persistent_buffers(inner, recurse=False)
    }
