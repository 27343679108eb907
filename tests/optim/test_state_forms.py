"""Stored states of torch's optimizers: each tensor's shape, kind and sign is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_peft.optim.state_check import check_optimizer_state

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "AdamW": lambda p: optim.AdamW(p, amsgrad=True),
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Adamax": optim.Adamax,
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.5, centered=True),
    "Adagrad": optim.Adagrad,
    "Adadelta": optim.Adadelta,
    "Rprop": optim.Rprop,
    "ASGD": optim.ASGD,
    "Adafactor": optim.Adafactor,
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
}
NEVER_NEGATIVE = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "acc_delta"} | {
    "row_var",
    "col_var",
    "mu_product",
    "eta",
    "step",
}


def stepped(name: str) -> tuple[nn.Linear, optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def wrong(key: str, t: Tensor) -> list[Tensor]:
    found = [torch.zeros(t.numel() + 1), t.to(torch.int64), t.to(torch.complex64)]
    return found + ([-t.abs() - 1] if key in NEVER_NEGATIVE else [])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_tensor_of_a_state_is_checked(name: str) -> None:
    model, optimizer = stepped(name)
    named, state = dict(model.named_parameters()), optimizer.state_dict()
    check_optimizer_state(optimizer, state, named)
    tried = 0
    for i, own in state["state"].items():
        for key in [k for k, t in own.items() if isinstance(t, Tensor)]:
            for value in wrong(key, own[key]):
                changed = copy.deepcopy(state)
                changed["state"][i][key] = value
                with pytest.raises(ValueError, match=rf"(?s)expected a state.*{key}: expected"):
                    check_optimizer_state(optimizer, changed, named)
                tried += 1
    assert tried >= 6


def test_options_and_lost_states() -> None:
    model, optimizer = stepped("AdamW")
    named, state = dict(model.named_parameters()), optimizer.state_dict()
    for key, value in {"lr": -1, "eps": [1], "betas": (0.9, 1.0), "weight_decay": 1e300}.items():
        changed = copy.deepcopy(state)
        changed["param_groups"][0][key] = value
        with pytest.raises(ValueError, match=rf"group 0: {key}: expected"):
            check_optimizer_state(optimizer, changed, named)
    changed = copy.deepcopy(state)
    del changed["state"][1], changed["param_groups"][0]["lr"]
    check_optimizer_state(optimizer, {**changed, "param_groups": state["param_groups"]}, named)
    with pytest.raises(ValueError, match=r"(?s)group 0: lr: missing.*bias: expected a state, got"):
        check_optimizer_state(optimizer, changed, named, stepped=["weight", "bias"])
