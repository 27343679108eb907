"""VeLoRA: exact outputs, peft's gradients, and less that is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import VeloraConfig
from torch import nn

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, loaded


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
@pytest.mark.parametrize("direction", ["batch_average", "batch_average_once", "random"])
def test_gradients_are_pefts(name: str, direction: str, tmp_path: Path) -> None:
    targets = {"llama": ["q_proj", "down_proj"], "t5": ["q", "wo"], "vit": ["query", "fc1"]}[name]
    base, inputs = build(name)
    targets = [t for t in targets if any(n.endswith(t) for n, _ in base.named_modules())]
    settings = VeloraConfig(num_groups=5, scale=0.7, init_type=direction)
    theirs = by_peft(base, tmp_path, r=4, target_modules=targets, velora_config=settings)
    ours = loaded(base, tmp_path)
    plain = copy.deepcopy(base)
    lp.attach(plain, lp.LoRA(r=4, target_modules=targets))
    lp.load_adapter_state_dict(
        plain, {k: t for k, t in lp.adapter_state_dict(ours).items() if not k.endswith(".v")}
    )
    found: list[list[torch.Tensor]] = []
    outputs = []
    for model in (theirs, ours, plain):
        torch.manual_seed(4)  # dropout of the base
        y = next(v for v in model.train()(**inputs).values() if torch.is_tensor(v) and v.ndim > 1)
        outputs.append(y.detach())
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
        grads = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        a = [g for n, g in grads if n.endswith((".A", "lora_A.default.weight"))]
        b = [g for n, g in grads if n.endswith((".B", "lora_B.default.weight"))]
        found.append([*a, *b])
    assert_close("output", outputs[1], outputs[0], floor=1e-4)
    assert_close("output of plain LoRA", outputs[1], outputs[2], floor=1e-5)
    assert len(found[0]) == len(found[1]) > 0
    for want, got in zip(found[0], found[1], strict=True):
        assert_close("gradient", got, want, floor=1e-4)
    n = len(found[1]) // 2
    for got, exact in zip(found[1][n:], found[2][n:], strict=True):
        assert_close("gradient of B", got, exact, floor=1e-4)
    both = zip(found[1][:n], found[2][:n], strict=True)
    assert any((got - exact).norm() > 0.05 * exact.norm() for got, exact in both)


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del y
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def test_the_input_is_not_kept() -> None:
    x = torch.randn(512, 256)
    kept: dict[str, int] = {}
    where: Any = {"r": 4, "target_modules": ["0"]}
    for method in (lp.LoRA(**where), lp.VeLoRA(groups=8, **where)):
        model = nn.Sequential(nn.Linear(256, 256))
        lp.attach(model, method)
        kept[method.label] = kept_bytes(model.train(), x)
    assert kept["LoRA"] >= x.nbytes
    assert kept["VeLoRA"] < x.nbytes / 8


def test_the_first_batch_sets_the_direction() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    lp.attach(model, lp.VeLoRA(r=2, groups=2, direction="batch_average_once", target_modules=["0"]))
    adapter: Any = model.get_submodule("0.peft.default")
    model.eval()(torch.ones(2, 8))
    assert not adapter.v.any()
    x = torch.randn(6, 8)
    model.train()(x)
    mean = x.unflatten(1, (2, 4)).mean((0, 1))
    torch.testing.assert_close(adapter.v, mean / mean.norm())
    first = adapter.v.clone()
    model(torch.randn(6, 8))
    assert torch.equal(adapter.v, first)
    assert any(k.endswith(".v") for k in lp.adapter_state_dict(model))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"groups": 0}, "groups >= 1"),
        ({"direction": "mean"}, "direction in"),
        ({"freeze_A": True}, "a trained A"),
    ],
)
def test_bad_values(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        lp.VeLoRA(**fields)
    with pytest.raises(ValueError, match="expected a linear layer"):
        lp.attach(nn.Sequential(nn.Conv1d(4, 4, 1)), lp.VeLoRA(r=2, target_modules=["0"]))


def test_a_file_says_the_settings(tmp_path: Path) -> None:
    base, _ = build("llama")
    model = copy.deepcopy(base)
    lp.attach(model, lp.VeLoRA(r=2, groups=3, scale=0.5, target_modules=["q_proj"]))
    lp.save_adapter(model, tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert config.velora_config == VeloraConfig(num_groups=3, scale=0.5)
    again: Any = loaded(base, tmp_path)
    (method,) = vars(again)["_peft_registry"].adapters["default"].methods
    assert isinstance(method, lp.VeLoRA)
    assert (method.groups, method.scale) == (3, 0.5)


def test_a_batch_without_rows_sets_no_direction() -> None:
    """The first rows do, in a later batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    method = lp.VeLoRA(r=2, groups=2, direction="batch_average_once", target_modules=["0"])
    lp.attach(model, method)
    model.train()(torch.randn(0, 8)).sum().backward()
    v = dict(model.named_buffers())["0.peft.default.v"]
    assert not v.any()
    x = torch.randn(3, 8)
    model(x).sum().backward()
    mean = x.view(6, 4).mean(0)
    torch.testing.assert_close(v, mean / mean.norm())
