"""LoRA's initialisations by name, and the options of those that need data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.methods.checks import require

__all__ = ["INITS", "check_options", "complete_options"]

INITS = (
    *("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "mica"),
    *("eva", "lora_ga", "corda"),
)
_OPTIONS: dict[str, dict[str, Any]] = {
    "eva": {
        "rho": 2.0,
        "tau": 0.99,
        "whiten": False,
        "adjust_scaling_factors": True,
        "use_label_mask": True,
        "label_mask_value": -100,
        "batches": 16,
    },
    "lora_ga": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16, "batches": 16},
    "corda": {"corda_method": "ipm", "batches": 16},
}
_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def complete_options(init: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an initialisation, with defaults."""
    return {**_OPTIONS.get(init, {}), **given}


def check_options(label: str, init: str, given: Mapping[str, Any]) -> None:
    """Check the names and values of an initialisation's options.

    Raises:
        ValueError: an unknown option, or a value out of range.
    """
    known = _OPTIONS.get(init, {})
    unknown = sorted(set(given) - set(known))
    require(
        not unknown,
        f"{label}: expected init_options for init={init!r} in {sorted(known)}, got {unknown}",
    )
    o = complete_options(init, given)
    for key, fits, text in (
        ("rho", lambda v: v >= 1, ">= 1"),
        ("tau", lambda v: 0 <= v <= 1, "in [0, 1]"),
        ("batches", lambda v: v >= 1, ">= 1"),
        ("stable_gamma", lambda v: v > 0, "> 0"),
        ("direction", lambda v: v in _DIRECTIONS, f"in {_DIRECTIONS}"),
        ("scale", lambda v: v in _SCALES, f"in {_SCALES}"),
        ("corda_method", lambda v: v in ("ipm", "kpm"), "in ('ipm', 'kpm')"),
    ):
        require(
            key not in o or fits(o[key]),
            f"{label}: expected init_options {key} {text}, got {o.get(key)!r}",
        )
