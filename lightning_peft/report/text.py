"""The report as text: one line per group of layers, and notes that a user can act on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_peft.report.summary import Group, Report

__all__ = ["report_lines", "wrapped"]

#: Reasons that follow from what the user asked, and need no line.
_EXPECTED = ("trained whole", "trained whole (modules_to_save)", "output head", "frozen by you")


def report_lines(report: Report, width: int = 80) -> list[str]:
    """Return the lines of a report.

    Args:
        report: The report.
        width: Columns of the terminal.
    """
    lines = _table([g for g in report.groups if g.shape], width)
    share = f"{report.trainable:,} of {report.total:,} parameters = {report.percent:.3f} %"
    sentences = [f"trained {share}", *_trained_fully(report), _memory(report)]
    dense = [(name, why) for name, why in report.dense if why not in _EXPECTED]
    skipped = [
        (name, why)
        for name, why in report.skipped
        if why not in _EXPECTED[:2] and name not in report.user_frozen
    ]
    sentences += _frozen_by_user(report)
    if report.loose:
        sentences.append(f"trained fully: {_names(report.loose)} (new parameter)")
    sentences += _grouped("left out", skipped) + _grouped("stays dense", dense)
    sentences += [f"tied: {' = '.join(names)}" for names in report.tied]
    if report.eval_roots:
        names = [f"{name}.train()" if name else "train()" for name in report.eval_roots]
        sentences.append(
            f"{report.eval_modules} modules are in eval mode, without dropout; call "
            f"{_names(names)} to train with dropout"
        )
    return lines + wrapped([*sentences, *report.notes], width)


def wrapped(sentences: Iterable[str], width: int = 80) -> list[str]:
    """Return sentences as lines of a width; a sentence goes on with an indent."""
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, width, subsequent_indent="  ", break_on_hyphens=False)
    ]


def _table(groups: Sequence[Group], width: int) -> list[str]:
    """Return one line per group. A long path is cut at its beginning."""
    rows = [
        (g.path, f"×{g.count}", g.method, g.shape, f"{g.trainable:,}", g.storage) for g in groups
    ]
    if not rows:
        return []
    sizes = [max(len(row[column]) for row in rows) for column in range(6)]
    sizes[0] = max(12, min(sizes[0], width - sum(sizes[1:]) - 5))
    return [
        f"{_shortened(path, sizes[0]):<{sizes[0]}} {count:>{sizes[1]}} {method:<{sizes[2]}} "
        f"{shape:<{sizes[3]}} {trained:>{sizes[4]}} {storage}"
        for path, count, method, shape, trained, storage in rows
    ]


def _shortened(path: str, size: int) -> str:
    return path if len(path) <= size else "…" + path[len(path) - size + 1 :]


def _trained_fully(report: Report) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, why in report.trained_fully:
        by_reason.setdefault(why, []).append(name)
    return [f"trained fully: {_names(names)} ({why})" for why, names in by_reason.items()]


def _frozen_by_user(report: Report) -> list[str]:
    followed = [
        part
        for part in report.user_frozen
        if any(name == part or name.startswith(f"{part}.") for name in report.followers)
    ]
    others = [part for part in report.user_frozen if part not in followed]
    lines = []
    if others:
        lines.append(f"frozen by you: {_names(others)} (name it in target_modules to adapt it)")
    if followed:
        lines.append(
            f"frozen by you: {_names(followed)} (a copy of an adapted part: it has copies of the "
            "adapters, for code that averages; they are never trained)"
        )
    return lines


def _memory(report: Report) -> str:
    """Return the sizes of the base before and after, and of the adapters."""
    dense, packed = report.nbytes.get("base", 0), report.nbytes.get("quantised base", 0)
    adapters = f"adapters {_mb(report.nbytes.get('adapters', 0))} MB"
    if not packed:
        return f"base {_mb(dense)} MB, {adapters}"
    kinds = [kind for kind, size in report.dense_kinds.items() if size > dense / 10]
    parts = [f"{_mb(dense)} dense: {', '.join(kinds)}"] if dense else []
    for label, size in report.storages.items():
        bits = report.bits.get(label)
        parts.append(f"{_mb(size)} {label}" + (f", {bits:.2f} bits per weight" if bits else ""))
    before = f"{_mb(report.base_before)} MB → " if report.base_before > dense + packed else ""
    return f"base {before}{_mb(dense + packed)} MB ({'; '.join(parts)}), {adapters}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}" if nbytes >= 1e5 else f"{nbytes / 1e6:.3f}"


def _grouped(what: str, reasons: Sequence[tuple[str, str]]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons:
        by_reason.setdefault(why, []).append(name)
    return [f"{what}, {why}: {_names(names)}" for why, names in by_reason.items()]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
