"""Empty tensors of a method's shapes, and their usual first values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site

__all__ = [
    "empty_like_site",
    "empty_shared",
    "kaiming",
    "low_rank_pair",
    "naming_argument",
    "require_size",
]

#: A tensor with more values than this may have at most `_MULTIPLE` values per weight that it
#: changes. Any rank that somebody means stays far below: LoRA's A has r values per weight and
#: output feature, so `_MULTIPLE` is a rank of 64 times the layer's width.
_SMALL = 1 << 24
_MULTIPLE = 64


class _OversizedTensor(ValueError):
    """A tensor that is too large for the layers that it changes.

    Attributes:
        where: The layer, as messages write it.
        text: What was expected and found.
        shape: The tensor's shape.
    """

    def __init__(self, where: str, text: str, shape: tuple[int, ...]) -> None:
        super().__init__(f"{where}: {text}; lower the method's ranks or counts")
        self.where, self.text, self.shape = where, text, shape


def require_size(sites: Sequence[Site], *shape: int) -> None:
    """Raise ValueError if a tensor of this shape is far too large for the weights it changes.

    Allocating it would end in an error without a layer's name, or in the process being killed.
    """
    count = math.prod(shape)
    if count <= _SMALL:
        return
    weights = sum(site.shape.numel() for site in sites)
    if count > _MULTIPLE * weights:
        more = f" and {len(sites) - 1} layers more" if len(sites) > 1 else ""
        of = "the weights of these layers" if more else f"the weight {list(sites[0].shape)}"
        raise _OversizedTensor(
            f"{sites[0].quoted}{more}",
            f"expected tensors of at most {_MULTIPLE} times {of}, got {list(shape)} "
            f"({4 * count / 2**30:.3g} GiB)",
            shape,
        )


@contextmanager
def naming_argument(method: Any) -> Iterator[None]:
    """Let an error of `require_size` in this block name the method and its largest count."""
    try:
        yield
    except _OversizedTensor as error:
        shape = error.shape
        name, value = max(_counts(method), key=lambda c: (c[1] in shape, c[1]))
        raise ValueError(
            f"{method.label} on {error.where}: {error.text} from {name} = {value}; lower {name} or "
            "exclude the layer"
        ) from None


def _counts(method: Any) -> Iterator[tuple[str, int]]:
    """Integers among a method's arguments, and among the values of its patterns."""
    for name in method.__dataclass_fields__:
        value = getattr(method, name)
        for v in value.values() if isinstance(value, Mapping) else (value,):
            if type(v) is int and name != "seed":
                yield name, v


def empty_like_site(site: Site, *shape: int) -> Tensor:
    """An fp32 tensor [*batch, *shape], on meta where the site's weight is, else on the CPU.

    Adapters start on the CPU (their values then depend on the seed alone, not on the device) and
    are moved by attach.
    """
    require_size([site], *site.batch_shape, *shape)
    device = "meta" if site.device.type == "meta" else "cpu"
    return torch.empty(*site.batch_shape, *shape, dtype=torch.float32, device=device)


def empty_shared(sites: Sequence[Site], *shape: int) -> Tensor:
    """An fp32 tensor that sites share, on meta where their weights are, else on the CPU."""
    require_size(sites, *shape)
    device = "meta" if sites[0].device.type == "meta" else "cpu"
    return torch.empty(shape, dtype=torch.float32, device=device)


def kaiming(t: Tensor) -> Tensor:
    """Kaiming-uniform with a = √5 over rows of length in, in place: U(−1/√in, 1/√in)."""
    bound = 1 / math.sqrt(t.shape[-1])
    return torch.nn.init.uniform_(t, -bound, bound)


def low_rank_pair(site: Site, r: int) -> dict[str, Tensor]:
    """Return A [r, in] Kaiming-uniform and B [out, r] zeros: no change at the start."""
    return {
        "A": kaiming(empty_like_site(site, r, site.in_features)),
        "B": empty_like_site(site, site.out_features, r).zero_(),
    }
