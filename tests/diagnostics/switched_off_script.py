"""Run by test_check.py in Triton's interpreter: two kernels are broken; training goes on in torch.

The compiler refuses one kernel, and another computes wrong numbers. Both are found by the check,
are not used afterwards, and the loss is that of kernels="torch".
"""

from __future__ import annotations

from typing import Any

import torch
from lightning_peft_kernels.dispatch import Backend, select, use_backend
from lightning_peft_kernels.launch import use_verdicts
from lightning_peft_kernels.lora import rank_gradients_triton
from lightning_peft_kernels.lora.selection import select_one_pass
from lightning_peft_kernels.nf4 import dequantize_triton
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.reference import quantize_4bit_reference
from triton.runtime.errors import OutOfResources

from lightning_peft.diagnostics.check_worker import Request, run_request

CPU = torch.device("cpu")


class Refused:
    __name__ = "refused_kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        raise OutOfResources(106_496, 101_376, "shared memory")


class Wrong:
    """The kernel, whose first result is off by one."""

    __name__ = "wrong_kernel"

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.kernel[grid](*arguments, **options)
            arguments[7].view(-1)[0] += 1

        return launch


def loss(backend: Backend) -> float:
    generator = torch.Generator().manual_seed(3)
    x, W, A, B = (
        torch.randn(s, generator=generator) for s in ((9, 64), (32, 64), (4, 64), (32, 4))
    )
    A, B, x = (t.half().requires_grad_() for t in (A, B, x))
    with use_backend(backend):
        for _ in range(2):
            q = quantize_4bit_reference(W)
            y = nf4_lora_linear(x, q, (32, 64), None, A, B, 0.5)
            y.square().mean().backward()
            with torch.no_grad():
                for t in (A, B):
                    assert t.grad is not None
                    t -= 0.1 * t.grad
                    t.grad = None
    return float(y.detach().float().square().mean())


def main() -> None:
    rank_gradients_triton._gradients_kernel = Refused()
    dequantize_triton._dequantize_kernel = Wrong(dequantize_triton._dequantize_kernel)
    ops = ("dequantize_4bit", "rank_gradients", "seeded_dropout")
    verdicts = [
        v for _, _, v in run_request(Request("cpu", ((80, 128, 20),), ops, short=True)) if v
    ]
    outcomes = {(v.op, v.configuration): v.outcome for v in verdicts}
    assert outcomes == {
        ("dequantize_4bit", "float16"): "wrong",
        ("rank_gradients", "float16, rank up to 16"): "refused",
        ("rank_gradients", "float16, rank up to 32"): "refused",
        ("seeded_dropout", "float16"): "ok",
    }, outcomes
    found = {(v.op, v.configuration): v for v in verdicts}
    use_verdicts(CPU, found)
    told = select("dequantize_4bit", CPU, torch.float16)
    assert told.backend == "torch"
    assert "wrong in the check: W: error" in told.reason, told
    assert "Required: 106496" in select_one_pass(CPU, torch.float16, 4).reason
    assert select("seeded_dropout", CPU, torch.float16).backend == "triton"
    assert loss("auto") == loss("torch")
    print("agrees")


if __name__ == "__main__":
    main()
