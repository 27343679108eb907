"""New layers next to a pretrained model are trained fully, saved and never packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertPreTrainedModel

import lightning_peft as lp
from lightning_peft.adapters.new_layers import new_layers_of
from lightning_peft.core.registry import registry_of
from lightning_peft.extend import register_pretrained
from lightning_peft.models import pretrained
from lightning_peft.models.modules import fork_seeded_rng
from tests.helpers.lightning_package import InPackage
from tests.helpers.nets import trainer

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
DATA = TensorDataset(torch.randint(60, (16, 8)), torch.randint(3, (16,)))


def bert() -> BertModel:
    with fork_seeded_rng(3):  # the pretrained weights
        return BertModel(BertConfig(**SIZES))


def teacher() -> nn.Module:
    with fork_seeded_rng(4):
        return nn.Linear(32, 3).requires_grad_(False)


class Classifier(InPackage):
    """A user's module; the head starts at random."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert()
        self.pool = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
        self.classifier = nn.Linear(32, 3)
        self.teacher = teacher()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=ids).last_hidden_state[:, 0]
        return self.classifier(self.pool(states))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(model: Any, **settings: Any) -> Any:
    run = trainer(lp.PEFT(lp.LoRA(r=2), **settings), max_epochs=1)
    run.fit(model, DataLoader(DATA, 8))
    return run


def saved(model: nn.Module) -> tuple[str, ...]:
    registry = registry_of(model)
    assert registry is not None
    return registry.adapters["default"].modules_to_save


pytestmark = pytest.mark.usefixtures("lightning_package")


def test_a_head_is_trained_stored_and_stays_dense(tmp_path, capsys) -> None:
    model = Classifier()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = fit(model, quantization="nf4")
    assert saved(model) == ("pool", "classifier")
    for name in ("classifier.weight", "pool.0.weight", "pool.1.bias"):
        owner, _, leaf = name.rpartition(".")
        trained = model.get_submodule(owner).peft["default"]._parameters[leaf]
        assert not torch.equal(trained, before[name])
        assert model.get_parameter(name).dtype == torch.float32
    assert model.encoder.encoder.layer[0].output.dense._parameters["weight"].dtype == torch.uint8
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert torch.equal(model.teacher.weight, before["teacher.weight"])  # neither packed nor moved
    printed = " ".join(capsys.readouterr().out.split())
    assert "trained fully: pool, classifier (new layer next to the pretrained encoder)" in printed
    assert "frozen by you: teacher" in printed
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(99)  # another random head
    again = lp.load_from_checkpoint(Classifier, tmp_path / "last.ckpt")
    assert torch.equal(again.eval()(DATA.tensors[0]), model.eval()(DATA.tensors[0]))


@pytest.mark.parametrize(
    ("given", "want"),
    [((), ()), (["classifier"], ("classifier",)), (None, ("pool", "classifier"))],
)
def test_names_given_are_exactly_those(given, want) -> None:
    model = Classifier()
    fit(model, modules_to_save=given)
    assert saved(model) == want


def test_a_layer_that_a_method_names_is_left_to_it() -> None:
    found = new_layers_of(Classifier(), lp.LoRA(target_modules=["query", "classifier"]))
    assert list(found.trained) == ["pool"]
    found = new_layers_of(Classifier(), lp.LoRA(target_modules="all-linear"))
    assert list(found.trained) == ["pool", "classifier"]


def test_a_second_adapter_sees_the_flags_of_the_user() -> None:
    model = Classifier()
    run = trainer(lp.PEFT(adapters={"a": lp.LoRA(r=2), "b": lp.LoRA(r=2)}), max_epochs=1)
    run.fit(model, DataLoader(DATA, 8))
    registry = registry_of(model)
    assert registry is not None
    assert [e.modules_to_save for e in registry.adapters.values()] == [("pool", "classifier")] * 2


class WithQuery(Classifier):
    """Pools by a vector that the module holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=ids).last_hidden_state
        weights = (states @ self.query).softmax(1)[..., None]
        return self.classifier(self.pool((weights * states).sum(1)))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_parameter_of_the_module_itself_is_trained_and_stored(
    quantization, tmp_path, capsys
) -> None:
    model = WithQuery()
    before = model.query.detach().clone()
    run = fit(model, quantization=quantization)
    assert "trained fully: query (new parameter)" in " ".join(capsys.readouterr().out.split())
    assert not torch.equal(model.query, before)
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(99)  # another random query and head
    again = lp.load_from_checkpoint(WithQuery, tmp_path / "last.ckpt")
    assert torch.equal(again.query, model.query)
    assert torch.equal(again.eval()(DATA.tensors[0]), model.eval()(DATA.tensors[0]))
    run = trainer(lp.PEFT(lp.LoRA(r=2), quantization=quantization), max_epochs=2)
    resumed = WithQuery()
    run.fit(resumed, DataLoader(DATA, 8), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.query.requires_grad


class Normalised(Classifier):
    """The head's weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.utils.parametrizations.weight_norm(nn.Linear(32, 3))


def test_a_parametrised_head_is_trained_in_place_and_stored(tmp_path) -> None:
    model = Normalised()
    before = model.classifier.weight.detach().clone()
    run = fit(model, quantization="nf4")
    assert not torch.equal(model.classifier.weight, before)
    with pytest.warns(UserWarning, match="left out: classifier.bias, classifier.parametrizations"):
        lp.save_adapter(model, tmp_path / "adapter")
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(99)
    again = lp.load_from_checkpoint(Normalised, tmp_path / "last.ckpt")
    assert torch.equal(again.eval()(DATA.tensors[0]), model.eval()(DATA.tensors[0]))


def test_no_new_parameters_when_names_are_given() -> None:
    model = WithQuery()
    fit(model, modules_to_save=())
    assert not model.query.requires_grad


def test_an_encoder_frozen_as_a_preparation_is_adapted() -> None:
    model = Classifier()
    model.encoder.requires_grad_(False)
    lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"), modules_to_save=None)
    assert hasattr(model.encoder.encoder.layer[0].output.dense, "peft")
    assert saved(model) == ("pool", "classifier")


class OnAbstractBase(BertPreTrainedModel):
    """A user's own model on a library's abstract base."""

    def __init__(self) -> None:
        super().__init__(BertConfig(**SIZES))
        self.bert = bert()
        self.my_head = nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.my_head(self.bert(ids).pooler_output)


class OwnForSequenceClassification(BertForSequenceClassification):
    """A library's model with a further method."""


class Vision(nn.Module):
    """Stands for a library's vision model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.stem(x).mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc


@pytest.mark.parametrize(
    ("model", "want"),
    [
        (OnAbstractBase, {"my_head": "new layer next to the pretrained bert"}),
        (
            lambda: OwnForSequenceClassification(BertConfig(**SIZES)),
            {"classifier": "head of the pretrained OwnForSequenceClassification"},
        ),
        (bert, {}),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {}),  # nothing is pretrained
    ],
)
def test_which_layers_are_new(model, want) -> None:
    assert new_layers_of(model(), lp.LoRA()).trained == want


class Distilled(Vision):
    """Has two heads, as timm's DeiT."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.ModuleDict({"head_dist": nn.Linear(4, 10)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.extra["head_dist"](self.stem(x).mean((2, 3)))

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.fc, self.extra["head_dist"]


@pytest.mark.parametrize(
    "how", [{"heads": ["fc", "extra.head_dist"]}, {"head_getter": "get_classifier"}]
)
def test_models_with_two_heads(how, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "_LIBRARIES", list(pretrained._LIBRARIES))
    register_pretrained(Vision.__module__, **how)
    found = new_layers_of(Distilled(), lp.LoRA(target_modules=["stem"]))
    assert list(found.trained) == ["fc", "extra.head_dist"]


def test_a_method_whose_only_layers_are_the_head_is_refused(monkeypatch) -> None:
    """All linear layers of a ResNet are its head: LoRA would train nothing beside it."""
    monkeypatch.setattr(pretrained, "_LIBRARIES", list(pretrained._LIBRARIES))
    register_pretrained(Vision.__module__, heads=["fc"])
    message = r"expected a layer that is not trained whole .*matches only fc; name other layers"
    with pytest.raises(ValueError, match=message):
        lp.attach(Vision(), lp.LoRA(r=2, target_modules="all-linear"), modules_to_save=None)


@pytest.mark.parametrize("how", [{"heads": ["fc"]}, {"head_getter": "get_classifier"}])
def test_libraries_of_the_user(how, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "_LIBRARIES", list(pretrained._LIBRARIES))
    model = nn.ModuleDict({"net": Vision(), "head": nn.Linear(10, 2)})
    assert not new_layers_of(model, lp.LoRA()).trained
    register_pretrained(Vision.__module__, **how)
    assert new_layers_of(model, lp.LoRA()).trained == {
        "head": "new layer next to the pretrained net",
        "net.fc": "head of the pretrained net",
    }
    model.requires_grad_(False)
    found = new_layers_of(model, lp.LoRA())
    assert not found.trained
    assert found.frozen == ["head"]


def test_attach_finds_them_when_asked() -> None:
    model = Classifier()
    lp.attach(model, lp.LoRA(r=2), modules_to_save=None)
    assert saved(model) == ("pool", "classifier")


def _frozen_parts_of(model: nn.Module) -> list[str]:
    registry = registry_of(model)
    assert registry is not None
    return registry.user_frozen


@pytest.mark.parametrize("given", [None, (), ["classifier"]])
def test_what_the_user_froze_computes_the_same(given) -> None:
    """A frozen pretrained model and a loss net next to the encoder; the encoder is packed."""
    model = Classifier()
    model.reference = bert().requires_grad_(False)
    with fork_seeded_rng(5):
        for parameter in model.reference.parameters():  # else it would be a copy that follows
            parameter.data.normal_()
    model.loss_net = nn.Sequential(nn.Linear(32, 32), nn.Tanh()).requires_grad_(False)
    before = {k: t.clone() for k, t in model.state_dict().items() if not k.startswith("encoder")}
    report = lp.attach(model, lp.LoRA(r=2), quantization="nf4", modules_to_save=given)
    assert _frozen_parts_of(model) == ["teacher", "reference", "loss_net"]
    assert "frozen by you: teacher, reference, loss_net" in " ".join(str(report).split())
    for key, value in before.items():
        if key.startswith(("teacher", "reference", "loss_net")):
            assert torch.equal(model.state_dict()[key], value), key
    assert model.encoder.encoder.layer[0].output.dense._parameters["weight"].dtype == torch.uint8


def test_layers_that_were_frozen_inside_the_base_are_base() -> None:
    model = Classifier()
    model.encoder.encoder.layer[0].requires_grad_(False)
    lp.attach(model, lp.LoRA(r=2), quantization="nf4", modules_to_save=None)
    assert model.encoder.encoder.layer[0].output.dense._parameters["weight"].dtype == torch.uint8
    assert _frozen_parts_of(model) == ["teacher"]


def test_a_frozen_part_that_a_method_names_is_adapted_and_packed() -> None:
    model = Classifier()
    lp.attach(model, lp.LoRA(r=2, target_modules=["teacher", "query"]), quantization="nf4")
    assert model.teacher._parameters["weight"].dtype == torch.uint8
    assert _frozen_parts_of(model) == []
