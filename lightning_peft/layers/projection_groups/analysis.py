"""Which children of a module are called with the same tensor: read from its forward's source.

q, k and v of an attention, gate and up of a feed-forward block: `self.q_proj(x)`, `self.k_proj(x)`
in one straight run of statements, each child called once, with a name that is not assigned in
between. What cannot be read so (another form of call, a branch, no source) is not grouped.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

__all__ = ["children_sharing_input"]

_BRANCHES = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.comprehension, ast.Try)


@dataclass(frozen=True)
class _Call:
    child: str
    argument: str
    block: int  # which list of statements
    statement: int  # place in it
    order: tuple[int, int]


def children_sharing_input(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of children, in order of calling, in groups of two or more."""
    forward: Any = module.forward
    function = inspect.unwrap(getattr(forward, "__func__", forward))
    return _groups(function) if inspect.isfunction(function) else ()


@lru_cache(maxsize=256)
def _groups(function: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return ()
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return ()
    me = tree.args.args[0].arg
    calls = list(_calls(tree, me))
    counts: dict[str, int] = {}
    for node in ast.walk(tree):
        child = _child(node, me)
        if child is not None:
            counts[child] = counts.get(child, 0) + 1
    by_input: dict[tuple[str, int], list[_Call]] = {}
    for call in calls:
        if counts[call.child] == 1:
            by_input.setdefault((call.argument, call.block), []).append(call)
    blocks = _blocks(tree)
    found = []
    for (name, block), same in by_input.items():
        for run in _runs(sorted(same, key=lambda c: c.order), blocks[block], name):
            if len(run) > 1:
                found.append(tuple(c.child for c in run))
    return tuple(found)


def _child(node: ast.AST, me: str) -> str | None:
    """The child that a call goes to."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == me
    ):
        return node.func.attr
    return None


def _blocks(tree: ast.AST) -> list[list[ast.stmt]]:
    """Every list of statements, in the order of `ast.walk`."""
    return [
        value
        for node in ast.walk(tree)
        for _, value in ast.iter_fields(node)
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt)
    ]


def _calls(tree: ast.AST, me: str) -> Iterator[_Call]:
    """Calls of children with one bare name, that run whenever their statement does."""
    for block, statements in enumerate(_blocks(tree)):
        for place, statement in enumerate(statements):
            for node in _always_run(statement):
                child = _child(node, me)
                if child is None or not isinstance(node, ast.Call) or node.keywords:
                    continue
                if len(node.args) == 1 and isinstance(node.args[0], ast.Name):
                    order = (node.lineno, node.col_offset)
                    yield _Call(child, node.args[0].id, block, place, order)


def _always_run(node: ast.AST) -> Iterator[ast.AST]:
    """Expressions of one statement, without statements inside it and without branches."""
    yield node
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, (ast.stmt, *_BRANCHES)):
            yield from _always_run(inner)


def _runs(calls: list[_Call], statements: list[ast.stmt], name: str) -> Iterator[list[_Call]]:
    """Cut where the name is assigned between two calls."""
    run: list[_Call] = []
    for call in calls:
        if run and any(
            _assigns(statement, name)
            for statement in statements[run[-1].statement : call.statement]
        ):
            yield run
            run = []
        run.append(call)
    yield run


def _assigns(statement: ast.stmt, name: str) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load)
        for node in ast.walk(statement)
    )
