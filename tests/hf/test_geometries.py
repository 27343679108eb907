"""Convolutions of every geometry and embeddings, from peft and back: equal numbers or a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import by_peft, loaded
from tests.helpers.peft_tables import TableCase, run_case

Layers = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]


class ScaledEmbedding(nn.Embedding):
    """Multiplies its output, as Gemma's and BART's do."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale = 4.0

    def forward(self, input: Tensor) -> Tensor:
        return self.embed_scale * super().forward(input)


LAYERS: Layers = {
    "linear": (lambda: nn.Linear(16, 12), (3, 5, 16)),
    "embedding": (lambda: nn.Embedding(20, 8, padding_idx=0), ()),
    "scaled": (lambda: ScaledEmbedding(20, 8), ()),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 9, 9)),
    "dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2), (2, 4, 9, 9)),
    "same": (lambda: nn.Conv2d(4, 8, 3, padding="same"), (2, 4, 9, 9)),
    "reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "tall": (lambda: nn.Conv2d(4, 8, (3, 1)), (2, 4, 9, 9)),
    "uneven": (lambda: nn.Conv2d(4, 8, 3, stride=(1, 2), padding=(1, 0)), (2, 4, 9, 9)),
    "one": (lambda: nn.Conv2d(4, 8, 1), (2, 4, 9, 9)),
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=2), (2, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, dilation=2), (2, 4, 9)),
    "conv1d_one": (lambda: nn.Conv1d(4, 8, 1), (2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2, dilation=2), (2, 4, 5, 5, 5)),
    "conv3d_one": (lambda: nn.Conv3d(4, 8, 1), (2, 4, 5, 5, 5)),
}
LORA = {"r": 4, "init_lora_weights": False}
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "lora": (peft.LoraConfig, LORA),
    "dora": (peft.LoraConfig, {**LORA, "use_dora": True}),
    "lora_bias": (peft.LoraConfig, {**LORA, "lora_bias": True}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "total_step": 10}),
    "loha": (peft.LoHaConfig, {"r": 3, "init_weights": False}),
    "loha_effective": (
        peft.LoHaConfig,
        {"r": 3, "init_weights": False, "use_effective_conv2d": True},
    ),
    "lokr": (peft.LoKrConfig, {"r": 2, "init_weights": False}),
    "lokr_effective": (
        peft.LoKrConfig,
        {"r": 1, "init_weights": False, "use_effective_conv2d": True},
    ),
    "lokr_both": (peft.LoKrConfig, {"r": 1, "init_weights": False, "decompose_both": True}),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}),
    "ia3_inputs": (peft.IA3Config, {"feedforward_modules": ["0"]}),
    "oft": (peft.OFTConfig, {"oft_block_size": 4}),
    "oft_two": (peft.OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    "oft_three": (peft.OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft_seven": (peft.OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 7}),
    "oft_exact": (peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "hra_gs": (peft.HRAConfig, {"r": 3, "apply_GS": True}),
    "hira": (peft.HiraConfig, {"r": 3}),
    "tinylora": (peft.TinyLoraConfig, {"r": 2}),
    "rows": (peft.TrainableTokensConfig, {"token_indices": [3, 5, 11]}),
    "miss": (peft.MissConfig, {"r": 4}),
    "vera": (peft.VeraConfig, {"r": 4}),
}


@pytest.mark.sweep(0.12)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_cell(layer: str, kind: str) -> None:
    make, shape = LAYERS[layer]

    def build() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(make())

    def inputs() -> dict[str, Tensor]:
        torch.manual_seed(2)
        return {"input": torch.randn(shape) if shape else torch.randint(0, 20, (3, 7))}

    config, options = KINDS[kind]
    case = TableCase(
        "layers", kind, layer, build, inputs, config, {**options, "target_modules": ["0"]}
    )
    result = run_case(case)
    if result.verdict == "not in peft":
        pytest.skip(result.reason[:60])
    if result.verdict.startswith("refused"):
        # Else peft itself merges to other numbers, or not at all.
        assert result.peft_itself or "rank 1 over a kernel" in result.reason, result
        return
    assert result.verdict == "pass", result


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"]])
def test_the_fused_path_of_torchs_encoder_layer(targets: list[str], tmp_path: Path) -> None:
    """In eval torch reads the weights past peft's layers; what was trained acts here."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    theirs = by_peft(base, tmp_path, r=2, target_modules=targets)
    model = loaded(base, tmp_path)
    with torch.no_grad():
        assert_close("peft leaves it out in eval", theirs(x), base(x), floor=1e-5)
        want = theirs.train()(x)
        assert_close("train", model.train()(x), want, floor=1e-5)
        assert_close("eval", model.eval()(x), want, floor=1e-5)
