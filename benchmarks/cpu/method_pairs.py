"""The methods that Hugging Face peft has too, each with peft's configuration of the same."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import nn

import lightning_peft as lp
from lightning_peft import methods

__all__ = ["INVOCATION", "PAIRS", "Pair"]

NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Adapt = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Pair:
    """One method.

    Attributes:
        ours, theirs: Adapt a model of the benchmark, in place or not, and return it.
        tasks: Whether both read the task of each sample.
        trains: Whether anything is trained; else a forward is timed.
        projects: Whether our step has a part before the optimizer's that peft does in its backward.
    """

    ours: Adapt
    theirs: Adapt
    tasks: bool = False
    trains: bool = True
    projects: bool = False

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What our forward runs in."""
        return lp.task_ids([1]) if self.tasks else contextlib.nullcontext()


def attached(method: Any) -> Adapt:
    def adapt(model: nn.Module) -> nn.Module:
        lp.attach(model, method)
        return model

    return adapt


def by_peft(config: Any) -> Adapt:
    return lambda model: peft.get_peft_model(model, config)  # type: ignore[arg-type, return-value]


def linear(method: Any, config: Any, **options: Any) -> Pair:
    """A method on all linear layers of the blocks."""
    config.target_modules = set(TARGETS)
    method = replace(method, target_modules=TARGETS)
    return Pair(attached(method), by_peft(config), **options)


def whole(method: Any, config: Any, **options: Any) -> Pair:
    """A method that chooses its places in the model itself."""
    return Pair(attached(method), by_peft(config), **options)


# ---- methods that take more than a configuration


def frozen_a(model: nn.Module) -> nn.Module:
    """peft's LoRA-FA: an optimizer that trains B alone."""
    theirs = by_peft(peft.LoraConfig(r=16, target_modules=TARGETS))(model)
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_B" in name)
    return theirs


@contextlib.contextmanager
def experts(model: nn.Module) -> Iterator[list[str]]:
    """Directories of three LoRA adapters."""
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for i in range(3):
            lp.attach(model, lp.LoRA(r=8, target_modules=TARGETS))
            for p in model.parameters():
                if p.requires_grad:
                    nn.init.normal_(p, std=0.02)
            lp.save_adapter(model, Path(folder) / str(i))
            lp.detach(model)
            names.append(str(Path(folder) / str(i)))
        yield names


def loaded(model: nn.Module) -> nn.Module:
    with experts(model) as paths:
        for path in paths:
            lp.load_adapter(model, path, adapter_name=Path(path).name)
    return model


def our_mixture(model: nn.Module) -> nn.Module:
    lp.attach(loaded(model), lp.XLoRA(adapters=["0", "1", "2"]), adapter_name="router")
    return model


def their_mixture(model: Any) -> nn.Module:
    width, model.config.use_cache = model.config.hidden_size, False
    with experts(model) as paths:
        adapters = {Path(path).name: path for path in paths}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=width, adapters=adapters)
        return peft.get_peft_model(model, config).train()  # type: ignore[return-value]


def our_arrow(model: nn.Module) -> nn.Module:
    lp.route(loaded(model), ["0", "1", "2"], "arrow", top_k=2)
    lp.set_adapter(model, "arrow")
    return model


def their_arrow(model: Any) -> nn.Module:
    with experts(model) as paths:
        made: nn.Module = create_arrow_model(model, paths, ArrowConfig(top_k=2, rng_seed=1))
    return made


LORA: dict[str, Any] = {"r": 16}
LM: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20}
EXAMPLES = list(range(20))
INVOCATION = 7
BLOCKS = (["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
ON_LINEAR_LAYERS: dict[str, Pair] = {
    "LoRA": linear(lp.LoRA(r=16), peft.LoraConfig(r=16)),
    "LoRA, dropout 0.1": linear(
        lp.LoRA(r=16, dropout=0.1), peft.LoraConfig(r=16, lora_dropout=0.1)
    ),
    "LoRA-FA": Pair(attached(lp.LoRA(r=16, freeze_A=True, target_modules=TARGETS)), frozen_a),
    "MiCA": linear(
        lp.LoRA(r=16, init="mica"), peft.LoraConfig(r=16, init_lora_weights="mica")
    ),
    "aLoRA": linear(
        methods.ALoRA(r=16, invocation_tokens=[INVOCATION]),
        peft.LoraConfig(r=16, alora_invocation_tokens=[INVOCATION], task_type="CAUSAL_LM"),
    ),
    "KaSA": linear(lp.KaSA(r=16), peft.LoraConfig(r=16, kasa_config=KasaConfig())),
    "BD-LoRA": linear(
        lp.BDLoRA(r=16, blocks_a=BLOCKS[0], blocks_b=BLOCKS[1], nblocks=4),
        peft.LoraConfig(
            r=16,
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=BLOCKS[0], target_modules_bd_b=BLOCKS[1], nblocks=4
            ),
        ),
    ),
    "VeLoRA": linear(
        lp.VeLoRA(r=16, groups=16), peft.LoraConfig(r=16, velora_config=VeloraConfig(num_groups=16))
    ),
    "MonteCLoRA": linear(
        lp.MonteCLoRA(r=16), peft.LoraConfig(r=16, monteclora_config=MontecloraConfig())
    ),
    "DoRA": linear(lp.DoRA(r=16), peft.LoraConfig(r=16, use_dora=True)),
    "AdaLoRA": linear(lp.AdaLoRA(init_r=12), peft.AdaLoraConfig(init_r=12, total_step=1000)),
    "LoHa": linear(lp.LoHa(r=8), peft.LoHaConfig(r=8)),
    "LoKr": linear(lp.LoKr(r=8), peft.LoKrConfig(r=8)),
    "IA3": linear(
        lp.IA3(feedforward_modules=["down_proj"]),
        peft.IA3Config(feedforward_modules=["down_proj"]),
    ),
    "VeRA": linear(lp.VeRA(r=64), peft.VeraConfig(r=64)),
    "OFT": linear(
        lp.OFT(block_size=32, cayley_neumann=True), peft.OFTConfig(oft_block_size=32, r=0)
    ),
    "BOFT": linear(lp.BOFT(block_size=4), peft.BOFTConfig(boft_block_size=4)),
    "MiSS": linear(lp.MiSS(r=64), peft.MissConfig(r=64)),
    "HRA": linear(lp.HRA(r=8), peft.HRAConfig(r=8)),
    "PEANuT": linear(lp.PEANuT(r=8, depth=1), peft.PeanutConfig(r=8, depth=1)),
    "HiRA": linear(lp.HiRA(r=8), peft.HiraConfig(r=8)),
    "WaveFT": linear(lp.WaveFT(n_frequency=2592), peft.WaveFTConfig(n_frequency=2592)),
    "C3A": linear(lp.C3A(block_size=64), peft.C3AConfig(block_size=64)),
    "FourierFT": linear(
        lp.FourierFT(n_frequency=1000), peft.FourierFTConfig(n_frequency=1000)
    ),
    "RandLoRA": linear(lp.RandLoRA(r=32), peft.RandLoraConfig(r=32)),
    "OSF": linear(lp.OSF(), peft.OSFConfig(), projects=True),
    "RoAd": linear(lp.RoAd(), peft.RoadConfig()),
    "DeLoRA": linear(lp.DeLoRA(r=8), peft.DeloraConfig(r=8)),
    "GraLoRA": linear(lp.GraLoRA(r=16), peft.GraloraConfig(r=16)),
    "SHiRA": linear(lp.SHiRA(r=8, seed=1), peft.ShiraConfig(r=8, random_seed=1)),
    "Super-Tuning": linear(
        lp.SuperTuning(sparsity=0.97), peft.SupertuningConfig(sparsity=0.97)
    ),
    "VB-LoRA": linear(lp.VBLoRA(r=4, vector_length=64), peft.VBLoRAConfig(r=4, vector_length=64)),
    "UniLoRA": linear(lp.UniLoRA(r=4), peft.UniLoraConfig(r=4)),
    "TinyLoRA": linear(lp.TinyLoRA(r=2), peft.TinyLoraConfig(r=2)),
    "PVeRA": linear(lp.PVeRA(r=64), peft.PveraConfig(r=64)),
    "PSOFT": linear(lp.PSOFT(r=32), peft.PsoftConfig(r=32)),
    "DEFT": linear(lp.DEFT(r=8), peft.DeftConfig(r=8)),
    "GLoRA": linear(lp.GLoRA(r=8), peft.GloraConfig(r=8)),
    "AdaMSS": linear(lp.AdaMSS(r=64), peft.AdamssConfig(r=64)),
    "Lily": linear(lp.Lily(r=16, stride=2), peft.LilyConfig(r=16, stride_A=2)),
    "Poly": linear(
        lp.Poly(r=8, tasks=2),
        peft.PolyConfig(r=8, n_tasks=2, task_type="CAUSAL_LM"),
        tasks=True,
    ),
}  # fmt: skip
ON_MODELS: dict[str, Pair] = {
    "NormTuning": whole(lp.NormTuning(), peft.LNTuningConfig(target_modules=NORMS)),
    "TrainableTokens": whole(
        lp.TrainableTokens(EXAMPLES),
        peft.TrainableTokensConfig(token_indices=EXAMPLES, target_modules=["embed_tokens"]),
    ),
    "PromptTuning": whole(lp.PromptTuning(n=20), peft.PromptTuningConfig(**LM)),
    "MultitaskPrompt": whole(
        lp.MultitaskPrompt(n=20, tasks=2),
        peft.MultitaskPromptTuningConfig(**LM, num_tasks=2, prompt_tuning_init="RANDOM"),
        tasks=True,
    ),
    "CPT": whole(
        lp.CPT(init_ids=EXAMPLES, types=[1, 2, 3, 4] * 5),
        peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=EXAMPLES, cpt_mask=[1] * 20,
            cpt_tokens_type_mask=[1, 2, 3, 4] * 5,
        ),
    ),
    "PTuning": whole(lp.PTuning(n=20), peft.PromptEncoderConfig(**LM, encoder_hidden_size=512)),
    "PTuning, LSTM": whole(
        lp.PTuning(n=20, encoder="lstm"),
        peft.PromptEncoderConfig(
            **LM, encoder_hidden_size=512, encoder_reparameterization_type="LSTM"
        ),
    ),
    "PrefixTuning": whole(lp.PrefixTuning(n=20), peft.PrefixTuningConfig(**LM)),
    "PrefixTuning, projection": whole(
        lp.PrefixTuning(n=20, projection=True, hidden=512),
        peft.PrefixTuningConfig(**LM, prefix_projection=True, encoder_hidden_size=512),
    ),
    "Cartridge": whole(lp.Cartridge(n=20), peft.CartridgeConfig(**LM)),
    "AdaptionPrompt": whole(
        lp.AdaptionPrompt(n=20, layers=2),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=20, adapter_layers=2),
    ),
    "X-LoRA, 3 adapters": Pair(our_mixture, their_mixture),
    "Arrow, 3 adapters (forward)": Pair(our_arrow, their_arrow, trains=False),
}  # fmt: skip
PAIRS: dict[str, Pair] = {**ON_LINEAR_LAYERS, **ON_MODELS}
