"""What one process of a test run does: the jobs it is given, one after the other.

`python -m tests.helpers.distributed.jobs <file>`; the file holds a JSON list of `Job` fields.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import (
    PEFT,
    Activations,
    LoRA,
    MethodHooks,
    Quantization,
    attach,
    convert_optimizer,
    load_checkpoint,
    route,
    save_checkpoint,
    set_adapter,
)
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.optim.state_pool import local
from lightning_peft.storage import held_tensors
from lightning_peft.storage.packed import as_bytes
from tests.helpers.lightning_package import InPackage, current, fabric, pl, use_package
from tests.helpers.tiny_models import BUILDERS, VOCAB

SAMPLES, LENGTH, BATCH = 8, 9, 4


@dataclass
class Job:
    """One fit.

    Attributes:
        name: Of the result file, ``<folder>/<name>-<rank>.pt``.
        folder: Where checkpoints and results go.
        package: The Lightning package of the run.
        ckpt: Resume from here.
        fault: What goes wrong, on `fault_rank`, in step `fault_step`.
        base_seed: Seed of the base, by rank; one value for all.
        lora_r: LoRA's r, by rank.
        site_packages: Folders with further packages, by rank; "" for none.
        method_options: Further settings of the method.
        reverse: Whether the optimizer gets its parameters in reverse order.
        fabric: Whether a loop under Fabric trains, instead of a Trainer.
        mixed: Whether each sample is under one of two adapters.
        tasks: Number of tasks that samples belong to; 0 if the method reads none.
        draws: Whether the net trains in train mode; else it draws no random numbers.
        activations: Arguments of `Activations`.
        loss: As `PEFT` takes it.
        sgd: Learning rate of SGD in place of AdamW, which turns the rounding of a gradient near
            zero into a part of a step.
    """

    name: str
    folder: str
    package: str = field(default_factory=current)
    strategy: str = "auto"
    strategy_options: dict[str, Any] = field(default_factory=dict)
    devices: int = 1
    nodes: int = 1
    epochs: int = 2
    ckpt: str | None = None
    model: str = "llama"
    quantization: str | None = "nf4"
    block_size: int = 32
    double_quant: bool = True
    optimizer: str | None = None
    precision: str = "32-true"
    accumulate: int = 1
    clip: float | None = None
    every_n_steps: int | None = None
    fault: str = ""
    fault_rank: int = 0
    fault_step: int = 3
    base_seed: list[int] = field(default_factory=lambda: [7])
    lora_r: list[int] = field(default_factory=lambda: [4])
    site_packages: list[str] = field(default_factory=lambda: [""])
    method: str = "LoRA"
    method_options: dict[str, Any] = field(default_factory=dict)
    reverse: bool = False
    mixed: bool = False
    tasks: int = 0
    draws: bool = True
    modules_to_save: list[str] = field(default_factory=list)
    callbacks: list[str] = field(default_factory=list)
    validate: bool = False
    step_seconds: float = 0.0
    fabric: bool = False
    meta_from: str | None = None
    packed_cache: str | None = None
    watch_memory: bool = False
    activations: dict[str, Any] | None = None
    loss: str | None = None
    sgd: float | None = None


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


T = TypeVar("T")


def of_rank(values: list[T]) -> T:
    return values[min(rank(), len(values) - 1)]


def build(job: Job) -> torch.nn.Module:
    """The pretrained model: by its own seed, whatever ran before."""
    state = torch.get_rng_state()
    torch.manual_seed(of_rank(job.base_seed))
    with torch.device("cpu" if job.meta_from is None else "meta"):
        net = OWN[job.model]() if job.model in OWN else BUILDERS[job.model]()
    torch.set_rng_state(state)
    return net.train()


def large() -> torch.nn.Module:
    """A Llama of 77 M weights, 309 MB in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )


class Block(torch.nn.Module):
    """Every sample goes to one of two experts: a process may reach one of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def forward(self, h: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                y = y.index_copy(0, rows, expert(h[rows]).tanh())
        return h + y


class Routed(torch.nn.Module):
    """A mixture of experts that are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 32)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(32, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        h = self.embed(input_ids)
        for i, block in enumerate(self.blocks):
            h = block(h, input_ids[:, i] % 2)
        logits = self.head(h)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        return SimpleNamespace(loss=loss, logits=logits)


OWN: dict[str, Any] = {"large": large, "routed": Routed}


class Net(InPackage):
    """Knows nothing of adapters or strategies."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.net = build(job)
        self.job = job
        self.losses: list[float] = []
        self.memory: Memory | None = None
        self.grown_at_start = 0

    def forward(self, ids: Tensor) -> Any:
        if self.job.tasks:
            with lightning_peft.task_ids([int(row[0]) % self.job.tasks for row in ids]):
                return self.net(input_ids=ids, labels=ids)
        if not self.job.mixed:
            return self.net(input_ids=ids, labels=ids)
        with lightning_peft.adapter_names(["ab"[int(row[0]) % 2] for row in ids]):
            return self.net(input_ids=ids, labels=ids)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch).loss
        self.losses.append(float(loss.detach()))
        return loss * self._fault(loss)

    def on_train_epoch_start(self) -> None:
        self.net.train(self.job.draws)

    def on_train_start(self) -> None:
        if self.memory is not None:
            self.grown_at_start = self.memory.peak - self.memory.before

    def _fault(self, loss: Tensor) -> float:
        job = self.job
        time.sleep(job.step_seconds)
        if not job.fault or rank() != job.fault_rank or self.global_step != job.fault_step:
            return 1.0
        if job.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.fault == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        if job.fault == "full":
            import resource

            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        if job.fault == "error":
            raise ArithmeticError("made up")
        return float(job.fault) if job.fault in ("nan", "inf") else 1.0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).loss, sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits: Tensor = self(batch).logits
        return logits

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        trained = trained[::-1] if self.job.reverse else trained
        if self.job.sgd is not None:
            return torch.optim.SGD(trained, lr=self.job.sgd)
        return torch.optim.AdamW(trained, lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.trainer)

    val_dataloader = predict_dataloader = train_dataloader


def loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """Every process its part of the same global batches."""
    world, own = trainer.world_size, trainer.global_rank
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (SAMPLES, LENGTH), generator=g)
    return DataLoader(ids[own::world], batch_size=BATCH // world)  # type: ignore[arg-type]


def make(job: Job) -> tuple[Net, pl.Trainer, PEFT]:
    method, quantization = method_of(job), quantization_of(job)
    adapters = adapters_of(job, method)
    peft = PEFT(
        None if adapters else method,
        adapters=adapters,
        modules_to_save=job.modules_to_save,
        quantization=quantization,
        optimizer=job.optimizer,
        base_from=job.meta_from if _by_callback(job) else None,
        packed_cache=job.packed_cache,
        activations=None if job.activations is None else Activations(**job.activations),
        loss=job.loss,  # type: ignore[arg-type]
        report=False,
    )
    saving = pl.callbacks.ModelCheckpoint(
        job.folder,
        filename=f"{job.name}-{{step}}",
        save_top_k=-1,
        save_last=True,
        every_n_train_steps=job.every_n_steps,
        save_on_train_epoch_end=None if job.every_n_steps else True,
    )
    saving.CHECKPOINT_NAME_LAST = f"{job.name}-last"
    more: list[Any] = []
    if "on_exception" in job.callbacks:
        more.append(pl.callbacks.OnExceptionCheckpoint(job.folder))
    if "ema" in job.callbacks:
        more.append(pl.callbacks.EMAWeightAveraging())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=job.devices,
        num_nodes=job.nodes,
        strategy=strategy_of(job),
        callbacks=[peft, *more, saving],
        max_epochs=job.epochs,
        precision=job.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=job.accumulate,
        gradient_clip_val=job.clip,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=2 if job.validate else 0,
        num_sanity_val_steps=0,
    )
    pl.seed_everything(1, verbose=False)
    return Net(job), trainer, peft


def _by_callback(job: Job) -> bool:
    """Whether the callback gets the base's folder; else `peft_fsdp` does."""
    return job.strategy != "peft_fsdp" or job.packed_cache is not None


def quantization_of(job: Job) -> Quantization | None:
    if job.quantization is None:
        return None
    return Quantization(
        job.quantization,  # type: ignore[arg-type]
        block_size=job.block_size,
        double_quant=job.double_quant,
    )


def adapters_of(job: Job, method: Any) -> dict[str, Any] | None:
    """The adapters of a run with several; None if it has one."""
    if job.mixed:
        return {"a": method, "b": replace(method, alpha=2.0)}
    if job.method == "XLoRA":
        lora = LoRA(r=4, target_modules=["q_proj", "v_proj"])
        return {"a": lora, "b": replace(lora, alpha=2.0), "router": method}
    return None


def method_of(job: Job) -> Any:
    kind = getattr(lightning_peft, job.method)
    options = {"target_modules": "all-linear", **job.method_options}
    if job.method in ("MultitaskPrompt", "XLoRA"):
        del options["target_modules"]
    if "r" in kind.__dataclass_fields__:
        options = {"r": of_rank(job.lora_r), **options}
    return kind(**options)


def strategy_of(job: Job) -> Any:
    package = job.package.partition(".")[0]
    ours = importlib.import_module(f"lightning_peft.strategies.{package}")
    classes = {"peft_ddp": ours.PEFTDDPStrategy, "peft_fsdp": ours.PEFTFSDPStrategy}
    options = dict(job.strategy_options)
    if job.meta_from is not None and not _by_callback(job):
        options["base_from"] = job.meta_from
    return classes[job.strategy](**options) if options else job.strategy


class Memory(threading.Thread):
    """Growth of this process's own memory (mapped files left out) while it runs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        if sys.platform == "linux":  # M_MMAP_THRESHOLD: larger blocks go back when they are freed
            ctypes.CDLL(None).mallopt(-3, 1 << 16)
        self.before = self.peak = self.now()
        self.over = False

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        (line,) = [x for x in status.splitlines() if x.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    def run(self) -> None:
        while not self.over:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    def growth(self) -> int:
        self.over = True
        self.join()
        return self.peak - self.before


def run(job: Job) -> None:
    memory = Memory() if job.watch_memory else None
    if memory is not None:
        memory.start()
    model, trainer, _ = make(job)
    model.memory = memory
    trainer.fit(model, ckpt_path=job.ckpt)
    grown = memory.growth() if memory is not None else 0  # before this gathers the base itself
    packed = packed_bytes(model)
    result: dict[str, Any] = {
        "losses": model.losses,
        "step": trainer.global_step,
        "packed_bytes": sum(p.numel() for p in packed.values()),
        "own_bytes": sum(local(p).numel() for p in packed.values()),
        "frozen_grads": [
            n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad
        ],
        "skipped": getattr(trainer.strategy, "skipped_steps", 0),
        "units": getattr(trainer.strategy, "units", []),
        "adapters": {k: whole(t) for k, t in trained_tensors(model).items()},
        "packed": {n: whole(p) for n, p in packed.items()},
        "held as": sorted({str(p.dtype) for _, p in held_bytes(model)}),
        "ddp": getattr(trainer.strategy, "_ddp_kwargs", None),
    }
    if memory is not None:
        result["growth"] = grown
        result["growth at start"] = model.grown_at_start
    if job.validate:
        result["val"] = {k: float(v) for k, v in trainer.validate(model, verbose=False)[0].items()}
        predicted = trainer.predict(model)
        result["logits"] = torch.cat(predicted) if predicted else None  # type: ignore[arg-type]
    torch.save(result, Path(job.folder) / f"{job.name}-{trainer.global_rank}.pt")


class Holder(torch.nn.Module):
    """Names as in the LightningModule: start values are drawn by name."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Any:
        return self.net(input_ids=ids, labels=ids)


def attach_all(job: Job, net: torch.nn.Module) -> None:
    """The method; Arrow over two adapters, below one that is trained."""
    if job.method != "Arrow":
        attach(net, method_of(job), quantization=quantization_of(job))
        return
    lora, g = LoRA(r=4, target_modules=["q_proj", "v_proj"]), torch.Generator().manual_seed(5)
    for name in "ab":
        attach(net, lora, adapter_name=name, quantization=quantization_of(job))
        for t in trained_tensors(net, name).values():
            t.data.copy_(torch.randn(t.shape, generator=g))
    route(net, ["a", "b"], "mix", **job.method_options)
    attach(net, lora, adapter_name="new")
    set_adapter(net, ["mix", "new"])


def run_loop(job: Job) -> None:
    """The same fit as a loop under Fabric; saved after every epoch."""
    loop = fabric().Fabric(accelerator="cpu", devices=job.devices, strategy=job.strategy)
    loop.launch()
    loop.seed_everything(1, verbose=False)
    net = Holder(build(job))
    attach_all(job, net)
    model = loop.setup_module(net)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = loop.setup_optimizers(
        torch.optim.AdamW(trained[::-1] if job.reverse else trained, lr=1e-2)
    )
    if job.optimizer is not None:
        convert_optimizer(optimizer, job.optimizer)
    hooks = MethodHooks(model, optimizer, total_steps=job.epochs * SAMPLES // BATCH)
    first, last = 0, Path(job.folder) / f"{job.name}-last.ckpt"
    if job.ckpt is not None:
        first = load_checkpoint(model, job.ckpt, optimizer=optimizer, hooks=hooks)["epoch"] + 1
    for epoch in range(first, job.epochs):
        for batch in loader(loop):
            loop.backward(model(batch).loss)
            hooks.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        if job.fault == "kill in save" and rank() == job.fault_rank and epoch:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint(model, last, optimizer=optimizer, hooks=hooks, epoch=epoch)
        if loop.is_global_zero:
            shutil.copy(last, Path(job.folder) / f"{job.name}-{epoch=}.ckpt")
    result = {
        "step": hooks.step,
        "adapters": {k: whole(t) for k, t in trained_tensors(net).items()},
        "packed": {n: whole(p) for n, p in packed_bytes(net).items()},
    }
    torch.save(result, Path(job.folder) / f"{job.name}-{loop.global_rank}.pt")


def held_bytes(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Packed weights and scales, by name, as they are held."""
    return [
        (f"{path}.{key}", module._parameters[key])  # type: ignore[misc]
        for path, module in model.named_modules()
        for key in held_tensors(module)
        if key in module._parameters
    ]


def packed_bytes(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: as_bytes(p) for name, p in held_bytes(model)}


def whole(t: Tensor) -> Tensor:
    full: Any = t.detach()
    gathered: Tensor = full.full_tensor() if hasattr(full, "full_tensor") else full
    return gathered.clone()


def warm_up() -> None:
    """Run a small fit, so that processes forked afterwards find all late imports done."""
    with tempfile.TemporaryDirectory() as folder:
        run(Job("warm", folder, epochs=1, optimizer="adamw_8bit"))


def main(listed: str) -> None:
    torch.set_num_threads(1)
    for fields in json.loads(Path(listed).read_text()):
        job = Job(**fields)
        if of_rank(job.site_packages):
            sys.path.insert(0, of_rank(job.site_packages))
        with use_package(job.package):
            (run_loop if job.fabric else run)(job)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
