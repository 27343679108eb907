"""`PEFT(activations=..., loss=...)` in the Trainer: equal runs, and the model comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import PEFT, Activations, LoRA
from lightning_peft.adapters.state_dict import trained_tensors
from tests.helpers.lightning_package import InPackage, in_package, pl
from tests.helpers.nets import Plain, trainer
from tests.helpers.tiny_models import BUILDERS, VOCAB

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

ALL: dict[str, Any] = {
    "activations": Activations("checkpoint+offload", min_bytes=0),
    "loss": "chunked",
}


class Net(InPackage):
    """A language model as `from_pretrained` returns it; it knows nothing of limits."""

    def __init__(self, compiles: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: Any = BUILDERS["llama"]()
        self.compiles, self.losses = compiles, list[float]()

    def compile_blocks(self, when: str) -> None:
        if when == self.compiles:
            for block in self.net.model.layers:
                block.compile(backend="eager")

    def configure_model(self) -> None:
        self.compile_blocks("configure_model")

    def on_train_start(self) -> None:
        self.compile_blocks("on_train_start")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(input_ids=batch, labels=batch).loss)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        found: Tensor = self.net(input_ids=batch).logits
        return found

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        g = torch.Generator().manual_seed(3)
        return DataLoader(torch.randint(3, VOCAB, (8, 9), generator=g), batch_size=4)  # type: ignore[arg-type]

    val_dataloader = predict_dataloader = train_dataloader


def fitted(model: Any, folder: Path | None = None, **options: Any) -> Any:
    quiet = {"precision": options.pop("precision", "32-true"), "max_epochs": 1}
    method = LoRA(r=2, dropout=0.1, target_modules="all-linear")
    callback = PEFT(method, **{"report": False, **options})
    run = trainer(callback, folder=folder, **quiet)
    pl.seed_everything(1, verbose=False)
    run.fit(model)
    return run


def plain_attributes(model: nn.Module) -> dict[str, list[str]]:
    kinds = ("forward", "_compiled_call_impl", "_forward_hooks", "_forward_pre_hooks")
    return {
        n: [k for k in kinds if vars(m).get(k)]
        for n, m in model.named_modules()
        if any(vars(m).get(k) for k in kinds)
    }


@pytest.mark.parametrize("options", [{}, {"quantization": "nf4", "precision": "bf16-mixed"}])
def test_equal_runs(options: dict[str, Any], tmp_path: Path) -> None:
    first, second = Net(), Net()
    fitted(first, **options)
    run = fitted(second, tmp_path, **ALL, **options)
    rtol = 1e-5 if not options else 1e-2
    assert first.losses == pytest.approx(second.losses, rel=rtol)
    want = trained_tensors(first)
    for name, t in trained_tensors(second).items():
        torch.testing.assert_close(t, want[name], rtol=10 * rtol, atol=10 * rtol)
    assert plain_attributes(second) == plain_attributes(first)
    validated = run.validate(second, verbose=False)[0]["val_loss"]
    assert validated == pytest.approx(run.validate(first, verbose=False)[0]["val_loss"], rel=rtol)
    assert run.predict(second)[0].shape == (4, 9, VOCAB)
    assert plain_attributes(second) == plain_attributes(first)


def test_the_report_names_blocks_and_heads(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(Net(), report=True, **ALL)
    text = " ".join(capsys.readouterr().out.split())
    assert "activations: 2 blocks (net.model.layers.0 … net.model.layers.1) run again" in text
    assert "loss: net.lm_head in chunks of tokens" in text


@pytest.mark.parametrize("when", ["configure_model", "on_train_start"])
def test_compiled_blocks(when: str) -> None:
    plain, model = Net(), Net(when)
    fitted(plain)
    fitted(model, activations=Activations("checkpoint+offload", min_bytes=0))
    assert plain.losses == pytest.approx(model.losses, rel=1e-5)
    compiled = [vars(b)["_compiled_call_impl"] for b in model.net.model.layers]
    assert all(hasattr(c, "_torchdynamo_orig_callable") for c in compiled)
    assert plain_attributes(model) == {
        f"net.model.layers.{i}": ["_compiled_call_impl"] for i in (0, 1)
    }


def test_averages_run_without_limits() -> None:
    averages = pl.callbacks.EMAWeightAveraging(decay=0.5)
    model = Net()
    callback = PEFT(LoRA(r=2), report=False, **ALL)
    run = trainer(callback, averages, max_epochs=1)
    run.fit(model)
    assert plain_attributes(model) == {}
    copied: Any = averages._average_model
    assert copied is None or all("_compiled_call_impl" not in vars(m) for m in copied.modules())


class Failing(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise ArithmeticError("made up")


def test_the_model_comes_back_after_an_error() -> None:
    model = Failing()
    with pytest.raises(ArithmeticError):
        fitted(model, **ALL)
    assert plain_attributes(model) == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activations": "recompute"}, ValueError, "activations: expected one of"),
        ({"loss": "fused"}, ValueError, "PEFT loss: expected 'chunked' or None, got 'fused'"),
        (
            {"activations": Activations(blocks=["Nothing"])},
            ValueError,
            "got 'Nothing'; the nearest",
        ),
    ],
)
def test_bad_values_are_named(options: Any, error: type[Exception], message: str) -> None:
    model = Net()
    with pytest.raises(error, match=message):
        fitted(model, **options, **({} if "loss" in options else {"loss": "chunked"}))
    assert plain_attributes(model) == {}


def test_a_model_without_a_head_is_refused() -> None:
    model = Plain()
    run = trainer(PEFT(LoRA(r=2, target_modules=["0"]), report=False, loss="chunked"))
    with pytest.raises(ValueError, match="in a model of your own call chunked_cross_entropy"):
        run.fit(model)


CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  max_epochs: 1
  callbacks:
    - class_path: lightning_peft.PEFT
      init_args:
        report: false
        method: {class_path: lightning_peft.LoRA, init_args: {r: 2}}
        loss: chunked
        activations: ACTIVATIONS
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("checkpoint", Activations("checkpoint")),
        (
            "{kind: offload, blocks: [LlamaMLP], min_bytes: 0}",
            Activations("offload", ["LlamaMLP"], 0),
        ),
    ],
)
def test_from_yaml(text: str, expected: Activations, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("ACTIVATIONS", text))
    cli = pl.cli.LightningCLI(
        in_package(Net), args=["fit", "--config", str(path)], save_config_callback=None
    )
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, PEFT))
    assert callback.activations == expected
    assert callback.loss == "chunked"
    assert cli.trainer.global_step == 2
