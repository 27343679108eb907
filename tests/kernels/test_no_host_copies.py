"""No step makes a tensor of Python numbers: on a GPU, each would be a copy that the host waits for.

Numbers enter kernels as arguments. The optimizer's rows of hyper-parameters change with the
schedule: they are the one exception, copied from pinned memory without a wait. Layers with kernels
of ours are in test_step_budgets.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers.created_tensors import CreatedTensors
from tests.helpers.method_cases import CASES, Case

ROWS = "lightning_peft_kernels.optim.step_inputs.rows_on"


def test_what_is_recorded() -> None:
    from lightning_peft_kernels.optim.step_inputs import rows_on

    with CreatedTensors() as seen:
        rows = rows_on(torch.device("cpu"), [[1.0, 2.0]], torch.float64)
        rows * 3.0
        torch.full((2,), 4.0)
        torch.tensor([5.0])  # not of our packages
    assert seen.made == {ROWS}
    assert seen.read == set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_training_step_of_each_method(case: Case) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    needs_nf4 = "linear" in case.skip or case.name == "loftq"
    method = dataclasses.replace(case.method, target_modules=["0"])
    lp.attach(model, method, quantization=lp.Quantization() if needs_nf4 else None)
    x = torch.randn(5, 64)
    for _ in range(2):  # tables are made in the first step
        model(x).square().sum().backward()
    with CreatedTensors() as seen:
        model(x).square().sum().backward()
    assert seen.made == set()
    assert seen.read == set()
