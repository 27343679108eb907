"""No step makes a tensor of Python numbers: on a GPU, each would be a copy that the host waits for.

Numbers enter kernels as arguments. The optimizer's rows of hyper-parameters change with the
schedule: they are the one exception, copied from pinned memory without a wait. Layers with kernels
of ours are in test_step_budgets.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.created_tensors import CreatedTensors
from tests.helpers.forks import run_function
from tests.helpers.method_cases import CASES, Case
from tests.helpers.peft_exchange import build

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
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    hooks = lp.MethodHooks(model, optimizer, total_steps=8)

    def step() -> None:
        model(x).square().sum().backward()
        hooks.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # tables are made in the first step
        step()
    with CreatedTensors() as seen:
        step()
    assert seen.made == set()
    assert seen.read == set()


def test_training_on_the_rounded_weight_waits_for_nothing(tmp_path: Path) -> None:
    """On a chip: a CPU looks for NaN before it rounds, where that costs no wait."""
    pytest.importorskip("triton")
    printed = run_function(
        "tests.helpers.rounding_step:print_what_is_seen",
        ["sm_90"],
        tmp_path,
        timeout=200,
        environment={"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert json.loads(printed.splitlines()[-1]) == {"made": [], "read": [], "quantised": True}


def chunked_loss(smoothing: float) -> Callable[[], Tensor]:
    head = nn.Linear(8, 12, bias=False)
    hidden, labels = torch.randn(6, 8, requires_grad=True), torch.randint(12, (6,))
    return lambda: lp.chunked_cross_entropy(
        hidden, head.weight, labels, chunk_tokens=3, label_smoothing=smoothing
    )


def loss_of_cpt() -> Tensor:
    method = lp.CPT(init_ids=[5, 9, 17, 33], types=[1, 2, 3, 4], decay=0.5, context_loss=True)
    return lp.cpt_loss(
        torch.randn(2, 10, 40, requires_grad=True), torch.randint(40, (2, 6)), method
    )


@pytest.mark.parametrize(
    "loss", [chunked_loss(0.0), chunked_loss(0.1), loss_of_cpt], ids=["plain", "smoothed", "CPT"]
)
def test_losses(loss: Callable[[], Tensor]) -> None:
    loss()  # tables of ids are kept
    with CreatedTensors() as seen:
        loss().backward()
    assert seen.made == set()
    assert seen.read <= {"lightning_peft.losses.chunk_pass._check_range"}  # of labels on a CPU


def test_a_mixed_batch_of_prompts_reads_no_mask() -> None:
    model, inputs = build("llama")
    for name, n in (("short", 2), ("long", 3)):
        lp.attach(model, lp.PromptTuning(n=n), adapter_name=name)
    lp.set_adapter(model, ["short", "long"])
    ids = inputs["input_ids"][:2]
    for names in (["short", "long"], ["long", "long"]):
        with CreatedTensors() as seen, lp.adapter_names(names):
            model(input_ids=ids)
        # With a mask, transformers' own forward, called from there, reads it.
        theirs = {"lightning_peft.layers.prompt.forward._forward_stack"}
        assert seen.read <= theirs
        assert seen.made - theirs == {ROWS}


def test_tokens_that_switch_an_adapter_on_are_not_copied() -> None:
    model, inputs = build("llama")
    lp.attach(model, lp.ALoRA(r=2, invocation_tokens=[5, 6], target_modules=["q_proj"]))
    with CreatedTensors() as seen:
        model(**inputs)
    assert seen.made == set()
    assert seen.read == set()
