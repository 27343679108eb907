"""TrainableTokens: rows in place of the embedding's, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.strategies.sharding import _check_adapters
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, randomise, run

IDS = [3, 7, 11]


class Net(nn.Module):
    """Embedding, a layer, a head with a bias; tied or not."""

    def __init__(self, tied: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20)
        if tied:
            self.head.weight = self.embedding.weight
        if scale != 1.0:
            self.embedding.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(ids))))


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)


X = torch.tensor([[1, 3, 7], [11, 3, 5]])


def by_hand(model: Net, rows: dict[str, Tensor], x: Tensor) -> Tensor:
    """fp64, with tables whose rows were replaced."""
    tables = {}
    for name in ("embedding", "head"):
        W = model.get_submodule(name)._parameters["weight"].detach().double()
        found = rows.get(name)
        tables[name] = W if found is None else W.index_copy(0, torch.tensor(IDS), found.double())
    h = F.embedding(x, tables["embedding"])
    h = torch.tanh(F.linear(h, model.inner.weight.double(), model.inner.bias.double()))
    return F.linear(h, tables["head"], model.head.bias.double())


def rows_of(model: nn.Module) -> dict[str, Tensor]:
    return {n.partition(".peft")[0]: p for n, p in trained_tensors(model).items() if "rows" in n}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", ["embedding", "head", "both"])
def test_forward_gradients_and_merge(tied: bool, layers: str) -> None:
    base = net(tied=tied)
    names = ["embedding", "head"] if layers == "both" else [layers]
    model = copy.deepcopy(base)
    lp.attach(model, lp.TrainableTokens(dict.fromkeys(names, IDS)))
    assert_close("start", model(X), base(X), floor=1e-6)
    randomise(model)
    found = rows_of(model)
    assert len(found) == (1 if tied else len(names))
    rows = {n: p.detach().double().requires_grad_() for n, p in found.items()}
    both = {"head": rows["embedding"]} if tied and "embedding" in rows else {}
    want = by_hand(base, {**rows, **both}, X)
    assert_close("output", model(X), want, floor=1e-6)
    want.pow(2).sum().backward()
    model(X).pow(2).sum().backward()
    for name, p in found.items():
        assert_close(f"gradient of {name}", p.grad, rows[name].grad, floor=1e-5)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    lp.merge(model)
    assert_close("merged", model(X), want, floor=1e-6)
    lp.unmerge(model)
    lp.detach(model)
    assert_same_bits("detached", model(X), base(X))
    assert set(model.state_dict()) == set(base.state_dict())


def test_the_embedding_starts_bit_for_bit_and_scales() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("llama", "gemma2"):
            base, inputs = build(name)
            base.to(dtype)
            embedding = base.get_input_embeddings()
            want = embedding(inputs["input_ids"])
            lp.attach(base, lp.TrainableTokens(inputs["input_ids"][0, :3].unique().tolist()))
            assert_same_bits(name, base.get_input_embeddings()(inputs["input_ids"]), want)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_nothing_but_the_rows_is_trained(optimizer: str) -> None:
    model = net(tied=True)
    table = model.embedding.weight.detach().clone()
    lp.attach(model, lp.TrainableTokens(IDS, target_modules=["embedding"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(3, 8)]
    opt: Any = torch.optim.AdamW(trained, lr=0.1)
    if optimizer != "adamw":
        lp.convert_optimizer(opt, optimizer)
    before = trained[0].detach().clone()
    for _ in range(3):
        opt.zero_grad()
        model(X).pow(2).sum().backward()
        opt.step()
    assert_same_bits("the table", model.embedding._parameters["weight"], table)
    assert not torch.equal(before, trained[0])
    moments = [t for s in opt.state.values() for t in s.values() if t.numel() >= 3 * 8]
    width = {"adamw": 4, "adamw_8bit": 1}[optimizer]
    assert sum(t.nbytes for t in moments) == 3 * 8 * 2 * width
    lp.merge(model)
    merged = model.embedding.weight
    others = [i for i in range(20) if i not in IDS]
    assert_same_bits("other rows", merged[others], table[others])
    assert_same_bits("the rows", merged[IDS].detach(), trained[0].detach())


def test_a_batch_without_these_tokens() -> None:
    model = net()
    lp.attach(model, lp.TrainableTokens(IDS, target_modules=["embedding"]))
    model(torch.tensor([[1, 2]])).sum().backward()
    (rows,) = rows_of(model).values()
    assert rows.grad is not None
    assert not rows.grad.any()


def test_the_padding_row_takes_no_gradient_from_the_embedding() -> None:
    model = net()
    lp.attach(model, lp.TrainableTokens([0, 3], target_modules=["embedding"]))
    model(torch.tensor([[0, 3, 0]])).sum().backward()
    (rows,) = rows_of(model).values()
    assert rows.grad is not None
    assert not rows.grad[0].any()
    assert rows.grad[1].any()


def test_several_adapters() -> None:
    base = net(tied=True)
    model = copy.deepcopy(base)
    for name, ids in (("a", [3, 7]), ("b", [5]), ("c", [7])):
        lp.attach(model, lp.TrainableTokens(ids, target_modules=["embedding"]), adapter_name=name)
    randomise(model)
    alone = {}
    for name in ("a", "b", "c"):
        lp.set_adapter(model, name)
        alone[name] = model(X)
    lp.set_adapter(model, ["a", "b"])
    both = model(X)
    lp.merge(model)
    assert_close("a and b merged", model(X), both, floor=1e-6)
    lp.unmerge(model)
    lp.set_adapter(model, ["a", "c"])
    with pytest.raises(ValueError, match=r"different tokens, got \[7\] in both 'a' and 'c'"):
        model(X)
    with pytest.raises(ValueError, match="different tokens"):
        lp.merge(model)
    with lp.adapter_names(["a", "c"]):  # each row under its own
        mixed = model(X)
    assert_close("row of a", mixed[0], alone["a"][0], floor=1e-6)
    assert_close("row of c", mixed[1], alone["c"][1], floor=1e-6)
    with lp.disable_adapters(model):
        assert_same_bits("disabled", model(X), base(X))


@pytest.mark.parametrize("method", [lp.LoRA, lp.DoRA])
def test_beside_lora(method: type[Any], tmp_path: Path) -> None:
    base = net(tied=True)
    how = method(r=2, target_modules=["inner"], trainable_token_indices={"embedding": IDS})
    model = copy.deepcopy(base)
    lp.attach(model, how)
    assert_close("start", model(X), base(X), floor=1e-6)
    assert len(rows_of(model)) == 1
    randomise(model)
    want = model(X)
    state = lp.adapter_state_dict(model)
    again = copy.deepcopy(base)
    lp.attach(again, how)
    lp.load_adapter_state_dict(again, state)
    assert_same_bits("state dict", again(X), want)
    lp.save_checkpoint(model, tmp_path / "a.ckpt")
    fresh = copy.deepcopy(base)
    lp.attach(fresh, how)
    lp.load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert_same_bits("checkpoint", fresh(X), want)
    lp.reset_adapters(fresh)
    assert_close("reset", fresh(X), base(X), floor=1e-6)
    assert_same_bits("a copy", copy.deepcopy(model)(X), want)
    lp.merge(model)
    assert_close("merged", model(X), want, floor=1e-6)


def test_over_a_packed_base() -> None:
    base, inputs = build("llama")
    model = copy.deepcopy(base)
    ids = inputs["input_ids"][0, :3].unique().tolist()
    lp.attach(model, lp.LoRA(r=2, trainable_token_indices=ids), quantization="nf4")
    packed = copy.deepcopy(base)
    lp.quantize(packed, "nf4")
    assert_close("start", run(model, inputs), run(packed, inputs), floor=1e-6)
    randomise(model)
    want = run(model, inputs)
    lp.merge_and_unload(model)
    assert_close("merged", run(model, inputs), want, floor=1e-4)


def test_a_packed_head() -> None:
    base = net()
    lp.quantize(base, lp.Quantization("nf4", block_size=32))
    model = copy.deepcopy(base)
    lp.attach(model, lp.TrainableTokens({"head": IDS}))
    assert_close("start", model(X), base(X), floor=1e-6)
    randomise(model)
    want = model(X)
    others = [i for i in range(20) if i not in IDS]
    assert_same_bits("others", want[..., others], base(X)[..., others])
    lp.merge(model)
    assert_close("merged", model(X), want, floor=1e-5)


def test_tied_rows_and_fsdp() -> None:
    model = net(tied=True)
    lp.attach(model, lp.TrainableTokens(IDS, target_modules=["embedding"]))
    with pytest.raises(ValueError, match="shared"):
        _check_adapters(model)
    model = net()
    lp.attach(model, lp.TrainableTokens(IDS, target_modules=["embedding"]))
    _check_adapters(model)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": (lambda: lp.TrainableTokens([]), {}, "list of token ids"),
    "twice": (lambda: lp.TrainableTokens([3, 3]), {}, "more than once"),
    "negative": (lambda: lp.TrainableTokens([-1]), {}, "at least 0"),
    "twice beside LoRA": (lambda: lp.LoRA(trainable_token_indices=[3, 3]), {}, "more than once"),
    "range": (
        lambda: lp.TrainableTokens([20], target_modules=["embedding"]),
        {},
        r"below the vocabulary's size 20, got \[20\]; call model.resize_token_embeddings",
    ),
    "name": (lambda: lp.TrainableTokens({"embeding": [1]}), {}, "nearest names.*embedding"),
    "target": (lambda: lp.TrainableTokens([1], target_modules=["x"]), {}, "matches none"),
    "whole": (
        lambda: lp.TrainableTokens([1], target_modules=["embedding"]),
        {"modules_to_save": ["embedding"]},
        "is in modules_to_save",
    ),
    "adapted": (
        lambda: lp.LoRA(
            r=2, target_modules=["embedding"], trainable_token_indices={"embedding": [1]}
        ),
        {},
        "has another adapter",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    make, more, message = BAD[case]
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lp.attach(model, make(), **more)
    assert set(model.state_dict()) == set(before)
    assert all(p.requires_grad for p in model.parameters())


def test_compiled_and_autocast() -> None:
    model = net(tied=True)
    lp.attach(model, lp.TrainableTokens(IDS, target_modules=["embedding"]))
    randomise(model)
    want = model(X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close("compiled", compiled(X), want, floor=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(X)
    assert_close("autocast", half.float(), want, floor=0.05)
