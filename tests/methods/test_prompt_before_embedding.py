"""Prompts before an embedding of the user's own transformer."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.methods import PrefixTuning, PromptTuning, PTuning
from lightning_peft.methods.base import SequenceMethod
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.prompt_cases import Own, masks_for, move


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("method", [PromptTuning(n=2), PTuning(n=2)], ids=["prompt", "mlp"])
def test_prompt_before_embeddings_of_the_users(kind: str, method: SequenceMethod) -> None:
    """Equal to the plain model on embeddings and masks that are put together by hand."""
    model, plain = Own(), Own()
    ids, masks = torch.randint(0, 20, (3, 5)), masks_for(kind)
    with torch.no_grad():
        base = model(ids, **masks)
        # torch.matmul takes another routine for a frozen weight, on some CPUs with other last bits.
        frozen = copy.deepcopy(model).requires_grad_(False)(ids, **masks)
    lp.attach(model, dataclasses.replace(method, target_modules=["embed"]))
    move(model)
    y = model(ids, **masks)
    assert y.shape == base.shape
    y.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        x = model.embed(ids)
        if "mask" in masks:
            masks["mask"] = torch.ones(7, 7, dtype=torch.bool).triu(1)
            masks["mask"][:2, :2] = False
        if "src_key_padding_mask" in masks:
            masks["src_key_padding_mask"] = F.pad(masks["src_key_padding_mask"], (2, 0))
        want = plain.layers(x, **{**masks, "is_causal": False} if masks else {})[:, 2:]
        keep = ~masks_for("padding")["src_key_padding_mask"]
        assert_close("output", y.detach()[keep], want[keep])
        with lp.disable_adapters(model):
            assert_same_bits("off", model(ids, **masks_for(kind)), frozen)
    twin = copy.deepcopy(model)
    move(twin)
    assert not torch.equal(twin(ids), model(ids))
    lp.detach(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with torch.no_grad():
        assert_same_bits("detached", model(ids, **masks_for(kind)), base)


def test_where_a_prefix_does_not_fit() -> None:
    with pytest.raises(ValueError, match="type Linear"):
        lp.attach(Own(), PrefixTuning(target_modules=["linear1"]))
    with pytest.raises(ValueError, match="one module that gives"):
        lp.attach(Own(), PromptTuning(target_modules=["linear1"]))
    with pytest.raises(ValueError, match="use init='random'"):
        lp.attach(Own(), PromptTuning(target_modules=["layers.layers.0.norm1"]))
