"""The methods that `PEFT` was given, by adapter name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_peft.methods.arguments import require_methods
from lightning_peft.methods.base import Method

__all__ = ["check_paths", "methods_by_name"]


def check_paths(**given: str | Path | None) -> None:
    """Raise TypeError unless each argument is a path or None."""
    for name, path in given.items():
        if path is not None and not isinstance(path, str | Path):
            raise TypeError(f"PEFT {name}: expected a directory, got {path!r}; give its path")


def methods_by_name(
    method: Method | list[Method] | None,
    adapters: dict[str, Method | list[Method]] | None,
    adapter_name: str,
    modules_to_save: Sequence[str] | None,
    init_from: str | Path | None,
) -> dict[str, list[Method]]:
    """Return the methods of every adapter.

    Args:
        method: One method or a hybrid, for the adapter `adapter_name`.
        adapters: Methods by adapter name, instead of `method`.
        adapter_name: Name of the adapter of `method`.
        modules_to_save: As given; they need no method beside them.
        init_from: As given; methods come from there.

    Raises:
        TypeError: an argument of another kind, with the right form.
        ValueError: neither or both of `method` and `adapters`, or a method beside `init_from`.
    """
    if isinstance(modules_to_save, str):
        raise TypeError(
            f"PEFT modules_to_save: expected a list of names, got the string {modules_to_save!r}; "
            f"write [{modules_to_save!r}]"
        )
    if init_from is not None and (method is not None or adapters):
        raise ValueError(
            f"PEFT: expected init_from alone, got {method or adapters!r} too; the configuration "
            "comes from the directory: leave the method out"
        )
    alone = method is None and (modules_to_save or init_from is not None)
    if (method is None) == (not adapters) and not alone:
        raise ValueError(
            f"PEFT: expected one of method and adapters, got {method!r} and {adapters!r}; for a "
            "method under a name of its own give adapter_name"
        )
    if adapters is not None and not isinstance(adapters, dict):
        raise TypeError(
            f"PEFT adapters: expected methods by adapter name, got {adapters!r}; write "
            "PEFT(adapters={'default': LoRA(r=8)})"
        )
    for each in [method] if adapters is None else adapters.values():
        require_methods([] if each is None else each, "PEFT({})")
    given = adapters if adapters else {adapter_name: [] if method is None else method}
    return {name: m if isinstance(m, list) else [m] for name, m in given.items()}
