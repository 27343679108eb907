"""The table of methods that the generic suite runs: one line a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.base import Method
from lightning_peft.methods.boft import BOFT
from lightning_peft.methods.diff_pruning import DiffPruning
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.lora_plus import LoRAPlus
from lightning_peft.methods.miss import MiSS
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.quant_aware import QuantAwareLoRA
from lightning_peft.methods.sparse_lora import SparseLoRA
from lightning_peft.methods.vera import VeRA

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: Its id.
        method: The method; targets are set by the suite.
        exact_start: Whether the adapted model equals the base bit for bit at the start.
        skip: Layer, storage or check → why the row does not run there.
    """

    name: str
    method: Method
    exact_start: bool = True
    skip: Mapping[str, str] = field(default_factory=dict)


_REWRITES = {
    "embedding": "its start needs features, not ids",
    "bnb4": "rewriting a bitsandbytes weight requantises it: the start is not equal",
    "bnb8": "rewriting a bitsandbytes weight requantises it: the start is not equal",
    "mha": "two weights a module: covered by linear",
}
_NEEDS_QUANTISED = dict.fromkeys(
    [
        "linear",
        "no_bias",
        "conv1d_gpt2",
        "conv1d",
        "conv2d",
        "conv3d",
        "depthwise",
        "reflect",
        "lstm",
        "odd",
    ],
    "LoftQ needs a quantised base",
)

_IDS = {"embedding": "refused: ids are no features"}
_ODD = dict.fromkeys(["odd"], "refused: blocks of one row rotate nothing")
_NO_TILES = {
    **_IDS,
    **dict.fromkeys(
        ["odd", "nf4_odd", "conv1d", "conv2d", "depthwise"], "refused: blocks of 4 do not tile it"
    ),
}
_ODD_TILES = dict.fromkeys(["reflect"], "refused: an odd number of blocks")

CASES = [
    Case("lora", LoRA(r=2, alpha=4)),
    Case("rslora", LoRA(r=4, alpha=4, use_rslora=True)),
    Case("lora_gaussian", LoRA(r=2, init="gaussian")),
    Case("lora_orthogonal", LoRA(r=2, init="orthogonal"), exact_start=False),
    Case(
        "lora_bias",
        LoRA(r=2, lora_bias=True),
        skip={"embedding": "refused: an embedding adds no bias"},
    ),
    Case("lora_trains_biases", LoRA(r=2, bias="lora_only")),
    Case("pissa", LoRA(r=2, init="pissa"), exact_start=False, skip=_REWRITES),
    Case("olora", LoRA(r=2, init="olora"), exact_start=False, skip=_REWRITES),
    Case(
        "loftq",
        LoRA(r=2, init="loftq", loftq_iter=2),
        exact_start=False,
        skip={**_REWRITES, **_NEEDS_QUANTISED},
    ),
    Case("lora_plus", LoRAPlus(r=2)),
    Case("sparse_lora", SparseLoRA(r=2, alpha=4)),
    Case("quant_aware", QuantAwareLoRA(r=2)),  # rounding itself: tests/recipes
    Case("dora", DoRA(r=2, alpha=4)),
    Case("ia3", IA3()),
    Case("ia3_input", IA3(feedforward_modules=["0"]), skip=_IDS),
    Case("ia3_add", IA3(mode="add"), skip=_IDS),
    Case("vera", VeRA(r=8)),
    Case("adalora", AdaLoRA(init_r=4, target_r=2)),
    Case("loha", LoHa(r=2)),
    Case("loha_effective", LoHa(r=2, use_effective_conv2d=True)),
    Case("lokr", LoKr(r=2)),
    Case("lokr_both", LoKr(r=1, decompose_both=True, use_effective_conv2d=True)),
    Case("oft", OFT(block_size=4), skip={**_IDS, **_ODD}),
    Case(
        "oft_neumann_shared",
        OFT(block_size=4, block_share=True, cayley_neumann=True),
        skip={**_IDS, **_ODD},
    ),
    Case("coft", OFT(block_size=4, coft=True, eps=0.5), skip={**_IDS, **_ODD}),
    Case("boft", BOFT(block_size=4), skip=_NO_TILES),
    Case("boft_stages", BOFT(block_size=4, n_butterfly=2), skip={**_NO_TILES, **_ODD_TILES}),
    Case("miss", MiSS(r=3)),
    Case("miss_mini", MiSS(r=3, mini_r=1, form="mini")),
    Case("miss_bat", MiSS(r=1, form="bat")),
    Case("diff_pruning", DiffPruning(sample=False, alpha_init=0.0, structured=True)),
]
