"""Checks of the shapes in the files of a released checkpoint, before transformers reads them."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from lightning_peft.core.names import counted
from lightning_peft.models.packed_layers import PackedLayer

__all__ = ["check_shapes"]

_OF_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_Shape = tuple[int, ...]


def check_shapes(layers: Sequence[PackedLayer], shapes: Mapping[str, _Shape]) -> None:
    """Compare declared tensors with those in the files.

    Args:
        layers: Layers with declared tensors.
        shapes: Shapes in the files, by name in the model.

    Raises:
        ValueError: some are missing, or have another shape.
    """
    problems = [*_of_layers(layers, shapes), *_of_single_experts(layers, shapes)]
    if problems:
        raise ValueError(
            f"load_packed: expected the tensors that the quantization_config describes, got "
            f"{counted(len(problems), 'difference')}; nothing was loaded; the files are "
            "damaged or belong to another config: download the checkpoint again:\n  "
            + "\n  ".join(problems[:8])
        )


def _of_layers(layers: Sequence[PackedLayer], shapes: Mapping[str, _Shape]) -> Iterator[str]:
    """Differences in layers whose tensors have the same names in model and files."""
    for layer in layers:
        wanted = layer.shapes
        if not any(name in shapes for name in wanted):
            continue  # transformers has other names for it, or merges it from experts
        for name, shape in (layer.dense_shapes | wanted).items():
            found = shapes.get(name)
            if found is None and name not in wanted:
                continue
            if found is None:
                yield f"{name}: missing"
            elif found != shape and math.prod(found) + math.prod(shape) != 2:
                yield f"{name}: expected shape {list(shape)}, got {list(found)}"


def _of_single_experts(
    layers: Sequence[PackedLayer], shapes: Mapping[str, _Shape]
) -> Iterator[str]:
    """Differences between the experts of a layer that the files hold one by one.

    Only tensors that `load_packed` reads count: scales of activations may be missing for experts
    without tokens in calibration.
    """
    read = {
        key.removeprefix(weight)
        for layer in layers
        for weight, (_, _, declared) in layer.weights.items()
        for key, _, _ in declared.tensors.values()
    }
    found: defaultdict[tuple[str, str], dict[int, _Shape]] = defaultdict(dict)
    experts: defaultdict[str, set[int]] = defaultdict(set)
    for name, shape in shapes.items():
        match = _OF_EXPERT.fullmatch(name)
        if match is None:
            continue
        module, n, leaf = match.groups()
        experts[module].add(int(n))
        if leaf.partition("weight")[2] in read:
            found[module, leaf][int(n)] = shape
    for (module, leaf), by_expert in found.items():
        ((usual, _),) = Counter(by_expert.values()).most_common(1)
        for n in sorted(experts[module]):
            shape = by_expert.get(n, ())
            if n not in by_expert:
                yield f"{module}.{n}.{leaf}: missing"
            elif shape != usual:
                yield (
                    f"{module}.{n}.{leaf}: expected shape {list(usual)} as of the other experts, "
                    f"got {list(shape)}"
                )
