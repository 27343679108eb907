"""Values that a file holds for the tensors attaching creates, each compared by shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_peft.adapters.placement.placement import (
    CopyPlacement,
    Placement,
    PlannedAdapter,
)
from lightning_peft.core.modules import parameter_at
from lightning_peft.core.names import counted, in_adapter, join
from lightning_peft.core.site import RouterSite
from lightning_peft.hf.keys import Reading, bias_key, tensor_prefix
from lightning_peft.hf.source import Source
from lightning_peft.hf.vocabulary import resize_advice
from lightning_peft.methods.adaption_prompt import AdaptionPrompt
from lightning_peft.methods.base import HFEntry, HFFormat, Method, RouterMethod, WeightMethod
from lightning_peft.methods.modules_to_save import ModulesToSave, TrainedBias
from lightning_peft.methods.norm_tuning import NormTuning
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.models.modules import fork_seeded_rng

__all__ = ["COPY", "ValueMatcher", "Values"]

#: (id of the module, weight or path of the copy, our tensor name) → value to copy after attaching.
Values = dict[tuple[int, str, str], Tensor]

#: Tensor name in `Values` of a trained copy.
COPY = "copy"


@dataclass
class ValueMatcher:
    """Matches a file's tensors with the placements that attaching will fill.

    Attributes:
        method: The method that the file describes.
        source: The file's content.
        reading: Its tensors by kind; biases are taken out of it.
        saved: Module → its trained copy.
        values: The values found so far.
        problems: The differences found so far.
    """

    method: Method
    source: Source
    reading: Reading
    saved: Mapping[str, Mapping[str, Tensor]]
    values: Values = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def match(self, planned: Sequence[PlannedAdapter]) -> Values:
        """Return the value of every tensor that attaching will create.

        Raises:
            ValueError: missing, extra or misshapen tensors, with the list.
        """
        entries = {(id(e.site.module), e.site.parameter): e for e in self.reading.entries}
        adapted: dict[int, list[str]] = {}
        for module_id, parameter in entries:
            adapted.setdefault(module_id, []).append(parameter)
        buffers = _site_buffers(self.method, planned)
        for each in planned:
            method, placement = each.method, each.placement
            if isinstance(method, ModulesToSave):
                self._match_copies(placement)
            elif isinstance(method, AdaptionPrompt):
                self._match_positions(method, placement)
            elif isinstance(method, RouterMethod):
                self._match_router(method, placement)
            elif isinstance(method, NormTuning):
                self._match_norm(placement)
            elif isinstance(method, TrainableTokens):
                continue  # `match_token_rows` has them
            elif isinstance(method, TrainedBias):
                self._match_biases(placement, adapted.get(id(placement.module), ()))
            elif self.source.format.tensors:
                key = (id(placement.module), placement.site.parameter)
                kept = buffers.get(id(placement.site), {})
                self._match_weight(method, placement, entries.pop(key, None), kept)
        self.problems += [
            f"extra {e.path}: not among the layers that are attached" for e in entries.values()
        ]
        placed = {self._path(each.placement) for each in planned}
        self.problems += [
            f"extra {path}: not in the attention of the last blocks"
            for path in self.reading.positions
            if path not in placed
        ]
        if self.problems:
            raise ValueError(
                f"adapter file: {counted(len(self.problems), 'difference')}; nothing was loaded:"
                "\n  " + "\n  ".join(self.problems[:20])
            )
        return self.values

    def _path(self, placement: Placement) -> str:
        """Name of the placement's module in the file."""
        return placement.name.removeprefix(self.source.prefix).removeprefix(".")

    def _owner(self, path: str) -> str | None:
        """Name of the trained module that holds the module of this name."""
        return next((n for n in self.saved if path == n or path.startswith(f"{n}.")), None)

    def _match_copies(self, placement: Placement) -> None:
        path = self._path(placement)
        for p in (*placement.paths, *_statistics_of(placement)):
            full = join(path, p)
            owner = self._owner(full)  # a part of an attention may be trained alone
            assert owner is not None  # attach plans copies of `saved` alone
            key = full[len(owner) + 1 :]
            if key in self.saved[owner]:  # earlier files have no num_batches_tracked
                self.values[id(placement.module), p, COPY] = self.saved[owner][key]

    def _match_norm(self, placement: Placement) -> None:
        path = self._path(placement)
        found = self.reading.norms.get(path, {})
        state = {k: t for k, t in placement.module.state_dict().items() if not in_adapter(k)}
        copied = {*placement.paths, *_statistics_of(placement)}
        self.problems += [f"extra {path}.{key}" for key in found if key not in state]
        for key in state:
            if key not in found:
                self.problems.append(f"missing {path}.{key}")
            elif found[key].shape != state[key].shape:
                shapes = f"{list(state[key].shape)}, got {list(found[key].shape)}"
                self.problems.append(f"{path}.{key}: expected shape {shapes}")
            elif key in copied:
                self.values[id(placement.module), key, COPY] = found[key]
            elif not torch.equal(found[key], state[key].to(found[key])):
                self.problems.append(f"{path}.{key}: a buffer that differs from the base's")

    def _match_positions(self, method: AdaptionPrompt, placement: Placement) -> None:
        path, site = self._path(placement), placement.site
        found = self.reading.positions.get(path, {})
        for name, shape in (("P", [1, method.n, site.out_features]), ("g", [1])):
            if name not in found:
                self.problems.append(f"missing {path}: {name} of an adaption prompt")
            elif list(found[name].shape) != shape:
                got = list(found[name].shape)
                self.problems.append(f"{path}: {name}: expected shape {shape}, got {got}")
            else:
                self.values[id(placement.module), site.parameter, name] = found[name]

    def _match_router(self, method: RouterMethod, placement: Placement) -> None:
        found, site = self.reading.router, placement.site
        assert isinstance(site, RouterSite)
        if not found:
            self.problems.append(
                f"{method.label}: no tensor of its classifier, which peft 0.21 does not write; "
                "train one with XLoRA(adapters=[...])"
            )
            return
        with fork_seeded_rng(0):
            expected = method.module(site).state_dict()
        self.problems += [f"missing {k} of the classifier" for k in expected if k not in found]
        for key, tensor in found.items():
            shape = list(expected[key].shape) if key in expected else None
            if shape != list(tensor.shape):
                wanted = "no such tensor" if shape is None else f"shape {shape}"
                self.problems.append(f"{key}: expected {wanted}, got {list(tensor.shape)}")
            self.values[id(placement.module), site.parameter, key] = tensor

    def _match_biases(self, placement: Placement, adapted: Sequence[str]) -> None:
        path, module = self._path(placement), placement.module
        owner = self._owner(path)
        for p in placement.paths:
            key = bias_key(module, path, p, adapted)
            if owner is None:
                tensor = self.reading.other.pop(key, None)
            else:  # the file has it once, with its module
                tensor = self.saved[owner].get(join(path, p)[len(owner) + 1 :])
            shape = parameter_at(module, p).shape
            if tensor is None:
                # peft trains what is named "bias" alone: an attention's in_proj_bias stays.
                if p.rpartition(".")[2] == "bias":
                    self.problems.append(f"missing {key}")
            elif tensor.shape != shape:
                self.problems.append(
                    f"{key}: expected shape {list(shape)}, got {list(tensor.shape)}"
                )
            else:
                self.values[id(module), p, COPY] = tensor

    def _match_weight(
        self,
        method: Method,
        placement: Placement,
        entry: HFEntry | None,
        buffers: Mapping[str, Tensor],
    ) -> None:
        if entry is None:
            self.problems.append(
                f"missing {tensor_prefix(self._path(placement), '')}: no tensors for "
                f"{placement.site.label}"
            )
            return
        tensors = self._unpacked(entry)
        if tensors is None:
            return
        initial = _initial_tensors(method, placement)
        self.problems += self._differences(entry, tensors, initial, buffers)
        for name, tensor in tensors.items():
            self.values[id(placement.module), entry.site.parameter, name] = tensor

    def _unpacked(self, entry: HFEntry) -> dict[str, Tensor] | None:
        """Return the entry's tensors in the method's terms, None if that fails."""
        unpack = self.source.format.unpack
        tensors = dict(entry.tensors)
        if unpack is None:
            return tensors
        try:
            return dict(unpack(self.method, entry.site, tensors, self.source.config))
        except (ValueError, KeyError, RuntimeError) as error:
            self.problems.append(f"{entry.path}: {entry.names_and_shapes()}: {error}")
            return None

    def _differences(
        self,
        entry: HFEntry,
        tensors: Mapping[str, Tensor],
        initial: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> list[str]:
        """Compare the file's tensors with the method's initial ones, by name and shape."""
        fmt, site = self.source.format, entry.site
        wanted = [*initial, *(k for k in buffers if k in fmt.tensors and k not in fmt.optional)]
        known = {**initial, **buffers}
        extra = sorted(set(tensors) - set(initial) - set(buffers))

        def named(name: str) -> str:
            return f"{entry.path}.{_peft_name(fmt, entry, name)}"

        problems = [f"missing {named(k)}" for k in wanted if k not in tensors]
        problems += [f"extra {named(k)}" for k in extra]
        for name, tensor in tensors.items():
            if name in known and tensor.shape != known[name].shape:
                axes = fmt.axes.get(name, "")
                expected = entry.layout.to_peft(site.parameter, axes, known[name]).shape
                got = entry.shapes.get(_peft_name(fmt, entry, name), tuple(tensor.shape))
                advice = resize_advice(self.source.top, site.module, expected, got)
                shapes = f"shape {list(expected)}, got {list(got)}"
                problems.append(f"{named(name)}: expected {shapes}{advice}")
        return problems


def _statistics_of(placement: Placement) -> tuple[str, ...]:
    """Names of the running statistics that attaching copies."""
    return placement.statistics if isinstance(placement, CopyPlacement) else ()


def _site_buffers(
    method: Method, planned: Sequence[PlannedAdapter]
) -> dict[int, Mapping[str, Tensor]]:
    """Buffers of each site of a weight method, by the site's id."""
    sites = [p.placement.site for p in planned if p.method is method]
    if not isinstance(method, WeightMethod) or not sites:
        return {}
    with fork_seeded_rng(0), torch.no_grad():
        pairs = zip(sites, method.site_buffers(sites), strict=True)
        return {id(site): {**method.buffers(site), **found} for site, found in pairs}


def _initial_tensors(method: Method, placement: Placement) -> Mapping[str, Tensor]:
    """Return tensors with the names and shapes that attaching will create."""
    if placement.paths:
        return {p.replace(".", "__"): parameter_at(placement.module, p) for p in placement.paths}
    if isinstance(method, WeightMethod):
        site = placement.site
        with fork_seeded_rng(0), torch.no_grad():
            initial = method.parameters(site.tied_to or site)
            return initial if site.tied_to is None else method.of_tied(initial, site)
    return {}


def _peft_name(fmt: HFFormat, entry: HFEntry, name: str) -> str:
    """Return peft's name of our tensor; our own for one that the table does not list."""
    return fmt.name(entry, name) if name in fmt.tensors else name
