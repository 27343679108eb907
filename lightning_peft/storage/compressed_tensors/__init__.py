"""compressed-tensors: int4, int8, FP8, NVFP4 and MXFP4 as llm-compressor and Kimi-K2 write them.

    int4   weight_packed int32 [N, ⌈K/8⌉], eight columns per word, first in the low bits; 8 added
    int8   weight int8 [N, K]
    FP8    weight e4m3 [N, K]
    NVFP4  weight_packed uint8 [N, K/2], scales e4m3, divided by weight_global_scale
    MXFP4  weight_packed uint8 [N, K/2], scales uint8: powers of two

``weight_scale`` covers a group of columns, a row, a block, or the tensor. The library's own layers
decompress for good in their first forward, and transformers decompresses experts when it loads
them. `load_packed` fills the model's own layers instead, experts included.
"""

from lightning_peft.storage.compressed_tensors.eight_bit import (
    CompressedFP8Storage,
    CompressedInt8Storage,
)
from lightning_peft.storage.compressed_tensors.float4 import CompressedFloat4Storage
from lightning_peft.storage.compressed_tensors.int4 import CompressedInt4Storage

__all__ = [
    "CompressedFP8Storage",
    "CompressedFloat4Storage",
    "CompressedInt4Storage",
    "CompressedInt8Storage",
]
