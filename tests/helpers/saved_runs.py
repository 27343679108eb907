"""Small training runs whose files are kept in `tests/data`, one folder per version.

Run as a script, this file writes such a folder with the `lightning_peft` found on the path. It uses
public names only, so it also runs under an older version of the package.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp

try:
    import lightning.pytorch as pl
except ImportError:  # the other package alone
    import pytorch_lightning as pl

__all__ = ["EPOCHS", "RUNS", "SavedModule", "SavedRun", "fit", "output"]

STEPS_PER_EPOCH, EPOCHS_BEFORE, EPOCHS = 2, 1, 3
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    **TOKENS,
}


def perceptron(features: int, hidden: int) -> nn.Module:
    first, second = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(hidden, 3))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def wide_mlp() -> nn.Module:
    """A net whose factors have more than 256 elements, so their optimizer state is 8-bit."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).eval()


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1)
    return MixtralForCausalLM(config).eval()


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "wide_mlp": wide_mlp,
    "llama": llama,
    "mixtral": mixtral,
}


def fill(model: nn.Module) -> nn.Module:
    """Write a fixed pattern into every weight: no random generator decides the base."""
    with torch.no_grad():
        for index, weight in enumerate(model.parameters()):
            pattern = (torch.arange(weight.numel()) * 2654435761 + index * 40503) % 65536
            spread = (pattern.to(torch.float32) / 65536 - 0.5).view(weight.shape)
            weight.copy_(1 + spread / 4 if weight.ndim == 1 else spread)
    return model


def inputs(net: str) -> Any:
    """Return one batch, made from a fixed pattern too."""
    if net in ("llama", "mixtral"):
        return (torch.arange(12).view(2, 6) * 7 % 17) + 3
    width = 64 if net == "wide_mlp" else 8
    return ((torch.arange(8 * width) * 37 % 101).to(torch.float32) / 101 - 0.5).view(8, width)


def output(module: SavedModule) -> Tensor:
    """Return the logits of the batch in evaluation mode."""
    module.eval()
    x = inputs(module.net_name)
    with torch.no_grad():
        if x.is_floating_point():
            return module.net(x)
        return module.net(input_ids=x).logits


class SavedModule(pl.LightningModule):
    """Trains a net on a fixed batch and records the loss of each step."""

    def __init__(self, net_name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net_name = net_name
        self.net = fill(NETS[net_name]())
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch.is_floating_point():
            target = torch.arange(len(batch)) % 3
            loss = nn.functional.cross_entropy(self.net(batch), target)
        else:
            loss = self.net(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-2)

    def train_dataloader(self) -> DataLoader[Tensor]:
        x = inputs(self.net_name)
        return DataLoader([x, x.flip(0)], batch_size=None)


@dataclass(frozen=True)
class SavedRun:
    """One run.

    Attributes:
        net: Name of the net.
        callback: Builds the arguments of the callback.
        exported: Whether `save_adapter` can write the adapter: peft needs an equivalent.
        quantization: Storage of the frozen base.
    """

    net: str
    callback: Callable[[], dict[str, Any]]
    exported: bool = True
    quantization: lp.Quantization | None = None

    def peft(self) -> lp.PEFT:
        return lp.PEFT(**self.callback(), quantization=self.quantization, report=False)


LINEARS = ["0", "2"]
RUNS: dict[str, SavedRun] = {
    "lora": SavedRun("mlp", lambda: {"method": lp.LoRA(r=2, target_modules=LINEARS)}),
    "dora": SavedRun("mlp", lambda: {"method": lp.DoRA(r=2, target_modules=LINEARS)}),
    "ia3": SavedRun(
        "mlp", lambda: {"method": lp.IA3(target_modules=LINEARS, feedforward_modules=["2"])}
    ),
    "bitfit": SavedRun("mlp", lambda: {"method": lp.BitFit()}, exported=False),
    "full": SavedRun("mlp", lambda: {"method": lp.Full(target_modules=["4"])}, exported=False),
    "modules_to_save": SavedRun(
        "mlp",
        lambda: {"method": lp.LoRA(r=2, target_modules=LINEARS), "modules_to_save": ["4"]},
    ),
    "hybrid": SavedRun(
        "mlp",
        lambda: {
            "method": [lp.LoRA(r=2, target_modules=["0"]), lp.IA3(target_modules=["2"])],
        },
        exported=False,
    ),
    "two_adapters": SavedRun(
        "mlp",
        lambda: {
            "adapters": {
                "default": lp.LoRA(r=2, target_modules=["0"]),
                "other": lp.LoRA(r=1, target_modules=["2"]),
            }
        },
    ),
    "prompt": SavedRun("llama", lambda: {"method": lp.PromptTuning(n=3)}),
    "prefix": SavedRun("llama", lambda: {"method": lp.PrefixTuning(n=2)}),
    "bottleneck": SavedRun(
        "llama", lambda: {"method": lp.BottleneckAdapter(reduction_factor=8)}, exported=False
    ),
    "nf4": SavedRun(
        "mlp",
        lambda: {"method": lp.LoRA(r=2, target_modules=LINEARS)},
        quantization=lp.Quantization("nf4", block_size=32),
    ),
    "adamw_8bit": SavedRun(
        "wide_mlp",
        lambda: {
            "method": lp.LoRA(r=8, target_modules=["0"]),
            "optimizer": "adamw_8bit",
        },
    ),
    "experts": SavedRun(
        "mixtral", lambda: {"method": lp.LoRA(r=2, target_modules=["q_proj", "experts"])}
    ),
}


def fit(run: SavedRun, epochs: int, ckpt: Path | None = None) -> tuple[SavedModule, pl.Trainer]:
    """Train to `epochs`, from a checkpoint if one is given."""
    torch.manual_seed(4)
    module = SavedModule(run.net)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[run.peft()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt)
    return module, trainer


def write(name: str, folder: Path) -> None:
    """Write the files of one run after its first epoch, and what follows from them."""
    run = RUNS[name]
    folder.mkdir(parents=True)
    checkpoint = folder / "trainer.ckpt"
    module, trainer = fit(run, EPOCHS_BEFORE)
    trainer.save_checkpoint(checkpoint)
    expected: dict[str, Any] = {"output": output(module)}
    if run.exported:
        lp.save_adapter(module, folder / "adapter")
        lp.set_adapter(module, "default")
        expected["output of the adapter"] = output(module)
    uninterrupted, _ = fit(run, EPOCHS)
    expected["losses"] = uninterrupted.losses[EPOCHS_BEFORE * STEPS_PER_EPOCH :]
    resumed, _ = fit(run, EPOCHS, checkpoint)
    assert resumed.losses == expected["losses"], name
    assert resumed.losses[-1] < uninterrupted.losses[0], name
    torch.save(expected, folder / "expected.pt")
    (folder / "trainer.ckpt.gz").write_bytes(gzip.compress(checkpoint.read_bytes(), mtime=0))
    checkpoint.unlink()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for each in sys.argv[2:] or RUNS:
        write(each, target / each)
