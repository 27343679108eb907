"""Optimizer state of one parameter, or a whole state dict, between ours, torch's and bitsandbytes'.

Ours (8 bit): step fp32 scalar, state1 and state2 uint8 [n], absmax1 and absmax2 fp32 [⌈n/256⌉]
(Lion: without the second), over the parameter's elements in row order. torch: step, exp_avg,
exp_avg_sq. bitsandbytes: as ours in the parameter's shape with a step that is an int, nested under
one key in files, fp32 below 4,096 elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_peft_kernels.optim.adamw_8bit import BLOCK, dequantize_blocks, quantize_blocks
from torch import Tensor

__all__ = ["from_torch", "join_shards", "moments", "pack", "shard", "to_torch"]

_BNB_NEST = "__bnb_optimizer_quant_state__"
_TORCH_NAMES = ("exp_avg", "exp_avg_sq")


def _steps(value: object) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).detach().reshape(()).clone()


def moments(state: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """First and, where there is one, second moment, fp32 [n], of a state in any of the three forms.

    Raises:
        ValueError: a form that is none of them.
    """
    state = {**state, **state.get(_BNB_NEST, {})}
    if "shards" in state:
        parts = zip(*(moments(s) for s in state["shards"]), strict=True)
        return tuple(torch.cat(part) for part in parts)
    if "exp_avg" in state:
        return tuple(state[name].reshape(-1).float() for name in _TORCH_NAMES if name in state)
    if "state1" not in state:
        raise ValueError(
            f"optimizer state: expected exp_avg or state1, got {sorted(state)}; convert it"
        )
    found = []
    for i, signed in ((1, True), (2, False)):
        values = state.get(f"state{i}")
        if values is None:
            continue
        flat = values.reshape(-1)
        if flat.dtype == torch.uint8:
            flat = dequantize_blocks(flat, state[f"absmax{i}"], signed=signed)
        found.append(flat.float())
    return tuple(found)


def pack(state: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Tensor]:
    """A state in any form as the one that has `fields`. Codes of the same form are kept byte for
    byte.

    Raises:
        ValueError: an unknown form, or a second moment is needed and missing.
    """
    flat = {**state, **state.get(_BNB_NEST, {})}
    packed = {"step": _steps(flat["step"])}
    codes = [name for name in fields if name.startswith("state")]
    if codes and all(name in flat and flat[name].dtype == torch.uint8 for name in codes):
        return packed | {name: flat[name].detach().reshape(-1).clone() for name in fields}
    values = moments(flat)
    needed = 2 if {"state2", "exp_avg_sq"} & set(fields) else 1
    if len(values) < needed:
        raise ValueError(
            f"optimizer state: expected two moments, got {sorted(flat)}; it was saved by Lion, "
            "start afresh"
        )
    for i in range(needed):
        if codes:
            packed[f"state{i + 1}"], packed[f"absmax{i + 1}"] = quantize_blocks(
                values[i], signed=i == 0
            )
        else:
            packed[_TORCH_NAMES[i]] = values[i].clone()
    return packed


def from_torch(state_dict: Mapping[str, Any], *, lion: bool = False) -> dict[str, Any]:
    """A state dict of torch.optim.AdamW or of bitsandbytes with 8-bit states; groups unchanged."""
    fields = ("state1", "absmax1") if lion else ("state1", "absmax1", "state2", "absmax2")
    states = {key: pack(state, fields) for key, state in state_dict["state"].items()}
    return {**state_dict, "state": states}


def to_torch(state_dict: Mapping[str, Any], shapes: Mapping[int, torch.Size]) -> dict[str, Any]:
    """An 8-bit AdamW state dict as torch.optim.AdamW's, fp32; `shapes` by parameter index."""
    states = {
        key: {
            name: value if name == "step" else value.view(shapes[key])
            for name, value in pack(state, _TORCH_NAMES).items()
        }
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def shard(state: Mapping[str, Any], first: int, length: int) -> dict[str, Tensor]:
    """Elements [first, first + length) of an 8-bit state. Bytes move where `first` is a multiple
    of 256; elsewhere the values are requantised (an error of one code, once)."""
    fields = [name for name in state if name != "step"]
    if "shards" in state:
        return _of_shards(state, first, length)
    if first % BLOCK == 0:
        blocks = slice(first // BLOCK, -(-(first + length) // BLOCK))
        cut = {"step": _steps(state["step"])}
        for name in fields:
            here = slice(first, first + length) if name.startswith("state") else blocks
            cut[name] = state[name].reshape(-1)[here].clone()
        return cut
    names = dict(zip(_TORCH_NAMES, moments(state), strict=False))
    sliced = {name: value[first : first + length] for name, value in names.items()}
    return pack({"step": state["step"], **sliced}, fields)


def _of_shards(state: Mapping[str, Any], first: int, length: int) -> dict[str, Tensor]:
    """Return the shard of exactly this range byte for byte; requantise otherwise."""
    start = 0
    for part in state["shards"]:
        if start == first and part["state1"].numel() == length:
            return {name: value.clone() for name, value in part.items()}
        start += part["state1"].numel()
    fields = [name for name in state["shards"][0] if name != "step"]
    sliced = [value[first : first + length] for value in moments(state)]
    named = dict(zip(_TORCH_NAMES, sliced, strict=False))
    return pack({"step": state["step"], **named}, fields)


def join_shards(shards: Sequence[Mapping[str, Tensor]], *, exact: bool = False) -> dict[str, Any]:
    """Neighbouring ranges as one; bytes move where all but the last are whole blocks.

    Where they are not, values are requantised, or, if `exact`, the shards are kept side by side
    under ``"shards"``, which `pack` and `shard` read.
    """
    fields = [name for name in shards[0] if name != "step"]
    if all(s["state1"].numel() % BLOCK == 0 for s in shards[:-1]):
        joined = {name: torch.cat([s[name].reshape(-1) for s in shards]) for name in fields}
        return {"step": _steps(shards[0]["step"]), **joined}
    if exact:
        return {"step": _steps(shards[0]["step"]), "shards": [dict(s) for s in shards]}
    parts = zip(*(moments(s) for s in shards), strict=True)
    whole = {name: torch.cat(part) for name, part in zip(_TORCH_NAMES, parts, strict=False)}
    return pack({"step": shards[0]["step"], **whole}, fields)
