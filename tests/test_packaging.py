"""What is published: its metadata, its files, and that it works where only it is installed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import lightning_peft
from lightning_peft.trainers.packages import OLDEST
from tests.helpers.site_packages import site_without

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIRED = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PACKAGES = {"lightning_peft": "lightning_peft", "lightning_peft_kernels": "triton_kernels"}
LLAMA = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 99},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
}


def run(*command: object, env: dict[str, str] | None = None, cwd: Path) -> Any:
    """Run to the end; the environment has nothing of ours on its path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**clean, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_one_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.M) == [PROJECT["version"]]
    assert lightning_peft.__version__ == PROJECT["version"]


@pytest.mark.parametrize(
    ("version", "taken"),
    [("2.5.3", True), ("2.6.1", True), ("2.6.2", False), ("2.6.3", False), ("2.6.4", True)],
)
def test_malicious_lightning_is_never_taken(version: str, taken: bool) -> None:
    extras = {r.name: r for n in EXTRAS for r in map(Requirement, EXTRAS[n])}
    for package in ("lightning", "pytorch-lightning"):
        assert extras[package].specifier.contains(version) is taken


def test_either_lightning_package_suffices() -> None:
    assert not {"lightning", "pytorch-lightning"} & REQUIRED.keys()
    assert [Requirement(r).name for r in EXTRAS["lightning"]] == ["lightning"]
    assert [Requirement(r).name for r in EXTRAS["pytorch-lightning"]] == ["pytorch-lightning"]


@pytest.mark.parametrize("extra", ["lightning", "pytorch-lightning"])
def test_the_callback_takes_every_lightning_that_is_installed_with_it(extra: str) -> None:
    *front, last = OLDEST
    (requirement,) = map(Requirement, EXTRAS[extra])
    oldest, before = (".".join(map(str, (*front, n))) for n in (last, last - 1))
    assert requirement.specifier.contains(oldest)
    assert not requirement.specifier.contains(before)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_triton_only_where_it_exists(platform: str) -> None:
    marker = REQUIRED["triton"].marker
    assert marker is not None
    assert marker.evaluate({"sys_platform": platform}) is (platform == "linux")


def test_what_is_not_needed_is_not_required() -> None:
    optional = {"transformers", "bitsandbytes", "torchmetrics"}
    assert not {"peft", "liger-kernel", "accelerate", *optional} & REQUIRED.keys()
    assert {Requirement(r).name for r in EXTRAS["all"]} == optional


@pytest.mark.parametrize("package", PACKAGES)
def test_typed(package: str) -> None:
    assert (
        ROOT / PACKAGES[package] / (package if package.endswith("s") else "") / "py.typed"
    ).is_file()


def test_without_triton_bitsandbytes_and_transformers(tmp_path: Path) -> None:
    others = ("peft", "accelerate", "sentence_transformers", "lightning_peft")
    site = site_without(tmp_path / "site", "triton", "bitsandbytes", "transformers", *others)
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "triton_kernels")))
    base = Path(sys.base_prefix) / "bin" / "python3"
    ran = run(
        base,
        ROOT / "tests" / "helpers" / "without_extras.py",
        env={"PYTHONPATH": path},
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    answers = json.loads(ran.stderr.splitlines()[-1])
    assert answers["merge"] < 1e-5
    assert answers["exchanged"]
    assert re.match(
        r"ModuleNotFoundError: quantization='int8': .*pip install bitsan", answers["int8"]
    )
    assert re.match(r"ValueError: plan: expected transformers .*give .* a module", answers["plan"])
    assert answers["vision"] > 0, "LoRA on convolutions learns"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of this tree, the wheel of this tree, the wheel of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation")
    made = run(*build, "--sdist", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    assert made.returncode == 0, made.stdout + made.stderr
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    again = run(*build, "--wheel", "--outdir", folder / "again", source, cwd=folder)
    assert again.returncode == 0, again.stdout + again.stderr
    (wheel,), (second,) = folder.glob("*.whl"), (folder / "again").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "again": second}


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built: dict[str, Path]) -> None:
    first, second = (hashlib.sha256(built[w].read_bytes()).digest() for w in ("wheel", "again"))
    assert first == second


@pytest.mark.slow
def test_the_sdist_holds_the_examples(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"examples/{p.name}" for p in (ROOT / "examples").glob("*.py")} <= names


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
    inside = {n for n in names if ".dist-info/" not in n}
    expected = {
        f"{package}/{file.relative_to(ROOT / where / name).as_posix()}"
        for package, where in PACKAGES.items()
        for name in ("" if where == package else package,)
        for file in (ROOT / where / name).rglob("*")
        if file.suffix == ".py" or file.name == "py.typed"
    }
    assert inside == expected
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(built: dict[str, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    python = tmp_path / "env" / "bin" / "python"
    site_without(
        packages, "lightning_peft", "lightning_peft_kernels"
    )  # what the wheel requires; not this project
    install = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"),
        *("--disable-pip-version-check", built["wheel"]), cwd=tmp_path,
    )  # fmt: skip
    assert install.returncode == 0, install.stderr
    where = run(python, "-c", "import lightning_peft as p; print(p.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(tmp_path), where.stderr
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    plan = run(
        *(python, "-m", "lightning_peft", "plan", "config.json", "--r", "4"),
        *("--quantization", "nf4", "--batch-size", "2", "--memory", "1GB"), cwd=tmp_path,
    )  # fmt: skip
    assert plan.returncode == 0, plan.stderr
    assert "largest batch" in plan.stdout
    program = run(python.with_name("lightning-peft"), "merge", "--help", cwd=tmp_path)
    assert "--adapter" in program.stdout
