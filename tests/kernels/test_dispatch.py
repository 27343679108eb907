"""The dispatch rule and its reasons."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels import dispatch
from lightning_peft_kernels.dispatch import (
    CROSSINGS,
    EXPERT_ROWS,
    crossing,
    select,
    select_experts,
    select_one_pass,
    select_product,
    use_backend,
)

CPU = torch.device("cpu")


def test_cpu_tensors_run_in_torch_and_say_why() -> None:
    assert select("dequantize_4bit", CPU, torch.bfloat16).reason == "cpu tensors"
    decision = select_product(CPU, torch.bfloat16, 1, (4096, 4096))
    assert (decision.backend, decision.reason) == ("dequantize", "cpu tensors")
    with use_backend("torch"):
        assert select("dequantize_4bit", CPU, torch.bfloat16).reason == "requested"
    with use_backend("triton"), pytest.raises(RuntimeError, match="got cpu tensors"):
        select("dequantize_4bit", CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="'cuda'"):
        use_backend("cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chip", "shape", "tokens"),
    [
        ("sm_90", (28672, 4096), 64),
        ("sm_90", (14336, 4096), 32),
        ("sm_90", (4096, 4096), 4),
        ("sm_90", (4096, 14336), 4),
        ("sm_90", (6144, 4096), 16),
        ("sm_80", (14336, 4096), 64),
        ("sm_100", (1024, 4096), 4),
        ("gfx942", (28672, 4096), 4),
    ],
)
def test_crossing(chip: str, shape: tuple[int, int], tokens: int) -> None:
    assert crossing(chip, shape) == tokens


def test_tables_are_complete() -> None:
    for rows in CROSSINGS.values():
        assert rows[-1][0] == 0, "every N has a row"
        assert [least for least, _ in rows] == sorted((r[0] for r in rows), reverse=True)
        assert all(1 <= tokens <= 64 for _, tokens in rows)


@pytest.mark.parametrize(
    ("tokens", "backend_name"), [(1, "fused"), (32, "fused"), (33, "dequantize"), (0, "dequantize")]
)
def test_product_by_tokens(tokens: int, backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    decision = select_product(CPU, torch.bfloat16, tokens, (14336, 4096))
    assert decision.backend == backend_name
    assert f"{tokens} tokens" in decision.reason


def test_experts_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(rows: int, shape: tuple[int, int] = (768, 2048)) -> str:
        return select_experts(CPU, torch.bfloat16, rows, 128, shape).backend

    assert select_experts(CPU, torch.bfloat16, 1, 128, (768, 2048)).reason == "cpu tensors"
    monkeypatch.setattr(dispatch, "_why_not_triton", lambda device, dtype: None)
    assert of(0) == of(8 * 64) == of(128 * EXPERT_ROWS) == "fused"
    assert of(128 * EXPERT_ROWS + 1) == of(8, (768, 21)) == "dequantize"


def test_fp32_takes_no_tiles_of_two_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    wide = CPU, torch.float32
    found = [select_product(*wide, tokens, (28672, 4096)).backend for tokens in (1, 4, 5)]
    assert found == ["fused", "fused", "dequantize"]
    assert select_experts(*wide, 8, 8, (768, 2048)).backend == "dequantize"
    assert select_one_pass(*wide, 8).backend == "torch"
