"""From one line to a deployed model, as the README says it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, BertConfig, BertModel

from lightning_peft import PEFT, LoRA, export_merged, load_adapter, merge_and_unload
from tests.helpers import end_to_end_job as job
from tests.helpers.compare import assert_close, assert_same_bits


def elsewhere(step: str, source: Path, out: Path) -> torch.Tensor:
    """The result of a step in a fresh process."""
    command = [sys.executable, "-m", job.__name__, step, str(source), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: torch.Tensor = torch.load(out, weights_only=True)
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[job.Classifier, Path]:
    """QLoRA by one callback: the module, and the folder with base, checkpoint and adapter."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "base")
    module = job.Classifier(str(folder / "base"))
    data = DataLoader(TensorDataset(job.IDS, job.LABELS), 2)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[PEFT(LoRA(r=8), quantization="nf4", export_to=folder / "adapter")],
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, folder


def test_a_fresh_process_scores_the_same(trained, tmp_path) -> None:
    module, folder = trained
    got = elsewhere("load", folder / "last.ckpt", tmp_path / "scores.pt")
    assert_same_bits("scores", got, job.scores(module))


@pytest.mark.slow
def test_the_plain_model_needs_no_package_of_ours(trained, tmp_path) -> None:
    module, folder = trained
    again = job.Classifier(str(folder / "base"))
    load_adapter(again, folder / "adapter", quantization="nf4")
    want = job.hidden(again.encoder)
    assert_same_bits("loaded", want, job.hidden(module.encoder))
    plain = merge_and_unload(again)
    plain.encoder.save_pretrained(tmp_path / "plain")
    got = elsewhere("plain", tmp_path / "plain", tmp_path / "hidden.pt")
    assert_close("plain", got, want, floor=1e-5)
    export_merged(folder / "adapter", folder / "base", tmp_path / "out", None, progress=False)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    merged = load_file(tmp_path / "plain" / "model.safetensors")
    assert exported.keys() == merged.keys()
    for key, value in merged.items():
        assert_close(key, exported[key], value, floor=1e-6)


def test_peft_and_transformers_read_the_adapter(trained, tmp_path) -> None:
    _, folder = trained
    again = job.Classifier(str(folder / "base"))
    load_adapter(again, folder / "adapter")
    want = job.hidden(again.encoder)
    theirs = PeftModel.from_pretrained(
        AutoModel.from_pretrained(folder / "base"), folder / "adapter"
    )
    assert_close("peft", job.hidden(theirs), want, floor=1e-5)
    model = AutoModel.from_pretrained(folder / "base")
    model.load_adapter(str(folder / "adapter"))
    assert_close("transformers", job.hidden(model), want, floor=1e-5)
