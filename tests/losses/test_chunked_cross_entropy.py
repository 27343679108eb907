"""`chunked_cross_entropy` against torch's own cross entropy in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import LoRA, TrainableTokens, attach, chunked_cross_entropy, quantize
from lightning_peft.losses.chunk_pass import chunk_tokens_for

ROWS, TOKENS, FEATURES, VOCABULARY = 2, 33, 16, 50


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, labels with some that do not count."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, TOKENS, FEATURES, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, FEATURES, generator=g, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=g, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=g)
    labels[0, :7] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def reference(
    hidden: Tensor, matrix: Tensor, bias: Tensor, labels: Tensor, softcap: float | None, **how: Any
) -> list[Tensor]:
    """Loss and gradients in float64."""
    given = [t.detach().double().requires_grad_() for t in (hidden, matrix, bias)]
    logits = F.linear(*given)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if how.get("weight") is not None:
        how["weight"] = how["weight"].double()
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **how)
    loss = loss.view(labels.shape) if how["reduction"] == "none" else loss
    loss.sum().backward()
    return [loss.detach(), *(t.grad for t in given)]  # type: ignore[list-item]


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **how: Any) -> list[Tensor]:
    given = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = chunked_cross_entropy(given[0], given[1], labels, bias=given[2], chunk_tokens=10, **how)
    loss.sum().backward()
    return [loss.detach(), *(t.grad for t in given)]  # type: ignore[list-item]


CASES = list(itertools.product(("mean", "sum"), (0.0, 0.2), (None, 5.0), (False, True)))


@pytest.mark.parametrize(("reduction", "smoothing", "softcap", "weighted"), CASES)
def test_equals_torch(
    reduction: str, smoothing: float, softcap: float | None, weighted: bool
) -> None:
    given = data()
    weight = (
        torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(1)) if weighted else None
    )
    how: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    want = reference(*given, softcap, **how, weight=weight)
    got = ours(*given, softcap=softcap, **how, class_weight=weight)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_every_token_by_itself() -> None:
    hidden, weight, bias, labels = data()
    want = reference(hidden, weight, bias, labels, None, reduction="none")
    x = hidden.requires_grad_()
    factors = torch.arange(labels.numel()).view(labels.shape).float()
    loss = chunked_cross_entropy(x, weight, labels, bias=bias, reduction="none", chunk_tokens=7)
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
    (loss * factors).sum().backward()
    torch.testing.assert_close(x.grad.double(), want[1] * factors[..., None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torch(dtype: torch.dtype) -> None:
    given = data(dtype)
    want = reference(*given, None, reduction="mean")
    got = ours(*given)
    plain = [t.detach().clone().requires_grad_() for t in given[:3]]
    F.cross_entropy(F.linear(*plain).float().flatten(0, 1), given[3].flatten()).backward()
    # float16 is scaled in backward only, so that small gradients are not lost before that
    factor = 1.5 if dtype == torch.bfloat16 else 2.0
    for a, p, w in zip(got[1:], [t.grad for t in plain], want[1:], strict=True):
        assert (a.double() - w).norm() <= factor * (p.double() - w).norm() + 1e-6 * w.norm()
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_double_precision(smoothing: float) -> None:
    """The loss is computed in float32; gradients have the dtype of their tensors."""
    hidden, weight, bias, labels = data(torch.float64)
    given = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = chunked_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=smoothing)
    found = [loss, *torch.autograd.grad(loss, given)]
    how = {"label_smoothing": smoothing, "reduction": "mean"}
    wanted = reference(hidden, weight, bias, labels, None, **how)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    assert all(got.dtype == torch.float64 for got in found[1:])


def test_scaled_and_repeated_backward() -> None:
    hidden, weight, bias, labels = data()
    x = hidden.requires_grad_()
    loss = chunked_cross_entropy(x, weight, labels, bias=bias)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 65536.0, x)
    assert torch.equal(scaled, once * 65536.0)


def test_no_token_counts() -> None:
    hidden, weight, _, labels = data()
    x = hidden.requires_grad_()
    loss = chunked_cross_entropy(x, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.isnan()
    assert not x.grad.any()


def adapted(storage: str | None, method: Any) -> nn.Linear:
    torch.manual_seed(2)
    head = nn.Linear(64, VOCABULARY, bias=False)
    holder = nn.Sequential(head)
    if storage is not None:
        quantize(holder, storage)
    attach(holder, method)
    for p in head.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return head


@pytest.mark.parametrize(
    ("storage", "method"),
    [
        (None, LoRA(r=2, target_modules=["0"])),
        ("nf4", LoRA(r=2, target_modules=["0"])),
        (None, TrainableTokens([3, 5], target_modules=["0"])),
    ],
    ids=["adapter", "packed", "tokens"],
)
def test_heads_with_adapters(storage: str | None, method: Any) -> None:
    head = adapted(storage, method)
    x = torch.randn(2, 9, 64)
    labels = torch.randint(0, VOCABULARY, (2, 9))

    def run(chunked: bool) -> list[Tensor]:
        head.zero_grad()
        h = x.clone().requires_grad_()
        if chunked:
            loss = chunked_cross_entropy(h, head, labels, chunk_tokens=4)
        else:
            loss = F.cross_entropy(head(h).flatten(0, 1), labels.flatten())
        loss.backward()
        trained = [p.grad for p in head.parameters() if p.requires_grad]
        return [loss.detach(), h.grad, *trained]  # type: ignore[list-item]

    got, want = run(True), run(False)
    assert len(got) > 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_weight_that_comes_from_elsewhere() -> None:
    """Gradients reach what the head is computed from, through a graph that chunks share."""
    hidden, weight, _, labels = data()
    factor = torch.ones((), requires_grad=True)
    chunked_cross_entropy(hidden, weight * factor.exp(), labels, chunk_tokens=8).backward()
    got, factor.grad = factor.grad, None
    F.cross_entropy(
        F.linear(hidden, weight * factor.exp()).flatten(0, 1), labels.flatten()
    ).backward()
    torch.testing.assert_close(got, factor.grad, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned, in elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_all_logits_never_exist() -> None:
    hidden = torch.randn(1024, 8, requires_grad=True)
    weight = torch.randn(512, 8, requires_grad=True)
    labels = torch.randint(0, 512, (1024,))
    with Largest() as seen:
        chunked_cross_entropy(hidden, weight, labels).backward()
    assert seen.elements == 1024 // 8 * 512
    assert chunk_tokens_for(2**20, 2**17, torch.device("cpu")) == 64
    assert chunk_tokens_for(2**20, 2**17, torch.device("cuda")) == 512


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number from 0 to 1"),
        ({"reduction": "avg"}, ValueError, "reduction: expected 'mean', 'sum' or 'none'"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: expected a whole number"),
        ({"labels": torch.full((ROWS, TOKENS), 50)}, ValueError, "class indices below 50.*got 50"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels: expected \[2, 33\]"),
        ({"labels": torch.zeros(ROWS, TOKENS)}, TypeError, "labels: expected int64"),
        ({"weight": torch.zeros(4, 3)}, ValueError, r"expected a weight \[vocabulary, 16\]"),
        ({"weight": nn.Linear(16, 4), "bias": torch.zeros(4)}, ValueError, "no bias beside"),
        ({"weight": nn.Linear(12, 4)}, ValueError, r"hidden states \[\*, 12\].*got \[2, 33, 16\]"),
        ({"weight": torch.zeros(4, 16).half()}, TypeError, "a weight of the dtype .*float16"),
        ({"weight": nn.Linear(16, 4).double()}, TypeError, "a head of the dtype .*float64"),
        ({"bias": torch.zeros(50).half()}, TypeError, "a bias of the dtype .*float16"),
        ({"hidden": torch.zeros(ROWS, TOKENS, 16).long()}, TypeError, "floating-point .*int64"),
        ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got"),
        ({"labels": [1]}, TypeError, "labels: expected a tensor, got"),
        ({"weight": "lm_head"}, TypeError, "output head or its weight, got 'lm_head'"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, _, labels = data()
    given = {"hidden": hidden, "weight": weight, "labels": labels, **changes}
    with pytest.raises(error, match=message):
        chunked_cross_entropy(**given)


def test_single_losses_of_a_trained_head_are_refused() -> None:
    hidden, weight, _, labels = data()
    with pytest.raises(ValueError, match="trains 1 tensors; use 'mean'"):
        chunked_cross_entropy(hidden, weight.requires_grad_(), labels, reduction="none")
