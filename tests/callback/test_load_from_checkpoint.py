"""`load_from_checkpoint`: hyper-parameters that are objects, classes with their own loader, and
what other ways to load a file of adapters say.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import (
    attach,
    load_adapter_state_dict,
    load_checkpoint,
    load_from_checkpoint,
    save_adapter,
)
from tests.helpers.lightning_package import in_package, pl
from tests.helpers.nets import Plain, adapters_of, assert_same, lora, peft, trainer
from tests.helpers.stored import stored_tensors

pytestmark = pytest.mark.usefixtures("lightning_package")


class Objects(Plain):
    """Has a loss function among its hyper-parameters."""

    def __init__(self, loss_fn: Any = None, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.loss_fn = loss_fn


class Rebuilt(Plain):
    """Needs parts that only its own loader rebuilds, as chemprop's MPNN does."""

    def __init__(self, head: Any, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters({"width": width})
        for name in ("head", "where", "lr", "batch_size"):
            self.hparams.pop(name, None)
        self.net[5] = head

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> Any:
        stored = torch.load(checkpoint_path, weights_only=kwargs.get("weights_only", True))
        torch.manual_seed(5)
        head = nn.Linear(16, stored["hyper_parameters"]["width"])
        return super().load_from_checkpoint(checkpoint_path, head=head, **kwargs)


class Grouped(Plain):
    """Takes all hyper-parameters as one argument."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(config)
        self.config = config


def written(model: Plain, path: Path) -> Path:
    pl.seed_everything(1, verbose=False)
    run = trainer(peft(modules_to_save=["3"]), max_epochs=1)
    run.fit(model)
    run.save_checkpoint(path)
    return path


def test_objects_need_weights_only_false(tmp_path: Path) -> None:
    model = Objects(nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="hyper-parameter 'loss_fn'"):
        path = written(model, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match=r"CrossEntropyLoss.*weights_only=False.*ign"):
        load_from_checkpoint(Objects, path, loss_fn=nn.CrossEntropyLoss())
    fresh = Objects(nn.CrossEntropyLoss())
    attach(fresh, lora(), modules_to_save=["3"])
    with pytest.raises(pickle.UnpicklingError, match=r"weights_only=False \(of .*load_checkpoint"):
        load_checkpoint(fresh, path)
    load_checkpoint(fresh, path, weights_only=False)
    assert_same(adapters_of(fresh), adapters_of(model))
    read = load_from_checkpoint(Objects, path, weights_only=False)
    assert isinstance(read.loss_fn, nn.CrossEntropyLoss)
    assert_same(adapters_of(read), adapters_of(model))


def test_a_class_with_its_own_loader(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = in_package(Rebuilt)(nn.Linear(16, 3))
    path = written(model, tmp_path / "a.ckpt")
    read = load_from_checkpoint(in_package(Rebuilt), path)
    assert_same(dict(read.state_dict()), dict(model.state_dict()))


def test_hyper_parameters_as_one_argument(tmp_path: Path) -> None:
    model = Grouped({"depth": 3})
    read = load_from_checkpoint(Grouped, written(model, tmp_path / "a.ckpt"))
    assert read.config["depth"] == 3
    assert_same(adapters_of(read), adapters_of(model))


def test_other_ways_to_load_name_this_one(tmp_path: Path) -> None:
    """What Lightning and torch say of a file of adapters, which they take for a full model."""
    path = written(Plain(), tmp_path / "a.ckpt")
    names_it = r"Unexpected key.*\"adapters only: .*lightning_peft\.load_from_checkpoint"
    with pytest.raises(RuntimeError, match=names_it):
        in_package(Plain).load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=names_it):
        trainer().fit(Plain(), ckpt_path=path)
    state = torch.load(path, weights_only=True)["state_dict"]
    left = Plain().load_state_dict(state, strict=False)
    assert "lightning_peft.load_from_checkpoint" in left.unexpected_keys[0]


def test_the_state_of_a_file_loads_into_attached_adapters(tmp_path: Path) -> None:
    model = Plain()
    path = written(model, tmp_path / "a.ckpt")
    fresh = Plain()
    attach(fresh, lora(), modules_to_save=["net.3"])
    state = torch.load(path, weights_only=True)["state_dict"]
    load_adapter_state_dict(fresh, state)
    for key, tensor in stored_tensors(path).items():
        assert torch.equal(fresh.state_dict()[key], tensor), key


class Unlike(Plain):
    """A module without the layers of `Plain`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 3)


def test_another_class_is_named(tmp_path: Path) -> None:
    path = written(Plain(), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt: expected .*got Unlike.*class and arguments"):
        load_from_checkpoint(in_package(Unlike), path)


def test_other_things_than_a_class_and_a_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    attach(net, lora())
    save_adapter(net, tmp_path / "adapter")
    for given, match in (
        ((Plain(), "last.ckpt"), r"got an instance of Plain; .*load_checkpoint\(model, path\)"),
        ((nn.Linear, "last.ckpt"), "got Linear; .*build a plain model, attach its adapters"),
        (("last.ckpt", Plain), "a LightningModule class, got 'last.ckpt'"),
        ((Plain, 5), "expected a path, got 5"),
        ((pl.LightningModule, "last.ckpt"), "a class derived from LightningModule, got that"),
    ):
        with pytest.raises(TypeError, match=match):
            load_from_checkpoint(*given)
    with pytest.raises(TypeError, match="expected tensors by name, got 'last"):
        load_adapter_state_dict(net, "last.ckpt")
    with pytest.raises(ValueError, match=r"a directory of save_adapter .*load_adapter\(module, d"):
        load_from_checkpoint(Plain, tmp_path / "adapter")
