"""`PEFT(export_to=...)`: the adapter of the best checkpoint, with its card."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.adapters.state_dict import adapter_state_dict
from lightning_peft.callback.export import check_exportable
from tests.callback.test_new_layers import DATA, Classifier
from tests.helpers.lightning_package import InPackage, in_package, pl
from tests.helpers.nets import trainer
from tests.helpers.stored import stored_tensors

pytestmark = pytest.mark.usefixtures("lightning_package")


class Worsening(Classifier):
    """The first epoch is the best."""

    def on_train_epoch_end(self) -> None:
        self.log("val_loss", float(self.current_epoch))


def test_the_best_checkpoint_is_exported_and_the_module_stays(tmp_path) -> None:
    model = Worsening()
    saver = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=1, save_on_train_epoch_end=True
    )
    peft = lp.PEFT(lp.LoRA(r=2), export_to=tmp_path / "adapter", quantization="nf4")
    trainer(peft, saver, max_epochs=2).fit(model, DataLoader(DATA, 8))
    best = stored_tensors(saver.best_model_path)
    fresh = Classifier()
    lp.load_adapter(fresh, tmp_path / "adapter")
    exported, last = adapter_state_dict(fresh), adapter_state_dict(model)
    assert all(torch.equal(exported[key], best[key]) for key in exported)
    assert not all(torch.equal(exported[key], last[key]) for key in exported)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| val_loss | 1 |" in card
    assert "on a base quantised to nf4" in card


def test_without_checkpoints_the_last_values_are_exported(tmp_path) -> None:
    model = Classifier()
    run = trainer(lp.PEFT(adapters={"a": lp.LoRA(r=2)}, export_to=tmp_path), max_steps=1)
    run.fit(model, DataLoader(DATA, 8))
    fresh = Classifier()
    lp.load_adapter(fresh, tmp_path, adapter_name="a")
    exported, last = adapter_state_dict(fresh), adapter_state_dict(model)
    assert all(torch.equal(exported[key], last[key]) for key in exported)


class Convolutions(InPackage):
    """A net whose second layer is dilated, which peft computes without the dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"chosen": Chosen()})
        self.first, self.second = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, dilation=2)
        self.steps = 0

    def training_step(self, batch, index):
        self.steps += 1
        return self.second(self.first(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Chosen:
    """A hyper-parameter that is no plain data."""


IMAGES = DataLoader(TensorDataset(torch.randn(4, 4, 8, 8)), 2)


def test_what_peft_cannot_hold_is_said_before_training(tmp_path) -> None:
    module = Convolutions()
    peft = lp.PEFT(lp.LoRA(r=2, target_modules=["second"]), export_to=tmp_path / "adapter")
    said = r"export_to: the export .* would fail: save_adapter: LoRA on 'second' has no equal in"
    with pytest.raises(ValueError, match=said):
        trainer(peft, max_steps=1).fit(module, IMAGES)
    assert module.steps == 0
    assert not (tmp_path / "adapter").exists()


class Attention(InPackage):
    """A net with the attention on which peft leaves out the bias of LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.steps = 0

    def training_step(self, batch, index):
        self.steps += 1
        return self.attention(batch[0], batch[0], batch[0])[0].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


SEQUENCES = DataLoader(TensorDataset(torch.randn(4, 3, 8)), 2)


def test_what_peft_cannot_hold_once_trained_is_said_before_training(tmp_path) -> None:
    """The bias of LoRA starts at zero, which a file can hold by leaving it out."""
    module = Attention()
    peft = lp.PEFT(
        lp.LoRA(r=2, lora_bias=True, target_modules=["attention"]), export_to=tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match=r"export .* would fail: .* expected no lora_bias"):
        trainer(peft, max_steps=1).fit(module, SEQUENCES)
    assert module.steps == 0


def test_the_check_before_training_leaves_the_values(tmp_path) -> None:
    module = Attention()
    lp.attach(module, lp.LoRA(r=2, target_modules=["attention"]))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    check_exportable(module, ["default"], tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_a_read_only_place_is_said_before_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    peft = lp.PEFT(lp.LoRA(r=2, target_modules=["first"]), export_to=tmp_path / "a" / "b")
    with pytest.raises(
        ValueError, match=r"can be written, got .*a/b inside .*, which is read-only"
    ):
        trainer(peft, max_steps=1).fit(Convolutions(), IMAGES)


def test_a_file_in_the_way_is_said_before_training(tmp_path) -> None:
    (tmp_path / "a").touch()
    peft = lp.PEFT(lp.LoRA(r=2, target_modules=["first"]), export_to=tmp_path / "a" / "b")
    with pytest.raises(FileExistsError, match=r"export_to: expected a directory .* is a file"):
        trainer(peft, max_steps=1).fit(Convolutions(), IMAGES)


def test_a_sharded_model_is_refused_with_the_way_out(tmp_path) -> None:
    module = Convolutions()
    module.first.weight.to_local = module.first.weight.detach  # as a DTensor has it
    with pytest.raises(ValueError, match=r"got a sharded one; .*load_from_checkpoint\(MyModule"):
        check_exportable(module, ["default"], tmp_path)


def test_merged_checkpoints_hold_no_adapter_to_export(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint='merged', from which none can be taken"):
        lp.PEFT(lp.LoRA(r=2), export_to=tmp_path, checkpoint="merged")


def saving(folder) -> object:
    return pl.callbacks.ModelCheckpoint(folder, save_on_train_epoch_end=True)


def test_a_best_file_with_objects_is_exported(tmp_path) -> None:
    """The file was written by this process, so that nothing foreign is unpickled."""
    module, saver = Convolutions(), saving(tmp_path)
    peft = lp.PEFT(lp.LoRA(r=2, target_modules=["first"]), export_to=tmp_path / "adapter")
    with pytest.warns(UserWarning, match="'chosen' is no plain data"):
        trainer(peft, saver, max_epochs=1).fit(module, IMAGES)
    with pytest.raises(pickle.UnpicklingError, match="expected plain data"):
        lp.load_from_checkpoint(in_package(Convolutions), saver.best_model_path)
    fresh = Convolutions()
    lp.load_adapter(fresh, tmp_path / "adapter")
    got, want = adapter_state_dict(fresh), adapter_state_dict(module)
    assert all(torch.equal(got[key], want[key]) for key in got)


class Vanishing(Classifier):
    """Something outside deletes the best file before fit ends."""

    def on_train_end(self) -> None:
        Path(self.trainer.checkpoint_callback.best_model_path).unlink()


def test_a_best_file_that_is_gone_is_told(tmp_path) -> None:
    peft = lp.PEFT(lp.LoRA(r=2), export_to=tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"best checkpoint again, got: .* found no such file"):
        trainer(peft, saving(tmp_path), max_epochs=1).fit(Vanishing(), DataLoader(DATA, 8))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_trial_run_leaves_the_former_export(tmp_path) -> None:
    peft = lp.PEFT(lp.LoRA(r=2), export_to=tmp_path / "adapter")
    trainer(peft, fast_dev_run=True).fit(Classifier(), DataLoader(DATA, 8))
    assert not (tmp_path / "adapter").exists()


class CausalModule(InPackage):
    """A causal model whose decoder alone is the root of the adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        self.net = LlamaForCausalLM(LlamaConfig(**sizes, **heads))

    def training_step(self, batch, index):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_the_model_around_the_root_saves_plain_weights_or_nothing(tmp_path) -> None:
    module, ids = CausalModule(), torch.arange(32).reshape(4, 8)
    peft = lp.PEFT(lp.LoRA(r=2), root="net.model", modules_to_save=())
    run = trainer(peft, max_steps=2)
    run.fit(module, DataLoader(ids, 2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    read = lp.load_from_checkpoint(in_package(CausalModule), tmp_path / "a.ckpt")
    for net in (module.net.eval(), read.net.eval()):
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM.save_pretrained: .*merge_and"):
            net.save_pretrained(tmp_path / "net")
        want = net(ids).logits
        lp.merge(net.model)
        net.save_pretrained(tmp_path / "net")
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "net").eval()
        assert torch.allclose(plain(ids).logits, want, atol=1e-5)
        lp.unmerge(net.model)
