"""Dequantised weights: saved nowhere, and never overwritten while autograd reads them."""

from __future__ import annotations

import torch
from lightning_peft_kernels.nf4 import weight_buffers
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import dequantize_4bit, dequantize_into, quantize_4bit
from torch import Tensor


def test_a_step_saves_no_dense_weight(monkeypatch):
    """Forward and backward dequantise each; what autograd saves is smaller than a weight."""
    calls, sizes, shapes = [], [], [(48, 64), (64, 48)]

    def counted(*args, **kwargs):
        calls.append(1)
        return dequantize_into(*args, **kwargs)

    monkeypatch.setattr(weight_buffers, "dequantize_into", counted)
    x: Tensor = torch.randn(5, 64, requires_grad=True)
    y = x
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        for N, K in shapes:
            A, B = torch.randn(4, K, requires_grad=True), torch.randn(N, 4, requires_grad=True)
            q = quantize_4bit(torch.randn(N, K) / 8)
            y = torch.tanh(nf4_lora_linear(y, q, (N, K), None, A, B, 0.5))
        y.sum().backward()
    assert len(calls) == 4
    assert max(sizes) < 48 * 64


def test_a_recorded_product_does_not_read_the_shared_buffer():
    """Double backward: the first backward keeps its weight while later layers write the buffer."""
    q, other = quantize_4bit(torch.randn(16, 16)), quantize_4bit(torch.randn(16, 16))
    x = torch.randn(3, 16, requires_grad=True)
    y = nf4_linear(x, q, (16, 16), None).square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    nf4_linear(x.detach(), other, (16, 16), None)
    W = dequantize_4bit(q, (16, 16), torch.float32)
    torch.testing.assert_close(g, 2 * x @ W.T @ W)
