"""Tokens per expert so far, which tell whether a zero gradient means *no token yet*."""

from __future__ import annotations

from torch import nn

from lightning_peft.layers.adapted import Adapted, adapted_modules

__all__ = ["stop_counting", "token_lines", "tokens_of", "tokens_per_expert"]


def tokens_of(module: Adapted) -> list[int] | None:
    """Return the training tokens per expert of an adapted module; None if it does not count."""
    tokens = module._peft.telemetry.expert_tokens
    return None if tokens is None else tokens.tolist()


def tokens_per_expert(model: nn.Module) -> dict[str, list[int]]:
    """Return the training tokens per expert so far, by module name.

    Counted on this process while adapters act; a callback with a report stops after the first step.
    """
    found = {name: tokens_of(module) for name, module in adapted_modules(model)}
    return {name: tokens for name, tokens in found.items() if tokens is not None}


def stop_counting(model: nn.Module) -> None:
    """Stop counting, and keep the counts."""
    for _, module in adapted_modules(model):
        module._peft.telemetry.counts_tokens = False


def token_lines(model: nn.Module) -> list[str]:
    """Return one line per layer of experts: the spread of its tokens, and experts without any."""
    lines = []
    for name, tokens in tokens_per_expert(model).items():
        none = [e for e, n in enumerate(tokens) if not n]
        spread = " ".join(map(str, tokens)) if len(tokens) <= 16 else _spread(tokens)
        text = f"{name}: tokens per expert {spread}"
        if none:
            shown = ", ".join(map(str, none[:8])) + (", …" if len(none) > 8 else "")
            text += f"; no token yet: {len(none)} of {len(tokens)} ({shown})"
        lines.append(text)
    return lines


def _spread(tokens: list[int]) -> str:
    return f"{min(tokens)} … {max(tokens)}, {sum(tokens) / len(tokens):.1f} on average"
