"""Run by test_interpreter.py in its own process: the kernel that decodes block-scaled weights."""

import torch
from lightning_peft_kernels.block_scaled.decode import decode_blocks_reference
from lightning_peft_kernels.block_scaled.decode_triton import decode
from lightning_peft_kernels.block_scaled.encode import encode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors, block_grid

LAYOUTS = [
    BlockLayout("e4m3", 128, 128),
    BlockLayout("e4m3", 128, 128, 2),
    BlockLayout("e4m3", 0, 0, 1, "e8m0"),
    BlockLayout("e2m1", 1, 32, 1, "e8m0"),
    BlockLayout("int8", 1, 0, 1, "bfloat16"),
    BlockLayout("int4", 1, 32, 1, "float16"),
    BlockLayout("uint4", 1, 32, 1, "float16"),
]


def check(q: BlockTensors, layout: BlockLayout, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    N, K = shape[-2:]
    torch.full((*shape[:-2], N, K), torch.nan, dtype=dtype)  # freed: shows what stays unwritten
    out = torch.empty(*shape[:-2], N, K, dtype=dtype)
    scales, zeros = block_grid(q, layout, N, K)
    got = decode(q.codes, scales, zeros, layout, out)
    want = decode_blocks_reference(q, (N, K), layout, dtype)
    assert torch.equal(got, want), (layout, shape, dtype)


def main() -> int:
    n = 0
    for layout in LAYOUTS:
        for shape in [(4, 32), (130, 288), (3, 18, 64)]:
            W = torch.randn(shape)
            for dtype in (torch.float32, torch.float16):
                check(encode_blocks(W, layout), layout, shape, dtype)
                n += 1
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    every = torch.where((every & 127) == 127, 0, every)
    q = BlockTensors(every, torch.ones(1, 1).view(torch.uint8))
    check(q, BlockLayout("e4m3", 0, 0), (2, 128), torch.float32)
    return n + 1


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{main()} cases equal")
