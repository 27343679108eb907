"""Promise 5: a plain model comes out, with the classes and keys as the library made them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapters_of, is_adapted
from lightning_peft.layers.adapter import Adapter
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.layer_cases import LAYERS, Layer
from tests.helpers.method_cases import CASES, Case
from tests.test_invariants import method_for, move

QUICK = ("linear", "conv2d", "embedding", "mha", "lstm", "nf4", "nf4_conv1d_gpt2")


def cells() -> list[object]:
    found = []
    for i, layer in enumerate(LAYERS):
        seen: set[type] = set()
        for j, case in enumerate(CASES):
            if layer.name in case.skip or type(case.method) in seen:
                continue
            seen.add(type(case.method))
            quick = layer.name in QUICK and (i + j) % 5 == 0
            marks = () if quick else pytest.mark.slow
            found.append(pytest.param(layer, case, id=f"{layer.name}-{case.name}", marks=marks))
    return found


def shape_of(model: nn.Module) -> tuple[list[type], list[str], list[list[str]]]:
    modules = list(model.modules())
    return [type(m) for m in modules], list(model.state_dict()), [sorted(vars(m)) for m in modules]


@pytest.mark.parametrize(("layer", "case"), cells())
def test_detach_and_unload(layer: Layer, case: Case) -> None:
    if layer.name.startswith("bnb"):
        pytest.skip("bitsandbytes' own layers are plain for transformers; see its tests")
    plain = layer.build().eval()
    before, bits = shape_of(plain), {k: v.clone() for k, v in plain.state_dict().items()}
    model = layer.build().eval()
    model.load_state_dict(plain.state_dict())
    if case.name == "loftq" and layer.quantization is None:
        pytest.skip("LoftQ needs a quantised base")
    lp.attach(model, method_for(case), quantization=layer.quantization)
    move(model)
    x = layer.inputs()
    y = layer.run(model, x).detach()
    if layer.quantization is None:
        attached = layer.build().eval()
        attached.load_state_dict(plain.state_dict())
        lp.attach(attached, method_for(case))
        lp.detach(attached)
        assert shape_of(attached) == before
        for key, value in attached.state_dict().items():
            assert_same_bits(key, value, bits[key])
    reasons = [a.why_not_mergeable() for m in model.modules() for a in _adapters(m)]
    if any(reasons):
        with pytest.raises(RuntimeError, match="no merged form"):
            lp.merge_and_unload(model)
        return
    if (layer.name, case.name) == ("no_bias", "beft"):
        with pytest.raises(RuntimeError, match=r"a change of the weight alone.*BEFT"):
            lp.merge_and_unload(model)
        return
    out = lp.merge_and_unload(model)
    classes, keys, attributes = shape_of(out)
    assert classes == before[0]
    assert set(keys) - {"0.bias"} == set(before[1]) - {"0.bias"}  # an edit may add a bias
    assert not any("peft" in name for names in attributes for name in names)
    assert all(v.is_floating_point() for v in out.state_dict().values())
    assert_close("output", layer.run(out, x).detach(), y, floor=max(1e-4, layer.tolerance))
    fresh = type(out)(*out)
    assert torch.equal(layer.run(fresh, x), layer.run(out, x))


def _adapters(module: nn.Module) -> list[Adapter]:
    return adapters_of(module) if is_adapted(module) else []
