"""Resume equals uninterrupted, parameter for parameter; only adapters are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, Quantization
from lightning_peft.checkpoint.contents import KEY
from tests.helpers.lightning_package import pl
from tests.helpers.nets import (
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
from tests.helpers.stored import stored_tensors

pytestmark = pytest.mark.usefixtures("lightning_package")

PLACES = ("init", "setup", "configure_model")


def run(
    model: pl.LightningModule,
    epochs: int,
    folder: Path,
    *callbacks: pl.Callback,
    ckpt: Path | None = None,
    seed: int = 1,
    **kwargs: Any,
) -> pl.Trainer:
    pl.seed_everything(seed, verbose=False)
    it = trainer(*callbacks, folder=folder, max_epochs=epochs, **kwargs)
    it.fit(model, ckpt_path=ckpt)
    return it


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("quantization", [None, Quantization("nf4")], ids=["dense", "nf4"])
def test_resume_is_uninterrupted(
    where: str, quantization: Quantization | None, tmp_path: Path
) -> None:
    """With dropout, shuffling and AdamW; the second process starts from another seed."""
    whole, first, second = (module(where) for _ in range(3))
    run(whole, 4, tmp_path / "whole", peft(quantization=quantization))
    run(first, 2, tmp_path / "parts", peft(quantization=quantization))
    last = tmp_path / "parts" / "last.ckpt"
    run(second, 4, tmp_path / "parts", peft(quantization=quantization), ckpt=last, seed=99)
    assert_same(dict(second.state_dict()), dict(whole.state_dict()))
    assert_same(base_of(second), base_of(first))
    assert any(not torch.equal(v, adapters_of(first)[k]) for k, v in adapters_of(whole).items())


@pytest.mark.one_package
@pytest.mark.sweep(0.5)
@pytest.mark.parametrize(
    "averaging",
    [
        lambda: pl.callbacks.EMAWeightAveraging(decay=0.9),
        lambda: pl.callbacks.WeightAveraging(),
        lambda: pl.callbacks.StochasticWeightAveraging(
            swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1
        ),
    ],
    ids=["EMA", "WeightAveraging", "SWA"],
)
@pytest.mark.parametrize("peft_first", [True, False])
def test_resume_with_averages(averaging: Any, peft_first: bool, tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        both: list[pl.Callback] = [peft(quantization=Quantization("nf4")), averaging()]
        return both if peft_first else both[::-1]

    whole, first, second = Plain(), Plain(), Plain()
    run(whole, 5, tmp_path / "whole", *callbacks())
    cut = tmp_path / "whole" / "epoch=2.ckpt"
    run(second, 5, tmp_path / "parts", *callbacks(), ckpt=cut, seed=99)
    assert_same(dict(second.state_dict()), dict(whole.state_dict()))
    run(first, 1, tmp_path / "first", *callbacks())
    assert_same(base_of(whole), base_of(first))
    written = torch.load(cut, weights_only=True)
    assert len(stored_tensors(written)) == len(adapters_of(whole))
    assert cut.stat().st_size < 60_000


class CountsSteps(Plain):
    """Its scheduler needs the number of steps, so the data is set up before fit starts."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_resume_with_data_that_is_set_up_early(tmp_path: Path) -> None:
    whole, second = CountsSteps(), CountsSteps()
    run(whole, 3, tmp_path / "whole", peft())
    run(second, 3, tmp_path / "parts", peft(), ckpt=tmp_path / "whole" / "epoch=0.ckpt", seed=99)
    assert_same(dict(second.state_dict()), dict(whole.state_dict()))


class NotesBatches(Plain):
    """Its data comes in order, and it notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(super().train_dataloader().dataset, 8)

    def training_step(self, batch: Any, index: int) -> Any:
        self.seen.append(float(batch[0].sum()))
        return super().training_step(batch, index)


def test_after_max_steps_the_callback_resumes_where_lightning_does(tmp_path: Path) -> None:
    """Lightning itself takes the first batch once more; see the page on limits."""

    def seen(*callbacks: pl.Callback, steps: int, ckpt: Path | None = None) -> list[float]:
        model = NotesBatches()
        it = trainer(*callbacks, max_steps=steps, max_epochs=9)
        it.fit(model, ckpt_path=ckpt)
        it.save_checkpoint(tmp_path / f"{len(callbacks)}-{steps}.ckpt")
        return model.seen

    batches = len(NotesBatches().train_dataloader())
    for callbacks in ([], [peft()]):
        seen(*callbacks, steps=batches)
    plain, adapted = (
        seen(*each, steps=2 * batches, ckpt=tmp_path / f"{len(each)}-{batches}.ckpt")
        for each in ([], [peft()])
    )
    assert adapted == plain
    assert len(plain) == batches


@pytest.mark.parametrize("kind", [Plain, CountsSteps])
def test_resume_mid_epoch_with_a_stateful_loader(kind: type[Plain], tmp_path: Path) -> None:
    class Loader:
        """Batches by position, and the position is kept."""

        def __init__(self) -> None:
            g = torch.Generator().manual_seed(3)
            self.x, self.y = torch.randn(8, 8, 8, generator=g), torch.randint(0, 3, (8, 8))
            self.at = 0

        def __len__(self) -> int:
            return 8

        def __iter__(self) -> Any:
            while self.at < 8:
                self.at += 1
                yield [self.x[self.at - 1], self.y[self.at - 1] * 0 + self.at % 3]
            self.at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    def once(folder: Path, ckpt: Path | None, seed: int) -> Plain:
        model = kind()
        pl.seed_everything(seed, verbose=False)
        each = pl.callbacks.ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=3, save_top_k=-1
        )
        trainer(peft(), each, max_epochs=2).fit(model, Loader(), ckpt_path=ckpt)
        return model

    whole = once(tmp_path / "whole", None, 1)
    resumed = once(tmp_path / "parts", tmp_path / "whole" / "step=3.ckpt", 99)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("weights_only", [False, True])
def test_only_what_is_trained_is_written(weights_only: bool, tmp_path: Path) -> None:
    model = Plain()
    it = trainer(peft(quantization=Quantization("nf4"), modules_to_save=["5"]))
    it.fit(model)
    it.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    written = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert_same(stored_tensors(written), adapters_of(model))
    assert set(stored_tensors(written)) == {
        *(f"net.{i}.peft.default.{n}" for i in (0, 3) for n in "AB"),
        "net.5.peft.default.weight",
        "net.5.peft.default.bias",
    }
    assert ("optimizer_states" in written) is not weights_only
    assert set(written[KEY]) >= {"format", "versions", "roots"}
    (adapter,) = written[KEY]["roots"][""]["adapters"].values()
    assert adapter["sites"] == [["net.0", [16, 8], "LoRA"], ["net.3", [16, 16], "LoRA"]]
    assert adapter["methods"][0]["r"] == 2


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_every_stage_reads_the_file(where: str, weights_only: bool, tmp_path: Path) -> None:
    model = module(where)
    it = trainer(peft(), folder=tmp_path)
    it.fit(model)
    it.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    predicted = torch.cat(it.predict(model))
    for stage in ("validate", "test", "predict"):
        fresh = module(where)
        getattr(trainer(peft()), stage)(fresh, ckpt_path=str(tmp_path / "a.ckpt"))
        assert_same(adapters_of(fresh), adapters_of(model))
    fresh = module(where)
    again = trainer(peft()).predict(fresh, ckpt_path=str(tmp_path / "a.ckpt"))
    assert torch.equal(torch.cat(again), predicted)


def test_best_and_last(tmp_path: Path) -> None:
    model = Plain()
    best = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="val_loss", save_last=True, filename="{epoch}"
    )
    it = trainer(peft(), best, max_epochs=3)
    it.fit(model)
    it.test(model, ckpt_path="best", verbose=False)
    stored = stored_tensors(best.best_model_path)
    assert_same(adapters_of(model), stored)
    it.fit_loop.max_epochs = 4
    it.fit(model, ckpt_path="last")
    assert it.current_epoch == 4


def test_tied_and_compiled_names_are_written_once(tmp_path: Path) -> None:
    class Aliased(Plain):
        def __init__(self, compiled: bool) -> None:
            super().__init__()
            self.alias = self.net
            if compiled:
                self.fast = torch.compile(self.net, backend="eager")

    files = {}
    for compiled in (False, True):
        model = Aliased(compiled)
        it = trainer(peft(), max_epochs=1)
        it.fit(model)
        files[compiled] = tmp_path / f"{compiled}.ckpt"
        it.save_checkpoint(files[compiled])
        written = stored_tensors(files[compiled])
        assert len(written) == 6
        assert all(k.startswith("net.") for k in written)
    for compiled in (False, True):  # each reads the other's
        fresh = Aliased(compiled)
        trainer(peft()).validate(fresh, ckpt_path=str(files[not compiled]), verbose=False)
        stored = stored_tensors(files[not compiled])
        assert torch.equal(fresh.alias[0].peft.default.A, stored["net.0.peft.default.A"])
    torch.compiler.reset()


def test_what_lies_outside_the_root_is_written_if_an_optimizer_holds_it(tmp_path: Path) -> None:
    class Outside(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)
            self.warmed_up_later = nn.Linear(3, 3).requires_grad_(False)
            self.teacher = nn.Linear(3, 3).requires_grad_(False)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += int(self.training)  # a resumed run may repeat the sanity check
            return self.head(self.net(x))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            parts = (self.net, self.head, self.warmed_up_later)
            return torch.optim.AdamW([p for m in parts for p in m.parameters()], lr=1e-2)

    def once(epochs: int, folder: Path, ckpt: Path | None = None, seed: int = 1) -> Outside:
        torch.manual_seed(0)
        model = Outside()
        run(model, epochs, folder, peft(root="net"), ckpt=ckpt, seed=seed)
        return model

    whole = once(3, tmp_path / "whole")
    resumed = once(3, tmp_path / "parts", tmp_path / "whole" / "epoch=0.ckpt", 99)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    written = stored_tensors(tmp_path / "whole" / "last.ckpt")
    linear = {f"{m}.{p}" for m in ("head", "warmed_up_later") for p in ("weight", "bias")}
    assert {k for k in written if ".peft." not in k} == {*linear, "seen"}


def test_buffers_that_training_moves_are_written(tmp_path: Path) -> None:
    class Counting(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.register_buffer("table", torch.arange(5.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += int(self.training)
            return super().forward(self.norm(x))

    whole, resumed = Counting(), Counting()
    run(whole, 3, tmp_path / "whole", peft())
    run(resumed, 3, tmp_path / "p", peft(), ckpt=tmp_path / "whole" / "epoch=1.ckpt", seed=99)
    assert int(whole.steps) == 12
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    written = stored_tensors(tmp_path / "whole" / "last.ckpt")
    others = {k for k in written if ".peft." not in k}
    assert others == {
        "steps",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_asynchronous_writing_holds_the_adapters_alone(tmp_path: Path) -> None:
    model = Plain()
    it = trainer(peft(), max_epochs=2, folder=tmp_path, plugins=[pl.plugins.io.AsyncCheckpointIO()])
    it.fit(model)
    it.strategy.checkpoint_io.teardown()
    stored = stored_tensors(tmp_path / "last.ckpt")
    assert_same(stored, adapters_of(model))
    assert not list(tmp_path.glob(".*tmp*"))


def test_several_adapters_resume(tmp_path: Path) -> None:
    def two() -> PEFT:
        return PEFT(adapters={"a": lora(), "b": lora(r=1)}, report=False)

    whole, resumed = Plain(), Plain()
    run(whole, 3, tmp_path / "whole", two())
    run(resumed, 3, tmp_path / "parts", two(), ckpt=tmp_path / "whole" / "epoch=0.ckpt", seed=9)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_two_callbacks_resume(tmp_path: Path) -> None:
    def two() -> list[PEFT]:
        return [peft(adapter_name="a"), peft(adapter_name="b")]

    whole, resumed = Plain(), Plain()
    run(whole, 3, tmp_path / "whole", *two())
    run(resumed, 3, tmp_path / "p", *two(), ckpt=tmp_path / "whole" / "epoch=0.ckpt", seed=9)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_a_users_own_state_dict_does_not_matter(tmp_path: Path) -> None:
    class Hiding(Plain):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            full = super().state_dict(*args, **kwargs)
            return {k: v for k, v in full.items() if ".peft." in k}

    whole, resumed = Hiding(), Hiding()
    run(whole, 3, tmp_path / "whole", peft())
    run(resumed, 3, tmp_path / "parts", peft(), ckpt=tmp_path / "whole" / "epoch=0.ckpt", seed=9)
    assert_same(dict(nn.Module.state_dict(resumed)), dict(nn.Module.state_dict(whole)))


def test_after_detaching_the_whole_model_is_written(tmp_path: Path) -> None:
    from lightning_peft import detach, merge

    model = Plain()
    it = trainer(peft(), max_epochs=1)
    it.fit(model)
    merge(model, keep_base=False)
    for _, adapted in list(model.named_modules()):
        if hasattr(adapted, "_peft"):
            adapted._peft.active.merged = []  # keep the merged weights, drop the adapters
    detach(model)
    it.save_checkpoint(tmp_path / "full.ckpt", weights_only=True)
    stored = stored_tensors(tmp_path / "full.ckpt")
    assert set(stored) == {f"net.{k}" for k in build().state_dict()}
