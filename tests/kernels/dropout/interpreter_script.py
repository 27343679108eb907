"""Run in its own process under TRITON_INTERPRET=1: the kernel's mask is the reference's, bit for
bit, for seeds of either sign and beyond 32 bits.
"""

import torch
from lightning_peft_kernels.dropout.ops import philox_uniform, seeded_dropout_reference
from lightning_peft_kernels.dropout.triton import dropout


def main() -> None:
    for number in (0, 1, 2**31 + 5, 2**32 + 7, 2**40 + 3, 2**62 - 1, -5):
        seed = torch.tensor([number])
        for shape in ((3, 700), (1,), (5, 1024)):
            x = torch.randn(shape)
            torch.testing.assert_close(
                dropout(x, seed, 0.3), seeded_dropout_reference(x, seed, 0.3), rtol=1e-6, atol=0
            )
        assert 0.45 < float(philox_uniform(seed, 20_000).mean()) < 0.55
    half = torch.randn(40, 33).half()
    torch.testing.assert_close(
        dropout(half, torch.tensor([9]), 0.5),
        seeded_dropout_reference(half, torch.tensor([9]), 0.5),
        rtol=1e-3,
        atol=0,
    )
    assert dropout(half[:0], torch.tensor([9]), 0.5).shape == (0, 33)
    print("agrees")


if __name__ == "__main__":
    main()
