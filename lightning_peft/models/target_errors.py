"""Error messages for target rules that select no module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from torch import nn

from lightning_peft.core.names import nearest_names
from lightning_peft.layers import uneditable

__all__ = ["no_match"]


def no_match(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    modules: Sequence[tuple[str, nn.Module]],
    skipped: Sequence[tuple[str, str]],
    unfit: Sequence[str],
    adaptable: Callable[[nn.Module], bool],
) -> str:
    """Return the message for a rule that selects no module.

    Args:
        model: The root.
        target_modules: The rule.
        modules: Names and modules of the root, without adapters.
        skipped: (name, reason) of modules that matched and were left out.
        unfit: Names of modules that matched and cannot be adapted.
        adaptable: Tells if a module's weights can be edited.
    """
    text = (
        f"target_modules: expected to match a layer of {type(model).__name__}, got "
        f"{target_modules!r}, which matches none"
    )
    given = target_modules if isinstance(target_modules, str) else ""
    if target_modules is not None and not target_modules:
        text += "; name layers, or leave target_modules out for the usual layers of the model"
    if not given and list(target_modules or ()) == ["all-linear"]:
        text += "; write target_modules='all-linear', without a list"
    if given != "all-linear" and get_close_matches(given, ["all-linear"], 1, 0.8):
        text += "; did you mean 'all-linear'?"
    if unfit:
        matched = [model.get_submodule(n) for n in unfit]
        kinds = sorted({type(m).__name__ for m in matched})
        reasons = sorted({why for m in matched if (why := uneditable(m))})
        text += (
            f" that can be adapted (it matches {', '.join(unfit[:3])} of type {', '.join(kinds)}"
            f"{''.join(f'; {why}' for why in reasons)})"
        )
    if skipped:
        text += "; left out: " + ", ".join(f"{n} ({why})" for n, why in skipped[:5])
    names = [n for n, m in modules if n and adaptable(m)]
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    near = [x for w in wanted for x in nearest_names(w.rpartition(".")[2] or w, names)]
    if not wanted:  # all that the rule selects is left out
        return text
    return (
        f"{text}; nearest names: "
        f"{', '.join(list(dict.fromkeys(near))[:8]) or 'no layer of this model can be adapted'}"
    )
