"""Lily: peft's outputs and gradients, shared factors, and mixtures per row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, weight_adapters_of
from lightning_peft.strategies.sharding import _check_adapters
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, randomise, run

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "t5": ["q", "wo"],
    "vit": ["q_proj", "fc1"],
    "bert": ["query", "output.dense"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "bart": ["q_proj", "fc2"],
}


def targets_of(name: str, base: nn.Module) -> list[str]:
    known = [n for n, _ in base.named_modules()]
    return [t for t in TARGETS[name] if any(n.endswith(f".{t}") for n in known)]


def gradients(model: nn.Module, inputs: Any, ends: tuple[str, ...]) -> dict[str, list[Tensor]]:
    torch.manual_seed(4)
    model.zero_grad()
    y = next(v for v in model(**inputs).values() if torch.is_tensor(v) and v.ndim > 1)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    found: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found.setdefault(next(e for e in ends if name.endswith(e)), []).append(p.grad)
    return found


@pytest.mark.parametrize("name", list(TARGETS))
def test_exchange_and_gradients(name: str, tmp_path: Path) -> None:
    base, inputs = build(name)
    targets = targets_of(name, base)
    fields = {"r": 3, "stride_A": 2, "num_B": 3, "scaling": 0.5}
    theirs = by_peft(base, tmp_path / "theirs", peft.LilyConfig, target_modules=targets, **fields)
    ours = loaded(base, tmp_path / "theirs")
    want = run(theirs, inputs)
    assert (want - run(base, inputs)).norm() > 1e-3 * want.norm()
    assert_close("peft's in ours", run(ours, inputs), want, floor=1e-5)
    mine = gradients(ours, inputs, (".A", ".B", ".R"))
    other = gradients(
        theirs, inputs, ("A.default.weight", "B.default.weight", "router.default.weight")
    )
    for got, wanted in zip(mine.values(), other.values(), strict=True):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_close("gradient", a, b, floor=1e-5)
    lp.save_adapter(ours, tmp_path / "ours")
    assert_close("ours in peft", run(in_peft(base, tmp_path / "ours"), inputs), want, floor=1e-5)


def attached(base: nn.Module, **fields: Any) -> Any:
    model = copy.deepcopy(base)
    lp.attach(model, lp.Lily(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **fields}))
    return model


def test_factors_are_shared_and_stay_shared() -> None:
    base, inputs = build("llama")
    model = attached(base, stride=2, n=3)
    for made in (model, copy.deepcopy(model)):
        adapters = {n: a for n, m in adapted_modules(made) for a in weight_adapters_of(m)}
        kinds = {n.rpartition(".")[2] for n in adapters}
        for kind in kinds:
            group = [a for n, a in adapters.items() if n.endswith(kind)]
            assert len({id(a.tensors()["B"]) for a in group}) == 1
            assert len({id(a.tensors()["A"]) for a in group}) == -(-len(group) // 2)
            assert len({id(a.tensors()["R"]) for a in group}) == len(group)
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
        made(**{**inputs, "labels": inputs["input_ids"]}).loss.backward()
        optimizer.step()
    state = lp.adapter_state_dict(model)
    assert sum(k.endswith(".B") for k in state) == 2
    fresh = attached(base, stride=2, n=3)
    lp.load_adapter_state_dict(fresh, state)
    assert torch.equal(run(fresh.eval(), inputs), run(model.eval(), inputs))
    lp.reset_adapters(model)
    assert torch.equal(run(model, inputs), run(base, inputs))
    with pytest.raises(ValueError, match=r"own what they train, got Lily .* shared \['A', 'B'\]"):
        _check_adapters(attached(base, stride=9))
    with pytest.raises(RuntimeError, match="depends on the input"):
        lp.merge(fresh)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_row_depends_on_its_neighbours_as_said(per_sample: bool) -> None:
    base, _ = build("llama")
    model = attached(base, per_sample=per_sample, n=4).eval()
    randomise(model, std=0.5)
    ids = torch.randint(3, 90, (3, 7))
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:1]
        alone = model(input_ids=ids[:1]).logits
    near = torch.allclose(whole, alone, atol=1e-4)
    assert near == per_sample


def test_per_sample_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    lp.attach(model, lp.Lily(r=2, n=3, per_sample=True, target_modules=["0"]))
    adapter: Any = model.get_submodule("0.peft.default")
    with torch.no_grad():
        adapter.B.normal_()
    x = torch.randn(2, 4, 6)
    h = x @ adapter.A.mT
    w = (h @ adapter.R.mT).softmax(-1).mean(1)
    B = adapter.B.reshape(3, 2, 5)
    want = nn.functional.linear(x, adapter.site.weight(), model[0].bias) + torch.stack(
        [sum(w[b, e] * h[b] @ B[e] for e in range(3)) for b in range(2)]
    )
    torch.testing.assert_close(model(x), want)


def test_refused(tmp_path: Path) -> None:
    base, _ = build("llama")
    with pytest.raises(ValueError, match="one mixture for the whole batch"):
        lp.save_adapter(attached(base, per_sample=True), tmp_path)
    with pytest.raises(ValueError, match="stride >= 1"):
        lp.Lily(stride=0)
    with pytest.raises(ValueError, match="expected a linear layer, got Conv1d"):
        lp.attach(nn.Sequential(nn.Conv1d(4, 4, 1)), lp.Lily(r=2, target_modules=["0"]))
    by_peft(base, tmp_path / "p", peft.LilyConfig, r=2, stride_A=1,
            target_modules=[f"model.layers.{i}.self_attn.q_proj" for i in range(2)])  # fmt: skip
    with pytest.raises(ValueError, match="in other groups than layers of one last name"):
        loaded(base, tmp_path / "p")
