"""Files of compiled modules: written and read with any other wrapper of torch.compile."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.checkpoint.description import KEY
from tests.helpers.lightning_package import pl
from tests.helpers.nets import Plain, trainer

pytestmark = pytest.mark.usefixtures("lightning_package")

WRAPPERS = ("none", "child", "grandchild", "in place")


class Compiled(Plain):
    """Compiles a part of its net."""

    def __init__(self, wrapper: str = "none") -> None:
        super().__init__()
        self.save_hyperparameters()
        if wrapper == "child":
            self.net = torch.compile(self.net, backend="eager")
        elif wrapper == "grandchild":
            self.net[0] = torch.compile(self.net[0], backend="eager")
        elif wrapper == "in place":
            self.net.compile(backend="eager")


def peft(**options: Any) -> PEFT:
    method = LoRA(r=2, target_modules=["0", "3"], rank_pattern={"0": 1})
    return PEFT(method, report=False, **options)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(b[0]) for b in Plain().val_dataloader()])


@pytest.fixture(scope="module")
def written(lightning_package: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for wrapper in WRAPPERS:
        path = tmp_path_factory.mktemp("compiled") / "a.ckpt"
        pl.seed_everything(1, verbose=False)
        run, model = trainer(peft(modules_to_save=["5"]), max_epochs=1), Compiled(wrapper)
        run.fit(model)
        run.save_checkpoint(path)
        found[wrapper] = path, outputs(model)
    return found


@pytest.mark.parametrize(("saved", "live"), list(itertools.product(WRAPPERS, WRAPPERS)))
def test_every_wrapper_reads_every_file(written: dict[str, Any], saved: str, live: str) -> None:
    path, want = written[saved]
    assert torch.equal(outputs(load_from_checkpoint(Compiled, path, wrapper=live)), want)


def test_wrappers_leave_no_trace_in_values(written: dict[str, Any]) -> None:
    for wrapper in WRAPPERS:
        torch.testing.assert_close(written[wrapper][1], written["none"][1])


@pytest.mark.parametrize("live", WRAPPERS)
def test_a_file_of_an_earlier_version(written: dict[str, Any], live: str, tmp_path: Path) -> None:
    """Earlier versions wrote the wrapper into the names of layers."""
    path, want = written["child"]
    content = torch.load(path, weights_only=True)
    adapter = content[KEY]["roots"][""]["adapters"]["default"]
    adapter["sites"] = [
        [label.replace("net.", "net._orig_mod."), shape, method]
        for label, shape, method in adapter["sites"]
    ]
    adapter["modules_to_save"] = ["net._orig_mod.5"]
    torch.save(content, tmp_path / "b.ckpt")
    read = load_from_checkpoint(Compiled, tmp_path / "b.ckpt", wrapper=live)
    assert torch.equal(outputs(read), want)


@pytest.mark.parametrize(("saved", "live"), [("child", "none"), ("none", "child")])
def test_a_root_that_is_compiled_resumes(saved: str, live: str, tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    run = trainer(peft(root="net", modules_to_save=["5"]), max_epochs=1, folder=tmp_path)
    run.fit(Compiled(saved))
    model = Compiled(live)
    again = trainer(peft(root="net", modules_to_save=["5"]), max_epochs=2)
    again.fit(model, ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.global_step == 8
