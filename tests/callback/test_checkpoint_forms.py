"""Files with the dense base, and files of merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import (
    IA3,
    PEFT,
    LoRA,
    Quantization,
    attach,
    load_checkpoint,
    load_from_checkpoint,
    merge,
    unmerge,
)
from lightning_peft.checkpoint.description import KEY
from tests.helpers.lightning_package import in_package, pl
from tests.helpers.nets import Plain, adapters_of, assert_same, lora, peft, trainer

pytestmark = pytest.mark.usefixtures("lightning_package")

STORED = [None, Quantization("nf4"), Quantization("int8")]


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(b[0]) for b in Plain().val_dataloader()])


def run(folder: Path, model: Plain, epochs: int, ckpt: Path | None = None, **options: Any) -> None:
    pl.seed_everything(1, verbose=False)
    trainer(peft(**options), max_epochs=epochs, folder=folder).fit(model, ckpt_path=ckpt)


@pytest.mark.parametrize("quantization", STORED, ids=["dense", "nf4", "int8"])
def test_a_full_file_loads_strictly_and_resumes(
    quantization: Quantization | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quantization": quantization, "modules_to_save": ["5"]}
    without_stop, first, second = Plain(), Plain(), Plain()
    run(tmp_path / "a", without_stop, 2, **options)
    run(tmp_path / "b", first, 1, **options, checkpoint="full")
    path = tmp_path / "b" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    assert state["net.0.weight"].shape == (16, 8)
    assert state["net.0.weight"].is_floating_point()
    before = {k: v.clone() for k, v in first.state_dict().items()}
    first.load_state_dict(state, strict=True)
    assert_same(dict(first.state_dict()), before)
    read = load_from_checkpoint(Plain, path)
    assert torch.equal(outputs(read), outputs(first))
    in_a_loop = Plain()
    attach(in_a_loop, lora(), quantization=quantization, modules_to_save=["5"])
    load_checkpoint(in_a_loop, path)
    assert torch.equal(outputs(in_a_loop), outputs(first))
    run(tmp_path / "b", second, 2, path, **options, checkpoint="full")
    assert_same(adapters_of(second), adapters_of(without_stop))


@pytest.mark.parametrize("quantization", STORED[:2], ids=["dense", "nf4"])
def test_a_library_that_reads_adapters_alone_is_told_how(
    quantization: Quantization | None, tmp_path: Path
) -> None:
    model = Plain()
    run(tmp_path, model, 1, quantization=quantization)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="adapters only: read by lightning_peft"):
        model.load_state_dict(state)
    model.load_state_dict(model.state_dict())


def test_another_base_does_not_load_into_packed_layers(tmp_path: Path) -> None:
    model = Plain()
    run(tmp_path, model, 1, quantization="nf4", checkpoint="full")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    state["net.0.weight"] = state["net.0.weight"] + 1
    with pytest.raises(RuntimeError, match=r"net\.0\.weight: expected the base that is packed"):
        model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("quantization", STORED, ids=["dense", "nf4", "int8"])
def test_a_merged_file_loads_into_the_plain_class(
    quantization: Quantization | None, tmp_path: Path
) -> None:
    model, plain = Plain(), Plain()
    options: dict[str, Any] = {"quantization": quantization, "modules_to_save": ["5"]}
    run(tmp_path, model, 1, **options, checkpoint="merged")
    path = tmp_path / "last.ckpt"
    plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    int8 = quantization is not None and quantization.kind == "int8"
    tolerance = {"atol": 1e-2, "rtol": 0.0} if int8 else {}  # it rounds activations too
    torch.testing.assert_close(outputs(plain), outputs(model), **tolerance)
    merge(model, into="dense")
    torch.testing.assert_close(outputs(plain), outputs(model))
    unmerge(model)
    assert torch.equal(outputs(in_package(Plain).load_from_checkpoint(path)), outputs(plain))
    for again in (peft(**options), peft(**options, checkpoint="merged")):
        with pytest.raises(ValueError, match=r"last\.ckpt: .*got merged weights.*for inference"):
            trainer(again, max_epochs=2).fit(Plain(), ckpt_path=path)
    with pytest.raises(ValueError, match=r"load a full model with Plain\.load_from_checkpoint"):
        load_from_checkpoint(Plain, path)


def test_saving_merged_weights_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    models = [Plain(), Plain()]
    run(tmp_path / "a", models[0], 2, quantization="nf4")
    run(tmp_path / "b", models[1], 2, quantization="nf4", checkpoint="merged")
    assert_same(dict(models[1].state_dict()), dict(models[0].state_dict()))


def test_what_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of \['adapters'.*got 'all'"):
        peft(checkpoint="all")
    method = [IA3(target_modules="all-linear"), lora()]
    average = pl.callbacks.StochasticWeightAveraging(1e-2)
    with pytest.raises(ValueError, match=r"'merged': expected no StochasticWeightAveraging"):
        trainer(PEFT(method, checkpoint="merged"), average).fit(Plain())
    other = PEFT(lora(), adapter_name="b", checkpoint="full", report=False)
    with pytest.raises(ValueError, match=r"expected one form.*\['adapters', 'full'\]"):
        trainer(peft(), other).fit(Plain())


def test_the_form_is_in_the_file(tmp_path: Path) -> None:
    run(tmp_path, Plain(), 1)
    assert "form" not in torch.load(tmp_path / "last.ckpt", weights_only=True)[KEY]


class Tied(Plain):
    """Its first and last layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
        self.net[2].weight = self.net[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"method": LoRA(r=2, target_modules=["2"])}, True),
        ({"method": LoRA(r=2, target_modules=["0", "2"])}, True),
        ({"method": LoRA(r=2, target_modules=["3"]), "modules_to_save": ["0"]}, True),
        ({"method": LoRA(r=2, target_modules=["3"]), "modules_to_save": ["0", "2"]}, False),
        ({"method": LoRA(r=2, target_modules=["3"])}, False),
    ],
)
def test_merged_weights_that_were_tied(
    options: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    model = in_package(Tied)()
    callback = PEFT(**options, checkpoint="merged", report=False)
    if refused:
        with pytest.raises(ValueError, match=r"net.0.weight, net.2.weight apart; a fresh Tied"):
            trainer(callback, folder=tmp_path).fit(model)
        return
    trainer(callback, folder=tmp_path).fit(model)
    fresh = in_package(Tied).load_from_checkpoint(tmp_path / "last.ckpt")
    torch.testing.assert_close(outputs(fresh), outputs(model))
