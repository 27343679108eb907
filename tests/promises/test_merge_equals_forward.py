"""Promise 3: merge equals forward for whatever is attached, or is refused before it changes.

Every pair of methods, as a hybrid under one name and as two adapters, on every kind of layer: with
both merged, and with the first or the second alone merged while the other stays.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
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
    if not error < 20 * layer.tolerance:
        return f"wrong: output differs by {error:.2e}"
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


def cells(layer: Layer, a: lp.Method, b: lp.Method) -> list[str]:
    """Results of the pair's cells."""
    hybrid = attached(layer, one=[a, b]) if a is not b else None
    results = [] if hybrid is None else [check(layer, hybrid, None)]
    two = attached(layer, a=a, b=b)
    if two is not None:
        results += [check(layer, two, names) for names in (None, ["a"], ["b"])]
    return results


SWEEP_OF_LAYER = [layer for layer in LAYERS if layer.name not in SKIPPED_LAYERS]


def chosen(layer: Layer, share: float) -> list[tuple[str, str]]:
    """A seeded share of the layer's pairs."""
    found = list(itertools.product([name for name, _ in entries(layer)], repeat=2))
    drawn = random.Random(f"pairs {layer.name}").sample(found, max(1, round(share * len(found))))
    return found if share == 1 else drawn


def run_pairs(layer: Layer, share: float) -> Counter[str]:
    """Count the results of all cells; fail with the cells that merged to another output."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    methods = dict(entries(layer))
    for a, b in chosen(layer, share):
        for i, result in enumerate(cells(layer, methods[a], methods[b])):
            counts[result.split(":")[0]] += 1
            wrong += [f"{a} and {b}, cell {i}: {result}"] if result.startswith("wrong") else []
    print(f"\n{layer.name}: {summary(counts)}")
    assert not wrong, "\n".join([layer.name, *wrong])
    return counts


def summary(counts: Counter[str]) -> str:
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("equal", "refused", "wrong"))
    return f"{counts.total()} cells, {kinds}, {counts['not finite']} not finite"


@pytest.fixture(scope="module")
def total() -> Iterator[Counter[str]]:
    """Counts over all layer kinds that ran; printed at the end."""
    counts: Counter[str] = Counter()
    yield counts
    print(f"\nall kinds that passed: {summary(counts)}")


@pytest.mark.parametrize("layer", SWEEP_OF_LAYER, ids=lambda layer: layer.name)
def test_a_share_of_the_pairs(layer: Layer) -> None:
    counts = run_pairs(layer, 0.1)
    assert counts["equal"] > 0


@pytest.mark.timeout(1200)  # the recurrent kinds take minutes on a busy machine
@pytest.mark.slow
@pytest.mark.parametrize("layer", SWEEP_OF_LAYER, ids=lambda layer: layer.name)
def test_all_pairs(layer: Layer, total: Counter[str]) -> None:
    counts = run_pairs(layer, 1)
    total.update(counts)
    assert counts["equal"] > counts["refused"]


def net(**methods: lp.Method | list[lp.Method]) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(16, 4)).eval()
    for name, method in methods.items():
        lp.attach(model, method, adapter_name=name)
        moved(model)
    lp.set_adapter(model, list(methods))
    return model, torch.randn(4, 16)


@pytest.mark.parametrize(
    "method",
    [
        lp.LoRA(r=2, bias="all", lora_bias=True, target_modules=["0"]),
        [lp.BitFit(), lp.IA3(target_modules=["0"], feedforward_modules=[])],
        [lp.Full(target_modules=["0"]), lp.LoRA(r=2, target_modules=["0"])],
        [lp.Full(target_modules=["0"]), lp.DoRA(r=2, target_modules=["0"])],
    ],
)
def test_edits_act_on_trained_copies(method: lp.Method | list[lp.Method]) -> None:
    model, x = net(a=method)
    y = model(x).detach()
    report = lp.merge(model)
    assert_close("merged", model(x), y, floor=1e-6)
    assert report.outputs.keys() == {"0"}
    assert report.outputs["0"] < 1e-6


def test_a_copy_that_stays_would_hide_the_merged_weight() -> None:
    model, x = net(copy=lp.Full(target_modules=["0"]), edit=lp.LoRA(r=2, target_modules=["0"]))
    y = model(x).detach()
    with pytest.raises(RuntimeError, match=r"Full in 'copy'.*merge both"):
        lp.merge(model, "edit")
    assert_same_bits("output", model(x), y)


def test_a_bias_that_stays_would_not_be_mapped() -> None:
    """RoAd maps the bias too; a layer whose class has its own forward cannot be compared."""
    (layer,) = (layer for layer in SWEEP_OF_LAYER if layer.name == "mha")
    road = {type(m).__name__: m for _, m in entries(layer)}["RoAd"]
    model = attached(layer, a=road, b=lp.BitFit())
    assert model is not None
    x = layer.inputs()
    y = layer.run(model.eval(), x).detach()
    with pytest.raises(RuntimeError, match=r"in_proj_bias'.*BitFit in 'b'.*merge both"):
        lp.merge(model, "a")
    assert_same_bits("output", layer.run(model, x), y)


def test_a_staying_adapter_that_reads_the_weight_is_refused() -> None:
    """DoRA's norm is that of the stored weight, which the merge of LoRA changes."""
    model, x = net(a=lp.LoRA(r=2, target_modules=["0"]), b=lp.DoRA(r=2, target_modules=["0"]))
    y = model(x).detach()
    with pytest.raises(RuntimeError, match=r"merge '0': expected the same eff.*\['b'\]"):
        lp.merge(model, "a")
    assert_same_bits("output", model(x), y)


def test_a_staying_adapter_that_reads_the_bias_is_refused() -> None:
    """GLoRA scales the stored bias, which the merge of BitFit changes; kinds without an example
    input are compared by their effective values alone.
    """
    layer = next(each for each in LAYERS if each.name == "mha")
    methods = dict(entries(layer))
    model = attached(layer, a=methods["BitFit"], b=methods["glora"])
    assert model is not None
    with pytest.raises(RuntimeError, match="expected the same effective bias"):
        lp.merge(model, "a")


@pytest.mark.parametrize("where", ["bias", "weight"])
def test_nan_in_a_copy_is_refused(where: str) -> None:
    model, _ = net(a=lp.Full(target_modules=["0"]))
    with torch.no_grad():
        getattr(model[0].peft["a"], where).flatten()[0] = math.nan
    kept = state_of(model)
    with pytest.raises(RuntimeError, match=rf"merge '0.{where}': expected finite"):
        lp.merge(model)
    for key, value in state_of(model).items():
        assert torch.equal(value.nan_to_num(7), kept[key].nan_to_num(7)), key


def test_a_change_that_a_pruning_mask_would_cut_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"))
    moved(model)
    x = torch.randn(4, 16)
    y = model(x).detach()
    with pytest.raises(RuntimeError, match="merge '0': expected the same output"):
        lp.merge(model)
    assert_same_bits("output", model(x), y)


def test_a_report_states_only_what_it_compared() -> None:
    model, x = net(a=lp.LoRA(r=2, target_modules=["0"]))
    base = {"0.weight": torch.randn(4, 16)}
    report = lp.merge(model, base=base)
    assert report.outputs == {}
    assert report.not_compared == ["0"]
    assert "not compared: 0" in str(report)
    assert x.shape == (4, 16)
