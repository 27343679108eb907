"""An encoder with a head of one's own: one directory holds both, and peft reads its part."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

import lightning_peft as lp
from lightning_peft.models.history import start_history
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import in_peft, randomise

IDS = torch.arange(12).reshape(2, 6)


class Net(nn.Module):
    """Encoder, normalised head with running statistics."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(ids).last_hidden_state[:, 0])


def encoder() -> BertModel:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config).eval()


def trained() -> Net:
    model = Net(encoder())
    lp.attach(model, lp.LoRA(r=2), modules_to_save=None)
    randomise(model)
    model(IDS)  # moves the running statistics
    return model.eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)


def test_both_come_back(tmp_path) -> None:
    model = trained()
    lp.save_adapter(model, tmp_path)
    fresh = Net(encoder())
    report = lp.load_adapter(fresh, tmp_path)
    assert_same_bits("loaded", outputs(fresh), outputs(model))
    assert "12 tensors loaded" in report.notes[0]  # 4 of LoRA, 8 of the head


def test_peft_reads_the_encoder(tmp_path) -> None:
    model = trained()
    lp.save_adapter(model, tmp_path)
    theirs = in_peft(encoder(), tmp_path)
    with torch.no_grad():
        want, got = model.encoder(IDS)[0], theirs(IDS)[0]
    assert_close("in peft", got, want, floor=1e-5)
    assert not any("head" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_the_encoder_alone_takes_its_part_and_says_so(tmp_path) -> None:
    lp.save_adapter(trained(), tmp_path)
    report = lp.load_adapter(encoder(), tmp_path)
    assert any("head: left out, BertModel has no such module" in note for note in report.notes)


def test_a_head_of_another_shape_is_refused(tmp_path) -> None:
    lp.save_adapter(trained(), tmp_path)
    fresh = Net(encoder())
    fresh.head[2] = nn.Linear(8, 5)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match="expected the tensors of 'head'"):
        lp.load_adapter(fresh, tmp_path)
    assert fresh.state_dict().keys() == before.keys()


def test_root_names_the_model_itself(tmp_path) -> None:
    model = Net(encoder())
    lp.attach(model, lp.LoRA(r=2, target_modules=["query", "2"]), modules_to_save=["head.0"])
    randomise(model)
    with pytest.raises(ValueError, match=r"found 'head\.2'; name the .* root='' for the model"):
        lp.save_adapter(model, tmp_path)
    lp.save_adapter(model, tmp_path, root="")
    fresh = Net(encoder())
    lp.load_adapter(fresh, tmp_path, root="")
    assert (
        fresh.head[2]
        .peft["default"]
        .tensors()["A"]
        .equal(model.head[2].peft["default"].tensors()["A"])
    )


def test_another_adapter_name_is_named(tmp_path) -> None:
    model = Net(encoder())
    lp.attach(model, lp.LoRA(r=2), adapter_name="mine")
    with pytest.raises(KeyError, match="give adapter_name='mine'"):
        lp.save_adapter(model, tmp_path)


class Around(nn.Module):
    """A net of which only `enc` is adapted; the rest is trained in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enc = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 3)
        self.teacher = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.enc(x) + self.teacher(x))


def trained_in_place(part: str) -> Around:
    model = Around()
    start_history(model)
    lp.attach(model.enc, lp.LoRA(r=2, target_modules=["0"]))
    start_history(model)
    randomise(model)
    model.enc.eval()
    with torch.no_grad():
        for tensor in (*model.get_submodule(part).parameters(),) if part else ():
            tensor.add_(1)
    return model.eval()


@pytest.mark.parametrize("part", ["", "head"])
def test_modules_outside_of_the_root_come_back(part: str, tmp_path, recwarn) -> None:
    model = trained_in_place(part)
    lp.save_adapter(model, tmp_path)
    assert not [w for w in recwarn if "left out" in str(w.message)]
    assert (tmp_path / "trained_modules.safetensors").exists() == bool(part)
    fresh = Around().eval()
    lp.load_adapter(fresh, tmp_path)
    x = torch.randn(4, 8)
    assert_same_bits("loaded", fresh.eval()(x), model(x))


@pytest.mark.parametrize("part", ["teacher", "enc.1"])
def test_what_a_directory_cannot_hold_is_named(part: str, tmp_path) -> None:
    model = trained_in_place("")
    with torch.no_grad():
        if part == "teacher":  # an average of the student, never trained itself
            model.teacher.weight.add_(1)
        else:
            model.enc.train()(torch.randn(4, 8))
    with pytest.warns(UserWarning, match=rf"left out: \d tensors .*{part}\."):
        lp.save_adapter(model, tmp_path)
