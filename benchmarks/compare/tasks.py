"""The two tasks on which methods are compared; nothing is downloaded.

classification: the quickstart's: which package of Python's standard library is a docstring from,
by a pretrained MiniLM; passages cut to 16 tokens, each seen twice, 16 a batch. language: a small
OPT is pretrained here on the source code of Python's standard library and adapted to the prose of
Python's manual (pydoc's topics, every eighth held out).
"""

from __future__ import annotations

import copy
import math
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import quickstart

__all__ = ["TASKS", "Classification", "Language"]

HEAD_RATE = 3e-3  # of the classifier's fresh head, beside every method


def warmed(optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    """A tenth of the steps up, then down to nothing in a line."""
    up = max(1, steps // 10)
    factor: Callable[[int], float] = lambda i: min((i + 1) / up, (steps - i) / (steps - up))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Classifier(quickstart.Classifier):
    """The quickstart's module with a schedule and a learning rate of its own for the head."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.encoder.parameters()), "lr": self.hparams["lr"]},
            {"params": list(self.head.parameters()), "lr": HEAD_RATE},
        ]
        steps = int(self.trainer.estimated_stepping_batches)
        return warmed(torch.optim.AdamW(groups, weight_decay=0.0), steps)


class Classification:
    """Score: accuracy in percent, higher is better."""

    name, score_name, better = "classification", "accuracy", max
    root, length, batch, passes = "encoder", 16, 16, 2
    targets = ("query", "key", "value", "dense")
    feedforward = ("output.dense",)

    def __init__(self, work: Path) -> None:
        self.template = Classifier(str(quickstart.MINILM), lr=0.0)
        del self.template.encoder.pooler  # never run here: the head reads the mean
        self.template.encoder.pooler = None
        self.passages, self.labels = self._read(held_out=False)
        self.held_out = self._read(held_out=True)

    def _read(self, held_out: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Tokens [N, length] by name, and labels [N]."""
        batches = quickstart.passages(str(quickstart.MINILM), held_out=held_out).dataset
        tokens = {k: torch.cat([self._cut(t[k]) for t, _ in batches]) for k in batches[0][0]}
        return tokens, torch.cat([labels for _, labels in batches])

    def _cut(self, tokens: Tensor) -> Tensor:
        """At `length`; shorter ones padded with 0, in the mask too."""
        short = max(0, self.length - tokens.shape[1])
        return nn.functional.pad(tokens, (0, short))[:, : self.length]

    def module(self, lr: float) -> Any:
        """The pretrained encoder with a fresh head."""
        module = copy.deepcopy(self.template)
        module.hparams["lr"] = lr
        module.head.reset_parameters()
        return module

    def _batch(self, rows: Tensor) -> Any:
        return {k: t[rows] for k, t in self.passages.items()}, self.labels[rows]

    def loader(self) -> DataLoader[Any]:
        """Every passage once an epoch, in random order; all epochs in one."""
        orders = [torch.randperm(len(self.labels)) for _ in range(self.passes)]
        batches = [self._batch(rows) for order in orders for rows in order.split(self.batch)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def longest(self) -> Any:
        return self._batch(torch.arange(self.batch))

    def loss(self, module: Any, batch: Any) -> Tensor:
        loss: Tensor = module.training_step(batch)
        return loss

    @property
    def steps(self) -> int:
        """Of training."""
        return self.passes * -(-len(self.labels) // self.batch)

    @torch.no_grad()
    def score(self, module: Any) -> float:
        """Percent of the held-out passages."""
        module.eval()
        tokens, labels = self.held_out
        found = [
            module({k: t[rows] for k, t in tokens.items()}).argmax(-1)
            for rows in torch.arange(len(labels)).split(32)
        ]
        return 100 * float((torch.cat(found) == labels).float().mean())

    def heads(self, module: Any) -> list[Tensor]:
        """What is trained beside every method."""
        return list(module.head.parameters())


class LanguageModel(pl.LightningModule):
    """A causal language model."""

    def __init__(self, net: Any, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        return warmed(optimizer, int(self.trainer.estimated_stepping_batches))


class Language:
    """Score: perplexity a token, lower is better."""

    name, score_name, better = "language", "perplexity", min
    root, length, batch = "net", 54, 8
    pretraining_length = 64  # room for 10 virtual tokens: no position is new when they come
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    feedforward = ("fc2",)
    steps = 120
    pretraining_steps = 1500

    def __init__(self, work: Path) -> None:
        from pydoc_data.topics import topics

        self.tokenizer = self._tokenizer(code := self._code())
        self.template = self._pretrained(work / "language.pt", code)
        texts = [topics[k] for k in sorted(topics)]
        own = [
            "\n".join(t for i, t in enumerate(texts) if (i % 8 == 3) == h) for h in (False, True)
        ]
        self.train, self.held_out = (self._windows(text, self.length) for text in own)

    @staticmethod
    def _code() -> str:
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return "\n".join(p.read_text("utf-8", errors="replace") for p in paths)

    @staticmethod
    def _tokenizer(text: str) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=1024, initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator([text[:1_000_000]], trainer)
        return tokenizer

    def _windows(self, text: str, length: int) -> Tensor:
        lines = text.splitlines(keepends=True)
        parts = ["".join(lines[i : i + 500]) for i in range(0, len(lines), 500)]
        ids = [i for e in self.tokenizer.encode_batch(parts) for i in e.ids]
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    def _pretrained(self, path: Path, code: str) -> Any:
        from transformers import OPTConfig, OPTForCausalLM

        config = OPTConfig(
            vocab_size=1024, hidden_size=128, ffn_dim=512, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=128,
            dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False, pad_token_id=None,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = OPTForCausalLM(config).train()
            if path.exists():
                net.load_state_dict(torch.load(path, weights_only=True))
                return net
            windows = self._windows(code, self.pretraining_length)
            module = LanguageModel(net, 2e-3)
            optimizer = torch.optim.AdamW(net.parameters(), lr=module.lr, weight_decay=0.01)
            schedule = warmed(optimizer, self.pretraining_steps)["lr_scheduler"]["scheduler"]
            for step in range(self.pretraining_steps):
                loss = module.training_step(windows[torch.randint(len(windows), (16,))])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if step % 300 == 0:
                    print(f"pretraining step {step}: loss {float(loss.detach()):.2f}", flush=True)
        torch.save(net.state_dict(), path)
        return net

    def module(self, lr: float) -> Any:
        """The pretrained model."""
        return LanguageModel(copy.deepcopy(self.template), lr)

    def loader(self) -> DataLoader[Any]:
        """`steps` batches of windows in random order."""
        picks = torch.randperm(len(self.train))[: self.steps * self.batch]
        return DataLoader(self.train[picks], batch_size=self.batch)  # type: ignore[arg-type]

    def longest(self) -> Any:
        return self.train[: self.batch]

    def loss(self, module: Any, batch: Any) -> Tensor:
        loss: Tensor = module.training_step(batch)
        return loss

    @torch.no_grad()
    def score(self, module: Any) -> float:
        """exp of the mean loss over the held-out windows."""
        module.eval()
        losses = [module.training_step(b) for b in self.held_out.split(32)]
        weights = [len(b) for b in self.held_out.split(32)]
        total = sum(float(x) * n for x, n in zip(losses, weights, strict=True))
        return math.exp(total / sum(weights))

    def heads(self, module: Any) -> list[Tensor]:
        """What a row without a method trains."""
        return list(module.net.lm_head.parameters())


TASKS: dict[str, Any] = {c.name: c for c in (Classification, Language)}
