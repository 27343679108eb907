"""Runs that are killed while they read a base and while they write its packed cache."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lightning_peft import LoRA, attach, read_base
from lightning_peft.storage import streaming
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


def main(place: str) -> None:
    folder = Path(place)
    (folder / "base").mkdir()
    torch.manual_seed(0)
    model = BUILDERS["llama"]()
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "base" / "model.safetensors")
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
