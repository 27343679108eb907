"""The callback with methods that change no weights: resume equals uninterrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_peft as lp
from tests.helpers.compare import assert_same_bits
from tests.helpers.stored import stored_tensors
from tests.helpers.tiny_models import BUILDERS, example_inputs, main_output

METHODS: dict[str, tuple[str, Any]] = {
    "lstm": ("gpt2", lp.PTuning(n=2, encoder="lstm", hidden=4)),
    "prefix": ("bert", lp.PrefixTuning(n=2, projection=True, hidden=4)),
    "hard": ("t5", lp.HardPrompt(n=2)),
    "parallel": ("bert", lp.BottleneckAdapter("parallel")),
    "mam": ("gpt2", [lp.PrefixTuning(n=2), lp.BottleneckAdapter("parallel")]),
    "tokens": ("gpt2", lp.TrainableTokens([3, 5])),
    "tokens beside LoRA": ("t5", lp.LoRA(r=2, trainable_token_indices=[3, 5])),
    "norm": ("t5", lp.NormTuning()),
    "last": ("bert", lp.LastLayers(1)),
    "diff": (
        "gpt2",
        lp.DiffPruning(target_modules=["c_attn"], density=0.2, fix_at=0.7, final_temperature=0.2),
    ),
}


class Net(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = BUILDERS[name]().train()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(name: str, method: Any, epochs: int, folder: Path, ckpt: Any = None, seed: int = 1) -> Net:
    pl.seed_everything(seed, verbose=False)
    x = example_inputs(name, batch=6)
    rows = [{k: t[i] for k, t in x.items()} for i in range(6)]
    net = Net(name)
    trainer = pl.Trainer(
        max_epochs=3,
        limit_train_batches=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            lp.PEFT(method, report=False),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        ],
    )
    trainer.fit(net, DataLoader(rows, batch_size=2, shuffle=True), ckpt_path=ckpt)  # type: ignore[arg-type]
    return net


@pytest.mark.parametrize("case", METHODS)
def test_resume_is_uninterrupted(case: str, tmp_path: Path) -> None:
    name, method = METHODS[case]
    whole = fit(name, method, 3, tmp_path / "whole")
    cut = tmp_path / "whole" / "epoch=0.ckpt"
    resumed = fit(name, method, 3, tmp_path / "parts", ckpt=cut, seed=9)
    want, got = lp.adapter_state_dict(whole), lp.adapter_state_dict(resumed)
    assert set(want) == set(got)
    for key, tensor in want.items():
        assert_same_bits(key, got[key], tensor)
    written = torch.load(tmp_path / "whole" / "epoch=2.ckpt", weights_only=True)
    assert set(stored_tensors(written)) == set(want)
    loaded = lp.load_from_checkpoint(Net, tmp_path / "whole" / "epoch=2.ckpt")
    x = example_inputs(name)
    with torch.no_grad():
        y = main_output(loaded.eval().net(**x))
        assert_same_bits("loaded", y, main_output(whole.eval().net(**x)))


def test_schedule_of_diff_pruning_runs_by_itself(tmp_path: Path) -> None:
    net = fit(*METHODS["diff"], 3, tmp_path)
    state = lp.adapter_state_dict(net)
    assert all(bool(t.all()) for k, t in state.items() if k.endswith(".fixed"))
    assert all(float(t) == pytest.approx(0.2) for k, t in state.items() if k.endswith(".tau"))
    masks = [t for k, t in state.items() if k.endswith(".mask")]
    kept = sum(int(t.sum()) for t in masks)
    assert kept == round(0.2 * sum(t.numel() for t in masks))
