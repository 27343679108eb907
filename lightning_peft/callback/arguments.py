"""The methods that `PEFT` was given, by adapter name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.core.value_types import require_fit, shown
from lightning_peft.methods.base import Method
from lightning_peft.methods.method_lists import require_methods
from lightning_peft.optim.replace import check_optimizer_name

__all__ = [
    "check_embeddings",
    "check_export",
    "check_paths",
    "check_separate_copies",
    "check_values",
    "methods_by_name",
]

#: Arguments that are checked by type → their type, and the form in which they are written.
_TYPES: dict[str, tuple[Any, str]] = {
    "optimizer": (str | None, "optimizer='adamw_8bit'"),
    "adapter_name": (str, "adapter_name='default'"),
    "modules_to_save": (Sequence[str] | None, "modules_to_save=['head']"),
    "separate_copies": (bool, "separate_copies=True"),
    "root": (str | None, "root='net'"),
    "liger": (bool, "liger=True"),
    "report": (bool, "report=False"),
    "plan": (bool | dict[str, Any], "plan=True"),
    "fall_back": (bool, "fall_back=True"),
}


def check_values(**given: object) -> None:
    """Raise TypeError for a value of another type, ValueError for an optimizer without a class."""
    for name, value in given.items():
        annotation, form = _TYPES[name]
        if name == "modules_to_save" and isinstance(value, str):
            form = f"[{value!r}]"
        require_fit("PEFT", name, value, annotation, form)
    if given["optimizer"] is not None:
        check_optimizer_name(str(given["optimizer"]))


def check_paths(**given: str | Path | None) -> None:
    """Raise TypeError unless each argument is a path or None."""
    for name, path in given.items():
        if path is not None and not isinstance(path, str | Path):
            raise TypeError(f"PEFT {name}: expected a directory, got {shown(path)}; give its path")


def check_separate_copies(separate_copies: bool, init_from: str | Path | None) -> None:
    """Raise ValueError where the file of an adapter says the same thing."""
    if separate_copies and init_from is not None:
        raise ValueError(
            f"PEFT separate_copies: expected without init_from, whose file says it, got both "
            f"({init_from}); leave separate_copies out"
        )


def check_embeddings(embeddings: object, init_from: str | Path | None) -> None:
    """Raise ValueError for another word, or if there is no directory to restore from."""
    if embeddings not in ("check", "restore"):
        raise ValueError(f"PEFT embeddings: expected 'check' or 'restore', got {shown(embeddings)}")
    if embeddings == "restore" and init_from is None:
        raise ValueError(
            "PEFT embeddings: expected init_from beside 'restore', got none; give the directory "
            "that holds the embeddings: PEFT(init_from='adapter', embeddings='restore')"
        )


def check_export(
    directory: str | Path | None, adapters: dict[str, list[Method]], checkpoint: str
) -> None:
    """Raise ValueError where the export after training is known to fail without a model.

    Args:
        directory: Where to; None for no export.
        adapters: Methods by adapter name.
        checkpoint: What checkpoints hold.
    """
    if directory is None:
        return
    if Path(directory).is_file():
        raise ValueError(f"PEFT export_to: expected a directory, got the file {directory}")
    if checkpoint == "merged":
        raise ValueError(
            "PEFT export_to: expected checkpoints that hold the adapters, got "
            "checkpoint='merged', from which none can be taken; give checkpoint='adapters' or "
            "'full', and merge_and_unload() gives the merged model"
        )
    for name, methods in adapters.items():
        unknown = [m.label for m in methods if m.hf is None]
        if unknown:
            raise ValueError(
                f"PEFT export_to: expected methods that peft has too, got {', '.join(unknown)} for "
                f"adapter {name!r}; leave export_to out: checkpoints hold the adapter, and "
                "merge_and_unload() gives the plain model"
            )


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
    if init_from is not None and (method is not None or adapters):
        raise ValueError(
            f"PEFT: expected init_from alone, got {shown(method or adapters)} too; the "
            "configuration comes from the directory: leave the method out"
        )
    method = None if isinstance(method, list) and not method else method
    alone = method is None and (modules_to_save or init_from is not None)
    if (method is None) == (not adapters) and not alone:
        raise ValueError(
            f"PEFT: expected one of method and adapters, got {shown(method)} and "
            f"{shown(adapters)}; for a method under a name of its own give adapter_name"
        )
    if adapters is not None and not isinstance(adapters, dict):
        raise TypeError(
            f"PEFT adapters: expected methods by adapter name, got {shown(adapters)}; write "
            "PEFT(adapters={'default': LoRA(r=8)})"
        )
    for each in [method] if adapters is None else adapters.values():
        require_methods([] if each is None else each, "PEFT({})")
    given = adapters if adapters else {adapter_name: [] if method is None else method}
    return {name: m if isinstance(m, list) else [m] for name, m in given.items()}
