"""DeepSeek-V4's block-diagonal linear layer: dense, packed to NF4, and in FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import lightning_peft as lp
from lightning_peft import Quantization
from lightning_peft.storage import storage_of
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.released import fp8_blocks

GROUPS, OUT, IN = 2, 128, 96


def _dense() -> nn.Module:
    layer: nn.Module = DeepseekV4GroupedLinear(IN, GROUPS * OUT, GROUPS)
    return layer


def _fp8() -> nn.Module:
    layer: Any = FP8GroupedLinear(IN, GROUPS * OUT, n_groups=GROUPS, block_size=[128, 128])
    codes, scales = fp8_blocks(torch.randn(GROUPS * OUT, IN))
    layer.weight.data, layer.weight_scale_inv.data = codes, scales
    return layer


BASES: dict[str, tuple[Callable[[], nn.Module], Quantization | None]] = {
    "dense": (_dense, None),
    "nf4": (_dense, Quantization("nf4", block_size=32)),
    "fp8": (_fp8, None),
}
METHODS = [
    lp.LoRA(r=2), lp.DoRA(r=2), lp.VeRA(r=2), lp.LoHa(r=2), lp.LoKr(r=2), lp.IA3(), lp.OFT(),
]  # fmt: skip


def by_group(x: Tensor, W: Tensor) -> Tensor:
    return torch.einsum("tgk,gnk->tgn", x, W.view(GROUPS, OUT, IN))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_forward_is_the_product_with_the_merged_weight(base: str, method: Any) -> None:
    torch.manual_seed(0)
    make, quantization = BASES[base]
    model = nn.Sequential(make())
    lp.attach(model, method.__class__(**{**vars(method), "target_modules": ["0"]}),
              quantization=quantization)  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data.add_(torch.randn_like(p) * 0.05)
    x = torch.randn(3, GROUPS, IN, requires_grad=True)
    y = model(x)
    assert y.shape == (3, GROUPS, OUT)
    got = torch.autograd.grad(y.square().sum(), [x, *trained])
    assert all(g.any() for g in got)
    lp.merge(model)
    W = storage_of(model[0], "weight").read(model[0], "weight", torch.float32)
    want = by_group(x, W)
    assert_close("output", y.detach(), want.detach(), floor=2e-6)
    assert_close("gradient", got[0], torch.autograd.grad(want.square().sum(), x)[0], floor=2e-6)
    assert_close("merged", model(x).detach(), want.detach(), floor=2e-6)
    lp.unmerge(model)
    assert_same_bits("unmerged", model(x).detach(), y.detach())


def test_all_linear_selects_it() -> None:
    model = nn.Sequential(_dense())
    report = lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"))
    assert [g.count for g in report.groups] == [1]
