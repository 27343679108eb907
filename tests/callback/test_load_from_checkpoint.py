"""`load_from_checkpoint`: hyper-parameters that are objects, and classes with their own loader."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import attach, load_checkpoint, load_from_checkpoint
from tests.helpers.lightning_package import in_package, pl
from tests.helpers.nets import Plain, adapters_of, assert_same, lora, peft, trainer

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
