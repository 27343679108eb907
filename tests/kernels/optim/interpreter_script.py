"""Run in its own process under TRITON_INTERPRET=1: the kernel against the torch reference."""

import torch
from lightning_peft_kernels.optim.adamw_8bit import PooledStep, pooled_8bit_step_reference
from lightning_peft_kernels.optim.adamw_8bit_triton import step_triton


def main() -> None:
    torch.manual_seed(3)
    shapes = [(16, 40), (300,), (5,)]
    params = [torch.randn(s) for s in shapes]
    starts = [0, 768, 1280]
    hyper = torch.tensor([[0.99, 1e-2, 1e-8, 0.9, 0.1, 0.99, 0.01]] * 3)
    hyper[1, 1] = 0.16
    for lion in (False, True):
        state = [torch.full((1536,), 127, dtype=torch.uint8), torch.zeros(6)]
        state += [None, None] if lion else [torch.zeros(1536, dtype=torch.uint8), torch.zeros(6)]
        ours = [p.clone() for p in params], [s if s is None else s.clone() for s in state]
        told = [p.clone() for p in params], [s if s is None else s.clone() for s in state]
        for turn in range(3):
            grads = [torch.randn(s) * 4 for s in shapes]
            found = torch.tensor(float(turn == 1))
            more = (torch.tensor(4.0), found, True)
            step_triton(PooledStep(ours[0], grads, starts, hyper, *ours[1], *more))
            pooled_8bit_step_reference(PooledStep(told[0], grads, starts, hyper, *told[1], *more))
        for a, b in zip(*(x[0] for x in (ours, told)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(ours[1], told[1], strict=True):
            if a is not None and a.dtype == torch.uint8:
                # torch rounds after each product and the interpreter may not: one code at a tie
                assert (a.int() - b.int()).abs().max() <= 1
                assert (a != b).float().mean() < 1e-2
    print("agrees")


if __name__ == "__main__":
    main()
