"""Language: a small OPT that knows Python's source code learns the prose of Python's manual."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.compare.tasks.base import Module, Split, Task
from benchmarks.compare.tasks.pretraining import pretrained

__all__ = ["Language"]

LENGTH, BATCH, STEPS = 54, 8, 120
PRETRAINING_LENGTH = 64  # room for 10 virtual tokens: no position is new when they come
SPLITS = {3: "test", 7: "validation"}  # topic number modulo 8


class Language(Task):
    """Perplexity per token; lower is better. Equal is within 1 % of the reference."""

    name: ClassVar[str] = "language"
    metric: ClassVar[str] = "perplexity"
    higher: ClassVar[bool] = False
    margin: ClassVar[float] = 0.01
    relative: ClassVar[bool] = True
    root: ClassVar[str] = "model"
    readout: ClassVar[str] = "lm_head"
    targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    embeddings: ClassVar[tuple[str, ...]] = ("embed_tokens", "lm_head")

    def __init__(self, work: Path) -> None:
        from pydoc_data.topics import topics

        from transformers import OPTConfig, OPTForCausalLM

        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        code = "\n".join(p.read_text("utf-8", errors="replace") for p in paths)
        self.tokenizer = _tokenizer(code)
        texts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        for i, key in enumerate(sorted(topics)):
            texts[SPLITS.get(i % 8, "train")].append(topics[key])
        self.splits = {k: self._windows("\n".join(v), LENGTH) for k, v in texts.items()}
        config = OPTConfig(
            vocab_size=1024, hidden_size=128, ffn_dim=512, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=128,
            dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False, pad_token_id=None,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = OPTForCausalLM(config)
        rows = self._windows(code, PRETRAINING_LENGTH)

        def batches() -> Iterator[Any]:
            while True:
                yield rows[torch.randint(len(rows), (16,))]

        path = work / "language.pt"
        self.template = pretrained(model, path, batches, self.loss, steps=1500, lr=2e-3)

    def _windows(self, text: str, length: int) -> Tensor:
        lines = text.splitlines(keepends=True)
        parts = ["".join(lines[i : i + 500]) for i in range(0, len(lines), 500)]
        ids = [i for e in self.tokenizer.encode_batch(parts) for i in e.ids]
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(input_ids=batch, labels=batch).loss
        return loss

    def loader(self) -> DataLoader[Any]:
        rows = self.splits["train"]
        picks = torch.randperm(len(rows))[: STEPS * BATCH]
        return DataLoader(rows[picks], batch_size=BATCH)  # type: ignore[arg-type]

    @torch.no_grad()
    def score(self, module: Module, split: Split) -> float:
        module.eval()
        parts = self.splits[split].split(32)
        total = sum(float(self.loss(module.model, part)) * len(part) for part in parts)
        return math.exp(total / len(self.splits[split]))


def _tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([text[:1_000_000]], trainer)
    return tokenizer
