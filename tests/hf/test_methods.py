"""Every weight method that peft has too: outputs equal after the directories are exchanged, both
ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest

import lightning_peft as lp
from lightning_peft import methods
from lightning_peft.methods.base import Method
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, run, trained

FLOOR = 1e-5


@dataclass(frozen=True)
class Row:
    """One method: ours, peft's configuration of the same, where peft cannot, and on which
    architectures it is not marked slow.
    """

    ours: type[Method]
    arguments: Mapping[str, Any]
    config: type[Any]
    theirs: Mapping[str, Any]
    skip: Mapping[str, str] = field(default_factory=dict)
    quick: Sequence[str] | None = None


BLOCKS = {
    "blocks_a": ["down_proj", "dense", "wo"],
    "blocks_b": ["q_proj", "v_proj", "query", "q", "v"],
}
LLAMA, BERT = ("llama",), ("bert",)
NO_CONV1D = {"gpt2": "peft refuses GPT-2's Conv1D"}
ROWS = {
    "dora": Row(
        lp.DoRA,
        {"r": 4, "alpha": 8.0},
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 8, "use_dora": True},
    ),
    "dora rslora": Row(
        lp.DoRA,
        {"r": 4, "use_rslora": True},
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 8, "use_dora": True, "use_rslora": True},
    ),
    "ia3": Row(
        lp.IA3,
        {"feedforward_modules": ["down_proj", "output.dense", "wo", "c_proj"]},
        peft.IA3Config,
        {},
    ),
    "vera": Row(lp.VeRA, {"r": 8, "seed": 3}, peft.VeraConfig, {"r": 8, "projection_prng_key": 3}),
    "adalora": Row(
        lp.AdaLoRA,
        {"init_r": 4, "target_r": 2, "alpha": 6.0},
        peft.AdaLoraConfig,
        {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10},
    ),
    "loha": Row(lp.LoHa, {"r": 3, "alpha": 6.0}, peft.LoHaConfig, {"r": 3, "alpha": 6}, NO_CONV1D),
    "lokr": Row(lp.LoKr, {"r": 2, "alpha": 3.0}, peft.LoKrConfig, {"r": 2, "alpha": 3}, NO_CONV1D),
    "lokr both": Row(
        lp.LoKr,
        {"r": 1, "decompose_both": True, "decompose_factor": 4},
        peft.LoKrConfig,
        {"r": 1, "alpha": 8, "decompose_both": True, "decompose_factor": 4},
        NO_CONV1D,
    ),
    "oft": Row(
        lp.OFT,
        {"block_size": 8},
        peft.OFTConfig,
        {"oft_block_size": 8, "r": 0, "use_cayley_neumann": False},
        NO_CONV1D,
    ),
    "oft neumann": Row(
        lp.OFT,
        {"block_size": 8, "cayley_neumann": True, "block_share": True},
        peft.OFTConfig,
        {"oft_block_size": 8, "r": 0, "use_cayley_neumann": True, "block_share": True},
        NO_CONV1D,
    ),
    "coft": Row(
        lp.OFT,
        {"block_size": 8, "coft": True, "eps": 2.0},
        peft.OFTConfig,
        {"oft_block_size": 8, "r": 0, "coft": True, "eps": 2.0, "use_cayley_neumann": False},
        NO_CONV1D,
    ),
    "boft": Row(lp.BOFT, {"block_size": 8}, peft.BOFTConfig, {"boft_block_size": 8}, NO_CONV1D),
    "miss": Row(lp.MiSS, {"r": 5}, peft.MissConfig, {"r": 5}, NO_CONV1D),
    "miss mini": Row(
        lp.MiSS,
        {"r": 4, "mini_r": 2, "form": "mini"},
        peft.MissConfig,
        {"r": 4, "mini_r": 2, "init_weights": "mini"},
        NO_CONV1D,
    ),
    "miss bat": Row(
        lp.MiSS,
        {"r": 4, "form": "bat"},
        peft.MissConfig,
        {"r": 4, "init_weights": "bat"},
        NO_CONV1D,
    ),
    "kasa": Row(
        methods.KaSA,
        {"r": 4},
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 8, "kasa_config": peft.tuners.lora.config.KasaConfig()},
        NO_CONV1D,
        LLAMA,
    ),
    "bd-lora": Row(
        methods.BDLoRA,
        {"r": 4, "nblocks": 2, **BLOCKS},
        peft.LoraConfig,
        {
            "r": 4,
            "lora_alpha": 8,
            "use_bdlora": {
                "target_modules_bd_a": BLOCKS["blocks_a"],
                "target_modules_bd_b": BLOCKS["blocks_b"],
                "nblocks": 2,
            },
        },
        NO_CONV1D,
        LLAMA,
    ),
    "hra": Row(methods.HRA, {"r": 4}, peft.HRAConfig, {"r": 4}, NO_CONV1D, LLAMA),
    "hra gs": Row(
        methods.HRA,
        {"r": 3, "apply_gs": True},
        peft.HRAConfig,
        {"r": 3, "apply_GS": True},
        NO_CONV1D,
        LLAMA,
    ),
    **{
        variant: Row(
            methods.RoAd,
            {"variant": variant, "group_size": 8},
            peft.RoadConfig,
            {"variant": variant, "group_size": 8},
            NO_CONV1D,
            BERT,
        )
        for variant in ("road_1", "road_2", "road_4")
    },
    "delora": Row(
        methods.DeLoRA,
        {"r": 3, "strength_pattern": {"v_proj": 3.0}},
        peft.DeloraConfig,
        {"r": 3, "lambda_pattern": {"v_proj": 3.0}},
        NO_CONV1D,
        LLAMA,
    ),
    "gralora": Row(
        methods.GraLoRA,
        {"r": 4, "hybrid_r": 2},
        peft.GraloraConfig,
        {"r": 4, "hybrid_r": 2},
        quick=("llama", "gpt2"),
    ),
    "shira": Row(
        methods.SHiRA,
        {"r": 2, "seed": 5},
        peft.ShiraConfig,
        {"r": 2, "random_seed": 5},
        NO_CONV1D,
        LLAMA,
    ),
    "super-tuning": Row(
        methods.SuperTuning,
        {"sparsity": 0.9},
        peft.SupertuningConfig,
        {"sparsity": 0.9},
        NO_CONV1D,
        BERT,
    ),
    "supra": Row(
        methods.SuperTuning,
        {"sparsity": 0.9, "r": 2, "alpha": 4.0},
        peft.SupertuningConfig,
        {"sparsity": 0.9, "r": 2, "lora_alpha": 4},
        NO_CONV1D,
        LLAMA,
    ),
    "hira": Row(methods.HiRA, {"r": 4}, peft.HiraConfig, {"r": 4}, quick=("llama", "gpt2")),
    "peanut": Row(
        methods.PEANuT,
        {"r": 4, "depth": 2, "act_fn": "gelu"},
        peft.PeanutConfig,
        {"r": 4, "depth": 2, "act_fn": "gelu"},
        NO_CONV1D,
        LLAMA,
    ),
    "vblora": Row(
        methods.VBLoRA,
        {"r": 2, "num_vectors": 12, "vector_length": 8},
        peft.VBLoRAConfig,
        {"r": 2, "num_vectors": 12, "vector_length": 8},
        quick=LLAMA,
    ),
    "unilora": Row(
        methods.UniLoRA,
        {"r": 2, "length": 32, "seed": 3},
        peft.UniLoraConfig,
        {"r": 2, "theta_d_length": 32, "proj_seed": 3},
        quick=BERT,
    ),
    "unilora indices": Row(
        methods.UniLoRA,
        {"r": 2, "length": 32},
        peft.UniLoraConfig,
        {"r": 2, "theta_d_length": 32, "save_indices": True},
        quick=LLAMA,
    ),
    "tinylora": Row(
        methods.TinyLoRA,
        {"r": 2, "u": 5, "weight_tying": 0.5},
        peft.TinyLoraConfig,
        {"r": 2, "u": 5, "weight_tying": 0.5},
        quick=("llama", "gpt2"),
    ),
    "randlora": Row(
        methods.RandLoRA,
        {"r": 6, "alpha": 3.0},
        peft.RandLoraConfig,
        {"r": 6, "randlora_alpha": 3},
        quick=LLAMA,
    ),
    "randlora sparse": Row(
        methods.RandLoRA,
        {"r": 6, "alpha": 3.0, "sparse": True},
        peft.RandLoraConfig,
        {"r": 6, "randlora_alpha": 3, "sparse": True, "save_projection": False},
        quick=BERT,
    ),
    "pvera": Row(
        methods.PVeRA,
        {"r": 8, "seed": 3},
        peft.PveraConfig,
        {"r": 8, "projection_prng_key": 3},
        quick=LLAMA,
    ),
    "c3a": Row(
        methods.C3A,
        {"block_size": 8},
        peft.C3AConfig,
        {"block_size": 8},
        NO_CONV1D,
        LLAMA,
    ),
    "fourierft": Row(
        methods.FourierFT,
        {"n_frequency": 40, "n_frequency_pattern": {"v_proj": 30}},
        peft.FourierFTConfig,
        {"n_frequency": 40, "n_frequency_pattern": {"v_proj": 30}},
        quick=LLAMA,
    ),
    "waveft": Row(
        methods.WaveFT, {"n_frequency": 40}, peft.WaveFTConfig, {"n_frequency": 40}, quick=LLAMA
    ),
    "waveft db3": Row(
        methods.WaveFT,
        {"n_frequency": 40, "family": "db3"},
        peft.WaveFTConfig,
        {"n_frequency": 40, "wavelet_family": "db3", "proportional_parameters": True},
        quick=BERT,
    ),
    "waveft entries": Row(
        methods.WaveFT,
        {"n_frequency": 40, "use_idwt": False},
        peft.WaveFTConfig,
        {"n_frequency": 40, "use_idwt": False},
        quick=(),
    ),
    "adamss": Row(methods.AdaMSS, {"r": 12}, peft.AdamssConfig, {"r": 12}, NO_CONV1D, LLAMA),
    "adamss ranks": Row(
        methods.AdaMSS,
        {"r": 9, "clusters": 3, "rank_per_cluster": 4, "seed": 2},
        peft.AdamssConfig,
        {"r": 9, "num_subspaces": 3, "subspace_rank": 4, "random_seed": 2},
        NO_CONV1D,
        BERT,
    ),
    "deft": Row(
        methods.DEFT,
        {"r": 4, "alpha": 8.0},
        peft.DeftConfig,
        {"r": 4, "alpha": 8},
        quick=("llama", "gpt2"),
    ),
    "deft qr": Row(
        methods.DEFT,
        {"r": 4, "decomposition": "qr"},
        peft.DeftConfig,
        {"r": 4, "decomposition_method": "qr"},
        quick=BERT,
    ),
    "para": Row(
        methods.DEFT, {"r": 4, "para": True}, peft.DeftConfig, {"r": 4, "para": True}, quick=BERT
    ),
    "glora": Row(methods.GLoRA, {"r": 4}, peft.GloraConfig, {"r": 4}, NO_CONV1D, ("llama", "bert")),
    "glora vector": Row(
        methods.GLoRA,
        {"weight_form": "vector", "weight_to_bias": "vector", "bias_form": "vector"},
        peft.GloraConfig,
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        NO_CONV1D,
        BERT,
    ),
    "glora constant": Row(
        methods.GLoRA,
        {"weight_form": "constant", "weight_to_bias": "none", "bias_form": "none"},
        peft.GloraConfig,
        {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        NO_CONV1D,
        (),
    ),
    "psoft": Row(methods.PSOFT, {"r": 8}, peft.PsoftConfig, {"r": 8}, NO_CONV1D, LLAMA),
    "psoft full": Row(
        methods.PSOFT,
        {"r": 8, "orthogonal": False, "mag_a": False, "split": "pissa_init"},
        peft.PsoftConfig,
        {"r": 8, "psoft_orth": False, "psoft_mag_a": False, "ab_svd_init": "pissa_init"},
        NO_CONV1D,
        BERT,
    ),
    "osf": Row(methods.OSF, {}, peft.OSFConfig, {}, NO_CONV1D, LLAMA),
    "osf share": Row(
        methods.OSF, {"kept": 0.75}, peft.OSFConfig, {"effective_rank": 0.75}, NO_CONV1D, BERT
    ),
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "output.dense"],
    "t5": ["q", "v", "wo"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["q_proj", "v_proj"],
}
CASES = [
    pytest.param(
        name,
        architecture,
        id=f"{name}-{architecture}",
        marks=() if row.quick is None or architecture in row.quick else pytest.mark.slow,
    )
    for name, row in ROWS.items()
    for architecture in TARGETS
]


@pytest.mark.sweep(0.45)
@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_both_ways(name: str, architecture: str, tmp_path: Path) -> None:
    row, targets = ROWS[name], TARGETS[architecture]
    if architecture in row.skip:
        pytest.skip(row.skip[architecture])
    base, inputs = build(architecture)
    arguments, theirs = dict(row.arguments), dict(row.theirs)
    if row.ours is lp.IA3:
        forward = [t for t in arguments["feedforward_modules"] if t in targets]
        arguments["feedforward_modules"] = theirs["feedforward_modules"] = forward

    # peft's AdaLoRA looks for its trainable adapter wherever the output has a loss.
    options = {"is_trainable": True} if row.ours is lp.AdaLoRA else {}

    model = trained(base, row.ours(target_modules=targets, **arguments))
    want = run(model, inputs)
    change = (want - run(base, inputs)).norm() / want.norm()
    assert change > 10 * FLOOR, f"the adapter does next to nothing: {change:.1e}"
    lp.save_adapter(model, tmp_path / "ours")
    assert_close(
        "ours in peft", run(in_peft(base, tmp_path / "ours", **options), inputs), want, floor=FLOOR
    )
    again = loaded(base, tmp_path / "ours")
    assert_close("ours in ours", run(again, inputs), want, floor=FLOOR)

    oracle = by_peft(base, tmp_path / "theirs", row.config, target_modules=targets, **theirs)
    want = run(oracle, inputs)
    model = loaded(base, tmp_path / "theirs")
    assert_close("peft's in ours", run(model, inputs), want, floor=FLOOR)
    lp.merge(model)
    assert_close("merged", run(model, inputs), want, floor=FLOOR)
