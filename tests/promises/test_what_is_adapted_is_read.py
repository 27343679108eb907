"""Promise 2: what is adapted is read.

A weight that another module's forward reads is served as W' to that reader, or refused.
"""

from __future__ import annotations

import copy
import io
import operator
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import trainer


class Window(nn.Module):
    """Reads its layer's weight instead of calling it, as Swin and BEiT do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.fc = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.qkv.weight.dtype)
        y = F.linear(x, self.qkv.weight, self.qkv.bias).relu()
        return self.fc(y @ self.qkv.weight.T)


class Called(Window):
    """The same function with the layer called."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).relu()
        eye = torch.eye(64)
        return self.fc(y @ (self.qkv(eye) - self.qkv(torch.zeros(64, 64))).mT.mT.T)


METHODS: dict[str, Any] = {
    "lora": lp.LoRA(r=4, target_modules="all-linear"),
    "pissa": lp.LoRA(r=4, init="pissa", target_modules="all-linear"),
    "lora with biases": lp.LoRA(r=4, bias="all", lora_bias=True, target_modules="all-linear"),
    "dora": lp.DoRA(r=4, target_modules="all-linear"),
    "ia3": lp.IA3(target_modules=["qkv", "fc"], feedforward_modules=[]),
    "oft": lp.OFT(block_size=4, target_modules="all-linear"),
    "road": lp.RoAd(target_modules="all-linear"),
    "bitfit": lp.BitFit(),
    "full and lora": [lp.Full(target_modules=["qkv"]), lp.LoRA(r=4, target_modules=["qkv"])],
}
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def moved(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", METHODS)
def test_an_outside_reader_gets_the_effective_weight(name: str, quantization: str | None) -> None:
    if quantization and name in ("pissa", "full and lora"):
        pytest.skip("the start is not equal on packed weights; Full needs dense ones")
    model = Window()
    if quantization:
        lp.quantize(model, lp.Quantization(quantization))
    base = model(X).detach()
    lp.attach(model, METHODS[name])
    assert_close("start", model(X).detach(), base, floor=1e-6)  # attach changes no function
    moved(model)
    y = model(X)
    assert not torch.allclose(y, base)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert_same_bits("copy", copy.deepcopy(model)(X), y)
    assert_same_bits("pickle", pickle.loads(pickle.dumps(model))(X), y)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close("compiled", compiled(X), y, floor=1e-6)
    with lp.disable_adapters(model):
        assert_close("disabled", model(X), base, floor=1e-6)
    lp.merge(model)
    assert_close("merged", model(X), y, floor=1e-5)


def test_facts_do_not_form_the_weight() -> None:
    model = Window()
    lp.attach(model, METHODS["lora"], quantization="nf4")
    formed: list[int] = []
    adapter = model.qkv.peft["default"]
    cls = type(adapter)
    original = cls.edit
    cls.edit = lambda self: formed.append(1) or original(self)
    try:
        weight = model.qkv.weight
        facts = (weight.dtype, weight.device.type, weight.shape, weight.ndim, weight.numel())
        assert not formed
        assert weight.sum().isfinite()
        assert formed
    finally:
        cls.edit = original
    assert copy.deepcopy(weight).shape == (64, 64)
    assert facts == (torch.float32, "cpu", torch.Size((64, 64)), 2, 4096)


@pytest.mark.parametrize("write", ["mul_", "zeros_", "copy_", "data"])
def test_a_write_into_a_packed_weight_is_refused(write: str) -> None:
    model = Window()
    lp.quantize(model, lp.Quantization("nf4"))
    writes = {
        "mul_": lambda w: w.mul_(2),
        "zeros_": nn.init.zeros_,
        "copy_": lambda w: w.copy_(torch.zeros(64, 64)),
        "data": lambda w: w.data.normal_(),
    }
    before = model(X).detach()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"Linear weight: expected the packed"):
        writes[write](model.qkv.weight)
    assert_same_bits("output", model(X), before)


def test_a_write_into_a_dense_adapted_weight_moves_the_base() -> None:
    model = Window()
    lp.attach(model, METHODS["lora"])
    moved(model)
    effective = model.qkv.weight.detach()
    with torch.no_grad():
        model.qkv.weight.mul_(2)
        held = model.qkv._parameters["weight"]
        adapter = model.qkv.peft["default"]
        delta = adapter.edit().terms[0].matrix()
    assert_close("base", held, 2 * (effective - delta), floor=1e-6)


VIEWS: dict[str, Any] = {
    "row": lambda w: w[0],
    "transposed": lambda w: w.T,
    "mT of a slice": lambda w: w[2:].mT,
    "flat": lambda w: w.view(-1),
    "detached": lambda w: w.detach(),
    "chunk": lambda w: w.chunk(2)[1],
    "same dtype": lambda w: w.to(torch.float32),
}
WRITES: dict[str, Any] = {
    "mul_": lambda v: v.mul_(2),
    "item": lambda v: v.__setitem__(0, 1.0),
    "augmented": lambda v: operator.iadd(v, 1),
    "out": lambda v: torch.add(v, 1, out=v),
    "init": nn.init.zeros_,
}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_a_view_is_refused(view: str, write: str, quantization: str | None) -> None:
    """A view is one of W', which is computed for one read: a write would be lost."""
    model = Window()
    lp.attach(model, METHODS["lora"], quantization=quantization)
    before = model(X)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"qkv.* expected a view .* read only"):
        WRITES[write](VIEWS[view](model.qkv.weight))
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("view", VIEWS)
def test_views_read_as_plain_tensors_do(view: str) -> None:
    model = Window()
    lp.attach(model, METHODS["lora"])
    moved(model)
    whole = model.qkv.weight.clone()
    found, expected = VIEWS[view](model.qkv.weight), VIEWS[view](whole)
    assert torch.equal(found, expected)
    assert type(found * 2) is Tensor
    assert type(copy.deepcopy(found.detach())) is Tensor
    other = torch.zeros_like(expected)
    assert type(other) is Tensor
    with torch.no_grad():
        other.add_(found).copy_(found)
    assert torch.equal(other, expected)
    with pytest.raises(ValueError, match="read-only"):
        found.detach().numpy()[0] = 1
    buffer = io.BytesIO()
    torch.save(found.detach(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), expected)
    if view != "detached":
        found.square().sum().backward()
        assert model.qkv.peft["default"].B.grad.abs().sum() > 0  # type: ignore[index,union-attr]


def test_a_detached_view_has_a_gradient_of_its_own() -> None:
    model = Window()
    lp.attach(model, METHODS["lora"])
    seen = []
    copied = model.qkv.weight.detach().requires_grad_()
    assert copied.is_leaf
    copied.register_hook(seen.append)
    copied[0].sum().backward()
    assert copied.grad is not None
    assert torch.equal(copied.grad[0], torch.ones(64))
    assert len(seen) == 1


@pytest.mark.parametrize("view", VIEWS)
def test_a_parameter_made_from_a_view_is_an_ordinary_one(view: str) -> None:
    model = Window()
    lp.attach(model, METHODS["lora"])
    parameter = nn.Parameter(VIEWS[view](model.qkv.weight))
    assert type(parameter) is nn.Parameter
    assert parameter.is_leaf
    net = nn.Module()
    net.weight = parameter
    assert type(copy.deepcopy(net).weight) is nn.Parameter
    before = parameter.detach().clone()
    parameter.square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.25).step()
    torch.testing.assert_close(parameter.detach(), before / 2)


def test_a_view_beside_a_weight_leaves_it_effective() -> None:
    """Both are read by one function, in either order; neither stands for the base's weight."""
    model = Window()
    lp.attach(model, METHODS["lora"])
    moved(model)
    weight = model.qkv.weight
    whole = weight.clone()
    torch.testing.assert_close(weight.T @ weight, whole.T @ whole)
    torch.testing.assert_close(weight @ weight.T, whole @ whole.T)
    torch.testing.assert_close(torch.cat([weight[:1], weight]), torch.cat([whole[:1], whole]))
    with torch.no_grad(), pytest.raises(RuntimeError, match="read only"):
        weight.T.copy_(weight)


def test_a_compiled_function_takes_a_view() -> None:
    model = Window()
    lp.attach(model, METHODS["lora"])
    summed = torch.compile(lambda w: (w[0] * 2).sum(), backend="eager", fullgraph=True)
    view = model.qkv.weight.T
    torch.testing.assert_close(summed(view), 2 * model.qkv.weight.clone()[:, 0].sum())


def test_an_average_follows_the_effective_weight() -> None:
    """In `average.lerp_(layer.weight)` the layer's weight is read, not written."""
    model = Window()
    lp.attach(model, METHODS["lora"])
    moved(model)
    average = torch.zeros_like(model.qkv.weight)
    with torch.no_grad():
        average.add_(model.qkv.weight).lerp_(model.qkv.weight, 0.5)
        torch._foreach_add_([average], [model.qkv.weight])
    torch.testing.assert_close(average, 2 * model.qkv.weight.detach())


def test_a_tied_reader_gets_the_adapted_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.embed(ids), self.embed.weight)

    model, ids = Tied(), torch.arange(5)
    lp.attach(model, lp.LoRA(r=2, target_modules=["embed"]))
    moved(model)
    adapter = model.embed.peft["default"]
    table = model.embed._parameters["weight"] + adapter.edit().terms[0].matrix().mT
    assert_close("tied", model(ids), F.linear(table[ids], table), floor=1e-5)


def test_what_holds_a_parameter_gets_the_parameter() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16, eos_token_id=0)
    ).eval()
    lp.attach(model, lp.LoRA(r=2, target_modules=["wte", "c_attn"]))
    moved(model)
    ids = torch.arange(6)[None]
    y = model(ids).logits
    held = model.transformer.wte._parameters["weight"]
    assert model.get_parameter("transformer.wte.weight") is held
    model.tie_weights()
    assert_same_bits("tied again", model(ids).logits, y)
    assert model.lm_head.weight is held


def test_a_mixed_batch_cannot_be_read_as_one_weight() -> None:
    model = Window()
    for name in ("a", "b"):
        lp.attach(model, METHODS["lora"], adapter_name=name)
        moved(model)
    lp.set_adapter(model, ["a", "b"])
    expected = pytest.raises(RuntimeError, match=r"qkv\.weight: expected rows.*read by Window")
    with expected, lp.adapter_names(["a", "b", "a"]):
        model(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: nn.utils.weight_norm(m),
        lambda m: nn.utils.spectral_norm(m),
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: nn.utils.parametrizations.spectral_norm(m),
        lambda m: nn.utils.parametrizations.orthogonal(m),
    ],
    ids=["weight_norm", "spectral_norm", "p.weight_norm", "p.spectral_norm", "p.orthogonal"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_are_left_out_or_refused_by_name(make: Any) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(make(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64)).eval()

    for quantization in (None, "nf4"):
        model = net()
        with torch.no_grad():
            y = model(X)
        report = lp.attach(
            model, lp.LoRA(r=4, target_modules="all-linear"), quantization=quantization
        )
        assert "computed by" in dict(report.skipped)["0"]
        if quantization is None:
            assert_close("start", model(X).detach(), y, floor=1e-6)
        moved(model)
        before = model(X).detach()
        lp.merge(model)
        assert_close("merged", model(X).detach(), before, floor=1e-5)
    with pytest.raises(ValueError, match=r"computed by|'0'"):
        lp.attach(net(), lp.LoRA(r=4, target_modules=["0"]))
    lp.quantize(net(), lp.Quantization("nf4", exclude_modules=["0"]))


def test_an_embedding_that_renormalises_itself_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"'0'|Embedding"):
        lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))


class Branches(InPackage):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.used(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


@pytest.mark.filterwarnings("error:.*got no gradient after the first step")
def test_a_layer_that_was_not_used_is_listed_once(
    capsys: pytest.CaptureFixture[str], lightning_package: Any
) -> None:
    module = Branches()
    data = torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4)
    callback = lp.PEFT(lp.LoRA(r=2, target_modules="all-linear"), report=False)
    trainer(callback, max_epochs=2).fit(module, data)
    out = capsys.readouterr().out
    assert out.count("1 adapted layers were not used in the first epoch: idle") == 1
    assert pl is not None
