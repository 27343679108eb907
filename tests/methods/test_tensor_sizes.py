"""A rank or a count far above a layer's size is refused before anything is allocated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft import methods
from lightning_peft.methods.base import Method
from tests.helpers.compare import assert_same_bits
from tests.helpers.method_rows import MODELS, ROWS, build, parts_of, placed

HUGE = 50_000_000
#: Integers that no tensor's shape follows from.
_NO_SIZE = {"seed", "alpha", "tinit", "tfinal", "deltaT", "terms", "stride", "loftq_iter"}
_NO_SIZE |= {"reduction_factor"}
#: They take the nearest size that the layer has.
CLIPPED = {
    *(("OFT", "block_size"), ("TinyLoRA", "r"), ("LoKr", "r"), ("LoKr", "decompose_factor")),
    *(("AdaMSS", "r"), ("DEFT", "r"), ("VeLoRA", "groups"), ("MiSS", "mini_r")),
}


def _counts() -> dict[tuple[str, str], tuple[Method, str]]:
    """(method, integer argument) → a method and the kind of model that it is tried on."""
    rows = [(part, row.skip) for row in ROWS.values() for part in parts_of(row)]
    rows += [(lp.Poly(), {}), (lp.MultitaskPrompt(), {})]
    found: dict[tuple[str, str], tuple[Method, str]] = {}
    for method, skip in rows:
        kind = next(k for k in MODELS if k not in skip)
        for f in dataclasses.fields(method):
            if type(getattr(method, f.name)) is int and f.name not in _NO_SIZE:
                found.setdefault((type(method).__name__, f.name), (method, kind))
    return found


COUNTS = _counts()


@pytest.mark.parametrize("case", COUNTS, ids=".".join)
def test_a_huge_count_is_refused_by_name(case: tuple[str, str]) -> None:
    method, kind = COUNTS[case]
    model, _ = build(MODELS[kind])
    before = {k: t.clone() for k, t in model.state_dict().items()}

    def attach() -> None:
        huge = dataclasses.replace(method, **{case[1]: HUGE})
        lp.attach(model, placed(huge, kind))

    if case in CLIPPED:
        attach()
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) < HUGE
        return
    with pytest.raises(ValueError, match=case[1]) as caught:
        attach()
    assert case[0] in str(caught.value)
    assert len(str(caught.value)) < 500
    after = model.state_dict()
    assert set(after) == set(before)
    for key, value in before.items():
        assert_same_bits(key, after[key], value)


@pytest.mark.parametrize(
    "method",
    [
        lp.HRA(r=200),
        lp.DeLoRA(r=200),
        lp.GLoRA(r=200),
        lp.HiRA(r=200),
        lp.PEANuT(r=200),
        lp.Lily(r=200),
        lp.VeRA(r=1000),
        lp.AdaLoRA(init_r=200, target_r=100),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_rank_above_a_small_layer_stays_allowed(method: Any) -> None:
    """As in peft, and as a head with one output needs."""
    model = nn.Sequential(nn.Linear(64, 1))
    lp.attach(model, dataclasses.replace(method, target_modules=["0"]))
    assert torch.isfinite(model(torch.randn(3, 64))).all()


def test_the_message_names_layer_argument_and_size() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(
        ValueError,
        match=r"HRA on '0': expected tensors of at most 64 times the weight \[64, 64\], got "
        r"\[64, 50000000\] \(11.9 GiB\) from r = 50000000; lower r or exclude the layer",
    ):
        lp.attach(model, methods.HRA(r=HUGE, target_modules=["0", "1"]))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"got \[64, 50000000\] .* from rank_pattern = 50000000"):
        lp.attach(model, lp.LoHa(rank_pattern={"1": HUGE}, target_modules=["1"]))
