"""QuantAwareLoRA: what merging into a quantised base writes is what was trained."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.created_tensors import CreatedTensors
from tests.helpers.peft_exchange import build, randomise, run

STORAGES = {
    "nf4": lp.Quantization("nf4", double_quant=False),
    "nf4, scales quantised": lp.Quantization("nf4"),
    "fp4": lp.Quantization("fp4", double_quant=False),
}


def merged_error(method: Any, quantization: lp.Quantization, name: str = "llama") -> float:
    base, inputs = build(name)
    lp.attach(base, method, quantization=quantization)
    randomise(base, std=0.05)
    error = lp.merge(base, into="storage", batch=inputs).output_error
    assert error is not None
    return error


@pytest.mark.parametrize("storage", STORAGES)
def test_merging_leaves_nothing_to_round(storage: str) -> None:
    """At most half the error of LoRA; none but fp32's where scales are not quantised again."""
    settings: dict[str, Any] = {"r": 4, "alpha": 16.0, "target_modules": "all-linear"}
    plain = merged_error(lp.LoRA(**settings), STORAGES[storage])
    aware = merged_error(lp.QuantAwareLoRA(**settings, start=0.0), STORAGES[storage])
    assert aware < (0.1 * plain if "scales" in storage else 1e-5)


def test_forward_is_the_quantised_weight_and_gradients_are_loras() -> None:
    base, _ = build("llama")
    kinds = {}
    for kind, method in (
        ("plain", lp.LoRA(r=4, alpha=16.0, target_modules=["q_proj"])),
        ("aware", lp.QuantAwareLoRA(r=4, alpha=16.0, target_modules=["q_proj"], start=0.0)),
    ):
        model = copy.deepcopy(base)
        lp.attach(model, method, quantization=lp.Quantization("nf4"))
        randomise(model, std=0.05)
        kinds[kind] = model
    layer: Any = kinds["aware"].get_submodule("model.layers.0.self_attn.q_proj")
    site, A, B = layer.peft["default"].site, layer.peft["default"].A, layer.peft["default"].B
    want = site.quantization_roundtrip(site.weight(torch.float32) + 4.0 * (B @ A).detach())
    x = torch.randn(3, 32)
    assert_close("y", layer(x).detach(), nn.functional.linear(x, want), floor=1e-5)
    g = torch.randn(3, 32)
    got = torch.autograd.grad(layer(x), (A, B), g)
    other: Any = kinds["plain"].get_submodule("model.layers.0.self_attn.q_proj")
    pair = (other.peft["default"].A, other.peft["default"].B)
    for name, a, b in zip("AB", got, torch.autograd.grad(other(x), pair, g), strict=True):
        assert_close(f"d{name}", a, b, floor=1e-5)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any) -> Tensor:
        self.seen.append(float(self.net[0].peft["default"].rounding))  # type: ignore[union-attr, index]
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_the_callback_begins_to_round(tmp_path: Any) -> None:
    """The last quarter of the steps; the file remembers it."""
    pl.seed_everything(0)
    g = torch.Generator().manual_seed(0)
    rows = [(torch.randn(64, generator=g), torch.tensor(i % 4)) for i in range(32)]
    loader = DataLoader(rows, batch_size=8)

    def trainer() -> pl.Trainer:
        return pl.Trainer(
            max_epochs=2, callbacks=[lp.PEFT(method, quantization=lp.Quantization("nf4"))],
            accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

    method = lp.QuantAwareLoRA(r=4, target_modules=["0"])
    torch.manual_seed(1)
    net = Net()
    run_ = trainer()
    run_.fit(net, loader)
    assert net.seen == [0.0] * 6 + [1.0] * 2
    run_.save_checkpoint(tmp_path / "end.ckpt")
    torch.manual_seed(1)  # the same base again
    again = lp.load_from_checkpoint(Net, tmp_path / "end.ckpt")
    assert float(again.net[0].peft["default"].rounding) == 1.0  # type: ignore[union-attr, index]
    net.eval()
    x = torch.randn(5, 64)
    with torch.no_grad():
        want = net(x)
        lp.merge(net, into="storage")
        assert_close("merged", net(x), want, floor=5e-3)


def test_until_then_it_is_lora() -> None:
    base, inputs = build("llama")
    models = []
    for method in (lp.LoRA(r=4), lp.QuantAwareLoRA(r=4)):
        model = copy.deepcopy(base)
        lp.attach(model, method, quantization=lp.Quantization("nf4"))
        randomise(model)
        models.append(run(model, inputs))
    assert_same_bits("logits", models[1], models[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 1.5}, "0 <= start <= 1, got start = 1.5"),
        ({"dropout": 0.1}, "expected dropout = 0, got 0.1"),
        ({"init": "eva"}, "needs no data, got init = 'eva'"),
    ],
    ids=str,
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.QuantAwareLoRA(**arguments)


def test_it_is_no_adapter_of_peft(tmp_path: Any) -> None:
    base, _ = build("llama")
    lp.attach(base, lp.QuantAwareLoRA(r=2))
    with pytest.raises(ValueError, match="expected a method that peft has too"):
        lp.save_adapter(base, tmp_path)


def test_the_flag_is_read_when_it_was_written_and_not_in_every_forward() -> None:
    """A read waits for the device."""
    model = nn.Sequential(nn.Linear(64, 64))
    method = lp.QuantAwareLoRA(r=4, target_modules="all-linear")
    lp.attach(model, method, quantization=lp.Quantization("nf4"))
    randomise(model)
    x, flag = torch.randn(3, 64), model[0].peft["default"].rounding  # type: ignore[union-attr, index]
    plain = model(x)
    with CreatedTensors() as again:
        model(x)
    assert again.read == set()
    flag.fill_(1.0)  # type: ignore[operator]
    with CreatedTensors() as written:
        rounded = model(x)
    assert "lightning_peft.methods.quant_aware_lora._is_set" in written.read
    assert not torch.equal(rounded, plain)
    saved = model.state_dict()
    flag.zero_()  # type: ignore[operator]
    assert torch.equal(model(x), plain)
    model.load_state_dict(saved | {"0.peft.default.rounding": torch.ones(1)})
    assert torch.equal(model(x), rounded)
