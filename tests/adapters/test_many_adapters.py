"""Work that must not grow with the number of attached adapters, counted instead of timed."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapter import Adapter


def visits(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Adapters that one `set_adapter` visits among `count` attached ones."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for i in range(count):
        lp.attach(model, lp.LoRA(r=1, target_modules=["0", "1"]), adapter_name=f"a{i}")
    lp.set_adapter(model, "a0")
    seen = Counter[str]()
    set_gradients = Adapter.requires_grad_

    def counted(self: Adapter, requires_grad: bool = True) -> Adapter:
        seen[self.adapter_name] += 1
        return set_gradients(self, requires_grad)

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "requires_grad_", counted)
        lp.set_adapter(model, "a1")
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a1"}
    assert set(seen) == {"a0", "a1"}
    return seen.total()


def test_set_adapter_visits_those_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visits(20, monkeypatch) == visits(2, monkeypatch) == 4


def test_an_adapter_attached_again_under_a_name_is_settled() -> None:
    """The name is known, the adapter is another: it must not train while it is inactive."""
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("a", "b"):
        lp.attach(model, lp.LoRA(r=1, target_modules=["0"]), adapter_name=name)
    lp.detach(model, "a")
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]), adapter_name="a")
    lp.set_adapter(model, "b")
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"b"}
