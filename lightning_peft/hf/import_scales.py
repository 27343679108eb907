"""Scales of LoRA files of other programs: from the header or an argument, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_peft.hf.header_scale import header_scales
from lightning_peft.hf.import_names import Layer

__all__ = ["set_loralib_scale", "set_scales"]


def set_scales(
    kind: str,
    layers: Sequence[Layer],
    alpha: float | None,
    metadata: Mapping[str, str],
    source: str,
    notes: list[str],
) -> None:
    """Set missing alphas from the header, or from the argument; none is guessed."""
    silent = [e for e in layers if not e.alpha]
    if alpha is not None and not silent:
        raise ValueError(
            f"load_adapter: alpha: expected with a file that lacks its scale, got a {kind} one, "
            "which says its own"
        )
    scales = header_scales(metadata, source) if silent else []
    read = 0
    for e in silent:
        found = (scale.of(e.label, e.rank) for scale in scales)
        e.alpha = next((value for value in found if value is not None), None)
        read += e.alpha is not None
        e.alpha = alpha if e.alpha is None else e.alpha
    if read:
        notes.append(f"{read} layers have their scale from the file's header")
    lacking = [e for e in silent if e.alpha is None]
    if lacking:
        ranks = sorted({e.rank for e in lacking})
        raise ValueError(
            f"{source}: expected an alpha in the tensors or in the header, got ranks {ranks} and "
            f"no alpha for {lacking[0].label!r} and {len(lacking) - 1} more; give alpha= of the "
            f"training run (alpha = rank is scale 1, which {kind} takes); nothing was loaded"
        )
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"load_adapter: alpha: expected a positive number, got {alpha}")


def set_loralib_scale(layers: Sequence[Layer], alpha: float | None, source: str) -> None:
    """Set the alpha of every layer from the argument, which loralib's files do not hold."""
    if alpha is None or not alpha > 0:
        raise ValueError(
            f"{source}: expected alpha= (loralib's lora_alpha, above 0), which loralib's files do "
            f"not hold, got {alpha}; take it from the run that made the adapter"
        )
    for e in layers:
        e.alpha = alpha
