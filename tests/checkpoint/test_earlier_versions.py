"""Files of earlier versions load: checkpoints, adapter directories, training goes on."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_peft as lp
from tests.helpers.saved_runs import EPOCHS, RUNS, SavedModule, fit, output

DATA = Path(__file__).parents[1] / "data"
SAVED = {
    f"{folder.parent.name}-{folder.name}": folder for folder in sorted(DATA.glob("version_*/*"))
}
EXPORTED = {name: path for name, path in SAVED.items() if (path / "adapter").exists()}


def unpacked(folder: Path, target: Path) -> Path:
    checkpoint = target / "trainer.ckpt"
    checkpoint.write_bytes(gzip.decompress((folder / "trainer.ckpt.gz").read_bytes()))
    return checkpoint


def expected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "expected.pt", weights_only=True)
    return found


def test_every_run_has_files() -> None:
    assert {folder.name for folder in SAVED.values()} == set(RUNS)
    assert {folder.name for folder in EXPORTED.values()} == {n for n in RUNS if RUNS[n].exported}


@pytest.mark.parametrize("name", SAVED)
def test_load_from_checkpoint(name: str, tmp_path: Path) -> None:
    """Every stored tensor arrives, and the output is the stored one."""
    checkpoint = unpacked(SAVED[name], tmp_path)
    module = lp.load_from_checkpoint(SavedModule, checkpoint)
    state = module.state_dict()
    for key, stored in torch.load(checkpoint, weights_only=True)["state_dict"].items():
        assert torch.equal(state[key], stored), key
    torch.testing.assert_close(output(module), expected(SAVED[name])["output"])


@pytest.mark.parametrize("name", SAVED)
def test_resumed_losses_are_those_of_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    module, _ = fit(RUNS[SAVED[name].name], EPOCHS, unpacked(SAVED[name], tmp_path))
    want = expected(SAVED[name])["losses"]
    assert module.losses == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", EXPORTED)
def test_load_adapter(name: str) -> None:
    run = RUNS[EXPORTED[name].name]
    module = SavedModule(run.net)
    lp.load_adapter(module, EXPORTED[name] / "adapter", quantization=run.quantization)
    torch.testing.assert_close(output(module), expected(EXPORTED[name])["output of the adapter"])
