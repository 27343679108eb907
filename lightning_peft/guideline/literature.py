"""Settings that the papers use, by row of the comparison."""

from __future__ import annotations

__all__ = ["SETTINGS"]

_REGRET = (
    "all linear layers, about 10 × full's rate at any rank (Schulman et al. 2025, LoRA Without "
    "Regret)"
)

#: Row of the comparison → the settings of the literature, with the source.
SETTINGS: dict[str, str] = {
    "LoRA": _REGRET,
    "LoRA, rank-stabilised": "scale α/√r, for large ranks (arXiv:2312.03732)",
    "LoRA on NF4": "all linear layers, r 64, α 16, 2e-4 up to 13B, 1e-4 above (arXiv:2305.14314)",
    "LoRA+": "rate of B 16 × that of A (arXiv:2402.12354)",
    "DoRA": "LoRA's settings, half its rank or less (arXiv:2402.09353)",
    "VeRA": "r 256 to 1024, a rate about 10 × LoRA's (arXiv:2310.11454)",
    "IA3": "3e-3 for T0 models (arXiv:2205.05638)",
    "PromptTuning": "0.3 with Adafactor, 20 to 100 tokens (arXiv:2104.08691)",
    "PrefixTuning, projection": "reparametrised in training; 10 tokens, 200 for summaries "
    "(arXiv:2101.00190)",
    "BitFit": "1e-4 to 1e-3 on GLUE (arXiv:2106.10199)",
    "Bottleneck, Houlsby": "bottleneck of 8 to 256, 3e-4 or 3e-3 on GLUE (arXiv:1902.00751)",
    "LoRA, PiSSA": "LoRA's settings (arXiv:2404.02948)",
    "LoRA, LoRA-GA": "LoRA's settings, one batch of gradients (arXiv:2407.05000)",
}
