"""Adapter directories with random damage: refused cleanly, or truly valid.

A seed draws each case. A refused directory leaves the model as it was; an accepted one computes
what the undamaged one does, or what peft computes from the damaged one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.peft_exchange import in_peft, randomise

SEED = int(os.environ.get("FUZZ_SEED", "20261130"))
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PATTERNS = ("(.+)+!", "(a|a)*!", ".*.*.*.*.*.*.*.*.*!", "((_|[a-z])*)*!", r"(\w+)\1+", "(" * 200)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 10**9, 10**400, 1e308, float("nan"), float("inf"), "x", "../x", ""),
    *([], {}, [1], ["../x"], {"(.+)+!": 4}, {"x": 10**400}, [[[]]], "a" * 5_000),
    *PATTERNS,
)
METHODS = {
    "lora": lambda: lp.LoRA(r=4, target_modules=["query_projection_of_the_layer"]),
    "loha": lambda: lp.LoHa(r=2, target_modules=["query_projection_of_the_layer"]),
    "ia3": lambda: lp.IA3(target_modules="all-linear", feedforward_modules=["down"]),
    "vera": lambda: lp.VeRA(r=4, target_modules=["query_projection_of_the_layer"]),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query_projection_of_the_layer = nn.Linear(16, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.query_projection_of_the_layer(x)))


def outputs(model: nn.Module) -> Tensor:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x)  # a damaged file may ask for dropout


@pytest.fixture(scope="module", params=sorted(METHODS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = Net()
    lp.attach(model, METHODS[request.param]())
    randomise(model)
    lp.save_adapter(model, folder)
    return folder


def damage(folder: Path, rng: random.Random) -> str:
    """Change one thing in a directory; return what."""
    kind = rng.choice(("config", "config", "config", "tensor", "bytes", "cut"))
    if kind == "config":
        config = json.loads((folder / CONFIG).read_text())
        more = ("rank_pattern", "alpha_pattern", "layers_pattern", "exclude_modules", "unknown")
        key, value = rng.choice([*sorted(config), *more]), rng.choice(VALUES)
        config[key] = value
        (folder / CONFIG).write_text(json.dumps(config))
        return key
    if kind == "tensor":
        tensors = load_file(folder / TENSORS)
        key = rng.choice(sorted(tensors))
        tensors[key] = bad_tensor(tensors[key], rng)
        save_file(tensors, folder / TENSORS)
        return "tensor"
    name = rng.choice((CONFIG, TENSORS))
    content = bytearray((folder / name).read_bytes())
    place = rng.randrange(len(content))
    if kind == "cut":
        del content[place:]
    else:
        content[place] ^= 1 << rng.randrange(8)
    (folder / name).write_bytes(content)
    return "bytes"


def bad_tensor(t: Tensor, rng: random.Random) -> Tensor:
    changes = [
        lambda: t.to(torch.float8_e4m3fn),
        lambda: t.reshape(*[1] * 70, *t.shape),
        lambda: t.to(torch.int64),
        lambda: t.to(torch.complex64),
        lambda: t * float("nan"),
        lambda: t.double() * 1e300,
        lambda: t.flatten()[1:].contiguous(),
        lambda: torch.zeros(0),
        lambda: t.to(torch.bool),
    ]
    return rng.choice(changes)()


@pytest.mark.parametrize(
    "block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_a_damaged_directory_is_refused_or_valid(written: Path, tmp_path: Path, block: int) -> None:
    whole = Net()
    lp.load_adapter(whole, written)
    expected, plain = outputs(whole), outputs(Net())
    rng = random.Random(f"{SEED} {written.name[:3]} {block}")
    for case in range(10):
        folder = tmp_path / str(case)
        folder.mkdir()
        for file in (CONFIG, TENSORS):
            (folder / file).write_bytes((written / file).read_bytes())
        what = damage(folder, rng)
        model, start = Net(), time.perf_counter()
        try:
            lp.load_adapter(model, folder)
        except (ValueError, FileNotFoundError):
            assert type(model.down) is nn.Linear, what
            assert torch.equal(outputs(model), plain), what
        else:
            same = torch.allclose(outputs(model), expected, atol=1e-6)
            assert same or computes_as_peft(model, folder), (what, case)
        assert time.perf_counter() - start < 10, what


def computes_as_peft(model: nn.Module, folder: Path) -> bool:
    by_peft = in_peft(Net(), folder)
    return torch.allclose(outputs(model), outputs(by_peft), atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_no_pattern_hangs(field: str, pattern: str, tmp_path: Path) -> None:
    model = Net()
    lp.attach(model, lp.LoRA(r=4, target_modules=["query_projection_of_the_layer"]))
    lp.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config[field] = {pattern: 4} if field == "rank_pattern" else pattern
    (tmp_path / CONFIG).write_text(json.dumps(config))
    start = time.perf_counter()
    with contextlib.suppress(ValueError):
        lp.load_adapter(Net(), tmp_path)
    assert time.perf_counter() - start < 2


def test_a_large_rank_takes_no_memory(tmp_path: Path) -> None:
    model = Net()
    lp.attach(model, lp.VeRA(r=4, target_modules=["down"]))
    lp.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "r": 10**9}))
    with pytest.raises(ValueError, match=r"got a tensor of shape|expected"):
        lp.load_adapter(Net(), tmp_path)


def test_a_name_that_is_a_path_is_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_name: expected letters.*'\.\./x'"):
        lp.load_adapter(Net(), tmp_path / "absent", adapter_name="../x")


def test_values_beyond_the_models_dtype_are_refused(tmp_path: Path) -> None:
    model = Net()
    lp.attach(model, lp.LoRA(r=4, target_modules=["down"]))
    lp.save_adapter(model, tmp_path)
    tensors = {k: t.double() + 1e300 for k, t in load_file(tmp_path / TENSORS).items()}
    save_file(tensors, tmp_path / TENSORS)
    model = Net()
    with pytest.raises(ValueError, match=r"expected values in the range of torch\.float32"):
        lp.load_adapter(model, tmp_path)
    assert type(model.down) is nn.Linear
