"""A cache of packed weights is complete or not there; a damaged one is named."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft import PEFT, LoRA, attach, read_base
from lightning_peft.strategies import base_reading
from tests.helpers.forks import run_function
from tests.helpers.lightning_package import INSTALLED
from tests.helpers.tiny_models import BUILDERS

#: Package → modules of its strategies, for a Trainer and for Fabric.
STRATEGIES = {
    "lightning.pytorch": ("lightning", "fabric"),
    "pytorch_lightning": ("pytorch_lightning", "lightning_fabric"),
}


def test_kills_while_reading_and_writing_leave_no_cache(tmp_path: Path) -> None:
    out = run_function("tests.checkpoint.cache_job:main", [str(tmp_path)], tmp_path)
    lines = [line for line in out.splitlines() if line.startswith(("killed", "read"))]
    # Only temporary folders, which the next start removes; then one folder with its own name.
    assert lines[:3] == ["killed ['.']"] * 3, out[-3000:]
    assert lines[3:] == ["read [False]", "read [False]"], out[-3000:]
    assert out.strip().endswith("equal")


def test_an_error_of_one_rank_is_an_error_of_both(tmp_path: Path) -> None:
    out = run_function("tests.checkpoint.cache_job:two_ranks", [str(tmp_path)], tmp_path)
    lines = [line for line in out.splitlines() if line.startswith(("rank ", "left"))]
    damage, left, values = sorted(lines[:2]), lines[2], lines[3:]
    # Both ranks learn of damage in the rows of rank 1, so neither waits for the other.
    assert damage[0].startswith("rank 0 got RuntimeError: packed_cache"), out[-3000:]
    assert damage[1].startswith("rank 1 got ValueError"), out[-3000:]
    assert all("expected checksum" in line for line in damage)
    assert "not written: the file of rank 1 is not on the disk of rank 0" in out, out[-3000:]
    assert left == "left behind []"
    assert "expected it on the disks of all ranks, found none on ranks [1]" in out, out[-3000:]
    assert any(
        line.startswith("rank 1 got ValueError: base_from") and "finite weights" in line
        for line in values
    ), out[-3000:]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {k: v.contiguous() for k, v in BUILDERS["llama"]().state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def read(base: Path, quantization: str | None = "nf4", **options: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model = BUILDERS["llama"]()
    attach(model, LoRA(r=2, target_modules="all-linear", **options), quantization=quantization)
    read_base(model, base, packed_cache=base.parent / "cache")
    return model


def test_a_file_is_no_directory(base: Path) -> None:
    (base.parent / "cache").write_text("")
    with pytest.raises(ValueError, match="packed_cache: expected a directory, got the file"):
        read(base)


def test_damage_is_named_with_the_remedy(base: Path) -> None:
    read(base)
    (folder,) = (base.parent / "cache").iterdir()
    data, index = folder / "rank-00000.bin", folder / "index.json"
    whole, text = data.read_bytes(), index.read_text()
    data.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=rf"expected {len(whole)} bytes, got {len(whole) - 5}; de"):
        read(base)
    data.unlink()
    with pytest.raises(ValueError, match=r"rank-00000.bin: expected \d+ bytes, got no file"):
        read(base)
    data.write_bytes(whole)
    index.write_text(text[:40])
    with pytest.raises(ValueError, match="got a damaged file"):
        read(base)
    index.write_text(text.replace('"offset": 0', '"offset": 8', 1))
    with pytest.raises(ValueError, match=r"got a damaged file \(its checksum is wrong\); delete"):
        read(base)
    content = {**json.loads(text), "key": "another"}
    del content["checksum"]
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    index.write_text(json.dumps({**content, "checksum": checksum}))
    with pytest.raises(ValueError, match="got another in format 2, of another base or quant"):
        read(base)
    index.unlink()
    with pytest.raises(ValueError, match=r"expected index.json, got \['rank-00000.bin'\]; delete"):
        read(base)
    shutil.rmtree(folder)
    read(base)
    assert (folder / "index.json").exists()


def test_a_flipped_byte_is_noticed(base: Path) -> None:
    """One byte in several tensors; the error names the file and the tensor."""
    read(base)
    (folder,) = (base.parent / "cache").iterdir()
    data = folder / "rank-00000.bin"
    whole = data.read_bytes()
    weights = json.loads((folder / "index.json").read_text())["weights"]
    pieces = [(n, r, p) for n, roles in weights.items() for r, (p,) in roles.items()]
    assert len({role for _, role, _ in pieces}) >= 2
    for i, (name, role, piece) in enumerate(pieces[:: len(pieces) // 5]):
        flipped = bytearray(whole)
        flipped[piece["offset"] + i % piece["size"]] ^= 1 << i % 8
        data.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"expected checksum .*; delete this folder") as raised:
            read(base)
        assert f"{data}, '{name}' ({role})" in str(raised.value)
    data.write_bytes(whole)
    read(base)


def edit(base: Path, values: int) -> None:
    """Add 1 to the last values of a packed weight, in place, as a later program would."""
    file = base / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    before = file.stat()
    changed = state[name].clone()
    changed.view(-1)[-1 - values : -1] += 1
    save_file({**state, name: changed}, file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.mark.parametrize("values", [1, 3])
def test_an_edited_base_is_packed_again(base: Path, values: int) -> None:
    old = read(base)
    edit(base, values)
    new, fresh = read(base), read(base)
    assert len(list((base.parent / "cache").iterdir())) == 2
    packed = "model.layers.0.mlp.up_proj.weight"
    first, second, third = (m.state_dict()[packed] for m in (old, new, fresh))
    assert not torch.equal(first, second)
    assert torch.equal(second, third)


def test_a_base_that_changes_while_it_is_read_is_not_cached(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = base_reading.stream_base

    def changing(*args: Any, **kwargs: Any) -> None:
        stream(*args, **kwargs)
        edit(base, 1)

    monkeypatch.setattr(base_reading, "stream_base", changing)
    with pytest.warns(UserWarning, match="not written: the base's files changed while they were"):
        read(base)
    assert not list((base.parent / "cache").iterdir())


def test_without_packed_weights_there_is_nothing_to_cache(base: Path) -> None:
    with pytest.raises(ValueError, match="expected a base with packed weights, got one without"):
        read(base, quantization=None)


def test_a_storage_that_needs_values_is_refused_on_meta(base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = "q_proj' weight: expected weights with values for .*int8.*, got one on the meta device"
    with pytest.raises(ValueError, match=words):
        read(base, quantization="int8")


@pytest.mark.parametrize("package", INSTALLED)
def test_a_cache_needs_a_base(package: str) -> None:
    words = "packed_cache: expected base_from beside it, got cache alone"
    with pytest.raises(ValueError, match=f"PEFT {words}"):
        PEFT(LoRA(), packed_cache="cache")
    trainer, fabric = (
        importlib.import_module(f"lightning_peft.strategies.{name}").PEFTFSDPStrategy
        for name in STRATEGIES[package]
    )
    for sharding in (trainer, fabric):
        with pytest.raises(ValueError, match=f"peft_fsdp {words}"):
            sharding(packed_cache="cache")
    strategy = trainer(base_from="one")
    strategy.read_base_from("one", "cache")
    with pytest.raises(ValueError, match="got one from the strategy and two from PEFT"):
        strategy.read_base_from("two", None)


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}], ids=["quantised", "start"])
def test_a_weight_that_is_not_finite_is_named(base: Path, options: dict[str, Any]) -> None:
    state = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 5] = float("nan")
    save_file(state, base / "model.safetensors")
    with pytest.raises(ValueError, match="expected finite weights, got NaN") as raised:
        read(base, **options)
    assert str(raised.value).startswith(f"base_from {base / 'model.safetensors'}, '{name}': ")


def test_a_base_in_memory_is_not_read(base: Path) -> None:
    model = BUILDERS["llama"]()
    with pytest.raises(ValueError, match="expected a model with adapters"):
        read_base(model, base)
    attach(model, LoRA(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="expected a base on the meta device"):
        read_base(model, base)
