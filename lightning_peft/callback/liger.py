"""liger-kernel's fused layers (norms, MLP, rotary embedding, loss) in the models that it knows."""

from __future__ import annotations

import importlib.util

from torch import nn

__all__ = ["apply_liger"]


def apply_liger(model: nn.Module, fused_loss: bool = True) -> list[str]:
    """Put the fused layers into every Hugging Face model below `model` whose type liger-kernel has.

    Call it before adapters are attached: it replaces the forward of norms and MLPs, not of linear
    layers. It also changes the modelling module of that architecture for the whole process.

    Args:
        model: The model.
        fused_loss: Whether its fused head and loss come too. They read the weight of a dense head.

    Returns:
        One line for each model.

    Raises:
        ModuleNotFoundError: liger-kernel is not installed.
        ValueError: no model of a type that it knows.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModuleNotFoundError(
            "liger=True: expected liger-kernel, found none; pip install liger-kernel, or leave "
            "liger out"
        )
    from liger_kernel.transformers import monkey_patch

    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    done: list[str] = []
    inside: list[str] = []
    types: list[str] = []
    for name, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind is None or any(name.startswith(prefix) for prefix in inside):
            continue
        types.append(str(kind))
        if kind in known:
            monkey_patch._apply_liger_kernel_to_instance(
                model=module, fused_linear_cross_entropy=fused_loss
            )
            done.append(f"liger-kernel: fused layers in {name or 'the model'} ({kind})")
            inside.append(f"{name}." if name else "")
    if not done:
        raise ValueError(
            f"liger=True: expected a Hugging Face model of a type in {sorted(known)}, got "
            f"{sorted(set(types)) or 'no Hugging Face model'}; leave liger out"
        )
    return done
