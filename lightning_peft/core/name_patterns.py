"""Regular expressions for names, matched in bounded time.

Patterns come from files that others wrote. Python's `re` backtracks: on ``(.+)+!`` its time doubles
with every character of a name. Here a pattern is matched by sets of positions, so that time grows
with the product of both lengths, and a number of steps is never exceeded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as ops
    import sre_parse as parser

__all__ = ["check_pattern", "ends_with_pattern", "fullmatch", "is_plain"]

#: Steps per name. A long pattern of peft's on a long name takes some hundred.
_MOST_STEPS = 4_000
_MOST_CHARACTERS = 4_000
_QUANTIFIERS = re.compile(r"[*+?{|(\\]")

#: (operation, its argument, whose form depends on the operation).
_Node = tuple[int, Any]


def is_plain(pattern: str) -> bool:
    """Whether a pattern has no part that repeats or branches, so that `re` takes linear time."""
    return _QUANTIFIERS.search(pattern.replace("\\.", "")) is None


def check_pattern(pattern: str) -> None:
    """Raise unless the pattern can be matched in bounded time.

    Raises:
        ValueError: it is no regular expression, too long, or needs backtracking.
    """
    _compiled(pattern)


def fullmatch(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the complete name, as `re.fullmatch` does.

    Raises:
        ValueError: as for `check_pattern`, or the match takes too many steps.
    """
    return _compiled(pattern)(name)


def ends_with_pattern(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the name, or its end after a dot, as peft's keys do."""
    check_pattern(pattern)
    if is_plain(pattern):
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    return fullmatch(rf"(?:.*\.)?(?:{pattern})", name)


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Callable[[str], bool]:
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(
            f"pattern: expected at most {_MOST_CHARACTERS:,} characters, got {len(pattern):,}; "
            "list the names instead"
        )
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"pattern: expected a regular expression, got {pattern[:60]!r} ({error}); correct it, "
            "or escape it with re.escape"
        ) from None
    if is_plain(pattern):
        function = re.compile(pattern).fullmatch
        return lambda name: function(name) is not None
    ignore_case = bool(tree.state.flags & re.IGNORECASE)
    _require_supported(pattern, tree)
    return lambda name: _Match(pattern, name).run(tree, ignore_case)


def _require_supported(pattern: str, tree: Iterable[_Node]) -> None:
    known = {
        *(ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN, ops.BRANCH, ops.SUBPATTERN, ops.AT),
        *(ops.MAX_REPEAT, ops.MIN_REPEAT, ops.ASSERT, ops.ASSERT_NOT),
    }
    for op, argument in tree:
        behind = op in (ops.ASSERT, ops.ASSERT_NOT) and argument[0] < 0
        if op not in known or behind:
            raise ValueError(
                f"pattern: expected a regular expression without back references, look-behind and "
                f"atomic groups, got {pattern[:60]!r}; list the names instead"
            )
        for child in _children(op, argument):
            _require_supported(pattern, child)


def _children(op: int, argument: Any) -> list[Iterable[_Node]]:
    if op is ops.BRANCH:
        return list(argument[1])
    if op is ops.SUBPATTERN:
        return [argument[3]]
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        return [argument[2]]
    return [argument[1]] if op in (ops.ASSERT, ops.ASSERT_NOT) else []


class _Match:
    """One match of one name. Bit p of a set of positions stands for position p."""

    def __init__(self, pattern: str, name: str) -> None:
        self.pattern, self.name = pattern, name
        self.everywhere = (1 << (len(name) + 1)) - 1
        self.steps = 0

    def run(self, tree: Iterable[_Node], ignore_case: bool) -> bool:
        """Whether the tree matches the complete name."""
        return bool(self.sequence(tree, 1, ignore_case) >> len(self.name) & 1)

    def sequence(self, nodes: Iterable[_Node], starts: int, ignore_case: bool) -> int:
        """Return the positions that the nodes reach, one after the other."""
        for node in nodes:
            if not starts:
                return 0
            starts = self.node(node, starts, ignore_case)
        return starts

    def node(self, node: _Node, starts: int, ignore_case: bool) -> int:
        """Return the positions that one node reaches from any of the starts."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise ValueError(
                f"pattern: expected a regular expression that is simple to match, got "
                f"{self.pattern[:60]!r}, which takes too many steps on {self.name[:60]!r}; list "
                "the names instead"
            )
        op, argument = node
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            return (starts & self.accepted(op, argument, ignore_case)) << 1
        if op is ops.AT:
            return starts & self.anchored(argument)
        if op is ops.BRANCH:
            found = 0
            for branch in argument[1]:
                found |= self.sequence(branch, starts, ignore_case)
            return found
        if op is ops.SUBPATTERN:
            _, added, removed, inner = argument
            inside = (ignore_case or bool(added & re.IGNORECASE)) and not removed & re.IGNORECASE
            return self.sequence(inner, starts, inside)
        if op in (ops.ASSERT, ops.ASSERT_NOT):
            wanted = op is ops.ASSERT
            places = [p for p in range(len(self.name) + 1) if starts >> p & 1]
            kept = 0
            for p in places:
                if bool(self.sequence(argument[1], 1 << p, ignore_case)) == wanted:
                    kept |= 1 << p
            return kept
        return self.repeat(argument, starts, ignore_case)

    def repeat(self, argument: Any, starts: int, ignore_case: bool) -> int:
        """Return the positions after the allowed numbers of repetitions."""
        least, most, inner = argument
        at = starts
        for _ in range(min(least, len(self.name) + 1)):
            at = self.sequence(inner, at, ignore_case)
            if not at:
                return 0
        found, fresh = at, at
        rounds = len(self.name) + 1 if most is ops.MAXREPEAT else most - least
        for _ in range(min(rounds, len(self.name) + 1)):
            fresh = self.sequence(inner, fresh, ignore_case) & ~found
            if not fresh:
                break
            found |= fresh
        return found

    def anchored(self, place: int) -> int:
        """Return the positions at which an anchor holds."""
        end = 1 << len(self.name)
        if place in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return 1
        if place in (ops.AT_END, ops.AT_END_STRING):
            return end
        words = [bool(re.match(r"\w", c)) for c in self.name]
        edges = 0
        for p, (left, right) in enumerate(zip([False, *words], [*words, False], strict=True)):
            edges |= int(left != right) << p
        return edges if place is ops.AT_BOUNDARY else self.everywhere & ~edges

    def accepted(self, op: int, argument: Any, ignore_case: bool) -> int:
        """Return the positions whose character a node accepts."""
        found = 0
        for p, character in enumerate(self.name):
            forms = {character, character.lower(), character.upper()} if ignore_case else character
            if any(_accepts(op, argument, form) for form in forms):
                found |= 1 << p
        return found


def _accepts(op: int, argument: Any, character: str) -> bool:
    code = ord(character)
    if op is ops.ANY:
        return character != "\n"
    if op in (ops.LITERAL, ops.NOT_LITERAL):
        is_same: bool = code == argument
        return is_same == (op is ops.LITERAL)
    negated = bool(argument) and argument[0][0] is ops.NEGATE
    found: bool = any(_in_set(kind, value, character) for kind, value in argument)
    return found != negated


def _in_set(kind: int, value: Any, character: str) -> bool:
    if kind is ops.LITERAL:
        return bool(ord(character) == value)
    if kind is ops.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    if kind is ops.CATEGORY:
        classes = {
            ops.CATEGORY_DIGIT: r"\d",
            ops.CATEGORY_NOT_DIGIT: r"\D",
            ops.CATEGORY_SPACE: r"\s",
            ops.CATEGORY_NOT_SPACE: r"\S",
            ops.CATEGORY_WORD: r"\w",
            ops.CATEGORY_NOT_WORD: r"\W",
        }
        return re.match(classes[value], character) is not None
    return False
