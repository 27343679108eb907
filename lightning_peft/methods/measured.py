"""Written by `python benchmarks/compare_methods.py --publish` from its results; not by hand."""

from __future__ import annotations

from lightning_peft.methods.measurement import Measured

__all__ = ["MEASURED", "Measured"]

# fmt: off
MEASURED: tuple[Measured, ...] = (
    Measured("classification", "LoRA", "LoRA", "accuracy",
             71.88, -3.82, 1, 1.449, 101.5, 1327104, None),
    Measured("classification", "LoRA", "LoRA, rank-stabilised", "accuracy",
             71.88, -3.82, 1, 1.449, 101.1, 1327104, None),
    Measured("classification", "LoRA", "LoRA, gaussian", "accuracy",
             72.22, -3.47, 1, 1.449, 101.4, 1327104, None),
    Measured("classification", "LoRA", "LoRA, orthogonal", "accuracy",
             70.49, -5.21, 1, 1.449, 101.0, 1327104, None),
    Measured("language", "LoRA", "LoRA", "perplexity",
             30.14, 7.88, 1, 6.4343, 24.5, 294912, None),
    Measured("language", "LoRA", "LoRA, rank-stabilised", "perplexity",
             30.55, 8.29, 1, 6.4343, 24.5, 294912, None),
    Measured("language", "LoRA", "LoRA, gaussian", "perplexity",
             30.14, 7.88, 1, 6.4343, 24.5, 294912, None),
    Measured("language", "LoRA", "LoRA, orthogonal", "perplexity",
             30.93, 8.68, 1, 6.4343, 24.5, 294912, None),
    Measured("language", "LoRA", "LoRA, PiSSA", "perplexity",
             30.6, 8.34, 1, 6.4343, 24.8, 589824, None),
    Measured("language", "LoRA", "LoRA, OLoRA", "perplexity",
             31.28, 9.02, 1, 6.4343, 24.8, 589824, None),
)
