"""The fastest way of one product, as it was measured on this device.

`check --tune` races the ways that a device offers and stores the winners beside the verdicts, for
one GPU model, driver, torch, Triton and one state of the kernel sources. A selection asks here
before it applies a rule. An unmeasured shape follows the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.verdicts import Key, device_key, read_entries, store_entries

__all__ = ["Question", "Race", "Winner", "measured", "read_races", "store_races", "use_races"]

_TYPES = ("cuda", "cpu")
#: What is chosen: how few rows meet a packed weight; whether layers over one input run as one;
#: how the two gradients of a low rank are computed; how rows meet packed experts.
Question = Literal["product", "group", "rank_gradients", "experts"]
_WAYS = {
    "dequantize", "fused", "pairs", "bitsandbytes", "bf16",  # product, experts
    "grouped", "apart", "torch", "triton",  # group, rank_gradients
}  # fmt: skip


@dataclass(frozen=True)
class Race:
    """One measurement; ValueError for a way or a dtype that is not known.

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
        if self.winner not in _WAYS:
            raise ValueError(f"winner {self.winner!r}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype {self.dtype!r}")


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
        place = race.question, device, getattr(torch, race.dtype), tuple(race.shape)
        winner = race.tokens, race.winner, f"measured here on {name}: {_times(race)}"
        _WINNERS[place] = (*_WINNERS.get(place, ()), winner)


def _times(race: Race) -> str:
    best = sorted(race.microseconds.items(), key=lambda item: item[1])[:2]
    return ", ".join(f"{name} {time:,.0f} us" for name, time in best)


def read_races(key: Key) -> list[Race]:
    """Return the races that are stored for a key; a file that cannot be used counts as absent."""
    return [
        Race(**{**entry, "shape": tuple(entry["shape"])})
        for entry in read_entries(key, "races", Race)
    ]


def store_races(key: Key, found: Sequence[Race]) -> str:
    """Store races beside those of other shapes; return why that failed, or "".

    Hold `verdict_lock`, so that two processes lose nothing.
    """
    new = {(r.question, r.dtype, tuple(r.shape), r.tokens): r for r in found}
    old = {(r.question, r.dtype, tuple(r.shape), r.tokens): r for r in read_races(key)}
    return store_entries(key, "races", [asdict(race) for race in {**old, **new}.values()])
