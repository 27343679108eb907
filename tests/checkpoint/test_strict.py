"""Files that do not belong to the model: refused with the list, nothing loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, LoRA, Quantization, load_from_checkpoint
from lightning_peft.checkpoint.contents import KEY, leaks
from tests.helpers.lightning_package import pl
from tests.helpers.nets import (
    Configured,
    Plain,
    adapters_of,
    assert_same,
    lora,
    module,
    peft,
    trainer,
)
from tests.helpers.stored import stored_tensors

pytestmark = pytest.mark.usefixtures("lightning_package")

A = "net.0.peft.default.A"
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def written(lightning_package: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pl.seed_everything(1, verbose=False)
    path = tmp_path_factory.mktemp("written") / "a.ckpt"
    it = trainer(peft(modules_to_save=["5"]), max_epochs=1)
    it.fit(Plain())
    it.save_checkpoint(path)
    return path


def _set(key: str, value: Any) -> Change:
    return lambda ck: ck["state_dict"].__setitem__(key, value)


def _pop(key: str) -> Change:
    return lambda ck: ck["state_dict"].pop(key)


def _adapter(ck: dict[str, Any]) -> dict[str, Any]:
    return ck[KEY]["roots"][""]["adapters"]["default"]


BAD: dict[str, tuple[Change, str]] = {
    "missing": (_pop(A), rf"missing {A}"),
    "extra": (_set("net.9.peft.default.A", torch.zeros(1)), r"extra net\.9\.peft\.default\.A"),
    "base tensor": (_set("net.0.weight", torch.zeros(16, 8)), r"extra net\.0\.weight"),
    "misshapen": (_set(A, torch.zeros(3, 8)), rf"{A}: expected shape \[2, 8\], got \[3, 8\]"),
    "nan": (_set(A, torch.full((2, 8), torch.nan)), rf"{A}: expected finite values, got NaN"),
    "infinite": (_set(A, torch.full((2, 8), torch.inf)), rf"{A}: expected finite"),
    "no tensor": (_set(A, "text"), rf"{A}: expected a tensor, got str"),
    "no entry": (lambda ck: ck.pop(KEY), r"expected a checkpoint with adapters, got one without"),
    "entry of a wrong type": (lambda ck: ck.__setitem__(KEY, 3), r"expected a dict.*got '3'"),
    "no format": (lambda ck: ck[KEY].pop("format"), r"expected a dict with 'format'"),
    "newer": (lambda ck: ck[KEY].__setitem__("format", 99), r"expected format <= 4, got 99"),
    "no roots": (lambda ck: ck[KEY].pop("roots"), r"expected roots with adapters.*got 'None'"),
    "another method": (
        lambda ck: _adapter(ck)["methods"][0].update(alpha=3.0),
        r"LoRA\.alpha: 3\.0 in the file, 8\.0 attached",
    ),
    "more methods": (
        lambda ck: _adapter(ck)["methods"].append(dict(_adapter(ck)["methods"][0])),
        r"2 methods in the file, 1 attached",
    ),
    "another name": (
        lambda ck: ck[KEY]["roots"][""]["adapters"].update(other=_adapter(ck)),
        r"adapter 'other' on root: in the file, not attached",
    ),
    "other sites": (
        lambda ck: _adapter(ck)["sites"].pop(),
        r"net\.3 \[16, 16\]: attached only",
    ),
    "other modules_to_save": (
        lambda ck: _adapter(ck).update(modules_to_save=[]),
        r"modules_to_save: \[\] in the file, \['net\.5'\] attached",
    ),
    "another base": (
        lambda ck: ck[KEY]["roots"][""]["fingerprint"]["tensors"]["net.0.weight"].__setitem__(
            2, "0" * 16
        ),
        r"another one \(1 tensors differ\)[\s\S]*net\.0\.weight: same shape, other values",
    ),
    "a base of another shape": (
        lambda ck: ck[KEY]["roots"][""]["fingerprint"]["tensors"]["net.0.weight"].__setitem__(
            0, [4, 4]
        ),
        r"net\.0\.weight: expected shape \[4, 4\], got \[16, 8\]",
    ),
    "another storage": (
        lambda ck: ck[KEY]["roots"][""].update(quantization={"kind": "nf4"}),
        r"written with quantization \{'kind': 'nf4'\}, this model has None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_the_reason(case: str, written: Path, tmp_path: Path) -> None:
    change, message = BAD[case]
    checkpoint = torch.load(written, weights_only=True)
    change(checkpoint)
    path = tmp_path / "bad.ckpt"
    torch.save(checkpoint, path)
    model = Plain()
    run = trainer(peft(modules_to_save=["5"]), max_epochs=2)
    with pytest.raises(ValueError, match=message) as caught:
        run.fit(model, ckpt_path=path)
    assert str(path) in str(caught.value)
    assert all(v.abs().sum() == 0 for k, v in adapters_of(model).items() if k.endswith(".B"))


def test_another_base_by_its_own_values(written: Path) -> None:
    model = Plain()
    with torch.no_grad():
        model.net[3].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"net\.3\.weight: same shape, other values"):
        trainer(peft(modules_to_save=["5"])).test(model, ckpt_path=str(written))


def test_a_fresh_head_that_is_trained_may_differ(written: Path) -> None:
    model = Plain()
    nn.init.normal_(model.net[5].weight)
    trainer(peft(modules_to_save=["5"])).test(model, ckpt_path=str(written), verbose=False)
    stored = stored_tensors(written)
    assert_same(adapters_of(model), stored)


def test_another_storage_is_a_warning_outside_training(tmp_path: Path) -> None:
    it = trainer(peft(), max_epochs=1)
    it.fit(Plain())
    it.save_checkpoint(tmp_path / "a.ckpt")
    quantised = trainer(peft(quantization=Quantization("nf4")))
    with pytest.warns(UserWarning, match="outputs differ by the rounding"):
        quantised.test(Plain(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)


def test_where_to_look_may_be_said_otherwise(tmp_path: Path) -> None:
    """The same sites under another selection are the same adapters."""
    it = trainer(peft(), max_epochs=1)
    it.fit(Plain())
    it.save_checkpoint(tmp_path / "a.ckpt")
    named = PEFT(lora(target_modules=["0", "3", "5"]), report=False)
    trainer(named).test(Plain(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)


def test_without_the_callback_lightning_says_what_is_missing(written: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*net\.0\.weight"):
        trainer().test(Plain(), ckpt_path=str(written))


def test_nothing_is_written_before_anything_is_attached(tmp_path: Path) -> None:
    class Late(Plain):
        def setup(self, stage: str) -> None:
            raise RuntimeError("early")

    good = tmp_path / "on_exception.ckpt"
    good.write_bytes(b"the former file")
    saving = pl.callbacks.OnExceptionCheckpoint(tmp_path, filename="on_exception")
    run = trainer(peft(), saving, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="no adapter is attached"), pytest.raises(RuntimeError):
        run.fit(Late())
    assert good.read_bytes() == b"the former file"


def test_a_base_tensor_that_somebody_else_writes_is_named(tmp_path: Path) -> None:
    class Leaking(pl.Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            checkpoint["mine"] = {"copy": [pl_module.net[0]._parameters["weight"].detach()]}

    it = trainer(peft(), Leaking(), max_epochs=1)
    it.fit(Plain())
    with pytest.warns(UserWarning, match=r"mine\.copy\[0\] holds a tensor of the frozen base"):
        it.save_checkpoint(tmp_path / "a.ckpt")


def test_no_leak_in_an_ordinary_file(tmp_path: Path) -> None:
    model = Plain()
    it = trainer(peft(), max_epochs=1)
    it.fit(model)
    checkpoint = it._checkpoint_connector.dump_checkpoint()
    assert any(path.startswith("state_dict.net.0.weight") for path in leaks(model, checkpoint))
    it.save_checkpoint(tmp_path / "a.ckpt")
    assert leaks(model, torch.load(tmp_path / "a.ckpt", weights_only=True)) == []


def test_hyper_parameters_that_are_no_plain_data_are_named(tmp_path: Path) -> None:
    class Fancy(Plain):
        def __init__(self, where_to: Path = tmp_path) -> None:
            super().__init__()
            self.save_hyperparameters()

    it = trainer(peft(), max_epochs=1)
    it.fit(Fancy())
    with pytest.warns(UserWarning, match=r"hyper-parameter 'where_to' is no plain data"):
        it.save_checkpoint(tmp_path / "a.ckpt")


# ---- load_from_checkpoint


@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_load_from_checkpoint_gives_the_same_output(where: str, tmp_path: Path) -> None:
    model = module(where)
    it = trainer(peft(quantization=Quantization("nf4"), modules_to_save=["5"]), max_epochs=1)
    it.fit(model)
    it.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(type(model), tmp_path / "a.ckpt", lr=0.5)
    x = torch.randn(4, 8)
    assert loaded.lr == 0.5
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_load_from_checkpoint_then_fit_goes_on(written: Path) -> None:
    loaded = load_from_checkpoint(Plain, written)
    before = adapters_of(loaded)
    trainer(peft(modules_to_save=["5"]), max_epochs=1).fit(loaded)
    assert list(adapters_of(loaded)) == list(before)


def test_load_from_checkpoint_restores_the_active_names(tmp_path: Path) -> None:
    both = PEFT(adapters={"a": lora(), "b": lora(r=1)}, report=False)
    it = trainer(both, max_epochs=1)
    it.fit(Plain())
    it.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Plain, tmp_path / "a.ckpt")
    assert loaded.net[0]._peft.active.names == ["a", "b"]


def test_load_from_checkpoint_names_a_net_built_in_setup(tmp_path: Path) -> None:
    it = trainer(peft(), max_epochs=1)
    it.fit(Plain("setup"))
    it.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"built in setup\(\) needs a run"):
        load_from_checkpoint(Plain, tmp_path / "a.ckpt")


def test_load_from_checkpoint_refuses_a_full_model(tmp_path: Path) -> None:
    it = trainer(max_epochs=1)
    it.fit(Plain())
    it.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"with adapters, got keys.*Plain\.load_from_checkpoint"):
        load_from_checkpoint(Plain, tmp_path / "a.ckpt")


def test_save_weights_only_checkpoints_say_so_on_fit(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="w", save_weights_only=True)
    trainer(peft(), saving, max_epochs=1).fit(Plain())
    with pytest.raises(ValueError, match="got weights alone"):
        trainer(peft(), max_epochs=2).fit(Plain(), ckpt_path=tmp_path / "w.ckpt")
    fresh = Configured()
    trainer(peft()).test(fresh, ckpt_path=str(tmp_path / "w.ckpt"), verbose=False)


def test_names_that_contain_our_words_load(tmp_path: Path) -> None:
    class Odd(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.lora_weight_adapters = nn.ModuleDict({"weight": nn.Linear(3, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lora_weight_adapters["weight"](self.net(x))

    pl.seed_everything(2, verbose=False)
    model = Odd()
    it = trainer(PEFT(LoRA(r=1, target_modules=["weight"]), report=False), max_epochs=1)
    it.fit(model)
    it.save_checkpoint(tmp_path / "a.ckpt")
    pl.seed_everything(2, verbose=False)
    loaded = load_from_checkpoint(Odd, tmp_path / "a.ckpt")
    assert list(adapters_of(loaded)) == [
        "lora_weight_adapters.weight.peft.default.A",
        "lora_weight_adapters.weight.peft.default.B",
    ]
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
