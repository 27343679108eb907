"""A change that fails halfway leaves the model as it was, wherever it fails.

An exception is raised at the n-th call of a function of this package, for n up to the last one.
`attach`, `load_adapter` and `merge(keep_base=True)` then leave the model bit for bit. `quantize`
and `merge(keep_base=False)` hold no second copy of the base: each layer is finished or untouched,
the model runs, and a second call completes it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules

PACKAGE = os.path.dirname(lp.__file__)
NF4 = lp.Quantization("nf4")
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
Change = Callable[[nn.Module], object]


class InjectedError(Exception):
    pass


def run_until(action: Callable[[], object], n: int) -> tuple[bool, BaseException | None]:
    """Raise at the n-th call into the package; whether there were as many, and what came out."""
    calls = 0

    def at_call(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls += 1
            if calls == n:
                raise InjectedError(f"{frame.f_code.co_filename} {frame.f_code.co_name}")

    sys.setprofile(at_call)
    try:
        action()
    except BaseException as error:
        return True, error
    finally:
        sys.setprofile(None)
    return calls >= n, None  # an error inside a generator that is dropped is lost


def failures(
    build: Callable[[], nn.Module], change: Change, step: int
) -> Iterator[tuple[nn.Module, Any, torch.Tensor]]:
    """Yield the model after each failure, with what it was and computed before."""
    n, more = 1, True
    while more:
        model = build()
        y = model(X).detach()
        before = structure(model)
        more, error = run_until(partial(change, model), n)
        if error is not None:
            yield model, before, y
        n += step


def structure(model: nn.Module) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, m in model.named_modules():
        found[name] = (
            type(m),
            sorted(vars(m)),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            m.training,
        )
        for key, t in {**m._parameters, **m._buffers}.items():
            if t is not None:
                found[name, key] = (t.requires_grad, t.dtype, t.detach().clone())
        state = vars(m).get("_peft")
        if state is not None:
            active = state.active
            found[name, "state"] = (list(active.names), list(active.merged), list(active.edits))
    return found


def assert_unchanged(model: nn.Module, before: dict[Any, Any], y: torch.Tensor) -> None:
    now = structure(model)
    assert now.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value[-1], torch.Tensor):
            assert now[key][:-1] == value[:-1], key
            assert torch.equal(now[key][-1], value[-1]), key
        else:
            assert now[key] == value, key
    assert torch.equal(model(X), y)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16))


def attach(model: nn.Module, **options: Any) -> None:
    lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"), **options)


def rewriting(model: nn.Module) -> None:
    lp.attach(model, lp.LoRA(r=2, init="pissa", target_modules="all-linear"), adapter_name="first")


def with_rewritten_base() -> nn.Module:
    model = net()
    rewriting(model)
    return model


def trained(quantization: lp.Quantization | None = None) -> nn.Module:
    model = net()
    attach(model, modules_to_save=["3"], quantization=quantization)
    with torch.no_grad():
        for i, p in enumerate(q for q in model.parameters() if q.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model


WHOLE: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "attach": (net, lambda m: attach(m, modules_to_save=["3"])),
    "attach that rewrites the base": (net, rewriting),
    "attach beside one that did": (with_rewritten_base, attach),
    "merge": (trained, lp.merge),
    "merge of NF4 into dense": (lambda: trained(NF4), lp.merge),
    "merge of NF4 into storage": (lambda: trained(NF4), lambda m: lp.merge(m, into="storage")),
}


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WHOLE)
def test_the_model_is_as_before(name: str, step: int) -> None:
    count = 0
    for model, before, y in failures(*WHOLE[name], step):
        assert_unchanged(model, before, y)
        count += 1
    assert count > 2


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    """Requantising a small update adds more noise than the update has, of which merge warns."""
    model = trained(NF4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.mul_(1e-4)
    y, before = model(X).detach(), structure(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="more noise than the update"):
            lp.merge(model, into="storage")
    assert_unchanged(model, before, y)


@pytest.mark.parametrize("step", [97, pytest.param(3, marks=pytest.mark.slow)])
def test_load_adapter_leaves_the_model_as_before(step: int, tmp_path: Path) -> None:
    lp.save_adapter(trained(), tmp_path)
    count = 0
    for model, before, y in failures(net, lambda m: lp.load_adapter(m, tmp_path), step):
        assert_unchanged(model, before, y)
        count += 1
    assert count > 2


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_a_layer_is_packed_or_untouched(step: int) -> None:
    whole = net()
    lp.quantize(whole, NF4)
    for model, _, _ in failures(net, lambda m: lp.quantize(m, NF4), step):
        assert_finished_or_untouched(model)
        lp.quantize(model, NF4)
        assert torch.equal(model(X), whole(X))


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_attach_on_a_base_that_is_packed_meanwhile(step: int) -> None:
    whole = net()
    attach(whole, quantization=NF4)
    for model, _, _ in failures(net, lambda m: attach(m, quantization=NF4), step):
        assert_finished_or_untouched(model)
        assert not any("peft" in key for key in model.state_dict())
        attach(model, quantization=NF4)
        assert torch.equal(model(X), whole(X))


def assert_finished_or_untouched(model: nn.Module) -> None:
    for index in (0, 2):
        packed = model[index]._parameters["weight"].dtype == torch.uint8
        assert packed == ("weight_absmax" in model[index]._parameters)
    assert model(X).isfinite().all()


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_each_module_is_merged_for_good_or_not(step: int) -> None:
    for model, _, y in failures(trained, lambda m: lp.merge(m, keep_base=False), step):
        assert float((model(X) - y).norm() / y.norm()) < 1e-5
        if any(not m._peft.active.merged for _, m in adapted_modules(model)):
            lp.merge(model, keep_base=False)
        assert float((model(X) - y).norm() / y.norm()) < 1e-5


def test_both_sets_are_named_when_a_layer_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_peft.storage.nf4.storage import NF4Storage

    model, whole, original = net(), net(), NF4Storage.quantize
    lp.quantize(whole, NF4)
    calls = 0

    def second_fails(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("no memory")
        original(self, *args)

    monkeypatch.setattr(NF4Storage, "quantize", second_fails)
    with pytest.raises(RuntimeError, match=r"'2': no memory; packed: \['0'\]; untouched: \['2'\]"):
        lp.quantize(model, NF4)
    assert model(X).isfinite().all()
    lp.quantize(model, NF4)
    assert torch.equal(model(X), whole(X))
