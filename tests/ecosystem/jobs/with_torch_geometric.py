"""PyTorch Geometric: its nets inside a LightningModule; `torch_geometric.nn.Linear` is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from checks import Case, examine
from supervised import fit
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT, GCN, GIN, GPSConv, TransformerConv, global_mean_pool


class GraphNet(pl.LightningModule):
    """Classifies graphs, as in the package's introduction."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 4)

    def forward(self, data: Any) -> Tensor:
        return self.head(global_mean_pool(self.encoder(data.x, data.edge_index), data.batch))

    def training_step(self, data: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(data), data.y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = TransformerConv(16, 8, heads=2), TransformerConv(16, 8, heads=2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.two(self.one(x, edges).relu(), edges)


class GPS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GPSConv(16, None, heads=2) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, edges)
        return x


NETS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: GCN(16, 16, 2),
    "GAT": lambda: GAT(16, 16, 2, heads=2),
    "GIN": lambda: GIN(16, 16, 2),
    "TransformerConv": Transformer,
    "GPSConv": GPS,
}


def graph(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 16, generator=generator)
    edges = torch.randint(10, (2, 30), generator=generator)
    return Data(x=x, edge_index=edges, y=torch.tensor([seed % 4]))


graphs = [graph(i) for i in range(16)]
batch = next(iter(DataLoader(graphs, batch_size=16)))

for name, net in NETS.items():
    examine(
        Case(
            package="torch_geometric",
            model=name,
            entry="`Trainer.fit`",
            build=lambda net=net: GraphNet(net()),
            fit=lambda module, *rest: fit(
                module, DataLoader(graphs, batch_size=4, shuffle=True), *rest
            ),
            predict=lambda module: module(batch),
        )
    )
