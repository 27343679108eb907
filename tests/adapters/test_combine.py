"""combine against peft's add_weighted_adapter, and against the sum of deltas."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import nn

import lightning_peft as lp
from lightning_peft.adapters.combine import mixed
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, randomise, run

TARGETS = ["q_proj", "v_proj", "embed_tokens"]
WEIGHTS = [0.7, -0.4]


def two_adapters(ranks: tuple[int, int] = (4, 4)):
    """The same two adapters in ours and in peft."""
    base, inputs = build("llama")
    ours = copy.deepcopy(base)
    configs = [peft.LoraConfig(r=r, lora_alpha=6, target_modules=TARGETS) for r in ranks]
    theirs = peft.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="a")
    theirs.add_adapter("b", configs[1])
    for name, r in zip("ab", ranks, strict=True):
        lp.attach(ours, lp.LoRA(r=r, alpha=6.0, target_modules=TARGETS), adapter_name=name)
    randomise(ours)
    with torch.no_grad():
        for path, module in adapted_modules(ours):
            for adapter in adapters_of(module):
                layer: Any = theirs.base_model.model.get_submodule(path)
                for ours_name in "AB":
                    name = adapter.adapter_name
                    if adapter.site.is_embedding:
                        target = getattr(layer, f"lora_embedding_{ours_name}")[name]
                    else:
                        target = getattr(layer, f"lora_{ours_name}")[name].weight
                    target.copy_(adapter.tensors()[ours_name])
    return ours, theirs.eval(), inputs


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "magnitude_prune"])
def test_as_peft(how) -> None:
    ours, theirs, inputs = two_adapters()
    density = {} if how in ("linear", "cat", "svd") else {"density": 0.6}
    lp.combine(ours, ["a", "b"], WEIGHTS, "c", how, **density)
    theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "c", combination_type=how, **density)
    lp.set_adapter(ours, "c")
    theirs.set_adapter("c")
    assert_close("logits", run(ours, inputs), run(theirs, inputs), floor=1e-4)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_random_drops_as_peft(how) -> None:
    """With density 1 nothing is drawn; the masks themselves are compared below."""
    ours, theirs, inputs = two_adapters()
    lp.combine(ours, ["a", "b"], WEIGHTS, "c", how, density=1.0)
    theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "c", combination_type=how, density=1.0)
    lp.set_adapter(ours, "c")
    theirs.set_adapter("c")
    assert_close("logits", run(ours, inputs), run(theirs, inputs), floor=1e-4)
    torch.manual_seed(0)
    lp.combine(ours, ["a", "b"], WEIGHTS, "sparse", how, density=0.5)
    tensors = lp.adapter_state_dict(ours, "sparse")
    zeros = [float((t == 0).float().mean()) for k, t in tensors.items() if k.endswith(".A")]
    assert 0.1 < sum(zeros) / len(zeros) < 0.6


@pytest.mark.parametrize("how", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_sparse_means_are_pefts(how, density) -> None:
    """The same tensors, weights and draws."""
    tensors = [torch.randn(6, 9) for _ in range(3)]
    weights = torch.tensor([0.7, -0.4, 1.3])
    theirs = getattr(merge_utils, how)
    torch.manual_seed(1)
    want = theirs(tensors, weights, density)
    torch.manual_seed(1)
    got = mixed(tensors, weights.tolist(), how, density)
    assert_close("mean", got, want)


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_ranks_may_differ(how) -> None:
    ours, _, inputs = two_adapters((2, 5))
    lp.combine(ours, ["a", "b"], [1.0, 1.0], "c", how, **({"rank": 7} if how == "svd" else {}))
    lp.set_adapter(ours, "c")
    got = run(ours, inputs)
    lp.set_adapter(ours, ["a", "b"])
    assert_close("sum of deltas", got, run(ours, inputs), floor=1e-4)


def test_the_others_stay_as_they_are() -> None:
    ours, _, inputs = two_adapters()
    lp.set_adapter(ours, "b")
    before, y = lp.adapter_state_dict(ours), run(ours, inputs)
    lp.combine(ours, ["a", "b"], [0.5, 0.5], "c")
    assert torch.equal(run(ours, inputs), y)
    after = lp.adapter_state_dict(ours)
    assert all(torch.equal(after[k], t) for k, t in before.items())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((["a", "x"], [1, 1], "c"), KeyError, "'x'"),
        ((["a"], [1, 1], "c"), ValueError, "one weight for each"),
        ((["a", "b"], [1, 1], "c", "ties"), ValueError, "density"),
        ((["a", "b"], [1, 1], "c", "sum"), ValueError, "how"),
        ((["a", "b"], [1, float("nan")], "c"), ValueError, "finite"),
        ((["a", "b"], [1, 1], "a"), RuntimeError, "free name"),
    ],
    ids=str,
)
def test_errors(arguments, error, match) -> None:
    ours, _, _ = two_adapters()
    before = lp.adapter_state_dict(ours)
    with pytest.raises(error, match=match):
        lp.combine(ours, *arguments)
    assert set(lp.adapter_state_dict(ours)) == set(before)


def test_not_low_rank() -> None:
    base, _ = build("llama")
    lp.attach(base, lp.IA3(), adapter_name="a")
    with pytest.raises(ValueError, match="IA3"):
        lp.combine(base, ["a"], [1.0], "b")


def test_biases_and_heads() -> None:
    """Changes of biases add up by the weights; a head that one adapter has is taken over."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), torch.randn(4, 6)
    base, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    for name, saved in (("a", ["1"]), ("b", [])):
        method = lp.LoRA(r=2, target_modules=["0"], bias="lora_only")
        lp.attach(net, method, adapter_name=name, modules_to_save=saved)
        randomise(net)
    state = {n: lp.adapter_state_dict(net, n) for n in "ab"}
    lp.combine(net, ["a", "b"], [0.5, -2.0], "c", how="cat")
    lp.set_adapter(net, "c")
    W, b = base.clone(), bias.clone()
    for name, w in (("a", 0.5), ("b", -2.0)):
        own = state[name]
        W += w * 8.0 / 2 * own[f"0.peft.{name}.B"] @ own[f"0.peft.{name}.A"]
        (key,) = [k for k in own if k.startswith("0.") and "bias" in k]
        b += w * (own[key] - bias)
    head = [state["a"][k] for k in sorted(state["a"]) if k.startswith("1.")]
    want = nn.functional.linear(nn.functional.linear(x, W, b), head[1], head[0])
    assert_close("output", net(x), want, floor=1e-5)


def test_one_head_of_two_adapters() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    for name in "ab":
        lp.attach(net, lp.LoRA(r=2, target_modules=["0"]), adapter_name=name, modules_to_save=["1"])
    with pytest.raises(ValueError, match="trained module of one adapter"):
        lp.combine(net, ["a", "b"], [0.5, 0.5], "c")
    assert "c" not in str(lp.parameter_report(net))
