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
from tests.helpers.nets import trainer
from tests.helpers.peft_exchange import randomise

pytestmark = pytest.mark.usefixtures("lightning_package")


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
