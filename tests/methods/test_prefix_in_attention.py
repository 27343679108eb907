"""Prefixes in `nn.MultiheadAttention` of the user's own transformer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.methods import PrefixTuning
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.prompt_cases import Own, masks_for, move


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("train", [True, False])
def test_prefix_in_multihead_attention(kind: str, train: bool) -> None:
    """Against attention by hand; no prefix and a masked row give the plain module's output."""
    model = Own().train(train)
    ids, masks = torch.randint(0, 20, (3, 5)), masks_for(kind)
    with torch.no_grad():
        base = model(ids, **masks)
        # torch.matmul takes another routine for a frozen weight, on some CPUs with other last bits.
        frozen = copy.deepcopy(model).requires_grad_(False)(ids, **masks)
    for name in ("a", "b"):
        lp.attach(model, PrefixTuning(n=2, target_modules=["self_attn"]), adapter_name=name)
        move(model)
    lp.set_adapter(model, "a")
    y = model(ids, **masks)
    y.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    keep = ~masks.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    lp.set_adapter(model, ["a", "b"])
    with torch.no_grad():
        with lp.adapter_names(["a", "__base__", "a"]):
            mixed = model(ids, **masks)
        assert_close("base row", mixed[1], base[1])
        assert_close("row 0", mixed[0][keep[0]], y[0][keep[0]].detach())
        assert_close("row 2", mixed[2], y[2].detach())
        with lp.disable_adapters(model):
            off = model(ids, **masks)
            assert_close("off", off[keep], base[keep])
            if train:  # in eval the base takes a fused path, which adapters turn off
                assert_same_bits("off", off, frozen)
    lp.detach(model)
    with torch.no_grad():
        assert_same_bits("detached", model(ids, **masks), base)


@pytest.mark.parametrize("batch_first", [True, False])
def test_prefix_formula_in_multihead_attention(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=batch_first))
    lp.attach(model, PrefixTuning(n=3, target_modules=["0"]))
    (P,) = trained_tensors(model).values()
    x = torch.randn(2, 4, 8)
    q, k, v = F.linear(x, model[0].in_proj_weight, model[0].in_proj_bias).chunk(3, dim=-1)
    k = torch.cat([P[:, :8].expand(2, -1, -1), k], dim=1)
    v = torch.cat([P[:, 8:].expand(2, -1, -1), v], dim=1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    want = model[0].out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
    z = x if batch_first else x.transpose(0, 1)
    for need_weights in (True, False):
        y, weights = model[0](z, z, z, need_weights=need_weights)
        assert_close("output", y if batch_first else y.transpose(0, 1), want)
        assert (weights is None) != need_weights
    assert weights is None or weights.shape == (2, 4, 4)


def test_prefix_beside_lora_in_one_module() -> None:
    model, ids = Own().eval(), torch.randint(0, 20, (3, 5))
    lp.attach(
        model,
        [
            PrefixTuning(n=2, target_modules=["self_attn"]),
            lp.LoRA(r=2, target_modules=["self_attn"]),
        ],
    )
    with torch.no_grad():
        prefix = model(ids)
        move(model)
        assert not torch.allclose(model(ids), prefix)
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
