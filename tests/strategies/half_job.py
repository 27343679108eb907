"""A loop under Fabric in half precision. Prints the error, or whether the adapters are finite."""

from __future__ import annotations

import torch

from lightning_peft import attach, convert_optimizer, register_strategies
from tests.helpers.lightning_package import fabric
from tests.helpers.nets import FEATURES, build, lora


def main(strategy: str, optimizer_name: str) -> None:
    torch.set_num_threads(1)
    package = fabric()
    register_strategies()  # the package may have been imported after ours
    loop = package.Fabric(accelerator="cpu", devices=1, strategy=strategy, precision="16-true")
    loop.launch()
    net = build()
    attach(net, lora())
    model = loop.setup_module(net)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = loop.setup_optimizers(torch.optim.AdamW(trained, lr=1e-2))
    if optimizer_name:
        convert_optimizer(optimizer, optimizer_name)
    try:
        for _ in range(3):
            loop.backward(model(torch.ones(2, FEATURES)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    except ValueError as error:
        print("error:", error)
    print("finite:", all(bool(p.isfinite().all()) for p in trained))
