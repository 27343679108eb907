"""Tensors of a peft directory that repeat the base: compared with it, or written into it.

peft writes the embeddings next to the adapter if their vocabulary was resized. Its load puts them
into the base; here that needs an option, because it changes the base that was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.registry import registries_in
from lightning_peft.hf.keys import PREFIX, Reading
from lightning_peft.hf.source import Source
from lightning_peft.hf.vocabulary import is_of_vocabulary, resize_advice
from lightning_peft.storage import storage_of

__all__ = ["Embeddings", "base_rewrites", "rewritten"]

#: What to do with a file's copies of the base's embeddings.
Embeddings = Literal["check", "restore"]
#: (tensor of the base, its values in the file)
_Pairs = list[tuple[Tensor, Tensor]]


def base_rewrites(source: Source, reading: Reading, embeddings: Embeddings) -> _Pairs:
    """Compare the remaining tensors of a file with the base, and return those to write into it.

    Nothing is written unless `embeddings` is "restore".

    Raises:
        ValueError: a tensor that differs from the base, or has no place in it.
    """
    tensors: dict[str, Tensor] = {
        **dict(source.top.named_parameters(remove_duplicate=False)),
        **dict(source.top.named_buffers(remove_duplicate=False)),
    }
    found: dict[int, tuple[str, Tensor, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in reading.other.items():
        head = PREFIX if key.startswith(PREFIX) else source.format.saved_prefix
        name = re.sub(r"(\.base_layer)+\.(?=[^.]+$)", ".", key.removeprefix(head))
        base = tensors.get(name)
        if not key.startswith(head) or base is None:
            problems.append(f"extra {key}")
        elif base.shape != tensor.shape:
            shapes = f"shape {list(tensor.shape)}, the base has {list(base.shape)}"
            advice = resize_advice(source.top, _owner(source.top, name), base.shape, tensor.shape)
            problems.append(f"{key}: a copy of the base of {shapes}{advice}")
        elif torch.equal(base.detach().cpu().to(tensor.dtype), tensor):
            reading.notes.append(f"{key}: equal to the base, left out")
        elif embeddings == "check" or not is_of_vocabulary(source.top, _owner(source.top, name)):
            problems.append(f"{key}: {_other_rows(name, tensor, base)}")
        elif (other := found.setdefault(id(base), (key, base, tensor))) and not torch.equal(
            other[2], tensor
        ):
            problems.append(f"{key}: expected the values of {other[0]}, which it is tied to")
    if found and not problems:
        problems += _not_writable(source.top, list(found.values()))
    if problems:
        raise ValueError(
            "adapter file: expected the base model it was trained on and no further tensors; "
            "nothing was loaded:\n  " + "\n  ".join(problems[:20])
        )
    for key, base, tensor in found.values():
        rows = len(_differing_rows(tensor, base))
        reading.notes.append(f"{key}: {rows} of {len(base)} rows of the base are the file's now")
    return [(base, tensor) for _, base, tensor in found.values()]


@contextmanager
def rewritten(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Write values into the base; an error inside of the block puts the base back bit for bit."""
    kept = [(base, base.detach().clone()) for base, _ in pairs]
    try:
        with torch.no_grad():
            for base, tensor in pairs:
                base.copy_(tensor)
        yield
    except BaseException:
        with torch.no_grad():
            for base, before in kept:
                base.copy_(before)
        raise


def _owner(top: nn.Module, name: str) -> nn.Module:
    """The module that has the tensor of this name."""
    return top.get_submodule(name.rpartition(".")[0])


def _not_writable(top: nn.Module, found: Sequence[tuple[str, Tensor, Tensor]]) -> list[str]:
    """Reasons why a base whose embeddings differ must stay as it is."""
    if list(registries_in(top)):
        return [
            f"{key}: expected a model without adapters to write the file's rows into, got one with "
            "some, which were attached to the present rows; load this file first"
            for key, _, _ in found
        ]
    bases = {id(base) for _, base, _ in found}
    packed = [
        name
        for name, module in top.named_modules()
        for base in module._parameters.values()
        if base is not None and id(base) in bases and storage_of(module, "weight").is_quantized
    ]
    return [f"{name}: expected a dense weight to write the file's rows into" for name in packed]


def _differing_rows(tensor: Tensor, base: Tensor) -> list[int]:
    held = base.detach().cpu().to(tensor.dtype)
    different = held != tensor
    rows: list[int] = different.reshape(len(held), -1).any(1).nonzero().flatten().tolist()
    return rows


def _other_rows(name: str, tensor: Tensor, base: Tensor) -> str:
    """Say which rows of a copy of the base differ: new tokens are random in every process."""
    rows = _differing_rows(tensor, base) if base.ndim > 1 else []
    found = "a copy of the base that differs from this one"
    if not 0 < len(rows) < len(base):
        return found
    return (
        f"{found} in {len(rows)} of {len(base)} rows ({rows[:5]}); if these are new tokens, "
        "embeddings='restore', in load_adapter or beside PEFT(init_from=), writes the file's rows "
        "into the base, as peft does; or write them first: "
        f"model.get_parameter({name!r}).data.copy_(safetensors.torch.load_file(file)[key])"
    )
