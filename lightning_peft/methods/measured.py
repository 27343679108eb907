"""Written by ``python benchmarks/compare_methods.py --publish`` from its results."""

from __future__ import annotations

from lightning_peft.methods.measurement import Measured

__all__ = ["MEASURED", "Measured"]

# fmt: off
MEASURED: tuple[Measured, ...] = (
    Measured("classification", "LoRA", "LoRA", "accuracy",
             79.86, -1.04, 1, 1.449, 143.8, 1327104, None),
    Measured("classification", "LoRA", "LoRA, rank-stabilised", "accuracy",
             80.21, -0.7, 1, 1.449, 143.8, 1327104, None),
    Measured("classification", "LoRA", "LoRA, gaussian", "accuracy",
             79.17, -1.74, 1, 1.449, 143.8, 1327104, None),
    Measured("classification", "LoRA", "LoRA, orthogonal", "accuracy",
             80.21, -0.7, 1, 1.449, 143.8, 1327104, None),
    Measured("classification", "LoRA", "LoRA, PiSSA", "accuracy",
             78.12, -2.78, 1, 1.449, 145.2, 2654208, None),
    Measured("classification", "LoRA", "LoRA, OLoRA", "accuracy",
             78.12, -2.78, 1, 1.449, 145.2, 2654208, None),
    Measured("classification", "LoRA", "LoRA, LoRA-GA", "accuracy",
             76.74, -4.17, 1, 1.449, 145.2, 2654208, None),
    Measured("classification", "LoRA", "LoRA on NF4", "accuracy",
             79.17, -1.74, 1, 1.449, 106.8, 1327104, None),
    Measured("classification", "LoRA", "LoRA on NF4, LoftQ", "accuracy",
             79.51, -1.39, 1, 1.449, 108.2, 2654208, None),
    Measured("classification", "DoRA", "DoRA", "accuracy",
             79.86, -1.04, 1, 1.5382, 165.6, 1410048, None),
    Measured("language", "LoRA", "LoRA", "perplexity",
             31.78, 8.49, 1, 6.4343, 21.5, 294912, None),
    Measured("language", "LoRA", "LoRA, rank-stabilised", "perplexity",
             31.9, 8.6, 1, 6.4343, 21.5, 294912, None),
    Measured("language", "LoRA", "LoRA, gaussian", "perplexity",
             31.63, 8.33, 1, 6.4343, 21.5, 294912, None),
    Measured("language", "LoRA", "LoRA, orthogonal", "perplexity",
             31.75, 8.45, 1, 6.4343, 21.5, 294912, None),
    Measured("language", "LoRA", "LoRA, PiSSA", "perplexity",
             31.42, 8.12, 1, 6.4343, 21.7, 589824, None),
    Measured("language", "LoRA", "LoRA, OLoRA", "perplexity",
             32.46, 9.16, 1, 6.4343, 21.8, 589824, None),
)
