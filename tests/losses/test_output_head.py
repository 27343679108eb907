"""Models whose heads defer: equal losses, gradients and logits; the model comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import LoRA, adapter_names, attach, chunk_losses, limit_activations, set_adapter
from lightning_peft.losses.deferred_logits import DeferredLogits
from tests.helpers.tiny_models import BUILDERS, HIDDEN, KINDS, VOCAB, example_inputs

DECODERS = [n for n in BUILDERS if KINDS[n] in ("decoder", "encoder_decoder", "speech")]
QUICK = {"llama", "gemma2", "granite", "gpt2", "t5", "mixtral", "bloom"}
MODELS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS]


def built(name: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = BUILDERS[name]().train()
    method = LoRA(**{"r": 2, "target_modules": "all-linear", **options})
    attach(net, method)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return net, example_inputs(name)


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def step(net: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return gradients(net, net(**x).loss)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert len(want) > 1
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[DeferredLogits]:
    """Logits that were computed although they were deferred."""
    seen: list[DeferredLogits] = []
    tensor = DeferredLogits.tensor

    def watched(self: DeferredLogits) -> Tensor:
        seen.append(self)
        return tensor(self)

    monkeypatch.setattr(DeferredLogits, "tensor", watched)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_equal_losses_without_logits(name: str, computed: list[DeferredLogits]) -> None:
    net, x = built(name)
    want = step(net, x)
    with torch.no_grad():
        logits = net.eval()(**x).logits
    net.train()
    before = {n: dict(vars(m)) for n, m in net.named_modules()}
    with chunk_losses(net):
        assert_close(step(net, x), want)
        assert computed == []
        with torch.no_grad():
            out = net.eval()(**x)  # validation: labels, no gradients
            assert computed == []
            torch.testing.assert_close(out.logits.argmax(-1), logits.argmax(-1))
            if KINDS[name] == "decoder":
                unlabelled = {k: v for k, v in x.items() if k != "labels"}
                assert isinstance(net(**unlabelled).logits, Tensor)
        net.train()
    assert {n: dict(vars(m)) for n, m in net.named_modules()} == before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["frozen", "adapter", "full"])
def test_heads(head: str, tied: bool, computed: list[DeferredLogits]) -> None:
    torch.manual_seed(0)
    net = BUILDERS["llama"]()
    if tied:
        net.config.tie_word_embeddings = True
        net.lm_head.weight = net.model.embed_tokens.weight
    where = {"frozen": ["q_proj"], "adapter": ["q_proj", "lm_head"], "full": ["q_proj"]}[head]
    attach(
        net, LoRA(r=2, target_modules=where), modules_to_save=["lm_head"] if head == "full" else ()
    )
    x = example_inputs("llama")
    want = step(net, x)
    with chunk_losses(net):
        assert_close(step(net, x), want)
    assert computed == []


def test_losses_of_your_own(computed: list[DeferredLogits]) -> None:
    net, x = built("llama")
    ids, y = x["input_ids"], x["input_ids"][:, 1:]

    def losses() -> list[dict[str, Tensor]]:
        found = []
        for form in range(4):
            z = net(input_ids=ids).logits
            if form == 0:
                loss = F.cross_entropy(z[:, :-1].flatten(0, 1), y.flatten(), label_smoothing=0.1)
            elif form == 1:
                loss = nn.CrossEntropyLoss()(
                    z[..., :-1, :].contiguous().view(-1, z.size(-1)), y.reshape(-1)
                )
            elif form == 2:
                loss = F.cross_entropy(z[:, :-1].transpose(1, 2), y, reduction="sum")
            else:
                loss = F.cross_entropy(z.float()[:, :-1].reshape(-1, VOCAB), y.reshape(-1))
            found.append(gradients(net, loss))
        return found

    want = losses()
    with chunk_losses(net):
        got = losses()
    assert computed == []
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_everything_else_computes_logits(computed: list[DeferredLogits]) -> None:
    net, x = built("llama")

    def values() -> list[Tensor]:
        z = net(input_ids=x["input_ids"]).logits
        return [
            z[0, -1],
            z[..., :5],
            z.softmax(-1),
            torch.log_softmax(z / 2.0, -1).gather(-1, x["input_ids"][..., None]),
            torch.stack([z, z]),
            z.view(-1),
            z.flatten(),
            z.permute(2, 0, 1),
            z.to(torch.float64),
            2 * z + 1,
            F.cross_entropy(
                z.flatten(0, 1), torch.full((z.shape[0] * z.shape[1], VOCAB), 1 / VOCAB)
            ),
            torch.tensor([z.numel(), *z.shape, z.dim(), len(z)]),
        ]

    want = values()
    with chunk_losses(net):
        got = values()
    assert computed
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.tensor() if isinstance(a, DeferredLogits) else a, b)


def test_generation_does_not_notice() -> None:
    net, x = built("llama")
    net.eval()
    ids = x["input_ids"][1:]
    want = net.generate(ids, max_new_tokens=4, do_sample=False)
    with chunk_losses(net):
        assert torch.equal(net.generate(ids, max_new_tokens=4, do_sample=False), want)


def test_rows_under_different_adapters(computed: list[DeferredLogits]) -> None:
    net, x = built("llama", target_modules=["q_proj", "lm_head"])
    attach(net, LoRA(r=3, alpha=5.0, target_modules=["q_proj", "lm_head"]), adapter_name="b")
    set_adapter(net, ["default", "b"])
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)

    def mixed(cut: slice) -> dict[str, Tensor]:
        with adapter_names(["b", "default"]):
            z = net(input_ids=x["input_ids"]).logits[cut, :-1]
            loss = F.cross_entropy(z.flatten(0, 1), x["input_ids"][cut, 1:].flatten())
        return gradients(net, loss)

    for cut in (slice(None), slice(1, None)):
        want = mixed(cut)
        with chunk_losses(net):
            assert_close(mixed(cut), want)
    assert len(computed) == 1  # rows that were cut off: adapters by row need every row


def test_with_autocast_and_checkpointing(computed: list[DeferredLogits]) -> None:
    net, x = built("llama", target_modules=["q_proj", "lm_head"])
    with torch.autocast("cpu", torch.bfloat16):
        want = net(**x).loss
    wanted = gradients(net, want)
    with chunk_losses(net), limit_activations(net):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(**x).loss
        got = gradients(net, loss)
    assert computed == []
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0.03, atol=2e-3, msg=name)


def test_copies_do_not_defer() -> None:
    net, x = built("llama")
    with chunk_losses(net):
        twin = copy.deepcopy(net)
    assert isinstance(twin(**x).logits, Tensor)
    assert_close(step(twin, x), step(net, x))


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match="got Linear; in a model of your own call chunked_cross_en"
    ):
        chunk_losses(nn.Linear(HIDDEN, VOCAB))
    bert = BUILDERS["bert"]()
    with pytest.raises(ValueError, match=r"got \['BertForSequenceClassification'\]"):
        chunk_losses(bert)
    net, _ = built("llama")
    with chunk_losses(net), pytest.raises(ValueError, match="defers them already"):
        chunk_losses(net)
    assert "forward" not in vars(net.lm_head)
