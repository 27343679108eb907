"""The runs of the comparison in Hugging Face peft, over bitsandbytes where the base has 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.compare.rows import Row
from benchmarks.compare.tasks import Module, Task

__all__ = ["adapt"]


def adapt(module: Module, row: Row, task: Task) -> None:
    """Freeze the base, and inject the peer's adapter in place."""
    import peft

    root = module.get_submodule(task.root)
    root.requires_grad_(False)
    if row.peer == "qlora":
        pack(root, task.targets)
    targets = list(task.targets)
    if row.peer == "ia3":
        targets, feedforward = _ia3_targets(root)
        config: Any = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    else:
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=targets, use_dora=row.peer == "dora"
        )
    peft.inject_adapter_in_model(config, root)
    for name, p in root.named_parameters():
        p.requires_grad_("lora_" in name or "ia3_" in name)


def pack(root: nn.Module, targets: tuple[str, ...]) -> None:
    """Replace target layers by bitsandbytes' 4-bit layers, NF4 with double quantisation."""
    import bitsandbytes as bnb

    for name, layer in list(root.named_modules()):
        if not isinstance(layer, nn.Linear) or not any(
            f".{name}".endswith(f".{t}") for t in targets
        ):
            continue
        packed = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None,
            compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4",
        )  # fmt: skip
        packed.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        packed.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, packed.to("cpu"))


def _ia3_targets(root: nn.Module) -> tuple[list[str], list[str]]:
    """Return (layers, feed-forward layers) as our IA3 chooses them."""
    from lightning_peft.models.target_modules import default_targets, feedforward_targets

    targets = dict.fromkeys(s for _, suffixes in default_targets(root, "ia3") for s in suffixes)
    return list(targets), list(feedforward_targets(root))
