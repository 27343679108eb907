"""The fastest way of one product, as it was measured on this device.

`check --tune` races the ways that a device offers and stores the winners beside the verdicts, for
one GPU model, driver, torch, Triton and one state of the kernel sources. A selection asks here
before it applies a rule. An unmeasured shape follows the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

from lightning_peft_kernels.cache_entries import expect, is_time
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.verdicts import Key, device_key, read_entries, store_entries

__all__ = ["Question", "Race", "Winner", "measured", "read_races", "store_races", "use_races"]

_TYPES = ("cuda", "cpu")
#: What is chosen: how few rows meet a packed weight; whether layers over one input run as one;
#: how the two gradients of a low rank are computed; how rows meet packed experts.
Question = Literal["product", "group", "rank_gradients", "experts"]
_WAYS: dict[Question, tuple[str, ...]] = {
    "product": ("dequantize", "fused", "pairs", "bitsandbytes", "bf16"),
    "group": ("grouped", "apart"),
    "rank_gradients": ("torch", "triton"),
    "experts": ("dequantize", "fused"),
}
# Fewest and most sizes in a shape.
_SIZES: dict[Question, tuple[int, int]] = {
    "product": (2, 2),
    "group": (3, 1 << 10),
    "rank_gradients": (1, 1),
    "experts": (2, 2),
}


@dataclass(frozen=True)
class Race:
    """One measurement; ValueError for a value of another type or range.

    Attributes:
        question: What is chosen.
        dtype: Dtype of x, ``"bfloat16"``.
        shape: (N, K) of a product; (N_1, …, N_n, K) of a group; (rank,) of gradients; (N, K) of an
            expert.
        tokens: Rows of x; of experts the mean rows per expert.
        winner: The fastest way, a backend of `Decision`.
        microseconds: Median time of each way.
    """

    question: Question
    dtype: str
    shape: tuple[int, ...]
    tokens: int
    winner: str
    microseconds: dict[str, float]

    def __post_init__(self) -> None:
        known, dtype, times = get_args(Question), self.dtype, self.microseconds
        expect("question", self.question, self.question in known, f"one of {known}")
        is_dtype = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
        expect("dtype", dtype, is_dtype, "the name of a dtype of torch")
        fewest, most = _SIZES[self.question]
        sizes = f"{fewest}" if fewest == most else f"at least {fewest}"
        is_shape = (
            isinstance(self.shape, tuple)
            and fewest <= len(self.shape) <= most
            and all(map(_is_count, self.shape))
        )
        expect("shape", self.shape, is_shape, f"{sizes} positive integers for {self.question}")
        expect("tokens", self.tokens, _is_count(self.tokens), "a positive integer")
        ways = _WAYS[self.question]
        expect("winner", self.winner, self.winner in ways, f"one of {ways}")
        timed = isinstance(times, dict) and all(map(is_time, times.values()))
        fits = timed and self.winner in times and set(times) <= set(ways)
        rule = f"finite times of at least 0, of ways among {ways} and of the winner"
        expect("microseconds", times, fits, rule)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


#: Tokens, the fastest way up to them, and the reason for the report.
Winner = tuple[int, str, str]
_Place = tuple[str, torch.device, torch.dtype, tuple[int, ...]]

_WINNERS: dict[_Place, tuple[Winner, ...]] = {}
_READ: set[torch.device] = set()


def measured(
    question: Question, device: torch.device, dtype: torch.dtype, shape: Sequence[int]
) -> tuple[Winner, ...]:
    """Return the winners of one shape by rising number of tokens; empty if it was not raced."""
    if device not in _READ:
        use_races(device, read_races(device_key(device)) if device.type in _TYPES else [])
    return _WINNERS.get((question, device, dtype, tuple(shape)), ())


# A traced graph reads it as a constant, as `dispatch.current_backend`.
vars(measured)["_dynamo_marked_constant"] = True


def use_races(device: torch.device, found: Iterable[Race]) -> None:
    """Have selections on this device follow these races, and no others."""
    _READ.add(device)
    if device in CHIPS:
        CHIPS[device].decisions.clear()
    for place in [place for place in _WINNERS if place[1] == device]:
        del _WINNERS[place]
    races = sorted(found, key=lambda race: race.tokens)
    name = device_key(device)["device"] if races else ""
    for race in races:
        place = race.question, device, getattr(torch, race.dtype), race.shape
        winner = race.tokens, race.winner, f"measured here on {name}: {_times(race)}"
        _WINNERS[place] = (*_WINNERS.get(place, ()), winner)


def _times(race: Race) -> str:
    best = sorted(race.microseconds.items(), key=lambda item: item[1])[:2]
    return ", ".join(f"{name} {time:,.0f} us" for name, time in best)


def read_races(key: Key) -> list[Race]:
    """Return the races that are stored for a key; a file that cannot be used counts as absent."""
    return read_entries(key, "races", Race)


def store_races(key: Key, found: Sequence[Race]) -> str:
    """Store races beside those of other shapes; return why that failed, or "".

    Hold `verdict_lock`, so that two processes lose nothing.
    """
    new = {(r.question, r.dtype, r.shape, r.tokens): r for r in found}
    old = {(r.question, r.dtype, r.shape, r.tokens): r for r in read_races(key)}
    return store_entries(key, "races", [asdict(race) for race in {**old, **new}.values()])
