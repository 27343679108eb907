"""State goes to the parameter that it was saved for, whatever the order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.optim import in_live_order, names_of
from tests.helpers.nets import Plain, loader, peft, trainer

Order = Any


def trained_with(order: Order, folder: Path, ckpt: Path | None, epochs: int) -> Plain:
    """A run whose optimizer holds its parameters in an order of its own."""

    class Net(Plain):
        def configure_optimizers(self) -> Any:
            ours = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(order(ours), lr=1e-2)

    torch.manual_seed(0)
    module = Net()
    run = trainer(peft(), max_epochs=epochs, folder=folder)
    run.fit(module, loader(), ckpt_path=ckpt)
    return module


def in_two(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:1]}, {"params": parameters[1:]}]


def test_a_run_goes_on_with_another_order_of_parameters(tmp_path: Path) -> None:
    whole = trained_with(list, tmp_path / "whole", None, 2)
    trained_with(list, tmp_path / "half", None, 1)
    again = trained_with(
        lambda ours: ours[::-1], tmp_path / "again", tmp_path / "half" / "last.ckpt", 2
    )
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-7, msg=name)


def test_another_grouping_is_told_by_name(tmp_path: Path) -> None:
    trained_with(list, tmp_path / "half", None, 1)
    with pytest.raises(ValueError, match=r"in the same 1 groups.*\n.*in group 0 of the file, in"):
        trained_with(in_two, tmp_path / "again", tmp_path / "half" / "last.ckpt", 2)


def test_every_parameter_keeps_its_state() -> None:
    named = {n: nn.Parameter(torch.randn(2 + i)) for i, n in enumerate("abcd")}
    saved = torch.optim.AdamW([{"params": [named["a"], named["b"]]}, {"params": [named["c"]]}])
    for p in (named["b"], named["c"]):  # `a` has no state yet
        p.grad = torch.randn_like(p)
    saved.step()
    live = torch.optim.AdamW([{"params": [named["b"], named["a"]]}, {"params": [named["c"]]}])
    names = [names_of(o, named) for o in (saved, live)]
    assert names == [[["a", "b"], ["c"]], [["b", "a"], ["c"]]]
    live.load_state_dict(in_live_order(saved.state_dict(), names[0], names[1], "state"))
    assert named["a"] not in live.state
    for name in "bc":
        for key, value in saved.state[named[name]].items():
            assert torch.equal(live.state[named[name]][key], value)


def test_names_are_those_without_compile() -> None:
    net = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD([*net.parameters(), nn.Parameter(torch.zeros(1))], lr=1.0)
    assert names_of(optimizer, dict(net.named_parameters())) == [["weight", "bias", "unnamed 0.2"]]
