"""Every method through fit, validate, test, fit and predict of one Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import PEFT
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.methods.alora import ALoRA
from lightning_peft.methods.registry import METHODS
from lightning_peft.methods.trainable_tokens import TrainableTokens
from tests.helpers.lightning_package import InPackage
from tests.helpers.method_rows import (
    MODELS,
    NEEDS,
    ROWS,
    STORAGES,
    build,
    diagonal,
    output,
    parts_of,
    placed,
)
from tests.helpers.nets import assert_same, trainer

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


class Net(InPackage):
    """A whole model, with one batch per stage."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.batch = build(MODELS[kind])
        self.net.requires_grad_(True)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        y = output(self.net, batch)
        return (y - torch.linspace(-1, 1, y.shape[-1])).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return output(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch], batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def method_of(row: str, kind: str, batch: dict[str, Tensor]) -> Any:
    if row == "alora":  # acts from a token of the batch on
        tokens = batch["input_ids"][0, :1].tolist()
        return placed(ALoRA(r=2, invocation_tokens=tokens), kind)
    if row == "trainable_tokens":
        return TrainableTokens(sorted(set(batch["input_ids"].flatten().tolist()))[:3])
    return placed(ROWS[row].method, kind)


CELLS = [
    ("alora", "decoder", "dense"),
    ("alora", "decoder", "nf4"),
    ("trainable_tokens", "decoder", "dense"),
    ("trainable_tokens", "decoder", "nf4"),
    *(
        (row, kind, storage)
        for row in ROWS
        for kind in MODELS
        for storage in STORAGES
        if not {kind, storage} & set(ROWS[row].skip) and (row, storage) not in NEEDS
    ),
]


def first_of_its_kind(row: str) -> bool:
    """Whether no earlier row has the same methods."""
    kinds = [[type(m) for m in parts_of(r)] for r in ROWS.values()]
    i = list(ROWS).index(row)
    return kinds.index(kinds[i]) == i


def marks(row: str, kind: str, storage: str) -> Any:
    if row in ("alora", "trainable_tokens"):
        quick = storage == "dense"
    else:
        quick = diagonal(row, kind, storage) and first_of_its_kind(row)
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(
    ("row", "kind", "storage"),
    [pytest.param(*cell, id="-".join(cell), marks=marks(*cell)) for cell in CELLS],
)
def test_all_stages(row: str, kind: str, storage: str) -> None:
    module = Net(kind)
    method = method_of(row, kind, module.batch)
    peft = PEFT(method, quantization=STORAGES[storage], report=False)
    run = trainer(peft, max_epochs=1)
    run.fit(module)
    layers = [name for name, _ in adapted_modules(module)]
    trained = copied(trained_tensors(module))
    frozen = copied({n: p for n, p in module.named_parameters() if not p.requires_grad})
    (first,) = run.validate(module, verbose=False)
    (again,) = run.test(module, verbose=False)
    assert first == again
    assert_same(copied(trained_tensors(module)), trained)
    run.fit_loop.max_epochs = 2
    run.fit(module)
    (predicted,) = run.predict(module)
    assert [name for name, _ in adapted_modules(module)] == layers
    ended = copied(trained_tensors(module))
    assert list(ended) == list(trained)
    assert any(not torch.equal(ended[n], t) for n, t in trained.items())
    assert_same(copied({n: p for n, p in module.named_parameters() if not p.requires_grad}), frozen)
    with torch.no_grad():
        torch.testing.assert_close(predicted, output(module.eval().net, module.batch))


def test_the_rows_hold_every_method() -> None:
    rows = {type(m).__name__ for row in ROWS.values() for m in parts_of(row)}
    by_others = {"ModulesToSave", "TrainedBias"}  # of modules_to_save= and LoRA(bias=)
    by_task = {"Poly", "MultitaskPrompt"}  # need task ids; tests/methods
    of_others = {"Arrow", "XLoRA"}  # mix adapters that are attached before; tests/methods
    known = rows | {"ALoRA", "TrainableTokens"} | by_others | by_task | of_others
    assert known == set(METHODS)
