"""How ranks are grouped: replicas of shards, and groups that share a sequence."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_peft.layers.context_parallel import ContextParallel
from lightning_peft.models.modules import hf_models

__all__ = ["check_context", "check_replicas", "data_mesh", "split_sequences"]


def check_replicas(replicas: int, world: int) -> None:
    """Raise unless the ranks can be split into that many equal groups.

    Raises:
        ValueError: with the numbers that can be given.
    """
    advice = "give the number of machines, or 1 to shard over all ranks"
    _check_divides("replicas", replicas, world, advice)


def check_context(size: int, world: int) -> None:
    """Raise unless that many ranks can share sequences.

    Raises:
        ValueError: with the numbers that can be given.
    """
    advice = "give the number of ranks that share a sequence"
    _check_divides("context_parallel", size, world, advice)


def _check_divides(option: str, n: int, world: int, advice: str) -> None:
    if type(n) is not int or n < 1 or world % n:
        fits = [k for k in range(1, world + 1) if world % k == 0]
        raise ValueError(
            f"peft_fsdp {option}: expected a divisor of the {world} ranks, one of {fits}, got "
            f"{n}; {advice}"
        )


def split_sequences(module: nn.Module, mesh: DeviceMesh, size: int) -> None:
    """Let groups of ranks that follow each other share the sequences of the model inside.

    Args:
        module: The sharded module.
        mesh: One axis over all ranks.
        size: Ranks per group; 1 changes nothing.

    Raises:
        ValueError: no model, or one whose attention cannot be split.
    """
    if size == 1:
        return
    found = [model for _, model in hf_models(module)]
    if not found:
        raise ValueError(
            "peft_fsdp context_parallel: expected a causal language model of Hugging Face inside "
            f"{type(module).__name__}, found none; leave context_parallel=1"
        )
    shape = (mesh.size() // size, size)
    both = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("data", "context"))
    for model in found:
        ContextParallel(model, both.get_group("context"))


def data_mesh(mesh: DeviceMesh, replicas: int) -> DeviceMesh:
    """Return the mesh that FSDP2 takes: over all ranks, or replicas of groups of ranks.

    Args:
        mesh: One axis over all ranks.
        replicas: Number of groups. Ranks of one machine follow each other, so they share a group.
    """
    if replicas == 1:
        return mesh
    shape = (replicas, mesh.size() // replicas)
    return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
