"""The short way through an adapted layer: its budget of Python calls, and when it is not taken."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.layers.adapted import Adapted
from tests.helpers.python_calls import own_calls

K, N = 64, 96
ALL = "all-linear"


def layer(quantized: bool, dtype: torch.dtype = torch.float32, **more: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).to(dtype)
    quantization = lp.Quantization() if quantized else None
    lp.attach(model, lp.LoRA(r=4, target_modules=ALL, **more), quantization=quantization)  # type: ignore[arg-type]
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model.eval()


def general(model: nn.Module, x: Tensor) -> Tensor:
    """The output without the short way."""
    adapted = model[0]  # type: ignore[index]
    state = adapted._peft
    state.direct, state.has_no_direct = None, True
    y: Tensor = model(x)
    state.has_no_direct = False
    return y


# Before the short way 47 and 83 without gradients, 49 and 81 with them. A packed layer that trains
# makes one call more once any layer of the process keeps reordered bytes for generation.
@pytest.mark.parametrize(
    ("quantized", "gradients", "most"),
    [(False, False, 17), (True, False, 32), (False, True, 24), (True, True, 40)],
)
def test_budget_of_python_calls(quantized: bool, gradients: bool, most: int) -> None:
    model, x = layer(quantized), torch.randn(1, 1, K)
    with torch.set_grad_enabled(gradients):
        model(x)
        found = own_calls(lambda: model(x))
    assert len(found) <= most, " ".join(found)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_general_way(
    quantized: bool, gradients: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    model, x = layer(quantized, dtype), torch.randn(shape).to(dtype)
    with torch.set_grad_enabled(gradients):
        y = model(x)
        assert model[0]._peft.direct is not None  # type: ignore[index]
        torch.testing.assert_close(y, general(model, x), rtol=0, atol=0)
        assert y.shape == (*shape[:-1], N)
        assert y.dtype == dtype


def second_name(model: nn.Module) -> None:
    lp.attach(model, lp.LoRA(r=2, target_modules=ALL), adapter_name="second")
    nn.init.normal_(model[0].peft["second"].B)  # type: ignore[index]
    lp.set_adapter(model, "second")


def both_names(model: nn.Module) -> None:
    second_name(model)
    lp.set_adapter(model, ["default", "second"])


def new_factor(model: nn.Module) -> None:
    model[0].peft["default"].B = nn.Parameter(torch.randn(N, 4))  # type: ignore[index]


def moved_factor(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].peft["default"].B.mul_(3.0)  # type: ignore[index]


def other_dtype(model: nn.Module) -> None:
    model.to(torch.float64)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "change", [second_name, both_names, new_factor, moved_factor, lp.merge, lp.detach, other_dtype]
)
def test_a_change_is_seen(quantized: bool, change: Callable[[nn.Module], object]) -> None:
    if quantized and change is lp.merge:
        pytest.skip("merging into packed bytes rounds")
    model, x = layer(quantized), torch.randn(3, K)
    before = model(x)
    change(model)
    if change is other_dtype:
        x = x.double()
    y = model(x)
    if isinstance(model[0], Adapted):  # type: ignore[index]
        torch.testing.assert_close(y, general(model, x), rtol=0, atol=0)
    same = change in (lp.merge, other_dtype)
    assert torch.allclose(y.double(), before.double(), atol=1e-5) == same


def test_dropout_acts_in_training_alone() -> None:
    model, x = layer(True, dropout=0.5), torch.randn(64, K)
    held = model(x)
    assert torch.equal(model(x), held)
    model.train()
    assert not torch.allclose(model(x), held)
    with torch.no_grad():
        assert not torch.allclose(model(x), held)


@pytest.mark.parametrize("quantized", [False, True])
def test_copies_bind_their_own_tensors(quantized: bool) -> None:
    model, x = layer(quantized), torch.randn(3, K)
    y = model(x)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            made[0].peft["default"].B.zero_()
        assert not torch.allclose(made(x), y)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    "method",
    [
        lp.DoRA(r=2, target_modules=ALL),
        lp.LoRA(r=2, target_modules=ALL, lora_bias=True),
        lp.IA3(target_modules=ALL, feedforward_modules=[]),
        lp.LoRA(r=2, target_modules=ALL, freeze_A=True),
    ],
    ids=repr,
)
def test_other_edits_take_the_general_way(method: lp.Method) -> None:
    model = nn.Sequential(nn.Linear(K, N))
    lp.attach(model, method)
    model(torch.randn(2, K))
    assert model[0]._peft.direct is None
    assert model[0]._peft.has_no_direct


def test_views_of_packed_bytes_follow_the_bytes() -> None:
    """Moved memory, new values and another dtype of the model."""
    model, x = layer(True), torch.randn(3, K)
    y = model(x)
    packed = model[0]._parameters["weight"]  # type: ignore[index]
    packed.data = packed.data.clone()
    assert torch.equal(model(x), y)
    packed.data.zero_()
    assert not torch.allclose(model(x), y)
    lp.quantize(nn.Sequential(nn.Linear(K, N)), lp.Quantization())
    with torch.inference_mode():
        inside = layer(True)(x)
    again = layer(True)
    with torch.inference_mode():
        again(x)
    again(x.requires_grad_()).sum().backward()  # views made in inference mode serve training
    assert torch.isfinite(inside).all()
