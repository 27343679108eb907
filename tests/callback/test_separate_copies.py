"""`PEFT(separate_copies=True)`: tied embeddings train a copy each, and resume so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.adapters.state_dict import adapter_state_dict
from tests.helpers.compare import assert_close
from tests.helpers.lightning_package import InPackage
from tests.helpers.nets import trainer

pytestmark = pytest.mark.usefixtures("lightning_package")


class Tied(InPackage):
    """An embedding, a layer and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, ids: Tensor, _: int) -> Tensor:
        logits = self.head(self.body(self.embed(ids)))
        return nn.functional.cross_entropy(logits.mT, ids)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def run(
    epochs: int, folder: Path | None = None, **settings: Any
) -> tuple[Any, Any, DataLoader[Any]]:
    method = lp.LoRA(r=2, target_modules=["body"])
    peft = lp.PEFT(method, modules_to_save=["embed", "head"], report=False, **settings)
    data = DataLoader(torch.arange(44).view(4, 11) % 11, batch_size=2)  # type: ignore[var-annotated,arg-type]
    return Tied(), trainer(peft, folder=folder, max_epochs=epochs), data


def test_each_copy_is_trained_and_resumes(tmp_path: Path) -> None:
    module, t, data = run(1, tmp_path, separate_copies=True)
    t.fit(module, data)
    embed, head = (t for k, t in adapter_state_dict(module).items() if "body" not in k)
    assert not torch.equal(embed, head)
    again, t, data = run(2, separate_copies=True)
    t.fit(again, data, ckpt_path=tmp_path / "last.ckpt")
    whole, t, data = run(2, separate_copies=True)
    t.fit(whole, data)
    got, want = adapter_state_dict(again), adapter_state_dict(whole)
    for key, value in want.items():
        assert_close(key, got[key], value, floor=1e-6)
    other, t, data = run(2)
    with pytest.raises(ValueError, match="separate_copies: True in the file"):
        t.fit(other, data, ckpt_path=tmp_path / "last.ckpt")


def test_one_copy_is_the_default() -> None:
    module, t, data = run(1)
    t.fit(module, data)
    copies = [t for k, t in adapter_state_dict(module).items() if "body" not in k]
    assert all(torch.equal(copies[0], c) for c in copies)
    with pytest.raises(ValueError, match="leave separate_copies out"):
        lp.PEFT(init_from="somewhere", separate_copies=True)
