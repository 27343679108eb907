"""The dispatch rules and their reasons, chip by chip."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.chips import CHIPS, chip_of, nvidia_chip, pipeline_stages
from lightning_peft_kernels.dispatch import Decision, select, use_backend
from lightning_peft_kernels.experts.selection import EXPERT_ROWS, select_experts
from lightning_peft_kernels.launch import FAILURES
from lightning_peft_kernels.lora.selection import select_one_pass
from lightning_peft_kernels.nf4 import selection
from lightning_peft_kernels.nf4.selection import select_group, select_product

from tests.helpers.fake_gpu import GPUS

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Put CPU tensors on a chip."""
    return lambda name: monkeypatch.setitem(CHIPS, CPU, GPUS[name].chip)


def test_cpu_tensors_run_in_torch_and_say_why() -> None:
    assert chip_of(CPU) is None
    assert select("dequantize_4bit", CPU, BF16).reason == "cpu tensors"
    decision = select_product(CPU, BF16, 1, (4096, 4096))
    assert (decision.backend, decision.reason) == ("dequantize", "cpu tensors")
    with use_backend("torch"):
        assert select("dequantize_4bit", CPU, BF16).reason == "requested"
    with use_backend("triton"), pytest.raises(RuntimeError, match="got cpu tensors"):
        select("dequantize_4bit", CPU, BF16)
    with pytest.raises(ValueError, match="'cuda'"):
        use_backend("cuda")  # type: ignore[arg-type]


def test_a_device_that_is_not_there_has_no_chip() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert select("dequantize_4bit", torch.device("cuda"), BF16).reason == "cuda tensors"


@pytest.mark.parametrize(
    ("tokens", "auto", "triton"),
    [
        (0, "dequantize", "dequantize"),
        (1, "fused", "fused"),
        (4, "fused", "fused"),
        (5, "dequantize", "fused"),
        (64, "dequantize", "fused"),
        (65, "dequantize", "dequantize"),
    ],
)
def test_without_bitsandbytes_ours_multiplies_few_tokens(on, tokens, auto, triton) -> None:  # type: ignore[no-untyped-def]
    on("sm_90")
    found = [
        select_product(CPU, BF16, tokens, (14336, 4096), how).backend for how in ("auto", "triton")
    ]
    assert found == [auto, triton]


def test_bitsandbytes_rule_decides_where_it_is_installed(  # type: ignore[no-untyped-def]
    on, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("sm_86")
    monkeypatch.setattr(selection, "fused_tokens", lambda *given: 128)
    few, many = (select_product(CPU, BF16, tokens, (14336, 4096)) for tokens in (128, 129))
    assert few.backend == "bitsandbytes"
    assert few.reason == "128 tokens, bitsandbytes' rule for this chip and shape ends at 128"
    assert many.backend == "dequantize"
    assert select_product(CPU, BF16, 1, (14336, 4096), "triton").backend == "fused"
    assert select_product(CPU, BF16, 1, (14336, 4096), "torch").backend == "dequantize"
    assert select_group(CPU, BF16, 128, [(64, 64)] * 2).backend == "apart"
    assert select_group(CPU, BF16, 129, [(64, 64)] * 2).backend == "grouped"


@pytest.mark.parametrize(
    ("chip", "stages"), [("sm_80", 3), ("sm_86", 2), ("sm_90", 3), ("sm_120", 2), ("gfx942", 3)]
)
def test_fewer_stages_where_shared_memory_is_small(chip: str, stages: int) -> None:
    assert pipeline_stages(GPUS[chip].chip, 64) == stages
    assert pipeline_stages(GPUS[chip].chip, 16) == 3


def test_a_tile_that_fits_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHIPS, CPU, nvidia_chip(8, 0, 49_152))
    decision = select_product(CPU, BF16, 33, (64, 64), "triton")
    assert decision == Decision(
        "dequantize", "sm_80: 49,152 bytes of shared memory hold no tile of 64 rows"
    )


@pytest.mark.parametrize("chip", ["sm_75", "gfx1100"])
def test_no_matrix_kernels_where_they_spill(on, chip: str) -> None:  # type: ignore[no-untyped-def]
    on(chip)
    for decision in (
        select_one_pass(CPU, torch.float16, 8),
        select_experts(CPU, torch.float16, 8, 8, (768, 2048)),
        select_product(CPU, torch.float16, 16, (4096, 4096), "triton"),
    ):
        assert decision.backend in ("torch", "dequantize")
        assert decision.reason == f"{chip}: {GPUS[chip].chip.no_matrix}"
    assert select("dequantize_4bit", CPU, torch.float16).backend == "triton"


def test_experts_by_rows(on) -> None:  # type: ignore[no-untyped-def]
    def of(rows: int, shape: tuple[int, int] = (768, 2048)) -> str:
        return select_experts(CPU, BF16, rows, 128, shape).backend

    assert select_experts(CPU, BF16, 1, 128, (768, 2048)).reason == "cpu tensors"
    on("sm_90")
    assert of(0) == of(8 * 64) == of(128 * EXPERT_ROWS) == "fused"
    assert of(128 * EXPERT_ROWS + 1) == of(8, (768, 21)) == "dequantize"


def test_fp32_takes_no_tiles_of_two_bytes(on) -> None:  # type: ignore[no-untyped-def]
    on("sm_90")
    wide = CPU, torch.float32
    found = [select_product(*wide, tokens, (28672, 4096), "triton").backend for tokens in (1, 4, 5)]
    assert found == ["fused", "fused", "dequantize"]
    assert select_experts(*wide, 8, 8, (768, 2048)).backend == "dequantize"
    assert select_one_pass(*wide, 8).backend == "torch"


def test_a_shape_is_decided_once_until_a_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHIPS, CPU, nvidia_chip(9, 0, 232_448))
    asked: list[int] = []

    def decide(*question: object, **more: object) -> Decision:
        asked.append(int(str(question[2])))
        return Decision("fused", "asked")

    monkeypatch.setattr(selection, "_select_product", decide)
    for tokens in (1, 1, 2, 1):
        select_product(CPU, BF16, tokens, (64, 64), "auto")
    assert asked == [1, 2]
    select_product(CPU, BF16, 1, [64, 64], "triton")
    assert asked == [1, 2, 1]  # another backend is another question
    monkeypatch.setitem(FAILURES, ("nf4_small_batch", "bfloat16, few rows", CPU), "PTXASError")
    for _ in range(2):
        select_product(CPU, BF16, 1, (64, 64), "auto")
    assert asked == [1, 2, 1, 1, 1]


def test_decisions_that_are_kept_are_limited() -> None:
    chip = nvidia_chip(9, 0, 232_448)
    for tokens in range(10_000):
        chip.remember(tokens, tokens)
    assert len(chip.decisions) <= 4096
    assert chip.decisions[9_999] == 9_999
