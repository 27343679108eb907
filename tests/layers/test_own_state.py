"""Layers that save, load and copy themselves their own way, as PyTorch Geometric's Linear does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.lightning_package import pl
from tests.helpers.nets import adapters_of, assert_same, trainer

STORAGES = pytest.mark.parametrize("quantization", [None, "nf4"])


class OwnState(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        made = OwnState(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        return made


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(OwnState(64, 64), nn.ReLU(), OwnState(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> Any:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 4, shuffle=True)


def trained(quantization: str | None) -> Net:
    model = Net()
    lp.attach(model, lp.LoRA(r=4, target_modules="all-linear"), quantization=quantization)
    for tensor in adapters_of(model).values():
        nn.init.normal_(tensor)
    return model


@STORAGES
def test_the_state_holds_the_tensors_as_they_are_held(quantization: str | None) -> None:
    model = trained(quantization)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = model.state_dict(keep_vars=True)
    assert state.keys() == held.keys()
    assert all(state[name] is tensor for name, tensor in held.items())


@STORAGES
def test_a_copy_has_the_adapters(quantization: str | None) -> None:
    model, x = trained(quantization), torch.randn(3, 64)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    assert_same(dict(copied.state_dict()), dict(model.state_dict()))
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}


@STORAGES
@pytest.mark.parametrize("form", ["adapters", "full"])
def test_resume(quantization: str | None, form: Any, tmp_path: Path) -> None:
    def run(model: Net, epochs: int, ckpt: Path | None = None) -> Net:
        method = lp.LoRA(r=4, target_modules="all-linear")
        callback = lp.PEFT(method, quantization=quantization, report=False, checkpoint=form)
        it = trainer(callback, folder=tmp_path, max_epochs=epochs)
        pl.seed_everything(3, verbose=False)
        it.fit(model, ckpt_path=ckpt)
        return model

    whole = run(Net(), 3)
    resumed = run(Net(), 3, tmp_path / "epoch=0.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
