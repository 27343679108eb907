"""`PEFT(export_to=...)`: the adapter of the best checkpoint, with its card."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.adapters.state_dict import adapter_state_dict
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
