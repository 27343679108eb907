"""Converts optimizer state between three forms: ours, torch's and bitsandbytes'.

- Ours (8 bit): step, an fp32 scalar; state1 and state2, uint8 [n]; absmax1 and absmax2, fp32
  [⌈n/256⌉]. Elements are in row order. Lion has no state2 and absmax2.
- torch: step, exp_avg and exp_avg_sq.
- bitsandbytes: our names, in the parameter's shape, with an integer step. Files nest them under one
  key. Parameters below 4,096 elements have fp32 state.
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
    """Return the first moment, and the second if there is one, as fp32 [n].

    Args:
        state: The state of one parameter in any of the three forms.

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
    """Convert a state to the form that has `fields`. 8-bit codes stay byte for byte.

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
            f"optimizer state: expected two moments, got {sorted(flat)}; it was saved by Lion; "
            "start with a new state"
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
    """Convert a state dict of torch's AdamW or of bitsandbytes to 8 bits; groups stay."""
    fields = ("state1", "absmax1") if lion else ("state1", "absmax1", "state2", "absmax2")
    states = {key: pack(state, fields) for key, state in state_dict["state"].items()}
    return {**state_dict, "state": states}


def to_torch(state_dict: Mapping[str, Any], shapes: Mapping[int, torch.Size]) -> dict[str, Any]:
    """Convert an 8-bit AdamW state dict to torch.optim.AdamW's, in fp32.

    Args:
        state_dict: The state dict with 8-bit states.
        shapes: Shape of each parameter, by its index.
    """
    states = {
        key: {
            name: value if name == "step" else value.view(shapes[key])
            for name, value in pack(state, _TORCH_NAMES).items()
        }
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def shard(state: Mapping[str, Any], first: int, length: int) -> dict[str, Tensor]:
    """Return the elements [first, first + length) of an 8-bit state.

    If `first` is a multiple of 256, bytes are copied. Otherwise values are quantised again, which
    changes each by at most one code.
    """
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
    """Join the states of neighbouring ranges.

    If all ranges but the last consist of whole blocks, bytes are copied. Otherwise values are
    quantised again. With `exact`, the shards are kept under ``"shards"`` instead, a form that
    `pack` and `shard` read.
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
