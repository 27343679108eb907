"""torchao: int8 and float8 weights, in a model that arrives quantised or in its files.

    Int8Tensor    W = (qdata - zero_point) · scale
    Float8Tensor  W = qdata · scale

A scale covers a row, a group of columns, a block, or the tensor. Products are W8A16, also where
torchao quantises activations.
"""

from __future__ import annotations

from lightning_peft.storage.torchao.weights import TorchAoFloat8Storage, TorchAoInt8Storage

__all__ = ["TorchAoFloat8Storage", "TorchAoInt8Storage"]
