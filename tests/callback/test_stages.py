"""Every stage, every place where a net may be built, every tuner: attached once, base untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, Quantization, attach, detach, set_adapter
from lightning_peft.layers.adapted import adapted_modules
from tests.helpers.lightning_package import pl
from tests.helpers.nets import (
    Configured,
    Plain,
    adapters_of,
    assert_same,
    base_of,
    build,
    lora,
    module,
    peft,
    trainer,
)

pytestmark = pytest.mark.usefixtures("lightning_package")

PLACES = ("init", "setup", "configure_model")


def pretrained() -> dict[str, torch.Tensor]:
    return {f"net.{k}": v for k, v in build().state_dict().items()}


@pytest.mark.parametrize("where", PLACES)
def test_fit_trains_the_adapters_alone(where: str) -> None:
    model = module(where)
    trainer(peft()).fit(model)
    assert len(list(adapted_modules(model))) == 3
    assert_same(base_of(model), pretrained())
    assert all(adapters_of(model)[k].abs().sum() > 0 for k in adapters_of(model))
    assert "configure_model" not in vars(model)


@pytest.mark.parametrize("where", PLACES)
def test_all_stages_in_any_order(where: str) -> None:
    """Validation under inference mode comes first: nothing made there may be kept."""
    model = module(where)
    run = trainer(peft())
    run.validate(model, verbose=False)
    fresh = adapters_of(model)
    run.test(model, verbose=False)
    predicted = torch.cat(run.predict(model))
    assert torch.equal(predicted, torch.cat([build().eval()(b[0]) for b in model.val_dataloader()]))
    assert_same(adapters_of(model), fresh)
    run.fit(model)
    assert_same(base_of(model), pretrained())
    run.test(model, verbose=False)
    trained = adapters_of(model)
    assert any(not torch.equal(trained[k], fresh[k]) for k in fresh)


def test_fit_twice_goes_on() -> None:
    model, run = Plain(), trainer(peft(), max_epochs=1)
    run.fit(model)
    first = adapters_of(model)
    run.fit_loop.max_epochs = 2
    run.fit(model)
    assert len(list(adapted_modules(model))) == 3
    assert any(not torch.equal(first[k], v) for k, v in adapters_of(model).items())


def test_a_second_trainer_finds_the_adapters() -> None:
    model = Plain()
    trainer(peft(), max_epochs=1).fit(model)
    first = adapters_of(model)
    trainer(peft(), max_epochs=1).validate(model, verbose=False)
    assert_same(adapters_of(model), first)


def test_a_second_configuration_under_one_name_is_refused() -> None:
    model = Plain()
    trainer(peft(), max_epochs=1).fit(model)
    before = adapters_of(model)
    with pytest.raises(RuntimeError, match=r"attached already.*r=2.*got.*r=1"):
        trainer(PEFT(lora(r=1)), max_epochs=1).fit(model)
    assert_same(adapters_of(model), before)


def test_detach_then_fit_attaches_again() -> None:
    model = Plain()
    trainer(peft(), max_epochs=1).fit(model)
    detach(model)
    trainer(PEFT(lora(r=1), report=False), max_epochs=1).fit(model)
    assert adapters_of(model)["net.0.peft.default.A"].shape[0] == 1


class Forgetful(Configured):
    def configure_model(self) -> None:
        self.net = build()


def test_a_net_that_is_rebuilt_loses_adapters_with_an_error() -> None:
    model, run = Forgetful(), trainer(peft(), max_epochs=1)
    run.fit(model)
    with pytest.raises(RuntimeError, match="thrown away"):
        run.test(model, verbose=False)


def test_a_net_that_is_rebuilt_is_filled_from_a_checkpoint(tmp_path: Path) -> None:
    model, run = Forgetful(), trainer(peft(), max_epochs=1, folder=tmp_path)
    run.fit(model)
    trained = adapters_of(model)
    run.test(model, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert_same(adapters_of(model), trained)


class Failing(Plain):
    def setup(self, stage: str) -> None:
        raise RuntimeError("the user's own")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_an_exception_leaves_the_module_as_it_was(stage: str) -> None:
    model = Failing()
    with pytest.raises(RuntimeError, match="the user's own"):
        getattr(trainer(peft()), stage)(model)
    assert "configure_model" not in vars(model)
    assert not list(adapted_modules(model))


def test_a_users_own_instance_hook_is_put_back() -> None:
    model = Plain()
    calls = []
    hook = lambda: calls.append(1)  # noqa: E731
    object.__setattr__(model, "configure_model", hook)
    trainer(peft(), max_epochs=1).fit(model)
    assert calls == [1]
    assert vars(model)["configure_model"] is hook


def test_the_module_may_bring_the_callback() -> None:
    class Bringing(Plain):
        def configure_callbacks(self) -> list[pl.Callback]:
            return [peft()]

    model = Bringing()
    trainer(max_epochs=1).fit(model)
    assert len(list(adapted_modules(model))) == 3


@pytest.mark.parametrize(
    "flags",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"barebones": True},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"inference_mode": False},
        {"detect_anomaly": True},
    ],
    ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()),
)
def test_trainer_flags(flags: dict[str, Any]) -> None:
    model = Plain()
    run = trainer(peft(), **{"max_epochs": 1, **flags})
    run.fit(model)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(
        str(flags.get("precision")), torch.float32
    )
    assert_same(base_of(model), {k: v.to(dtype) for k, v in pretrained().items()})
    assert all(v.dtype == dtype for v in adapters_of(model).values())
    assert adapters_of(model)["net.0.peft.default.B"].abs().sum() > 0


def test_quantised_bytes_survive_every_precision() -> None:
    bits = {}
    for precision in ("32-true", "bf16-true", "bf16-mixed"):
        model = Plain()
        trainer(peft(quantization=Quantization("nf4")), max_epochs=1, precision=precision).fit(
            model
        )
        layer = dict(model.net.named_modules())["3"]
        held = layer._parameters["weight"]
        bits[precision] = [held, layer.weight_absmax, layer.weight_absmax2]
        assert held.dtype == torch.uint8
    for others in list(bits.values())[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits["32-true"], others, strict=True))


@pytest.mark.parametrize("where", PLACES)
def test_learning_rate_finders_put_the_adapters_back(where: str, tmp_path: Path) -> None:
    model = module(where)
    run = trainer(peft(), default_root_dir=tmp_path, enable_checkpointing=True)
    pl.tuner.Tuner(run).lr_find(model, num_training=4, update_attr=True)
    assert all(v.abs().sum() == 0 for k, v in adapters_of(model).items() if k.endswith(".B"))
    assert_same(base_of(model), pretrained())
    run.fit(model)
    assert adapters_of(model)["net.0.peft.default.B"].abs().sum() > 0


def test_batch_size_scaling_puts_the_adapters_back(tmp_path: Path) -> None:
    model = Plain()
    run = trainer(peft(), default_root_dir=tmp_path, enable_checkpointing=True)
    pl.tuner.Tuner(run).scale_batch_size(model, max_trials=2, init_val=4, steps_per_trial=1)
    assert all(v.abs().sum() == 0 for k, v in adapters_of(model).items() if k.endswith(".B"))
    assert_same(base_of(model), pretrained())
    run.fit(model)
    assert_same(base_of(model), pretrained())


@pytest.mark.parametrize(
    "finder",
    [
        lambda: pl.callbacks.LearningRateFinder(num_training_steps=4),
        lambda: pl.callbacks.BatchSizeFinder(max_trials=2, init_val=4, steps_per_trial=1),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
def test_finders_as_callbacks(finder: Any, tmp_path: Path) -> None:
    model = Plain()
    trainer(peft(), finder(), default_root_dir=tmp_path, enable_checkpointing=True).fit(model)
    assert_same(base_of(model), pretrained())
    assert adapters_of(model)["net.0.peft.default.B"].abs().sum() > 0


class Compiled(Plain):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "copy":
            self.fast = torch.compile(self.net, backend="eager")
        elif how == "in place":
            self.net.compile(backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fast(x) if self.how == "copy" else self.net(x)


@pytest.mark.one_package
@pytest.mark.parametrize("how", ["copy", "in place"])
def test_compiled_nets_train_as_plain_ones(how: str) -> None:
    results = []
    for model in (Plain(), Compiled(how)):
        torch.manual_seed(5)
        trainer(PEFT(lora(dropout=0.0), report=False), max_epochs=1).fit(model)
        results.append(model.net.state_dict())
    for key, tensor in results[0].items():
        torch.testing.assert_close(results[1][key], tensor, msg=key)
    torch.compiler.reset()


def test_root_adapts_a_part_and_leaves_the_rest_to_the_user() -> None:
    class TwoParts(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(CLASSES_OUT, CLASSES_OUT)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(x))

    CLASSES_OUT = 3
    model = TwoParts()
    head = model.head.weight.detach().clone()
    trainer(peft(root="net"), max_epochs=1).fit(model)
    assert {n.split(".")[0] for n, _ in adapted_modules(model)} == {"net"}
    assert not torch.equal(model.head.weight, head)
    assert_same({k: v for k, v in base_of(model).items() if k.startswith("net.")}, pretrained())


def test_an_unknown_root_is_named() -> None:
    with pytest.raises(ValueError, match=r"path of a submodule, got 'nett'.*\['net'"):
        trainer(peft(root="nett")).fit(Plain())


def test_several_adapters_act_and_train_in_the_order_named() -> None:
    model = Plain()
    both = PEFT(adapters={"first": lora(), "second": [lora(r=1)]}, report=False)
    trainer(both, max_epochs=1).fit(model)
    adapted = model.get_submodule("net.0")
    assert adapted._peft.active.names == ["first", "second"]
    for name in ("first", "second"):
        assert adapters_of(model)[f"net.0.peft.{name}.B"].abs().sum() > 0
    set_adapter(model, "second")
    assert adapted._peft.active.names == ["second"]


def test_two_callbacks_on_one_module() -> None:
    model = Plain()
    trainer(peft(adapter_name="a"), peft(adapter_name="b"), max_epochs=1).fit(model)
    assert set(model.get_submodule("net.0").peft) == {"a", "b"}
    assert all(adapters_of(model)[f"net.0.peft.{n}.B"].abs().sum() > 0 for n in "ab")
    assert_same(base_of(model), pretrained())


def test_attached_by_hand_before_the_trainer() -> None:
    model = Plain()
    attach(model, lora())
    trainer(peft(), max_epochs=1).fit(model)
    assert len(list(adapted_modules(model))) == 3
    assert adapters_of(model)["net.0.peft.default.B"].abs().sum() > 0


def test_attaching_leaves_the_random_stream_to_the_data() -> None:
    """Order of batches is the same with and without the callback."""
    seen: list[list[torch.Tensor]] = []

    class Watching(Plain):
        def training_step(self, batch: list[torch.Tensor], i: int) -> torch.Tensor:
            seen[-1].append(batch[1].clone())
            self.net.eval()  # no dropout: its draws belong to the model
            return super().training_step(batch, i)

    for callbacks in ([], [peft()]):
        seen.append([])
        torch.manual_seed(11)
        trainer(*callbacks, max_epochs=1).fit(Watching())
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_without_a_printed_report_the_configuration_is_logged(tmp_path, capsys) -> None:
    logged: dict[str, Any] = {}

    class Spy(pl.loggers.Logger):
        name, version = "spy", 0

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            logged.update(params)

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    run = trainer(PEFT(lora(), report=False), max_epochs=1, logger=Spy(), limit_train_batches=1)
    run.fit(Plain())
    assert logged["peft/default"]["adapters"]["default"][0]["method"] == "LoRA"
    assert "trained" not in capsys.readouterr().out
