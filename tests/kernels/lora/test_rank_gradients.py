"""dS and dB of a low-rank branch on a CPU: values, registration, compile, and who asks for them."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.lora.rank_gradients import rank_gradients
from lightning_peft_kernels.lora.selection import select_one_pass

from tests.helpers.compare import assert_close
from tests.helpers.fake_gpu import GPUS


def given(M: int, N: int, R: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(M + N + R)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in ((M, N), (M, R), (N, R)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", [1.0, 0.25])
@pytest.mark.parametrize(("M", "N", "R"), [(7, 5, 1), (33, 64, 65), (0, 8, 2), (3, 8, 4)])
def test_against_fp64(M: int, N: int, R: int, scaling: float, dtype: torch.dtype) -> None:
    dY, S, B = given(M, N, R, dtype)
    found = rank_gradients(dY, S, B, scaling)
    want = scaling * (dY.double() @ B.double()), dY.double().mT @ S.double()
    floor = 1e-5 if dtype == torch.float32 else 2e-2
    for name, a, b in zip(("dS", "dB"), found, want, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        if M:
            assert_close(name, a, b, floor=floor)
        else:
            assert not a.any()


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.lightning_peft.rank_gradients.default, (*given(5, 8, 2, torch.float32), 0.5)
    )


def test_compiles_without_a_graph_break() -> None:
    args = given(5, 8, 2, torch.float32)
    made = torch.compile(rank_gradients, fullgraph=True, backend="aot_eager")(*args, 0.5)
    for a, b in zip(made, rank_gradients(*args, 0.5), strict=True):
        assert_close("gradient", a, b)


def test_one_pass_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert select_one_pass(cpu, torch.bfloat16, 8).reason == "cpu tensors"
    for name, most in (("sm_75", 0), ("sm_86", 32), ("gfx942", 16), ("gfx1100", 0)):
        monkeypatch.setitem(CHIPS, cpu, GPUS[name].chip)
        found = {r: select_one_pass(cpu, torch.bfloat16, r).backend for r in (1, 16, 32, 33)}
        assert found == {r: "triton" if r <= most else "torch" for r in found}, name
