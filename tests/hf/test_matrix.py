"""Every method × layer kind: what `save_adapter` writes, the installed peft computes alike.

Whatever peft has no equal of is refused with the reason, before anything is written. By default a
share of the cells runs, so that every method and every layer kind occurs.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.hf.adapter_files import adapter_files
from tests.helpers.compare import assert_close
from tests.helpers.layer_cases import LAYERS, Layer
from tests.helpers.method_cases import CASES
from tests.helpers.peft_exchange import randomise


class Attention(nn.Module):
    """Attention of a sequence to itself; peft wraps the layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


MORE = [
    Layer("conv1d_padded", lambda: nn.Conv1d(6, 8, 3, padding=1), lambda: torch.randn(3, 6, 11)),
    Layer("conv1d_one", lambda: nn.Conv1d(8, 8, 1), lambda: torch.randn(3, 8, 11)),
    Layer("conv2d_padded", lambda: nn.Conv2d(4, 8, 3, padding=1), lambda: torch.randn(3, 4, 9, 9)),
    Layer("conv2d_one", lambda: nn.Conv2d(8, 8, 1), lambda: torch.randn(3, 8, 5, 5)),
    Layer("conv2d_groups", lambda: nn.Conv2d(8, 8, 3, groups=2), lambda: torch.randn(3, 8, 9, 9)),
    Layer("conv2d_tall", lambda: nn.Conv2d(4, 8, (3, 1)), lambda: torch.randn(3, 4, 9, 9)),
    Layer("attention", Attention, lambda: torch.randn(3, 5, 16)),
]
#: Subclasses of attention and packed layers are other tests' business.
_ELSEWHERE = ("mha", "bnb4", "bnb8")
KINDS = {
    layer.name: layer
    for layer in [*LAYERS, *MORE]
    if layer.quantization is None and layer.name not in _ELSEWHERE
}
METHODS = {case.name: case.method for case in CASES}
#: Warnings of peft about the layer or the environment, not about the file.
_NOT_OURS = (
    *("Merging is not supported", "CUDA", "boft_n_butterfly_factor"),
    "r is odd",
    "has no bias",
)


def refusal_of(call: Callable[[], object]) -> str:
    """Text of the error that a call raises; "" for none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.sweep(0.12)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_cell(name: str, kind: str, tmp_path: Path) -> None:
    if name == "boft_stages":
        pytest.skip("without its CUDA extension peft has one stage whatever the config says")
    torch.manual_seed(0)
    layer = KINDS[kind]
    base, x = layer.build().eval(), layer.inputs()
    targets = ["attention"] if kind == "attention" else ["0"]
    model, method = copy.deepcopy(base), dataclasses.replace(METHODS[name], target_modules=targets)
    try:
        lp.attach(model, method)
    except ValueError as error:
        pytest.skip(f"not attached: {str(error)[:60]}")
    early = refusal_of(lambda: adapter_files(model, tmp_path))
    randomise(model)
    with torch.no_grad():
        want = layer.run(model.eval(), x)
    refusal = refusal_of(lambda: lp.save_adapter(model, tmp_path))
    # A bias of an attention that peft leaves out can be written as long as it is 0.
    if "got a trained one" not in refusal:
        assert refusal == early, "PEFT(export_to=...) says it before training"
    if refusal:
        assert "peft" in refusal
        assert not list(tmp_path.iterdir()), "a refusal writes nothing"
        return
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    described = peft.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    assert set(config) <= {f.name for f in dataclasses.fields(described)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert not [text for text in told if not any(part in text for part in _NOT_OURS)]
    with torch.no_grad():
        assert_close("in peft", layer.run(theirs, x), want, floor=1e-5)
        again = copy.deepcopy(base)
        lp.load_adapter(again, tmp_path)
        assert_close("here", layer.run(again, x), want, floor=1e-5)
