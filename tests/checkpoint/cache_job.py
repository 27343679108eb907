"""Runs that are killed while they read a base and while they write its packed cache."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from lightning_peft import LoRA, attach, read_base
from lightning_peft.storage import streaming
from lightning_peft.strategies.sharding import Options, shard_model
from tests.helpers.rank_forks import run_ranks
from tests.helpers.tiny_models import BUILDERS


def read(place: Path, kill_at: int, ranks: int, rank: int) -> None:
    """Read the base; kill the last rank when it packs its n-th weight."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    with torch.device("meta"):
        model = BUILDERS["llama"]()
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization="nf4")
    if kill_at and rank == ranks - 1:
        left, fill = [kill_at], streaming._fill

        def blow(*args: Any) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            fill(*args)

        streaming._fill = blow
    read_base(model, place / "base", packed_cache=place / "cache")
    state = {k: v for k, v in model.state_dict().items() if ".peft." not in k}
    torch.save(state, place / f"state-{os.getpid()}.pt")


def save_base(folder: Path, **changes: float) -> None:
    """Write a base; `changes` are the last values of weights in the first block."""
    torch.manual_seed(0)
    model = BUILDERS["llama"]()
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    for name, value in changes.items():
        state[f"model.layers.0.mlp.{name}.weight"].view(-1)[-1] = value
    folder.mkdir()
    save_file(state, folder / "model.safetensors")


def read_in_shards(base: Path, disks: list[Path], rank: int) -> None:
    """Read a base into the shards of two ranks, each with a disk; print the error."""
    torch.set_num_threads(1)
    os.chdir(disks[rank])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with torch.device("meta"):
        model = BUILDERS["llama"]()
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization="nf4")
    options = Options(base_from=base, packed_cache="cache")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            shard_model(model, init_device_mesh("cpu", (2,)), torch.device("cpu"), options)
        except Exception as error:
            print(f"rank {rank} got {type(error).__name__}: {error}", flush=True)
            raise
    for each in told:
        print(f"warning: {each.message}", flush=True)


def two_ranks(place: str) -> None:
    """Damage in the cache, a weight that is not finite, and machines without a shared disk."""
    folder = Path(place)
    save_base(folder / "base")
    shared = partial(read_in_shards, folder / "base", [folder, folder])
    assert run_ranks(shared, 2)[0] == [0, 0]
    (data,) = folder.glob("cache/*/rank-00001.bin")
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    data.write_bytes(flipped)
    assert run_ranks(shared, 2)[0] == [1, 1]
    disks = [folder / "disk 0", folder / "disk 1"]
    for disk in disks:
        disk.mkdir()
    apart = partial(read_in_shards, folder / "base", disks)
    assert run_ranks(apart, 2)[0] == [0, 0]
    print("left behind", [str(p) for p in folder.glob("disk*/cache/*")], flush=True)
    shutil.copytree(folder / "cache", disks[0] / "cache", dirs_exist_ok=True)
    assert run_ranks(apart, 2)[0] == [0, 0]
    save_base(folder / "nan", down_proj=float("nan"))  # in the rows of rank 1
    assert run_ranks(partial(read_in_shards, folder / "nan", [folder, folder]), 2)[0] == [1, 1]


def main(place: str) -> None:
    folder = Path(place)
    save_base(folder / "base")
    for kill_at in (5, 9):
        statuses, _ = run_ranks(partial(read, folder, kill_at, 1), 1)
        assert statuses == [-signal.SIGKILL], statuses
        print("killed", sorted(p.name[:1] for p in (folder / "cache").iterdir()), flush=True)
    # Another rank notices within the limit of `run_ranks`, and publishes nothing.
    statuses, _ = run_ranks(partial(read, folder, 5, 2), 2)
    assert statuses == [1, -signal.SIGKILL], statuses
    print("killed", sorted(p.name[:1] for p in (folder / "cache").iterdir()), flush=True)
    for _ in range(2):
        statuses, _ = run_ranks(partial(read, folder, 0, 1), 1)
        assert statuses == [0], statuses
        print("read", [p.name[:1] == "." for p in (folder / "cache").iterdir()], flush=True)
    first, second = (torch.load(p, weights_only=True) for p in folder.glob("state-*.pt"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    print("equal")
