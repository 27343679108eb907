"""Run by test_check.py in Triton's interpreter: every check in bf16, on several shapes."""

from __future__ import annotations

import sys

import torch
from lightning_peft_kernels.chips import CHIPS, nvidia_chip
from lightning_peft_kernels.launch import use_verdicts

from lightning_peft.diagnostics.kernel_checks import kernel_checks
from lightning_peft.diagnostics.pairs import Shape
from tests.helpers.interpreter_bf16 import use_bf16

CPU = torch.device("cpu")
SHAPES = (Shape(80, 192, 20), Shape(64, 64, 1), Shape(33, 320, 130))


def main(shapes: tuple[Shape, ...]) -> None:
    use_bf16()
    CHIPS[CPU] = nvidia_chip(9, 0, 232_448)
    use_verdicts(CPU, {})
    count = 0
    for shape in shapes:
        for check in kernel_checks(CPU, shape, interpreted=False):
            # The interpreter rounds to e4m3 wrongly too.
            if check.configuration.startswith("bfloat16") and "e4m3" not in check.op:
                assert check.applies, (check.op, check.configuration)
                error = check.error()
                assert not error, (check.op, check.configuration, shape, error)
                count += 1
    print(f"{count} checks agree")


if __name__ == "__main__":
    main(SHAPES[:1] if "sample" in sys.argv else SHAPES)
