"""The fingerprint of a base that is read in parts equals that of the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_peft import LoRA, Quantization, attach, reset_adapters
from lightning_peft.core.registry import registries_in
from lightning_peft.models.streamed_fingerprint import FingerprintSampler
from lightning_peft.storage.materialize import materialize
from lightning_peft.storage.streaming import stream_base
from tests.helpers.tiny_models import BUILDERS


def fingerprint_of(model: nn.Module) -> dict[str, Any]:
    ((_, _, registry),) = registries_in(model)
    assert registry.fingerprint is not None
    tensors: dict[str, Any] = registry.fingerprint["tensors"]
    return tensors


def stream(name: str, folder: Path, dtype: torch.dtype, chunk: int = 1 << 8) -> nn.Module:
    with torch.device("meta"):
        read: nn.Module = BUILDERS[name]().to(dtype)
    attach(read, METHOD, quantization=Quantization("nf4", block_size=32))
    assert all(entry[2] == "" for entry in fingerprint_of(read).values())
    materialize(read, torch.device("cpu"))
    reset_adapters(read)
    sampler = FingerprintSampler(read)
    stream_base(read, folder, chunk=chunk, through=sampler.around)
    sampler.finish(torch.device("cpu"))
    return read


METHOD = LoRA(r=2, target_modules="all-linear")


def save(model: nn.Module, folder: Path) -> None:
    seen: set[int] = set()
    state = {}
    for key, t in model.state_dict(keep_vars=True).items():
        if id(t) not in seen:  # a tied tensor is in the file once
            seen.add(id(t))
            state[key] = t.detach().clone().contiguous()
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_equal_to_the_dense_fingerprint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rows, transposed weights and experts; a file in fp32 under a model in bfloat16."""
    torch.manual_seed(0)
    whole = BUILDERS[name]()
    save(whole, tmp_path)
    whole.to(dtype)
    read = stream(name, tmp_path, dtype)
    attach(whole, METHOD, quantization=Quantization("nf4", block_size=32))
    assert fingerprint_of(read) == fingerprint_of(whole)
    different = [
        key
        for (key, a), b in zip(whole.state_dict().items(), read.state_dict().values(), strict=True)
        if ".peft." not in key and not torch.equal(a, b)
    ]
    assert different == []


def test_one_changed_sample_changes_the_hash(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = BUILDERS["llama"]()
    save(whole, tmp_path)
    first = fingerprint_of(stream("llama", tmp_path, torch.float32))
    with torch.no_grad():
        whole.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1
    save(whole, tmp_path)
    second = fingerprint_of(stream("llama", tmp_path, torch.float32))
    changed = [name for name in first if first[name] != second[name]]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
