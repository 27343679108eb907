"""What every job checks: train, resume, load, predict and merge, with LoRA and with LoRA over NF4.

The oracles: a resumed run equals an uninterrupted one, a fresh model with the file predicts what
the trained one predicts, and the merged model predicts what the adapted one predicts.
"""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_peft import (
    PEFT,
    LoRA,
    Quantization,
    adapter_state_dict,
    attach,
    load_checkpoint,
    merge,
    parameter_report,
    save_checkpoint,
    unmerge,
)
from lightning_peft.trainers.callback_base import TrainerCallback

__all__ = ["Case", "examine"]

S = TypeVar("S")
STORAGES = ("dense", "nf4")
STAGES = ("train", "resume", "load", "predict", "merge")
MERGE_ERROR = 1e-5
"""Largest difference of a prediction before and after the merge, relative to its largest value."""


@dataclass(frozen=True)
class Case(Generic[S]):
    """One model of one package.

    Attributes:
        package: Name on PyPI.
        model: Class of the model, for the table.
        entry: The package's own call that trains it, for the table.
        build: Returns the model or the package's estimator with its pretrained weights. Every call
            returns the same weights.
        fit: Trains it for two epochs: (subject, callbacks, checkpoint to resume from or None).
        predict: Returns predictions of the subject on fixed data.
        module: Returns the module of the subject that the Trainer sees.
        prepare: Called before adapters are loaded into a fresh subject: builds the net of a
            package that builds it late.
        peft: Arguments of `PEFT` besides the method and the quantization.
        quantization: Arguments of `Quantization` besides the kind.
        lora: Arguments of `LoRA` besides the rank and the targets.
        resumes: Whether the entry takes a checkpoint. If not, the adapters are loaded into a fresh
            subject before it is trained again.
        weights_only: False if the package's hyper-parameters are objects.
        remark: What the table says.
    """

    package: str
    model: str
    entry: str
    build: Callable[[], S]
    fit: Callable[[S, list[Any], str | None], object]
    predict: Callable[[S], Tensor]
    module: Callable[[S], nn.Module] = lambda subject: subject  # type: ignore[assignment,return-value]
    prepare: Callable[[S], None] = lambda subject: None
    peft: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    resumes: bool = True
    weights_only: bool = True
    remark: str = ""


def examine(case: Case[Any]) -> None:
    """Run all stages under each storage and print one line of JSON per storage."""
    for storage in STORAGES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(_Examination(case, storage, Path(folder)).run()), flush=True)


class Snapshots(TrainerCallback):
    """Writes a checkpoint after the first epoch, and another when it is asked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.trainer = str(path), None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.trainer = trainer

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "trainer": None}  # libraries copy the callbacks they are given


class FirstGradients(TrainerCallback):
    """Notes which parameters of a plain model get no gradient, or zeros, in its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.zero: set[int] | None = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *optimizer: Any) -> None:
        if self.zero is None:
            self.zero = {
                id(p) for p in pl_module.parameters() if p.grad is None or not p.grad.any()
            }


class _Examination:
    def __init__(self, case: Case[Any], storage: str, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.quantization = (
            None if storage == "dense" else Quantization(storage, **case.quantization)
        )
        self.line: dict[str, Any] = {
            "package": case.package,
            "lightning": "",
            "model": case.model,
            "entry": case.entry,
            "storage": storage,
            "argument": _shown(case),
            "remark": case.remark,
            **dict.fromkeys(STAGES, "not reached"),
        }
        self.file, self.half = str(folder / "end.ckpt"), folder / "half.ckpt"

    def run(self) -> dict[str, Any]:
        with self.stage("train"):
            first = self.train()
            with self.stage("resume"):
                self.line["resume"] = self.resume(first)
            with self.stage("load"):
                fresh = self.load()
                self.line["load"] = "equal"
                with self.stage("predict"):
                    self.line["predict"] = self.compare(first, fresh)
                with self.stage("merge"):
                    self.line["merge"] = self.merge(fresh)
        return self.line

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Put the error into the table; the stages that do not need this one go on."""
        try:
            yield
        except Exception as error:
            self.line[name] = f"{type(error).__name__}: {error}"

    def method(self) -> LoRA:
        return LoRA(**{"r": 4, "target_modules": "all-linear", **self.case.lora})

    def callback(self) -> PEFT:
        """The callback that goes into the package's own entry point."""
        return PEFT(self.method(), quantization=self.quantization, report=False, **self.case.peft)

    def build(self) -> Any:
        _seed(1)
        return self.case.build()

    def fit(self, subject: Any, ckpt: str | None = None) -> Snapshots:
        _seed(2)
        snapshots = Snapshots(self.folder / "again.ckpt" if ckpt else self.half)
        self.case.fit(subject, [self.callback(), snapshots], ckpt)
        return snapshots

    def predict(self, subject: Any) -> Tensor:
        _seed(3)
        self.case.module(subject).eval()
        with torch.no_grad():
            return self.case.predict(subject).detach().clone()

    def copies(self, subject: Any) -> dict[str, Tensor]:
        state = adapter_state_dict(self.case.module(subject))
        return {name: value.detach().clone() for name, value in state.items()}

    def train(self) -> Any:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            subject = self.build()
            trainer = self.fit(subject).trainer
        module = self.case.module(subject)
        report = parameter_report(module)
        factors = {k: v for k, v in self.copies(subject).items() if k.endswith(".B")}
        still = [k for k, v in factors.items() if not v.any()]
        self.line |= {
            "lightning": _lightning_package(module if trainer is None else trainer),
            "adapted": sum(group.count for group in report.groups),
            "packed": sum(_is_packed(m) for m in module.modules()),
            "trained": report.trainable,
            "total": report.total,
            "warned": [str(w.message) for w in said if "lightning_peft" in w.filename],
        }
        _require(len(still) < len(factors), "no adapter moved")
        # The library may train with a copy of the callback, or with a module around the subject's.
        if trainer is None or trainer.lightning_module is not module:
            save_checkpoint(module, self.file)
        else:
            trainer.save_checkpoint(self.file)
        self.check_file(module)
        self.line["train"] = "trained"
        if still:
            self.check_unmoved([name.partition(".peft.")[0] for name in still])
            self.line["train"] = f"{len(still)} of {len(factors)} adapters did not move"
        return subject

    def check_unmoved(self, layers: list[str]) -> None:
        """An adapter may stay only where the plain layer has no gradient in its first step."""
        plain, watch = self.build(), FirstGradients()
        _seed(2)
        self.case.fit(plain, [watch], None)
        assert watch.zero is not None
        module = self.case.module(plain)
        wrong = []
        for name in layers:
            weights = [p for p in module.get_submodule(name).parameters() if p.ndim > 1]
            if not all(id(p) in watch.zero or not p.requires_grad for p in weights):
                wrong.append(name)
        _require(not wrong, f"adapters did not move, the plain layers do: {wrong[:3]}")

    def check_file(self, module: nn.Module) -> None:
        written = torch.load(self.file, weights_only=False)["state_dict"]
        plain = self.build()
        self.case.prepare(plain)
        base = dict(self.case.module(plain).named_parameters())
        still = [n for n in base.keys() & written.keys() if torch.equal(base[n], written[n])]
        full = self.case.peft.get("checkpoint") == "full"
        _require(full or not still, f"the base is in the file: {still[:3]}")
        state = adapter_state_dict(module).items()
        lacking = [n for n, v in state if not torch.equal(written.get(n, torch.empty(0)), v)]
        _require(not lacking, f"not in the file: {lacking[:3]}")

    def resume(self, first: Any) -> str:
        again = self.build()
        if self.case.resumes:
            self.fit(again, str(self.half))
            want, got = self.copies(first), self.copies(again)
            apart = [n for n in want if not torch.equal(want[n], got[n])]
            _require(not apart, f"differs from the uninterrupted run: {len(apart)} of {len(want)}")
            return "bit for bit"
        self.load_into(again)
        start, module = self.copies(again), self.case.module(again)
        self.fit(again)
        _require(self.case.module(again) is module, "the entry trained another module")
        end = self.copies(again)
        _require(start.keys() == end.keys(), "other adapters after the resumed run")
        _require(any(not torch.equal(start[n], end[n]) for n in start), "the resumed run stood")
        return "adapters"

    def load(self) -> Any:
        fresh = self.build()
        self.load_into(fresh)
        return fresh

    def load_into(self, subject: Any) -> None:
        self.case.prepare(subject)
        module = self.case.module(subject)
        root = module.get_submodule(self.case.peft.get("root", ""))
        attach(root, self.method(), quantization=self.quantization, modules_to_save=None)
        load_checkpoint(module, self.file, weights_only=self.case.weights_only)

    def compare(self, first: Any, fresh: Any) -> str:
        """Predictions of the trained subject, the fresh one with the file, and the base."""
        trained, loaded = self.predict(first), self.predict(fresh)
        _require(bool(torch.isfinite(trained.float()).all()), "predictions are not finite")
        _require(torch.equal(trained, loaded), f"differs by {_apart(trained, loaded):.1e}")
        base = self.build()
        self.case.prepare(base)
        plain = self.predict(base)
        _require(not torch.equal(plain, loaded), "the adapters do not change the prediction")
        return "equal"

    def merge(self, fresh: Any) -> str:
        before = self.predict(fresh)
        merge(self.case.module(fresh))
        error = _apart(before, self.predict(fresh))
        _require(error <= MERGE_ERROR, f"merged: prediction differs by {error:.1e}")
        unmerge(self.case.module(fresh))
        _require(torch.equal(before, self.predict(fresh)), "unmerged: another prediction")
        return "equal"


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _is_packed(module: nn.Module) -> bool:
    return any(p.dtype == torch.uint8 for p in module.parameters(recurse=False))


def _apart(one: Tensor, other: Tensor) -> float:
    scale = one.double().abs().max().clamp_min(1e-12)
    return float((one.double() - other.double()).abs().max() / scale)


def _shown(case: Case[Any]) -> str:
    arguments = {**case.lora, **case.peft, **case.quantization}
    if not case.weights_only:
        arguments["weights_only"] = False
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _lightning_package(of: object) -> str:
    packages = [cls.__module__.partition(".")[0] for cls in type(of).__mro__]
    return next((p for p in packages if p in ("lightning", "pytorch_lightning")), "none")
