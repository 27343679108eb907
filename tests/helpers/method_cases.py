"""The table of methods that the generic suite runs: one line a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.adamss import AdaMSS
from lightning_peft.methods.base import Method
from lightning_peft.methods.bd_lora import BDLoRA
from lightning_peft.methods.beft import BEFT
from lightning_peft.methods.boft import BOFT
from lightning_peft.methods.c3a import C3A
from lightning_peft.methods.deft import DEFT
from lightning_peft.methods.delora import DeLoRA
from lightning_peft.methods.diff_pruning import DiffPruning
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.fourierft import FourierFT
from lightning_peft.methods.glora import GLoRA
from lightning_peft.methods.gralora import GraLoRA
from lightning_peft.methods.hira import HiRA
from lightning_peft.methods.hra import HRA
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.kasa import KaSA
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.lora_plus import LoRAPlus
from lightning_peft.methods.miss import MiSS
from lightning_peft.methods.monteclora import MonteCLoRA
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.osf import OSF
from lightning_peft.methods.peanut import PEANuT
from lightning_peft.methods.psoft import PSOFT
from lightning_peft.methods.pvera import PVeRA
from lightning_peft.methods.quant_aware_lora import QuantAwareLoRA
from lightning_peft.methods.randlora import RandLoRA
from lightning_peft.methods.road import RoAd
from lightning_peft.methods.shira import SHiRA
from lightning_peft.methods.sparse_lora import SparseLoRA
from lightning_peft.methods.super_tuning import SuperTuning
from lightning_peft.methods.tinylora import TinyLoRA
from lightning_peft.methods.unilora import UniLoRA
from lightning_peft.methods.vblora import VBLoRA
from lightning_peft.methods.velora import VeLoRA
from lightning_peft.methods.vera import VeRA
from lightning_peft.methods.waveft import WaveFT

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: Its id.
        method: The method; targets are set by the suite.
        exact_start: Whether the adapted model equals the base bit for bit at the start.
        same_start: Whether it equals the base up to rounding.
        skip: Layer, storage or check → why the row does not run there.
        quick: Layers where the row is not marked slow; None means all.
        no_gradient: Tensors whose gradient may vanish, since the layer or the one behind it
            cancels what they add.
    """

    name: str
    method: Method
    exact_start: bool = True
    same_start: bool = True
    skip: Mapping[str, str] = field(default_factory=dict)
    quick: frozenset[str] | None = None
    no_gradient: frozenset[str] = frozenset()

    def marks(self, layer: str) -> Any:
        """Marks of the row's cell on a layer."""
        return () if self.quick is None or layer in self.quick else pytest.mark.slow


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

# Parts of the names of all layers that the suites adapt.
_LEAVES = ["0", "proj", "query", "value", "dense", "linear", "q", "v", "wo"]
_FROZEN = {"embedding": "refused: the factor that is trained starts at zero there"}
_IDS = {"embedding": "refused: ids are no features"}
_ODD = dict.fromkeys(["odd"], "refused: blocks of one row rotate nothing")
_NO_TILES = {
    **_IDS,
    **dict.fromkeys(
        ["odd", "nf4_odd", "conv1d", "conv2d", "depthwise"], "refused: blocks of 4 do not tile it"
    ),
}
_ODD_OUT = {"odd": "refused: 7 outputs", "nf4_odd": "refused: 7 outputs"}
_NO_GS = {"depthwise": "refused: in_features < r"}
_ODD_IN = {"conv2d": "refused: an odd number of inputs", "depthwise": "refused: 9 inputs"}
_SMALL = {"depthwise": "refused: more places than entries"}
# b' = b + b ∘ D + E on biases that are zero, and in front of a normalisation.
_CANCELLED = frozenset("BDE")
_NO_TRIPLETS = {"depthwise": "refused: one triplet"}
_NO_BIAS = frozenset(["no_bias"])
_NO_FOURS = dict.fromkeys(
    ["odd", "nf4_odd", "conv1d", "conv2d", "conv3d", "depthwise", "reflect"],
    "refused: blocks of 4 do not tile it",
)
_MERGED = dict.fromkeys(["mha", "lstm", "gru"], "refused: the layer reads merged weights")
_ROWS = {
    **_IDS,
    **_MERGED,
    **dict.fromkeys(
        ["conv1d", "conv2d", "conv3d", "depthwise", "reflect"],
        "refused: it compresses rows of features",
    ),
}
_QUICK = frozenset(["linear", "nf4"])
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
    Case(
        "lora_fa",
        LoRA(r=2, freeze_A=True),
        skip=_FROZEN,
        quick=frozenset(["linear", "nf4", "conv2d"]),
    ),
    Case("mica", LoRA(r=2, init="mica"), skip=_FROZEN, quick=_QUICK),
    Case(
        "kasa",
        KaSA(r=2),
        exact_start=False,
        same_start=False,
        skip=_REWRITES,
        quick=_QUICK,
    ),
    Case(
        "bd_lora",
        BDLoRA(r=4, blocks_a=_LEAVES, nblocks=2),
        skip=_IDS | _ODD_IN | _ODD_OUT,
        quick=_QUICK,
    ),
    Case(
        "bd_lora_b", BDLoRA(r=4, blocks_b=_LEAVES, nblocks=2), skip=_IDS | _ODD_OUT, quick=_NO_BIAS
    ),
    Case("lora_plus", LoRAPlus(r=2)),
    Case("sparse_lora", SparseLoRA(r=2, alpha=4)),
    Case("quant_aware", QuantAwareLoRA(r=2)),  # rounding itself: tests/recipes
    Case("dora", DoRA(r=2, alpha=4)),
    Case("ia3", IA3()),
    Case("ia3_input", IA3(feedforward_modules=["0"]), skip=_IDS),
    Case("ia3_add", IA3(mode="add"), skip=_IDS),
    Case("beft", BEFT(), skip=_IDS, quick=_QUICK),
    Case("vera", VeRA(r=8)),
    Case("adalora", AdaLoRA(init_r=4, target_r=2)),
    Case("loha", LoHa(r=2)),
    Case("loha_effective", LoHa(r=2, use_effective_conv2d=True)),
    Case("lokr", LoKr(r=2)),
    Case("lokr_both", LoKr(r=1, decompose_both=True, use_effective_conv2d=True)),
    Case("oft", OFT(block_size=4), skip=_ODD),
    Case(
        "oft_neumann_shared",
        OFT(block_size=4, block_share=True, cayley_neumann=True),
        skip=_ODD,
    ),
    Case("coft", OFT(block_size=4, coft=True, eps=0.5), skip=_ODD),
    Case("boft", BOFT(block_size=4), skip=_NO_TILES),
    Case("boft_stages", BOFT(block_size=4, n_butterfly=2), skip={**_NO_TILES, **_ODD_TILES}),
    Case("miss", MiSS(r=3)),
    Case("miss_mini", MiSS(r=3, mini_r=1, form="mini")),
    Case("miss_bat", MiSS(r=1, form="bat")),
    Case("hra", HRA(r=4), exact_start=False, skip=_IDS, quick=_QUICK),
    Case(
        "hra_gs",
        HRA(r=3, apply_gs=True),
        exact_start=False,
        same_start=False,
        skip=_IDS | _NO_GS,
        quick=_QUICK,
    ),
    Case("road_1", RoAd(group_size=2), skip=_ODD_OUT, quick=_QUICK | {"conv2d", "embedding"}),
    Case("road_2", RoAd("road_2", 2), skip=_ODD_OUT, quick=frozenset(["no_bias"])),
    Case("road_4", RoAd("road_4", 2), skip=_ODD_OUT, quick=frozenset(["conv1d_gpt2"])),
    Case("delora", DeLoRA(r=2), quick=_QUICK),
    Case("gralora", GraLoRA(r=4, k=2), skip=_ODD_OUT | _ODD_IN, quick=_QUICK),
    Case(
        "gralora_hybrid",
        GraLoRA(r=4, k=2, hybrid_r=2),
        skip=_ODD_OUT | _ODD_IN,
        quick=frozenset(["no_bias"]),
    ),
    Case("shira", SHiRA(r=1, seed=1), skip=_SMALL, quick=_QUICK | {"embedding"}),
    Case("shira_drawn", SHiRA(r=1), skip=_SMALL, quick=_NO_BIAS),
    Case("super_tuning", SuperTuning(sparsity=0.5), quick=_QUICK),
    Case("supra", SuperTuning(sparsity=0.5, r=2, alpha=4.0), quick=frozenset(["no_bias"])),
    Case("hira", HiRA(r=2), quick=_QUICK | {"embedding", "conv2d"}),
    Case("peanut", PEANuT(r=4, depth=1), quick=_QUICK),
    Case(
        "vblora",
        VBLoRA(r=2, num_vectors=6, vector_length=2),
        exact_start=False,
        same_start=False,
        skip=_ODD_OUT | _ODD_IN,
        quick=_QUICK,
    ),
    Case("unilora", UniLoRA(r=2), exact_start=False, same_start=False, quick=_QUICK),
    Case("tinylora", TinyLoRA(r=2, u=3), quick=_QUICK | {"embedding"}),
    Case("randlora", RandLoRA(r=3, alpha=3.0), skip=_IDS, quick=_QUICK),
    Case("randlora_sparse", RandLoRA(r=3, alpha=3.0, sparse=True), skip=_IDS, quick=_NO_BIAS),
    Case("pvera", PVeRA(r=4, sample=False), quick=_QUICK),
    Case(
        "c3a",
        C3A(block_size=2),
        exact_start=False,
        same_start=False,
        skip=_ODD_OUT | _ODD_IN,
        quick=_QUICK | {"conv1d"},
    ),
    Case("c3a_zeros", C3A(block_size=4, init="zeros"), skip=_NO_FOURS, quick=_NO_BIAS),
    Case("fourierft", FourierFT(n_frequency=20, zero_start=True), quick=_QUICK),
    Case("waveft", WaveFT(n_frequency=20), quick=_QUICK),
    Case("waveft_db3", WaveFT(n_frequency=20, family="db3"), quick=frozenset(["odd"])),
    Case("waveft_entries", WaveFT(n_frequency=20, use_idwt=False), quick=_NO_BIAS),
    Case("adamss", AdaMSS(r=3, clusters=2), quick=_QUICK),
    Case("adamss_ranks", AdaMSS(r=3, clusters=3, rank_per_cluster=2), quick=_NO_BIAS),
    Case("deft", DEFT(r=2), exact_start=False, quick=_QUICK),
    Case("deft_qr", DEFT(r=2, decomposition="qr", alpha=4.0), exact_start=False, quick=_NO_BIAS),
    Case("para", DEFT(r=2, para=True), exact_start=False, same_start=False, quick=_NO_BIAS),
    Case("glora", GLoRA(r=2), no_gradient=_CANCELLED, quick=_QUICK | {"conv2d"}),
    Case(
        "glora_constant",
        GLoRA(weight_form="constant", weight_to_bias="vector", bias_form="none"),
        no_gradient=_CANCELLED,
        quick=frozenset(["conv1d_gpt2"]),
    ),
    Case(
        "glora_vector",
        GLoRA(r=2, weight_form="vector", weight_to_bias="vector", bias_form="vector"),
        no_gradient=_CANCELLED,
        quick=_NO_BIAS,
    ),
    Case("psoft", PSOFT(r=2), skip=_NO_TRIPLETS, quick=_QUICK),
    Case("psoft_full", PSOFT(r=2, orthogonal=False), skip=_NO_TRIPLETS, quick=_NO_BIAS),
    Case("velora", VeLoRA(r=2, groups=4), skip=_ROWS, quick=_QUICK),
    Case("velora_once", VeLoRA(r=2, direction="batch_average_once"), skip=_ROWS, quick=_NO_BIAS),
    Case(
        "monteclora",
        MonteCLoRA(r=2, noise=0.0),
        skip=_IDS | _MERGED,
        no_gradient=frozenset(["log_std", "log_concentration"]),
        quick=_QUICK,
    ),
    Case("osf", OSF(), exact_start=False, skip=_NO_TRIPLETS, quick=_QUICK | {"no_bias"}),
    Case("diff_pruning", DiffPruning(sample=False, alpha_init=0.0, structured=True)),
]
