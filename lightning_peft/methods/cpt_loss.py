"""The loss of CPT: labels of the text, and of the examples in the prompt."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.value_types import shown
from lightning_peft.methods.checks import require

if TYPE_CHECKING:
    from lightning_peft.methods.cpt import CPT

__all__ = ["cpt_loss"]


def cpt_loss(logits: Tensor, labels: Tensor, method: CPT, types: Tensor | None = None) -> Tensor:
    """Cross entropy of the next token on labels of the text and of the examples, as a mean.

    Args:
        logits: Output of the model under `method` with context_loss=True [batch, n + positions,
            vocabulary].
        labels: Token ids of the text [batch, positions]; −100 does not count.
        method: The method that is attached.
        types: Kind of each token of the text, as in `CPT.types`; None counts all of `labels`.

    Raises:
        TypeError: another method, or a dtype that is not that of logits, labels or types.
        ValueError: logits without the positions of the prompt, or shapes that do not fit.
    """
    _check(logits, labels, method, types)
    batch, n = labels.shape[0], logits.shape[1] - labels.shape[1]
    require(
        n == method.n,
        f"cpt_loss: expected logits of {method.n} positions of the prompt and "
        f"{labels.shape[1]} of the text, got {logits.shape[1]}; attach CPT(context_loss=True) and "
        "give the model no labels",
    )
    device = labels.device
    own, init_ids = (_numbers(tuple(t), str(device)) for t in (method.types, method.init_ids))
    last = -(-max(method.types) // 4) * 4
    text = torch.full_like(labels, 4) if types is None else types
    kinds = torch.cat([own.expand(batch, -1), torch.where(text > 0, text + last, text)], dim=1)
    target, kinds = torch.cat([init_ids.expand(batch, -1), labels], dim=1)[:, 1:], kinds[:, 1:]
    example = torch.where((kinds > 0) & (kinds % 4 == 0), kinds // 4, 0)
    counted = (example > 0) & (target != -100)
    # Reading the numbers of the user's own types waits for the device.
    most = last // 4 + 1 if types is None else int(example.max())
    present = logits.new_zeros(batch, most + 1).scatter(1, example, 1.0)
    later = present.flip(1).cumsum(1).flip(1) - present
    weight = method.decay ** later.gather(1, example)
    rows = logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(rows, target.flatten(), reduction="none")
    return (loss * weight.flatten())[counted.flatten()].mean()


@lru_cache(maxsize=64)
def _numbers(numbers: tuple[int, ...], device: str) -> Tensor:
    """The numbers on the device; kept, so that no step copies them again."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _check(logits: Any, labels: Any, method: Any, types: Any) -> None:
    """Raise TypeError or ValueError unless the arguments fit each other."""
    if not hasattr(method, "init_ids") or not hasattr(method, "decay"):
        raise TypeError(
            f"cpt_loss method: expected the CPT(...) that is attached, got {shown(method)}"
        )
    for name, t, shape, is_kind, kind in (
        ("logits", logits, "[batch, positions, vocabulary]", Tensor.is_floating_point, "numbers"),
        ("labels", labels, "[batch, positions]", _is_integer, "token ids"),
        ("types", types, "[batch, positions]", _is_integer, "kinds of tokens"),
    ):
        if t is None and name == "types":
            continue
        if not isinstance(t, Tensor) or not is_kind(t):
            got = t.dtype if isinstance(t, Tensor) else shown(t)
            raise TypeError(f"cpt_loss {name}: expected {kind} {shape}, got {got}")
        require(
            t.dim() == shape.count(",") + 1,
            f"cpt_loss {name}: expected {shape}, got {list(t.shape)}",
        )
    require(
        len(logits) == len(labels),
        f"cpt_loss labels: expected {len(logits)} rows, as the logits have, got {len(labels)}",
    )
    require(
        types is None or types.shape == labels.shape,
        f"cpt_loss types: expected the shape of the labels, {list(labels.shape)}, got "
        f"{None if types is None else list(types.shape)}",
    )


def _is_integer(t: Tensor) -> bool:
    return t.dtype in (torch.int64, torch.int32)
