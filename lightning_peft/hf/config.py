"""adapter_config.json of Hugging Face peft, read with its common fields checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.core.name_patterns import check_pattern, is_plain

__all__ = [
    "CONFIG",
    "check_config",
    "is_finite",
    "is_int",
    "missing_config",
    "read_config",
    "shortened",
]

CONFIG = "adapter_config.json"
_MOST_BYTES = 16 << 20  # the largest seen (rank patterns of every layer) are below 1 MB
_MOST_PATTERNS = 32  # each is tried on every layer
_LARGEST_NUMBER = 1e300  # integers of JSON have no bound; floats have


def read_config(directory: Path) -> dict[str, Any]:
    """Return the config; its common fields have the right types.

    Raises:
        FileNotFoundError: no adapter_config.json.
        ValueError: not JSON, not an object, too large, or a common field of another type.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise missing_config(directory)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(
            f"{path}: expected at most {_MOST_BYTES:,} bytes, got {path.stat().st_size:,}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    _check_common(path, config)
    return config


def missing_config(directory: Path) -> FileNotFoundError:
    """Return the error for a directory without adapter_config.json."""
    return FileNotFoundError(
        f"{directory}: expected {CONFIG} of a Hugging Face peft adapter, found "
        f"{_listing(directory)}"
    )


def _listing(directory: Path) -> str:
    if not directory.is_dir():
        return "no such directory"
    return ", ".join(sorted(p.name for p in directory.iterdir())[:10]) or "an empty directory"


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Check the common fields of a config.

    Raises:
        ValueError: a common field of another type; the message begins with `where`.
    """
    _check_common(where, config)


def _check_common(path: Path | str, config: Mapping[str, Any]) -> None:
    def require(ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise ValueError(f"{path}: {key}: expected {rule}, got {shortened(config.get(key))}")

    require(isinstance(config.get("peft_type"), str), "peft_type", "a string")
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        require(
            value is None or isinstance(value, str) or _is_names(value),
            key,
            "a string or a list of strings",
        )
        if isinstance(value, str):
            _compiles(path, key, value)
    for key in ("modules_to_save", "target_parameters"):
        value = config.get(key)
        require(value is None or _is_names(value), key, "a list of strings")
    pattern = config.get("layers_pattern")
    require(
        pattern is None or isinstance(pattern, str) or _is_names(pattern),
        "layers_pattern",
        "a string or a list of strings",
    )
    for item in [pattern] if isinstance(pattern, str) else pattern or ():
        _compiles(path, "layers_pattern", item)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if isinstance(patterns, dict):
            _check_patterns(path, key, patterns)
    layers = config.get("layers_to_transform")
    require(
        layers is None or is_int(layers) or (isinstance(layers, list) and all(map(is_int, layers))),
        "layers_to_transform",
        "an integer or a list of integers",
    )


def _compiles(path: Path | str, key: str, pattern: str) -> None:
    try:
        check_pattern(pattern)
    except ValueError as error:
        raise ValueError(
            f"{path}: {key}: expected a regular expression, got {shortened(pattern)} ({error})"
        ) from None


def _check_patterns(path: Path | str, key: str, patterns: Mapping[str, Any]) -> None:
    for pattern, value in patterns.items():
        _compiles(path, key, pattern)
        if isinstance(value, int | float) and not abs(value) < _LARGEST_NUMBER:
            raise ValueError(f"{path}: {key}: expected finite numbers, got {shortened(value)}")
    complex_ones = [p for p in patterns if not is_plain(p)]
    if len(complex_ones) > _MOST_PATTERNS:
        raise ValueError(
            f"{path}: {key}: expected at most {_MOST_PATTERNS} regular expressions besides names, "
            f"got {len(complex_ones)}"
        )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def is_finite(value: float) -> bool:
    """Return False for numbers that no float holds, and for NaN."""
    return abs(value) < _LARGEST_NUMBER


def is_int(value: object) -> bool:
    """Return True for integers; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def shortened(value: object) -> str:
    """Return a value as text of at most 80 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
