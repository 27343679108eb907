"""`PEFT(init_from=...)`: training goes on from an adapter directory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.adapters.state_dict import adapter_state_dict
from tests.callback.test_new_layers import DATA, Classifier
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.lightning_package import InPackage
from tests.helpers.nets import trainer
from tests.helpers.peft_exchange import randomise
from tests.hf.test_resized_vocabularies import with_other_rows, written_by_peft
from tests.hf.test_tied_weights import build as build_tied

pytestmark = pytest.mark.usefixtures("lightning_package")


class Causal(InPackage):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.net(input_ids=ids).logits

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def first_run(tmp_path) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    lp.attach(model, lp.LoRA(r=3, alpha=6), modules_to_save=None)
    randomise(model)
    lp.save_adapter(model, tmp_path / "adapter")
    return model


def go_on(tmp_path, steps: int, **settings: Any) -> Classifier:
    model = Classifier()
    peft = lp.PEFT(init_from=tmp_path / "adapter", **settings)
    run = trainer(peft, max_steps=steps)
    run.fit(model, DataLoader(DATA, 8))
    run.save_checkpoint(tmp_path / "next.ckpt")
    return model


def test_values_and_configuration_come_from_the_directory(tmp_path) -> None:
    first = first_run(tmp_path)
    model = go_on(tmp_path, 0)
    want, got = adapter_state_dict(first), adapter_state_dict(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_training_goes_on_and_is_loaded(quantization, tmp_path) -> None:
    first = first_run(tmp_path)
    model = go_on(tmp_path, 2, quantization=quantization)
    before, after = adapter_state_dict(first), adapter_state_dict(model)
    assert all(not torch.equal(after[key], before[key]) for key in before)
    again = lp.load_from_checkpoint(Classifier, tmp_path / "next.ckpt")
    assert torch.equal(again.eval()(DATA.tensors[0]), model.eval()(DATA.tensors[0]))


def test_a_checkpoint_counts_more_than_the_directory(tmp_path) -> None:
    first_run(tmp_path)
    model = go_on(tmp_path, 2)
    other = Classifier()
    run = trainer(lp.PEFT(init_from=tmp_path / "adapter"), max_steps=2)
    run.fit(other, DataLoader(DATA, 8), ckpt_path=tmp_path / "next.ckpt")
    want, got = adapter_state_dict(model), adapter_state_dict(other)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_several_directories_on_one_base(tmp_path) -> None:
    first_run(tmp_path)
    model = Classifier()
    callbacks = [
        lp.PEFT(init_from=tmp_path / "adapter", adapter_name=name, modules_to_save=())
        for name in ("a", "b")
    ]
    trainer(*callbacks, max_steps=1).fit(model, DataLoader(DATA, 8))
    assert {k.rpartition(".peft.")[2].partition(".")[0] for k in adapter_state_dict(model)} == {
        "a",
        "b",
    }


def test_what_does_not_fit_is_said(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected init_from alone, got"):
        lp.PEFT(lp.LoRA(), init_from=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config\.json"):
        trainer(lp.PEFT(init_from=tmp_path)).fit(Classifier(), DataLoader(DATA, 8))


def test_the_old_way_points_here(tmp_path) -> None:
    first_run(tmp_path)
    model = Classifier()
    lp.load_adapter(model, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match=r"PEFT\(init_from=directory\)"):
        trainer(lp.PEFT(lp.LoRA())).fit(model, DataLoader(DATA, 8))


def test_a_part_that_fits_is_named(tmp_path) -> None:
    first_run(tmp_path)
    module = nn.ModuleDict({"student": Classifier().encoder, "teacher": Classifier().encoder})
    with pytest.raises(ValueError, match=r"name its part: PEFT\(root='student'\)"):
        lp.load_adapter(module, tmp_path / "adapter")


def test_resized_embeddings_are_restored(tmp_path) -> None:
    base = build_tied("llama")[0]
    size = base.config.vocab_size
    theirs = written_by_peft(base, "beside", True, tmp_path / "adapter")
    ids = torch.tensor([[3, size, 5, size + 1]])

    def run(steps: int, **resume: Any) -> Causal:
        module = Causal(with_other_rows(base, size))
        callback = lp.PEFT(init_from=tmp_path / "adapter", embeddings="restore")
        fitting = trainer(callback, max_steps=steps)
        fitting.fit(module, DataLoader(ids.repeat(4, 1), 2), **resume)
        fitting.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    start = run(0)
    assert_close("as in peft", start(ids), theirs(input_ids=ids).logits, floor=1e-5)
    straight = run(2)
    run(1)
    assert_same_bits("resumed", run(2, ckpt_path=tmp_path / "1.ckpt")(ids), straight(ids))


def test_restoring_needs_a_directory() -> None:
    with pytest.raises(ValueError, match="expected init_from beside 'restore'"):
        lp.PEFT(lp.LoRA(), embeddings="restore")
    with pytest.raises(ValueError, match="expected 'check' or 'restore', got 'yes'"):
        lp.PEFT(init_from="adapter", embeddings="yes")  # type: ignore[arg-type]
