"""A cache of packed weights is complete or not there; a damaged one is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_peft import LoRA, attach, read_base
from tests.helpers.forks import run_function
from tests.helpers.tiny_models import BUILDERS


def test_kills_while_reading_and_writing_leave_no_cache(tmp_path: Path) -> None:
    out = run_function("tests.checkpoint.cache_job:main", [str(tmp_path)], tmp_path)
    lines = [line for line in out.splitlines() if line.startswith(("killed", "read"))]
    # Only temporary folders, which the next start removes; then one folder with its own name.
    assert lines[:3] == ["killed ['.']"] * 3, out[-3000:]
    assert lines[3:] == ["read [False]", "read [False]"], out[-3000:]
    assert out.strip().endswith("equal")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {k: v.contiguous() for k, v in BUILDERS["llama"]().state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def read(base: Path) -> None:
    with torch.device("meta"):
        model = BUILDERS["llama"]()
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization="nf4")
    read_base(model, base, packed_cache=base.parent / "cache")


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
    index.write_text(json.dumps({**json.loads(text), "key": "another"}))
    with pytest.raises(ValueError, match="got another in format 1, of another base or quant"):
        read(base)
    index.unlink()
    with pytest.raises(ValueError, match=r"expected index.json, got \['rank-00000.bin'\]; delete"):
        read(base)
    shutil.rmtree(folder)
    read(base)
    assert (folder / "index.json").exists()


def test_a_base_in_memory_is_not_read(base: Path) -> None:
    model = BUILDERS["llama"]()
    with pytest.raises(ValueError, match="expected a model with adapters"):
        read_base(model, base)
    attach(model, LoRA(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="expected a base on the meta device"):
        read_base(model, base)
