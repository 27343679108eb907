"""FSDP2 on two processes: each holds its rows of the packed base.

The same QLoRA run with one process, then with two under strategy="peft_fsdp" (gloo, on the CPU; on
GPUs only `accelerator` changes). Prints what each process holds and how far the runs are apart.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from byte_model import BATCH, LanguageModel, split, texts
from keeping import parser, show, table
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_peft import PEFT, LoRA, Quantization


def held(module: torch.nn.Module) -> int:
    """Bytes of packed weights that this process holds."""
    tensors = (p for p in module.parameters() if p.dtype == torch.uint8)
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


class Watched(LanguageModel):
    """Notes what it holds while it trains: afterwards the base is gathered again."""

    held, last = 0, 0.0

    def on_train_start(self) -> None:
        self.held = held(self)

    def on_train_end(self) -> None:
        """The loss of the whole last batch: each process has seen its half."""
        self.last = self.all_gather(torch.tensor(self.losses[-1])).mean().item()


def run(devices: int, steps: int, answers: Path) -> None:
    """Train; rank 0 writes what it found. With two processes Lightning starts the second itself."""
    pl.seed_everything(0)
    module = Watched(width=128, layers=4)
    rows = split(texts()["sums"], steps)[0].dataset
    # The rows of a global batch stay: Lightning's own sampler would shuffle them over processes.
    mine = rows[int(os.environ.get("LOCAL_RANK", "0")) :: devices]
    loader = DataLoader(mine, BATCH // devices)
    callback = PEFT(
        LoRA(r=8, target_modules="all-linear"), quantization=Quantization("nf4"), report=False
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="peft_fsdp" if devices > 1 else "auto",
        max_epochs=1, callbacks=[callback], logger=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        answers.write_text(json.dumps({"held": module.held, "loss": module.last}))


def main(smoke: bool, keep: bool) -> dict[int, dict[str, float]]:
    found = {}
    for devices in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            answers = Path(folder) / "answers.json"
            given = [str(devices), "2" if smoke else "40", str(answers)]
            subprocess.run([sys.executable, __file__, "--run", *given], check=True, timeout=600)
            found[devices] = json.loads(answers.read_text())
    rows = [(n, f"{f['held']:,}", f"{f['loss']:.5f}") for n, f in found.items()]
    text = table(["processes", "bytes of packed base on one", "loss of the last step"], rows)
    show("FSDP2 on two processes", text, keep)
    return found


if __name__ == "__main__":
    if "--run" in sys.argv:
        at = sys.argv.index("--run")
        run(int(sys.argv[at + 1]), int(sys.argv[at + 2]), Path(sys.argv[at + 3]))
    else:
        main(**vars(parser(__doc__).parse_args()))
