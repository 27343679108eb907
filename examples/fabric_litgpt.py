"""LitGPT's GPT under Fabric: QLoRA in a loop of your own, saved and resumed strictly.

LitGPT pins huggingface-hub below what transformers 5 needs: install litgpt in an environment of its
own, with lightning_peft beside it. The model is small and has random weights; the loop is the same
for a converted checkpoint. On several processes add `devices=2, strategy="peft_ddp"`.
"""

import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy

from lightning_peft import (
    LoRA,
    Quantization,
    attach,
    convert_optimizer,
    load_checkpoint,
    parameter_report,
    save_checkpoint,
)

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
BATCH, LENGTH = 8, 64


def base() -> torch.nn.Module:
    """The pretrained model: the same weights each time."""
    from litgpt import GPT, Config

    torch.manual_seed(0)
    config = Config(
        block_size=LENGTH, vocab_size=256, padded_vocab_size=256,
        n_layer=2, n_head=4, n_embd=64, intermediate_size=128,
    )  # fmt: skip
    return GPT(config)


def batches(steps: int, seed: int) -> list[torch.Tensor]:
    """Windows of the text, as bytes."""
    tokens = torch.tensor(list(TEXT.encode()))
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH - 1, (steps, BATCH), generator=g)
    return [torch.stack([tokens[i : i + LENGTH + 1] for i in row]) for row in starts.tolist()]


def finetune(fabric: Fabric, path: Path, epochs: int, steps: int) -> list[float]:
    """Train up to `epochs` in all, from the file if there is one; returns the losses."""
    net = base()
    attach(net, LoRA(r=8, target_modules="all-linear"), quantization=Quantization("nf4"))
    model = fabric.setup_module(net)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    convert_optimizer(optimizer, "adamw_8bit")
    optimizer = fabric.setup_optimizers(optimizer)
    first = 0
    if path.exists():
        first = load_checkpoint(model, path, optimizer=optimizer)["epoch"] + 1
    losses = []
    for epoch in range(first, epochs):
        for batch in batches(steps, seed=epoch):
            logits = model(batch[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        save_checkpoint(model, path, optimizer=optimizer, epoch=epoch)
    if first == 0:
        fabric.print(parameter_report(net))
    return losses


def main(steps: int = 20) -> dict[str, list[float]]:
    """One run of two epochs, and one that is stopped between them."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    with tempfile.TemporaryDirectory() as folder:
        whole = finetune(fabric, Path(folder) / "whole.ckpt", 2, steps)
        parts = finetune(fabric, Path(folder) / "parts.ckpt", 1, steps)
        parts += finetune(fabric, Path(folder) / "parts.ckpt", 2, steps)
        size = (Path(folder) / "parts.ckpt").stat().st_size
    fabric.print(f"loss {whole[0]:.3f} -> {whole[-1]:.3f}; file {size / 1e3:.0f} kB")
    fabric.print(f"stopped and resumed: {'equal' if whole == parts else 'different'}")
    return {"whole": whole, "parts": parts}


if __name__ == "__main__":
    main()
