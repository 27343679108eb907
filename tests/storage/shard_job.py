"""A step over shards of a storage from outside the package, against a step of the plain model."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import lightning_peft as lp
from lightning_peft.storage import storage_of
from lightning_peft.storage.dtensor import local
from lightning_peft.strategies.sharding import Options, shard_model
from tests.helpers.nets import Plain
from tests.helpers.rank_forks import free_port
from tests.helpers.toy_int8_storage import ToyInt8


def net() -> Plain:
    model = Plain()
    lp.attach(model, lp.LoRA(r=2, target_modules=["0", "3"]), quantization=ToyInt8())
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model.eval()


def compare_sharded(mesh: DeviceMesh) -> None:
    """Output, gradients, and bytes after snapshot and restore."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    alone, sharded = net(), net()
    shard_model(sharded, mesh, torch.device("cpu"), Options(shard_classes=(nn.Linear,)))
    layer = sharded.net[0]
    codes = local(layer.weight)
    assert codes.shape == (16 // mesh.size(), 8), codes.shape
    assert codes.dtype == torch.uint8
    for model in (alone, sharded):
        model(x).square().sum().backward()
    assert torch.equal(sharded(x), alone(x))
    for p, q in zip(alone.parameters(), sharded.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6)
    sharded.net[0].reshard()
    storage = storage_of(layer)
    bits = storage.snapshot(layer, "weight")
    local(layer.weight).zero_()
    storage.restore(layer, "weight", bits)
    assert torch.equal(sharded(x), alone(x))


def work(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    compare_sharded(init_device_mesh("cpu", (2,)))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(free_port(),), nprocs=2)
