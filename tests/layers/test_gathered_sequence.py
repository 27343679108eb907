"""Autograd keeps a rank's part of keys and values, and backward forms the complete ones again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lightning_peft.layers.gathered_sequence import saving_parts


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 8, 16)
    return [q.requires_grad_(), *(torch.randn(1, 1, 8, 16).requires_grad_() for _ in range(2))]


def attend(
    q: Tensor, k: Tensor, v: Tensor, calls: list[str], watched: list[Callable[[], object]]
) -> Tensor:
    def complete(name: str, part: Tensor) -> Tensor:
        calls.append(name)
        return torch.cat([part, part], 2).repeat_interleave(2, 1)

    keys, values = complete("k", k), complete("v", v)
    watched += [weakref.ref(t.untyped_storage()) for t in (keys, values)]
    forms = (partial(complete, name, t.detach()) for name, t in (("k", k), ("v", v)))
    with saving_parts(list(zip((keys, values), forms, strict=True))):
        return scaled_dot_product_attention(q, keys, values)


def test_complete_tensors_are_formed_again_in_one_order() -> None:
    plain, parts = tensors(), tensors()
    doubled = (torch.cat([t, t], 2).repeat_interleave(2, 1) for t in plain[1:])
    scaled_dot_product_attention(plain[0], *doubled).square().sum().backward()
    calls: list[str] = []
    watched: list[Callable[[], object]] = []
    out = attend(*parts, calls, watched)
    assert calls == ["k", "v"]
    assert [ref() for ref in watched] == [None, None]
    loss = out.square().sum()
    loss.backward(retain_graph=True)
    assert calls == ["k", "v", "k", "v"]
    loss.backward()
    for t, want in zip(parts, plain, strict=True):
        assert t.grad is not None
        assert want.grad is not None
        torch.testing.assert_close(t.grad, 2 * want.grad)


def test_a_checkpointed_block_keeps_its_own_way() -> None:
    plain, parts = tensors(), tensors()
    attend(*plain, [], []).square().sum().backward()
    calls: list[str] = []
    out = checkpoint(attend, *parts, calls, [], use_reentrant=False)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    assert calls == ["k", "v", "k", "v"]  # forward and its second run, and no third time
    for t, want in zip(parts, plain, strict=True):
        assert t.grad is not None
        assert want.grad is not None
        torch.testing.assert_close(t.grad, want.grad)
