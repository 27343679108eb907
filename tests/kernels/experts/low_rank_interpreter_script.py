"""Run by test_interpreter.py in its own process: an expert's low rank in place, its gradients from
one pass over dY, and the function as a GPU runs it; fp64 truth.
"""

import torch
from lightning_peft_kernels.chips import CHIPS, nvidia_chip
from lightning_peft_kernels.experts import low_rank_triton as kernels
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.experts.low_rank import add_low_rank, add_low_rank_reference

# Rows of each expert, rows of nobody, N, R.
CASES = [
    ([3, 0, 70, 1], 2, 48, 4),
    ([0, 0, 5, 0, 0], 0, 300, 16),
    ([0, 0, 0], 3, 16, 1),
    ([1, 90, 0, 2], 4, 130, 31),
    ([20, 1], 0, 64, 32),
]
CPU = torch.device("cpu")


def given(counts, tail, N, R, dtype):
    used = sum(counts)
    groups = Groups.counted(counts, used + tail, CPU)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y, dY = torch.randn(2, used + tail, N).to(dtype)
    Z, B = torch.randn(used + tail, R).to(dtype), torch.randn(len(counts), N, R).to(dtype)
    return groups, expert, y, dY, Z, B


def close(got, want, floor, what) -> None:
    assert got.isfinite().all(), what
    if got.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-9)
        assert error < floor, (*what, float(error))


def functions() -> int:
    n = 0
    for counts, tail, N, R in CASES:
        for dtype, floor in ((torch.float32, 1e-6), (torch.float16, 3e-3)):
            groups, expert, y, dY, Z, B = given(counts, tail, N, R, dtype)
            used, what = len(expert), (counts, N, R, dtype)
            want = y.double()
            want[:used] += torch.einsum("sr,snr->sn", Z[:used].double(), B[expert].double())
            kernels.add_low_rank_product_(y, Z, B, groups.offsets)
            close(y, want, floor, what)
            for _ in range(4):  # freed NaN memory shows what is left unwritten
                torch.full((B.numel(),), torch.nan, dtype=dtype)
            dZ, dB = kernels.expert_low_rank_gradients(dY, Z, B, groups.offsets, 0.5)
            by_row = torch.einsum("sn,sr->snr", dY[:used].double(), Z[:used].double())
            close(dB, torch.zeros(B.shape).double().index_add(0, expert, by_row), floor, what)
            want = 0.5 * torch.einsum("sn,snr->sr", dY[:used].double(), B[expert].double())
            close(dZ[:used], want, floor, what)
            n += 3
    return n


def layer() -> int:
    n = 0
    CHIPS[torch.device("cpu")] = nvidia_chip(9, 0, 232_448)
    Groups.on_host = property(lambda self: False)
    for (counts, tail, N, R), in_place in [(c, p) for c in CASES for p in (True, False)]:
        K = 24
        groups, expert, y, dY, _, B = given(counts, tail, N, R, torch.float16)
        X, A = torch.randn(groups.rows, K).half(), torch.randn(len(counts), R, K).half()
        leaves = [t.clone().requires_grad_() for t in (y, X, A, B)]
        got = add_low_rank(leaves[0] * 1, *leaves[1:], 0.5, groups, in_place=in_place)
        got.backward(dY)
        wide = [t.double().requires_grad_() for t in (y, X, A, B)]
        used = len(expert)
        low = add_low_rank_reference(wide[0][:used], wide[1][:used], *wide[2:], 0.5, expert)
        want = torch.cat([low, wide[0][used:]])
        want.backward(dY.double())
        for a, b in ((got.detach(), want.detach()), *((p.grad, q.grad) for p, q in zip(
            leaves, wide, strict=True
        ))):  # fmt: skip
            close(a, b, 5e-3, (counts, N, R, in_place))
            n += 1
    return n


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{functions() + layer()} cases equal")
