"""Layer kinds from outside: registered, found by "all-linear", adapted, merged; not exchanged."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.protocols import LayerOps
from lightning_peft.layers import ops_for, register_layer
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.base import MatrixOps
from lightning_peft.layers.linear import LinearOps
from tests.helpers.compare import assert_close
from tests.helpers.toy_layer import GainLinear, GainLinearOps

METHODS = {
    "lora": lp.LoRA(r=2, alpha=4.0, target_modules="all-linear"),
    "dora": lp.DoRA(r=2, alpha=4.0, target_modules="all-linear"),
    "ia3": lp.IA3(target_modules="all-linear", feedforward_modules=["first"]),
    "oft": lp.OFT(block_size=4, target_modules="all-linear"),  # a rotation: features come last
    "loha": lp.LoHa(r=2, target_modules="all-linear"),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = GainLinear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.second = GainLinear(12, 4, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return y


def randomised(net: nn.Module) -> None:
    torch.manual_seed(1)
    for _, module in adapted_modules(net):
        for adapter in adapters_of(module):
            for p in adapter.parameters():
                p.data += 0.1 * torch.randn_like(p)


def edited_in_fp64(base: Net, net: nn.Module, x: Tensor) -> Tensor:
    """The base in fp64, with every kernel and bias replaced by the edit's own matrix and bias."""
    reference = copy.deepcopy(base).double()
    for name, module in adapted_modules(net):
        (adapter,) = adapters_of(module)
        adapter.double()
        edit, layer = adapter.edit(), reference.get_submodule(name)
        assert isinstance(layer, GainLinear)
        with torch.no_grad():
            b = edit.edited_bias(layer.bias)
            layer.kernel.copy_(edit.matrix(layer.kernel.mT, adapter.site.ops, adapter.site).mT)
            assert b is not None
            layer.bias.copy_(b)
        adapter.float()
    return reference(x.double())


@pytest.mark.parametrize("name", METHODS)
def test_all_linear_finds_the_kind(name: str) -> None:
    torch.manual_seed(0)
    base, x = Net(), torch.randn(5, 8)
    net = copy.deepcopy(base)
    lp.attach(net, METHODS[name])
    assert [n for n, _ in adapted_modules(net)] == ["first", "second"]
    randomised(net)
    want, y = edited_in_fp64(base, net, x), net(x)
    assert (y - base(x)).abs().max() > 1e-2
    assert_close("forward", y, want, floor=1e-5)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.requires_grad)
    lp.merge(net)
    assert_close("merged", net(x), want, floor=1e-5)
    lp.unmerge(net)
    lp.detach(net)
    assert torch.equal(net(x), base(x))


def test_peft_files_refuse_the_kind(tmp_path: Path) -> None:
    net = Net()
    lp.attach(net, METHODS["lora"])
    with pytest.raises(ValueError, match=r"'first\.kernel'.*no Hugging Face layout for GainLinear"):
        lp.save_adapter(net, tmp_path)
    assert not list(tmp_path.iterdir())

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 12)

    theirs = Plain()
    lp.attach(theirs, METHODS["lora"])
    lp.save_adapter(theirs, tmp_path)
    fresh = Net()
    with pytest.raises(ValueError, match="no Hugging Face layout for GainLinear"):
        lp.load_adapter(fresh, tmp_path)
    assert not list(adapted_modules(fresh))


def test_a_bias_trained_beside_is_exchanged_with_other_kinds_alone(tmp_path: Path) -> None:
    """The kind refuses its own adapters, not those of its neighbours."""
    net = nn.Sequential(nn.Linear(8, 8), GainLinear(8, 4))
    lp.attach(net, lp.LoRA(r=2, bias="all", target_modules=["0"]))
    lp.save_adapter(net, tmp_path)
    assert lp.load_adapter(copy.deepcopy(lp_detached(net)), tmp_path)


def lp_detached(net: nn.Module) -> nn.Module:
    lp.detach(net)
    return net


def test_at_most_eight_members_are_required() -> None:
    assert len(LayerOps.__abstractmethods__) <= 8
    assert not MatrixOps.__abstractmethods__


def test_a_derived_class_has_its_own_kind_only_if_registered() -> None:
    class Derived(GainLinear):
        pass

    assert isinstance(ops_for(Derived(2, 2)), GainLinearOps)
    own = GainLinearOps()
    register_layer(Derived, own)
    assert ops_for(Derived(2, 2)) is own
    assert ops_for(GainLinear(2, 2)) is not own


def test_a_kind_told_by_a_function() -> None:
    class Marked(nn.Module):
        is_marked_for_this_test = True

    ops = LinearOps()
    register_layer(lambda m: hasattr(m, "is_marked_for_this_test"), ops)
    assert ops_for(Marked()) is ops
    assert ops_for(nn.LayerNorm(2)) is None


@pytest.mark.parametrize(
    ("kind", "ops", "match"),
    [(GainLinear, GainLinearOps, "ops: expected"), (3, GainLinearOps(), "kind: expected")],
)
def test_wrong_arguments(kind: object, ops: object, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        register_layer(kind, ops)  # type: ignore[arg-type]
