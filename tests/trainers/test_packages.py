"""Both Lightning packages, in either order: imported once, and each accepts the callback."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lightning_peft import PEFT, load_from_checkpoint
from lightning_peft.callback.compatibility import check_trainer
from lightning_peft.checkpoint.contents import KEY
from lightning_peft.strategies import register_strategies
from lightning_peft.trainers.packages import is_supported, package_of
from tests.helpers.lightning_package import INSTALLED, pl, use_package
from tests.helpers.nets import Plain, adapters_of, assert_same, peft, trainer
from tests.helpers.site_packages import site_without

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
FABRICS = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
needs_both = pytest.mark.skipif(len(INSTALLED) < 2, reason="one Lightning package is installed")

ORDER = """
import importlib, json, sys
before = set(sys.modules)
for name in {first!r}:
    importlib.import_module(name)
import lightning_peft
alone = [n for n in ("lightning", "pytorch_lightning") if n in sys.modules]
from lightning_peft import PEFT, LoRA
early = PEFT(LoRA())
for name in {then!r}:
    importlib.import_module(name)
late = PEFT(LoRA())
from lightning_peft import PEFT as again
result = []
for name in {packages!r}:
    pl = sys.modules[name]
    pl.Trainer(accelerator="cpu", logger=False, callbacks=[early])
    pl.Trainer(accelerator="cpu", logger=False, callbacks=late)
    own = pl.Trainer(accelerator="cpu", devices=2, logger=False, strategy="peft_fsdp")
    result.append([isinstance(c, pl.Callback) for c in (early, late)]
                  + [issubclass(again, pl.Callback), type(own.strategy).__module__])
print(json.dumps([alone, result, again is PEFT]))
"""


def printed(code: str) -> Any:
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'triton_kernels'}{os.pathsep}{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@needs_both
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], ["pytorch_lightning"]),
        pytest.param(["pytorch_lightning"], ["lightning.pytorch"], marks=pytest.mark.slow),
        pytest.param(["lightning.pytorch"], ["pytorch_lightning"], marks=pytest.mark.slow),
        pytest.param(["pytorch_lightning"], [], marks=pytest.mark.slow),
    ],
)
def test_either_order(first: list[str], then: list[str]) -> None:
    loaded = [p for p in PACKAGES if p in [*first, *then] or (not first and p == PACKAGES[0])]
    alone, result, same = printed(ORDER.format(first=first, then=then, packages=loaded))
    assert len(alone) <= 1
    assert same
    strategies = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}
    want = [[True, True, True, f"lightning_peft.strategies.{strategies[p]}"] for p in loaded]
    assert result == want


@pytest.mark.usefixtures("lightning_package")
def test_copies_and_pickles_hold_the_configuration() -> None:
    callback = peft(quantization="nf4", modules_to_save=["5"], optimizer="adamw_8bit")
    trainer(callback, max_epochs=1).fit(Plain())
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert isinstance(other, PEFT)
        assert isinstance(other, pl.Callback)
        assert other.state_key == callback.state_key
        assert other.quantization == callback.quantization
        trainer(other, max_epochs=1).fit(Plain())


@needs_both
@pytest.mark.parametrize(("writer", "reader"), list(itertools.permutations(PACKAGES, 2)))
def test_a_checkpoint_of_one_resumes_under_the_other(
    writer: str, reader: str, tmp_path: Path
) -> None:
    def run(package: str, epochs: int, ckpt: Path | None, seed: int) -> Plain:
        with use_package(package):
            pl.seed_everything(seed, verbose=False)
            module = Plain()
            it = trainer(peft(quantization="nf4"), max_epochs=epochs)
            it.fit(module, ckpt_path=ckpt)
            it.save_checkpoint(tmp_path / f"{epochs}.ckpt")
            return module

    whole = run(writer, 4, None, 1)
    run(writer, 2, None, 1)
    resumed = run(reader, 4, tmp_path / "2.ckpt", 99)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    with use_package(writer):
        loaded = load_from_checkpoint(Plain, tmp_path / "4.ckpt")
        assert isinstance(loaded, pl.LightningModule)
    assert_same(adapters_of(loaded), adapters_of(whole))


@needs_both
def test_a_module_of_the_other_package_is_lightnings_error() -> None:
    with use_package("pytorch_lightning"):
        module = Plain()
    with use_package("lightning.pytorch"), pytest.raises(TypeError, match="LightningModule"):
        trainer(peft(), max_epochs=1).fit(module)


@pytest.mark.usefixtures("lightning_package")
def test_package_of_what_a_run_has(lightning_package: str) -> None:
    run = trainer(max_epochs=1)
    for found in map(package_of, (run, run.strategy, Plain())):
        assert found is not None
        assert found.name == lightning_package
    assert package_of(object()) is None


@pytest.mark.usefixtures("lightning_package")
def test_versions_are_in_the_file(tmp_path: Path) -> None:
    run = trainer(peft(), max_epochs=1)
    run.fit(Plain())
    run.save_checkpoint(tmp_path / "a.ckpt")
    import torch

    versions = torch.load(tmp_path / "a.ckpt", weights_only=True)[KEY]["versions"]
    names = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}
    assert {names[p] for p in INSTALLED} <= versions.keys()


@needs_both
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("package", PACKAGES)
def test_either_package_alone_suffices(package: str, tmp_path: Path) -> None:
    """The tests of callback, checkpoints and strategies, where the other is not installed."""
    absent = ["lightning"] if package == "pytorch_lightning" else [PACKAGES[1], "lightning_fabric"]
    dists = ["pytorch_lightning"] if package != "pytorch_lightning" else []
    site = site_without(tmp_path / "site", *absent, *dists, "lightning_peft")
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "triton_kernels")))
    folders = ("callback", "checkpoint", "strategies", "trainers")
    command = [
        str(Path(sys.base_prefix) / "bin" / "python3"), "-m", "pytest", "-q", "-p",
        "no:cacheprovider", "-m", "not slow and not gpu",
        *(f"tests/{f}" for f in folders),
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    ran = subprocess.run(
        command, cwd=ROOT, env={**env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1400, check=False,
    )  # fmt: skip
    print(ran.stdout.splitlines()[-1])
    assert ran.returncode == 0, ran.stdout[-8000:]


def test_an_older_package_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """lightning-bolts pins pytorch_lightning 1.9; importing us beside it must not fail."""
    old = types.ModuleType("pytorch_lightning")
    old.__version__ = "1.9.5"
    old.Trainer = type("Trainer", (), {"__module__": "pytorch_lightning"})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", old)
    register_strategies()
    with pytest.raises(RuntimeError, match=r"lightning 2\.5\.3 or later, got 1\.9\.5; upgr"):
        check_trainer(old.Trainer())
    for version, supported in (
        ("2.5.2", False),
        ("2.5.3", True),
        ("2.6.6.post1", True),
        ("2.10", True),
    ):
        old.__version__ = version
        assert is_supported("pytorch_lightning") == supported
