"""`liger=True` on a stand-in for liger-kernel, which needs a GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from lightning_peft.callback.liger import apply_liger
from tests.helpers.tiny_models import BUILDERS


class StandIn:
    """What `apply_liger` calls.

    Attributes:
        calls: (model type, whether the loss is fused) of every model that was changed.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}

    def _apply_liger_kernel_to_instance(
        self, model: Any, fused_linear_cross_entropy: bool = True
    ) -> None:
        self.calls.append((model.config.model_type, fused_linear_cross_entropy))


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    package.__spec__ = ModuleSpec("liger_kernel", None)
    vars(transformers)["monkey_patch"] = stand_in
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    return stand_in


@pytest.mark.parametrize("fused_loss", [True, False])
def test_a_known_model_is_changed_once(liger: StandIn, fused_loss: bool) -> None:
    model = nn.ModuleDict({"net": BUILDERS["llama"]()})
    assert apply_liger(model, fused_loss) == ["liger-kernel: fused layers in net (llama)"]
    assert liger.calls == [("llama", fused_loss)]  # and not its inner model too


def test_an_unknown_model_is_named(liger: StandIn) -> None:
    with pytest.raises(ValueError, match=r"a type in \['llama'\], got \['gpt2'\]"):
        apply_liger(BUILDERS["gpt2"]())
    assert liger.calls == []


def test_without_the_package_the_error_says_what_to_install() -> None:
    if "liger_kernel" in sys.modules:
        pytest.skip("liger-kernel is here")
    with pytest.raises(ModuleNotFoundError, match="pip install liger-kernel"):
        apply_liger(BUILDERS["llama"]())
