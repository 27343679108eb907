"""Every weight method that peft has too, in fp64: outputs, gradients and merged weights are equal.

The architectures differ from those of the other exchange tests: fused projections with biases,
grouped heads without biases, an encoder-decoder, parallel blocks, grouped heads with biases, and
windows of images at two widths. The oracle of C3A's gradient is its dense form, because peft's
gradient of a layer's input is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import methods
from lightning_peft.adapters.state_dict import trained_tensors
from tests.helpers.compare import assert_close, relative_error
from tests.helpers.more_models import base_of
from tests.helpers.peft_exchange import by_peft, in_peft, loaded, trained
from tests.helpers.peft_exchange import run as output
from tests.hf.test_methods import ROWS, Row

BOUND = 1e-5

TARGETS = {
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "mistral": ["q_proj", "v_proj", "down_proj"],
    "bart": ["q_proj", "v_proj", "fc2"],
    "gptj": ["q_proj", "v_proj", "fc_out"],
    "starcoder2": ["q_proj", "v_proj", "c_proj"],
    "swin": ["q_proj", "v_proj", "fc2"],
}
#: Layers that lead out of a feed-forward block, for IA3 and the blocks of BD-LoRA.
WAY_OUT = {name: targets[-1] for name, targets in TARGETS.items()}
MORE = {
    "lora": Row(lp.LoRA, {"r": 4, "alpha": 8.0}, peft.LoraConfig, {"r": 4, "lora_alpha": 8}),
    "lora patterns": Row(
        lp.LoRA,
        {"r": 4, "use_rslora": True, "lora_bias": True, "alpha_pattern": {"v_proj": 3.0}},
        peft.LoraConfig,
        {"r": 4, "use_rslora": True, "lora_bias": True, "alpha_pattern": {"v_proj": 3.0}},
    ),
    "velora": Row(
        methods.VeLoRA,
        {"r": 4, "groups": 4},
        peft.LoraConfig,
        {"r": 4, "velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
    ),
    "monteclora": Row(
        methods.MonteCLoRA,
        {"r": 4, "alpha": 8.0},
        peft.LoraConfig,
        {"r": 4, "monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
    ),
    "beft": Row(methods.BEFT, {}, peft.BeftConfig, {}),
    "lily": Row(methods.Lily, {"r": 3, "stride": 2}, peft.LilyConfig, {"r": 3, "stride_A": 2}),
}
ALL: dict[str, Row] = {**MORE, **ROWS}
#: peft cannot add the bias of an adapter to a layer without one.
UNMERGED_BY_PEFT = {(n, a) for n in ("lora patterns", "beft") for a in ("mistral", "gptj")}
#: peft keeps tensors that `.double()` does not reach.
SINGLE = {"adamss", "adamss ranks"}
CELLS = [pytest.param(n, a, id=f"{n}-{a}") for n in ALL for a in TARGETS]


def arguments(name: str, architecture: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our arguments and those of peft's configuration."""
    row, targets, way_out = ALL[name], TARGETS[architecture], WAY_OUT[architecture]
    ours, theirs = dict(row.arguments), dict(row.theirs)
    if row.ours is lp.IA3:
        ours["feedforward_modules"] = theirs["feedforward_modules"] = [way_out]
    if name == "bd-lora":
        others = [t for t in targets if t != way_out]
        ours |= {"blocks_a": [way_out], "blocks_b": others}
        theirs["use_bdlora"] = {
            "target_modules_bd_a": [way_out],
            "target_modules_bd_b": others,
            "nblocks": 2,
        }
    for fields in (ours, theirs):
        for key, value in fields.items():
            if isinstance(value, dict) and "v_proj" in value:
                fields[key] = {way_out: value["v_proj"]}
        fields["target_modules"] = targets
    return ours, theirs


def precise(name: str, inputs: Mapping[str, Tensor]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The conversion of a model, and the inputs, in the dtype of the comparison."""
    if name in SINGLE:
        return lambda model: model, dict(inputs)
    wide = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    return lambda model: model.double(), wide


def weighted(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """One number that depends on all logits."""
    y = model(**inputs).logits
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    return (y * weights).sum()


def values(tensors: Iterable[Tensor | None]) -> Tensor:
    """All values, sorted, since names and shapes differ."""
    return torch.cat([t.detach().flatten() for t in tensors if t is not None]).sort().values


def dense_gradients(base: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The gradients of C3A's vectors c through W + ΔW, whose entry (o, i) of a block is
    c[(i − o) mod b] / in.
    """
    vectors = {n: t.detach().requires_grad_() for n, t in trained_tensors(model).items()}
    weights = {}
    for name, c in vectors.items():
        path = f"{name.partition('.peft.')[0]}.weight"
        W = base.get_parameter(path).detach()
        o, i = (torch.arange(n) for n in W.shape)
        b = c.shape[-1]
        place = (i % b - (o % b).unsqueeze(1)) % b
        weights[path] = W + c[o.unsqueeze(1) // b, i // b, place] / W.shape[1]

    def forward(**inputs: Any) -> Any:
        return torch.func.functional_call(base, weights, kwargs=inputs)

    return values(torch.autograd.grad(weighted(forward, inputs), list(vectors.values())))


def projected(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Gradients after the hooks of the method; peft's OSF has them in the backward pass."""
    weighted(model, inputs).backward()
    ours = trained_tensors(model)
    tensors = [t for t in (ours.values() if ours else model.parameters()) if t.grad is not None]
    if ours:
        lp.MethodHooks(model).before_step(torch.optim.SGD(tensors, lr=0.1))
    return values(t.grad for t in tensors)


def plain_gradients(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    ours = trained_tensors(model)
    tensors = [t for t in (ours.values() if ours else model.parameters()) if t.requires_grad]
    return values(torch.autograd.grad(weighted(model, inputs), tensors, allow_unused=True))


@pytest.mark.sweep(0.15)
@pytest.mark.parametrize(("name", "architecture"), CELLS)
def test_equal(name: str, architecture: str, tmp_path: Path) -> None:
    row = ALL[name]
    base, inputs = base_of(architecture)
    ours_of, theirs_of = arguments(name, architecture)
    widen, x = precise(name, inputs)
    # peft's AdaLoRA looks for its trainable adapter wherever the output has a loss.
    options = {"is_trainable": True} if row.ours is lp.AdaLoRA else {}

    model = trained(base, row.ours(**ours_of))
    lp.save_adapter(model, tmp_path / "ours")
    there = widen(in_peft(base, tmp_path / "ours", **options))
    want = output(widen(model), x)
    assert_close("ours in peft", output(there, x), want, floor=BOUND)
    assert relative_error(output(widen(copy.deepcopy(base)), x), want) > 10 * BOUND

    oracle = by_peft(base, tmp_path / "theirs", row.config, **theirs_of)
    here = widen(loaded(base, tmp_path / "theirs").eval())
    oracle = widen(oracle)
    want = output(oracle, x)
    assert_close("peft's in ours", output(here, x), want, floor=BOUND)
    gradients = projected if row.ours is methods.OSF else plain_gradients
    got = gradients(here, x)
    expected = (
        dense_gradients(widen(copy.deepcopy(base)), here, x)
        if name == "c3a"
        else gradients(oracle, x)
    )
    if name == "adamss ranks":  # its small clusters have ranks here that the file leaves out
        got, expected = got[got != 0], expected[expected != 0]
    assert_close("gradients", got, expected, floor=BOUND)
    if not row.ours.mergeable:
        return
    lp.merge(here)
    assert_close("merged", output(here, x), want, floor=BOUND)
    if (name, architecture) in UNMERGED_BY_PEFT:
        return
    merge_there: Any = oracle
    assert_close("merged by peft", output(merge_there.merge_and_unload(), x), want, floor=BOUND)
