"""Promise 3: merge equals forward for whatever is attached, or is refused before it changes.

Every pair of methods, as a hybrid under one name and as two adapters, on every kind of layer: with
both merged, and with the first or the second alone merged while the other stays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_same_bits
from tests.helpers.layer_cases import LAYERS, Layer
from tests.helpers.method_cases import CASES
from tests.test_invariants import base_of, method_for

SELECTED = {"BitFit": lp.BitFit(), "Full": lp.Full()}
SKIPPED_LAYERS = ("bnb4", "bnb8")  # outputs before and after differ by their own int8 products


def entries(layer: Layer) -> Iterator[tuple[str, lp.Method]]:
    """One case per method that is meant for the layer, and the selecting methods."""
    seen: set[type] = set()
    for case in CASES:
        if layer.name not in case.skip and type(case.method) not in seen:
            seen.add(type(case.method))
            yield case.name, method_for(case)
    if layer.quantization is None:
        yield from SELECTED.items()


def pairs() -> list[tuple[Layer, str, str]]:
    found = []
    for layer in LAYERS:
        if layer.name in SKIPPED_LAYERS:
            continue
        names = [name for name, _ in entries(layer)]
        found += [(layer, a, b) for a, b in itertools.product(names, repeat=2)]
    return found


def moved(model: nn.Module) -> None:
    """Stand for training: every trained tensor moves."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator).to(p)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def check(layer: Layer, model: nn.Module, names: list[str] | None) -> str:
    """Merge and compare; "refused" if the merge was refused and nothing changed."""
    model.eval()
    x = layer.inputs()
    before, kept = layer.run(model, x).detach(), state_of(model)
    if not before.isfinite().all():
        return "not finite"
    try:
        lp.merge(model, names)
    except (RuntimeError, ValueError):
        now = state_of(model)
        assert now.keys() == kept.keys()
        for key, value in kept.items():
            assert_same_bits(key, now[key], value)
        assert_same_bits("output", layer.run(model, x).detach(), before)
        return "refused"
    after = layer.run(model, x).detach()
    error = float((after - before).norm() / before.norm().clamp_min(1e-30))
    assert error < 20 * layer.tolerance, f"merge {names}: output differs by {error:.2e}"
    lp.unmerge(model)
    for key, value in state_of(model).items():
        assert_same_bits(key, value, kept[key])
    return "equal"


def attached(layer: Layer, **adapters: lp.Method | list[lp.Method]) -> nn.Module | None:
    """The layer with these adapters; None if one of them is refused there."""
    model = base_of(layer)
    try:
        for i, (name, method) in enumerate(adapters.items()):
            packing = layer.quantization if i == 0 else None
            lp.attach(model, method, adapter_name=name, quantization=packing)
            moved(model)
        lp.set_adapter(model, list(adapters))
    except ValueError:
        return None
    return model


def cells(layer: Layer, a: str, b: str) -> list[str]:
    """Results of the pair's cells."""
    methods = dict(entries(layer))
    hybrid = attached(layer, one=[methods[a], methods[b]]) if a != b else None
    results = [] if hybrid is None else [check(layer, hybrid, None)]
    two = attached(layer, a=methods[a], b=methods[b])
    if two is not None:
        results += [check(layer, two, names) for names in (None, ["a"], ["b"])]
    return results


def groups() -> list[tuple[Layer, str]]:
    return list(dict.fromkeys((layer, a) for layer, a, _ in pairs()))


@pytest.mark.sweep(0.1)
@pytest.mark.parametrize(("layer", "first"), groups(), ids=lambda v: getattr(v, "name", v))
def test_pairs_of_methods(layer: Layer, first: str) -> None:
    results = [r for _, a, b in pairs() if _ is layer and a == first for r in cells(layer, a, b)]
    assert results.count("equal") + results.count("refused") + results.count("not finite") == len(
        results
    )
    assert math.isfinite(len(results))
