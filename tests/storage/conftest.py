"""Prints format × check after `pytest -m "slow or not slow" tests/storage/test_released.py`."""

from __future__ import annotations

from collections import defaultdict

import pytest

_FILE = "test_released.py"
_MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "-"}
_found: defaultdict[str, dict[str, str]] = defaultdict(dict)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path, _, test = report.nodeid.partition("::")
    check, _, name = test.removesuffix("]").partition("[")
    if path.endswith(_FILE) and name and (report.when == "call" or report.failed):
        _found[check.removeprefix("test_")][name] = _MARKS[report.outcome]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Checks of one format at most are left out: most formats have no cell there."""
    checks = [check for check, cells in _found.items() if len(cells) > 3]
    names = list(dict.fromkeys(name for check in checks for name in _found[check]))
    if len(names) < 2:
        return
    write = terminalreporter.write_line
    terminalreporter.section("released formats: each column is a check")
    for number, check in enumerate(checks, 1):
        write(f"{number:3d}  {check.replace('_', ' ')}")
    width = max(map(len, names))
    write(" " * width + "".join(f"{n:7d}" for n in range(1, len(checks) + 1)))
    for name in names:
        write(f"{name:{width}}" + "".join(f"{_found[c].get(name, ''):>7}" for c in checks))
