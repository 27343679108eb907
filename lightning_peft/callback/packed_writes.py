"""Explains errors of code that averages or writes parameters which are packed.

A loop over `model.parameters()` meets the packed bytes themselves, and torch's error does not say
which layer they belong to.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.core.names import join
from lightning_peft.models.frozen_parts import frozen_copies
from lightning_peft.storage import held_tensors

__all__ = ["explain_packed_writes"]

#: Parts of torch's messages when floating values meet packed bytes.
_SIGNS = ("type Byte", "same number of tensors", "must match the size of tensor")


def explain_packed_writes(module: nn.Module, exception: BaseException) -> None:
    """Add the layers and the way out to torch's error, if an averaged copy may have caused it."""
    message = str(exception.args[0]) if exception.args else ""
    if not isinstance(exception, RuntimeError) or not any(sign in message for sign in _SIGNS):
        return
    pairs = frozen_copies(module)
    packed = [
        name
        for part in {name for pair in pairs for name in pair}
        for name in _packed_layers(module.get_submodule(part), part)
    ]
    if not packed:
        return
    teachers = [pair.teacher for pair in pairs]
    exception.args = (
        f"{message}\nPEFT: expected packed weights to be left as they are, found code that may "
        f"write or average them: {', '.join(sorted(packed)[:6])}; keep the averaged parts dense "
        f"with Quantization(exclude_modules={teachers})",
        *exception.args[1:],
    )


def _packed_layers(part: nn.Module, name: str) -> list[str]:
    return [join(name, inner) for inner, m in part.named_modules() if held_tensors(m)]
