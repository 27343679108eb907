"""Damaged checkpoints in every released format: `load_packed` names the tensor and changes nothing.

Each error says where, what was expected, what was found and what to do. The files stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_peft import load_packed
from tests.helpers.released import RELEASED, State, save_state, write
from tests.storage.test_released import QUICK

FORMATS = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in RELEASED],
)
#: Layer whose tensors are damaged: of linear layers, of experts in one file tensor, of single ones.
_LAYER = re.compile(r"model\.layers\.1\.mlp\.(up_proj|experts\.gate_up_proj|experts\.2\.up_proj)\W")
_NO_SCALES = ("activation_scale", "input_scale", "_shape", "zero_point", "qzeros", "g_idx")
_OUTER = ("global_scale", "scale_2")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            made[name] = write(name, tmp_path_factory.mktemp(name.replace(" ", "_")))[0]
        return made[name]

    return source


Sources = Callable[[str], Path]


def refused(folder: Path) -> str:
    """The error of loading; the files are the same after it."""
    before = digests(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_packed(AutoModelForCausalLM, folder, dtype=torch.float32)
    assert digests(folder) == before
    return str(caught.value)


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def assert_helpful(message: str, place: str) -> None:
    """Where, expected, found, and a remedy after the last semicolon."""
    assert place in message, message
    assert "expected" in message, message
    assert re.search(r"\b(got|found|missing)\b", message), message
    assert re.search(r"; [a-z]", message), message


def layer_tensors(state: State) -> State:
    """Tensors of one packed layer."""
    found = {k: t for k, t in state.items() if _LAYER.match(f"{k} ".replace("_proj_", "_proj."))}
    assert found
    return found


def scales_of(state: State) -> State:
    """Scales of one layer, without those of the whole weight and of activations."""
    other = (*_NO_SCALES, *_OUTER)
    return {k: t for k, t in layer_tensors(state).items() if "scale" in k and not k.endswith(other)}


def damaged(source: Path, folder: Path, change: Callable[[State], None]) -> Path:
    """A copy of a checkpoint with changed tensors."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_state(folder, state)
    return folder


def replaced(t: Tensor, value: float | int) -> Tensor:
    """A copy whose first element has another value."""
    fresh = t.clone()
    raw = fresh.view(torch.uint8) if fresh.element_size() == 1 else fresh
    raw.view(-1)[0] = value
    return fresh


def place_of(key: str) -> str:
    """What an error has to name: the layer, or the module that holds its experts."""
    return key.partition(".experts")[0] if ".experts" in key else key.rpartition(".")[0]


@FORMATS
def test_missing_scales(name: str, sources: Sources, tmp_path: Path) -> None:
    gone: list[str] = []

    def change(state: State) -> None:
        gone.extend(scales_of(state))
        del state[gone[0]]

    message = refused(damaged(sources(name), tmp_path / "bad", change))
    assert_helpful(message, place_of(gone[0]))


@FORMATS
def test_misshapen_scales(name: str, sources: Sources, tmp_path: Path) -> None:
    keys: list[str] = []

    def change(state: State) -> None:
        keys.extend(scales_of(state))
        state[keys[0]] = torch.cat([state[keys[0]].reshape(-1).view(torch.uint8)] * 3).view(
            state[keys[0]].dtype
        )

    message = refused(damaged(sources(name), tmp_path / "bad", change))
    assert_helpful(message, place_of(keys[0]))


@FORMATS
@pytest.mark.parametrize("value", ["zero", "infinite", "NaN"])
def test_scales_that_no_encoder_writes(
    name: str, value: str, sources: Sources, tmp_path: Path
) -> None:
    """Zero in a scale per group of NVFP4 is a number: its weights are zero. 2^-127 has no zero."""
    keys: list[str] = []

    def change(state: State) -> None:
        found = scales_of(state)
        outer = {k: t for k, t in layer_tensors(state).items() if k.endswith(_OUTER)}
        first, t = next(iter(found.items()))
        if t.element_size() == 1:  # powers of two and e4m3 have no infinity
            if value == "NaN":
                state[first] = replaced(t, 255)
                keys.append(first)
            elif outer:
                first, t = next(iter(outer.items()))
                state[first] = replaced(t, {"zero": 0.0, "infinite": float("inf")}[value])
                keys.append(first)
            return
        numbers = {"zero": 0.0, "infinite": float("inf"), "NaN": float("nan")}
        state[first] = replaced(t, numbers[value])
        keys.append(first)

    folder = damaged(sources(name), tmp_path / "bad", change)
    if not keys:
        pytest.skip("the dtype of these scales has no such value")
    assert_helpful(refused(folder), place_of(keys[0]))


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow])
    for n, case in RELEASED.items() if "fp8" in n or "fp8" in case.label
])  # fmt: skip
def test_codes_that_are_no_numbers(name: str, sources: Sources, tmp_path: Path) -> None:
    keys: list[str] = []

    def change(state: State) -> None:
        for key, t in layer_tensors(state).items():
            if t.dtype == torch.float8_e4m3fn and "scale" not in key:
                state[key] = replaced(t, 0x7F)
                keys.append(key)

    message = refused(damaged(sources(name), tmp_path / "bad", change))
    assert "expected codes of numbers, got 1 NaN" in message
    assert_helpful(message, place_of(keys[0]))


@FORMATS
def test_codes_of_another_shape(name: str, sources: Sources, tmp_path: Path) -> None:
    keys: list[str] = []

    def change(state: State) -> None:
        found = layer_tensors(state)
        others = (*_NO_SCALES, *_OUTER)
        keys.extend(k for k in found if "scale" not in k and not k.endswith(others))
        state[keys[0]] = state[keys[0]][:-1]

    message = refused(damaged(sources(name), tmp_path / "bad", change))
    assert_helpful(message, place_of(keys[0]))


@FORMATS
@pytest.mark.parametrize("left", [4, 100, -100])
def test_truncated_files(name: str, left: int, sources: Sources, tmp_path: Path) -> None:
    """Cut in the length of the header, in the header, in the tensors."""
    folder = shutil.copytree(sources(name), tmp_path / "bad")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert_helpful(refused(folder), str(folder))


@FORMATS
def test_unknown_method(name: str, sources: Sources, tmp_path: Path) -> None:
    folder = shutil.copytree(sources(name), tmp_path / "bad")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["quant_method"] = "unheard_of"
    (folder / "config.json").write_text(json.dumps(settings))
    message = refused(folder)
    assert "got 'unheard_of'" in message
    assert_helpful(message, str(folder))
