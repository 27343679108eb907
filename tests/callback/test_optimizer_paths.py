"""Optimizers, schedulers and callbacks of users beside the callback."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IA3, PEFT, LoRAPlus, load_from_checkpoint
from lightning_peft.callback.unused_parameters import explain_unused_parameters
from tests.helpers.lightning_package import pl
from tests.helpers.nets import Plain, adapters_of, assert_same, lora, peft, trainer
from tests.helpers.stored import stored_tensors

pytestmark = pytest.mark.usefixtures("lightning_package")


def run(model: Any, *callbacks: Any, ckpt: Any = None, **options: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    it = trainer(*callbacks, **options)
    it.fit(model, ckpt_path=ckpt)
    return it


def test_ia3_runs_every_stage() -> None:
    model = Plain()
    it = trainer(PEFT(IA3(target_modules="all-linear"), report=False), max_epochs=1)
    it.fit(model)
    it.validate(model, verbose=False)
    it.test(model, verbose=False)
    it.fit_loop.max_epochs = 2
    it.fit(model)
    it.predict(model)


# ---- optimizers


class Cyclic(Plain):
    def configure_optimizers(self) -> Any:
        o = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        cyclic = torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2)
        return [o], [{"scheduler": cyclic, "interval": "step"}]


def test_loraplus_with_a_cyclic_rate() -> None:
    it = run(Cyclic(), PEFT(LoRAPlus(r=2, ratio=4.0, target_modules="all-linear"), report=False))
    slow, fast = it.optimizers[0].param_groups
    assert fast["lr"] == pytest.approx(4 * slow["lr"])
    assert fast["momentum"] == slow["momentum"]


class Named(Plain):
    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.named_parameters()), "name": "net"}]
        o = torch.optim.AdamW(groups, lr=self.lr)
        return [o], [torch.optim.lr_scheduler.StepLR(o, 1)]


def test_loraplus_with_named_groups_and_a_monitor(tmp_path: Path) -> None:
    model = Named()
    monitor = pl.callbacks.LearningRateMonitor()
    logger = pl.loggers.CSVLogger(tmp_path)
    method = LoRAPlus(r=2, target_modules="all-linear")
    it = run(model, PEFT(method, report=False), monitor, logger=logger)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in it.optimizers[0].param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert [g["name"] for g in it.optimizers[0].param_groups] == ["net", "net (fast)"]
    assert len(monitor.lrs) == 2


def test_half_precision_is_refused_before_the_first_step() -> None:
    model = Plain()
    with pytest.raises(ValueError, match=r"eps.*16-mixed.*adamw_8bit"):
        run(model, peft(), precision="16-true")
    run(Plain(), peft(optimizer="adamw_8bit"), precision="16-true")


def test_an_8bit_run_goes_on_without_the_argument(tmp_path: Path) -> None:
    run(Plain(), peft(optimizer="adamw_8bit"), folder=tmp_path, max_epochs=1)
    model = Plain()
    with pytest.warns(UserWarning, match="converted from 8 bit to AdamW"):
        it = run(model, peft(), ckpt=str(tmp_path / "last.ckpt"), max_epochs=2)
    assert it.global_step == 8
    assert all(bool(t.isfinite().all()) for t in adapters_of(model).values())


class Momentum(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def test_another_optimizer_class_is_named(tmp_path: Path) -> None:
    run(Plain(), peft(), folder=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"(?s)SGD can continue.*momentum_buffer, got exp_"):
        run(Momentum(), peft(), ckpt=str(tmp_path / "last.ckpt"), max_epochs=2)
    run(Momentum(), peft(), folder=tmp_path / "sgd", max_epochs=1)
    with pytest.raises(ValueError, match=r"(?s)AdamW can continue.*expected exp_avg, exp_avg_sq"):
        run(Plain(), peft(), ckpt=str(tmp_path / "sgd" / "last.ckpt"), max_epochs=2)


@pytest.mark.parametrize("saved", [None, "adamw_8bit"])
def test_the_moments_of_adamw_are_not_read_as_those_of_lion(
    saved: str | None, tmp_path: Path
) -> None:
    run(Plain(), peft(optimizer=saved), folder=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"(?s)Lion8bit can continue.*another optimizer class"):
        run(Plain(), peft(optimizer="lion_8bit"), ckpt=str(tmp_path / "last.ckpt"), max_epochs=2)


# ---- gradients


class TwoOptimizers(Plain):
    """Steps in turn, each over a half of the net."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.net[i].parameters(), lr=1e-2) for i in (0, 3)] + [
            torch.optim.AdamW(self.net[5].parameters(), lr=1e-2)
        ]


class ZeroHead(Plain):
    """Its head starts at zero, so nothing before it has a gradient in the first step."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.net[5].weight)


@pytest.mark.parametrize("build", [TwoOptimizers, ZeroHead])
def test_no_false_alarm(build: type[Plain]) -> None:
    saved = ["5"] if build is ZeroHead else []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*got no gradient")
        run(build(), peft(modules_to_save=saved))


class Unused(Plain):
    """Runs a branch whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.branch(x)
        return self.net(x)


class Cut(Unused):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.branch(x)
        return self.net(x + y)


def test_the_cause_is_named() -> None:
    with pytest.warns(UserWarning, match="branch: LoRA.*its output does not reach the loss"):
        run(Unused(), peft())
    with pytest.warns(UserWarning, match="branch: LoRA.*ran only without a graph"):
        run(Cut(), peft())


def test_ddp_errors_name_the_way_out() -> None:
    error = RuntimeError("Expected to have finished reduction in the prior iteration")
    explain_unused_parameters(error)
    pl.strategies.DDPStrategy().on_exception(error)  # comes after the callbacks
    assert "PEFT(root=…)" in str(error)
    assert "PEFTDDPStrategy(find_unused_parameters=True)" in str(error)


# ---- other callbacks


def test_what_pruning_did_is_saved(tmp_path: Path) -> None:
    module = Plain()
    pruning = pl.callbacks.ModelPruning(
        "l1_unstructured", parameters_to_prune=[(module.net[0], "weight")], amount=0.5
    )
    run = trainer(peft(), pruning, max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    written = stored_tensors(tmp_path / "a.ckpt")
    live = module.state_dict()["net.0.weight"]  # Lightning makes pruning permanent at the end
    assert 0.4 < float((live == 0).float().mean()) < 0.6
    assert torch.equal(written["net.0.weight"], live)


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("layer", ["0", "5"])
def test_a_pruned_run_resumes_and_loads(layer: str, permanent: bool, tmp_path: Path) -> None:
    def fit(ckpt: Path | None = None, folder: Path | None = None) -> Plain:
        module = Plain()
        pruning = pl.callbacks.ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(module.net.get_submodule(layer), "weight")],
            amount=0.2,
            apply_pruning=lambda epoch: epoch > 0,
            use_lottery_ticket_hypothesis=False,
            make_pruning_permanent=permanent,
        )
        run(module, peft(), pruning, max_epochs=4, folder=folder, ckpt=ckpt)
        return module

    whole = fit(folder=tmp_path)
    for epoch in range(3):  # before the first pruning and after it
        resumed = fit(ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    loaded = load_from_checkpoint(Plain, tmp_path / "epoch=3.ckpt").eval()
    x = torch.randn(4, 8)
    torch.testing.assert_close(loaded(x), whole.eval()(x))


@pytest.mark.parametrize(
    ("layer", "options", "why"),
    [
        ("5", {"modules_to_save": ["5"]}, r"net\.5\.weight: has a trained copy"),
        ("3", {"quantization": "nf4"}, r"net\.3\.weight: packed bytes"),
    ],
)
def test_weights_that_are_not_read_are_not_pruned(
    layer: str, options: dict[str, Any], why: str
) -> None:
    module = Plain()
    pruned = [(module.net.get_submodule(layer), "weight")]
    pruning = pl.callbacks.ModelPruning("l1_unstructured", parameters_to_prune=pruned, amount=0.2)
    with pytest.raises(ValueError, match=f"(?s)ModelPruning: expected weights.*{why}"):
        run(module, peft(**options), pruning, max_epochs=1)


class WithHead(Plain):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.net(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def finetuning(first: str) -> list[Any]:
    found = [
        PEFT(lora(), root="net", report=False),
        pl.callbacks.BackboneFinetuning(1, verbose=False, backbone_initial_lr=1e-3, train_bn=False),
    ]
    return found if first == "peft" else found[::-1]


@pytest.mark.parametrize("first", ["peft", "finetuning"])
def test_finetuning_of_a_part_outside_the_root_resumes(first: str, tmp_path: Path) -> None:
    whole = WithHead()
    run(whole, *finetuning(first), max_epochs=4, folder=tmp_path)
    start = WithHead().backbone[0].weight
    assert not torch.equal(whole.backbone[0].weight, start)  # unfrozen after the first epoch
    for epoch in range(3):  # before and after that
        resumed = WithHead()
        file = str(tmp_path / f"epoch={epoch}.ckpt")
        it = run(resumed, *finetuning(first), max_epochs=4, ckpt=file)
        assert it.global_step == 16
        assert len(it.optimizers[0].param_groups) == 2
        assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_another_class_with_the_same_state_is_named(tmp_path: Path) -> None:
    def run(kind: type[torch.optim.Optimizer], **more: object) -> None:
        class Net(Plain):
            def configure_optimizers(self) -> torch.optim.Optimizer:
                return kind([p for p in self.parameters() if p.requires_grad], lr=1e-3)

        fit = trainer(peft(), max_epochs=2 if more else 1)
        fit.fit(Net(), **more)
        fit.save_checkpoint(tmp_path / "a.ckpt")

    run(torch.optim.AdamW)
    with pytest.warns(UserWarning, match=r"trained with \['AdamW'\].*returns \['RAdam'\]"):
        run(torch.optim.RAdam, ckpt_path=str(tmp_path / "a.ckpt"))
