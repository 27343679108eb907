"""What every test starts from: no network, one thread, one seed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Before huggingface_hub is imported by anything: no test may ask a server.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import pytest
import torch

from tests.helpers.forks import server
from tests.helpers.lightning_package import INSTALLED, use_package
from tests.helpers.sweeps import mark_slow_cases

SEED = 20


def pytest_configure() -> None:
    # Two test processes share two cores; more threads only take turns.
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow_cases(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses `lightning_package` under every installed package.

    Tests marked `one_package` run under the others in the slow set only.
    """
    if "lightning_package" not in metafunc.fixturenames:
        return
    heavy = metafunc.definition.get_closest_marker("one_package") is not None
    params = [
        pytest.param(name, marks=[pytest.mark.slow] if heavy and name != INSTALLED[0] else [])
        for name in INSTALLED
    ]
    metafunc.parametrize("lightning_package", params, indirect=True, scope="module")


@pytest.fixture(scope="module")
def lightning_package(request: pytest.FixtureRequest) -> Iterator[str]:
    """Import name of the Lightning package that the test runs under."""
    with use_package(request.param):
        yield request.param


def pytest_collection_finish() -> None:
    # Before the first test: what the server forks starts from imports alone.
    server()


def pytest_sessionfinish() -> None:
    if server.cache_info().currsize:
        server().close()


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def seeded() -> int:
    """Every test starts from the same generators, whichever tests ran before it."""
    torch.set_grad_enabled(True)  # an example that ends by an error may leave it off
    seed_all(SEED)
    return SEED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many of the cells methods × models × storages held, and how many have no meaning."""
    cells, stats = "tests/methods/test_all_methods_all_models.py::test_cell", terminalreporter.stats
    passed, skipped, failed = (
        sum(cells in getattr(report, "nodeid", "") for report in stats.get(outcome, ()))
        for outcome in ("passed", "skipped", "failed")
    )
    if passed or skipped or failed:
        terminalreporter.write_line(
            f"invariants: {passed} cells of method, model and storage hold, {skipped} have no "
            f"meaning (reasons above), {failed} fail"
        )
