"""lightning_peft: parameter-efficient fine-tuning for PyTorch Lightning, by one callback.

Trainer(callbacks=[PEFT(LoRA(r=16), quantization=Quantization("nf4"))])
"""

import importlib
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning_peft_kernels  # noqa: F401 - defines the ops that saved programs name

from lightning_peft.strategies import register_strategies
from lightning_peft.trainers.callback_base import TrainerCallback
from lightning_peft.trainers.packages import default_package

if TYPE_CHECKING:
    from lightning_peft.activations.config import Activations
    from lightning_peft.activations.limit import limit_activations
    from lightning_peft.adapters.activation import (
        adapter_names,
        disable_adapters,
        set_adapter,
        task_ids,
        use_adapters,
    )
    from lightning_peft.adapters.attach import attach, quantize
    from lightning_peft.adapters.combine import combine
    from lightning_peft.adapters.detach import detach
    from lightning_peft.adapters.hard_prompt import hard_prompt_ids
    from lightning_peft.adapters.merge import MergeReport, merge, unmerge
    from lightning_peft.adapters.reset import reset_adapters
    from lightning_peft.adapters.route import route
    from lightning_peft.adapters.state_dict import adapter_state_dict, load_adapter_state_dict
    from lightning_peft.adapters.unload import merge_and_unload
    from lightning_peft.callback import PEFT
    from lightning_peft.callback.adapter_monitor import AdapterMonitor
    from lightning_peft.callback.load_from_checkpoint import load_from_checkpoint
    from lightning_peft.checkpoint.loop import load_checkpoint, save_checkpoint
    from lightning_peft.hf.export import ExportReport, export_merged
    from lightning_peft.hf.load import load_adapter
    from lightning_peft.hf.load_packed import load_packed
    from lightning_peft.hf.save import save_adapter
    from lightning_peft.initialization.data_driven import start_from_data
    from lightning_peft.losses.chunked_cross_entropy import chunked_cross_entropy
    from lightning_peft.losses.output_head import chunk_losses
    from lightning_peft.methods.adalora import AdaLoRA
    from lightning_peft.methods.adamss import AdaMSS
    from lightning_peft.methods.adaption_prompt import AdaptionPrompt
    from lightning_peft.methods.alora import ALoRA
    from lightning_peft.methods.arrow import Arrow
    from lightning_peft.methods.bd_lora import BDLoRA
    from lightning_peft.methods.beft import BEFT
    from lightning_peft.methods.bitfit import BitFit
    from lightning_peft.methods.boft import BOFT
    from lightning_peft.methods.bottleneck_adapter import BottleneckAdapter
    from lightning_peft.methods.c3a import C3A
    from lightning_peft.methods.cartridge import Cartridge
    from lightning_peft.methods.cpt import CPT, cpt_loss
    from lightning_peft.methods.deft import DEFT
    from lightning_peft.methods.delora import DeLoRA
    from lightning_peft.methods.diff_pruning import DiffPruning
    from lightning_peft.methods.dora import DoRA
    from lightning_peft.methods.fourierft import FourierFT
    from lightning_peft.methods.full import Full
    from lightning_peft.methods.gated_lora import GatedLoRA
    from lightning_peft.methods.glora import GLoRA
    from lightning_peft.methods.gralora import GraLoRA
    from lightning_peft.methods.hard_prompt import HardPrompt
    from lightning_peft.methods.hira import HiRA
    from lightning_peft.methods.hra import HRA
    from lightning_peft.methods.ia3 import IA3
    from lightning_peft.methods.kasa import KaSA
    from lightning_peft.methods.last_layers import LastLayers
    from lightning_peft.methods.lily import Lily
    from lightning_peft.methods.loha import LoHa
    from lightning_peft.methods.lokr import LoKr
    from lightning_peft.methods.lora import LoRA
    from lightning_peft.methods.lora_plus import LoRAPlus
    from lightning_peft.methods.miss import MiSS
    from lightning_peft.methods.monteclora import MonteCLoRA
    from lightning_peft.methods.multitask_prompt import MultitaskPrompt
    from lightning_peft.methods.norm_tuning import NormTuning
    from lightning_peft.methods.oft import OFT
    from lightning_peft.methods.osf import OSF
    from lightning_peft.methods.p_tuning import PTuning
    from lightning_peft.methods.peanut import PEANuT
    from lightning_peft.methods.poly import Poly
    from lightning_peft.methods.prefix_tuning import PrefixTuning
    from lightning_peft.methods.prompt_tuning import PromptTuning
    from lightning_peft.methods.psoft import PSOFT
    from lightning_peft.methods.pvera import PVeRA
    from lightning_peft.methods.quant_aware_lora import QuantAwareLoRA
    from lightning_peft.methods.randlora import RandLoRA
    from lightning_peft.methods.road import RoAd
    from lightning_peft.methods.shira import SHiRA
    from lightning_peft.methods.sparse_lora import SparseLoRA
    from lightning_peft.methods.super_tuning import SuperTuning
    from lightning_peft.methods.tinylora import TinyLoRA
    from lightning_peft.methods.trainable_tokens import TrainableTokens
    from lightning_peft.methods.unilora import UniLoRA
    from lightning_peft.methods.vblora import VBLoRA
    from lightning_peft.methods.velora import VeLoRA
    from lightning_peft.methods.vera import VeRA
    from lightning_peft.methods.waveft import WaveFT
    from lightning_peft.methods.xlora import XLoRA
    from lightning_peft.optim.method_hooks import MethodHooks
    from lightning_peft.optim.replace import convert_optimizer
    from lightning_peft.planner.estimate import Plan, estimate_memory
    from lightning_peft.planner.recommendation import Recommendation, recommend
    from lightning_peft.recipes.extract_lora import extract_lora
    from lightning_peft.recipes.extract_report import ExtractReport
    from lightning_peft.recipes.prune_rank import PruneReport, prune_rank
    from lightning_peft.report.summary import Report, parameter_report
    from lightning_peft.report.tokens import tokens_per_expert
    from lightning_peft.storage import Quantization
    from lightning_peft.strategies.base_reading import read_base
    from lightning_peft.strategies.lightning import PEFTDDPStrategy, PEFTFSDPStrategy

#: Public name → its module in this package. Methods are found by `lightning_peft.methods`.
_MODULES = {
    "PEFT": "callback",
    "AdapterMonitor": "callback.adapter_monitor",
    "cpt_loss": "methods.cpt_loss",
    "Activations": "activations.config",
    "limit_activations": "activations.limit",
    "adapter_names": "adapters.activation",
    "disable_adapters": "adapters.activation",
    "set_adapter": "adapters.activation",
    "task_ids": "adapters.activation",
    "use_adapters": "adapters.activation",
    "attach": "adapters.attach",
    "quantize": "adapters.attach",
    "combine": "adapters.combine",
    "detach": "adapters.detach",
    "hard_prompt_ids": "adapters.hard_prompt",
    "MergeReport": "adapters.merge",
    "merge": "adapters.merge",
    "unmerge": "adapters.merge",
    "reset_adapters": "adapters.reset",
    "route": "adapters.route",
    "adapter_state_dict": "adapters.state_dict",
    "load_adapter_state_dict": "adapters.state_dict",
    "merge_and_unload": "adapters.unload",
    "load_from_checkpoint": "callback.load_from_checkpoint",
    "load_checkpoint": "checkpoint.loop",
    "save_checkpoint": "checkpoint.loop",
    "ExportReport": "hf.export",
    "export_merged": "hf.export",
    "load_adapter": "hf.load",
    "load_packed": "hf.load_packed",
    "save_adapter": "hf.save",
    "start_from_data": "initialization.data_driven",
    "chunked_cross_entropy": "losses.chunked_cross_entropy",
    "chunk_losses": "losses.output_head",
    "MethodHooks": "optim.method_hooks",
    "convert_optimizer": "optim.replace",
    "Plan": "planner.estimate",
    "estimate_memory": "planner.estimate",
    "Recommendation": "planner.recommendation",
    "recommend": "planner.recommendation",
    "extract_lora": "recipes.extract_lora",
    "ExtractReport": "recipes.extract_report",
    "PruneReport": "recipes.prune_rank",
    "prune_rank": "recipes.prune_rank",
    "Report": "report.summary",
    "parameter_report": "report.summary",
    "tokens_per_expert": "report.tokens",
    "Quantization": "storage",
    "read_base": "strategies.base_reading",
}


if not TYPE_CHECKING:  # type checkers read the imports above

    def __getattr__(name: str) -> Any:
        """Import what is named for the first time.

        The classes of Trainers are looked up each time, since they depend on which Lightning
        packages are loaded by then.
        """
        if name not in __all__:
            if name.startswith("_") or "." in name or find_spec(f"{__name__}.{name}") is None:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            return importlib.import_module(f"{__name__}.{name}")  # a room, by its own name
        if name in ("PEFTDDPStrategy", "PEFTFSDPStrategy"):
            package = default_package().name.partition(".")[0]
            return getattr(importlib.import_module(f"{__name__}.strategies.{package}"), name)
        module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'methods')}")
        found = getattr(module, name)
        if name in ("PEFT", "AdapterMonitor"):
            TrainerCallback.complete()
        else:
            globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """The public names, imported or not."""
        return sorted({*globals(), *__all__})


with suppress(ModuleNotFoundError):  # attach, merge and others need no Lightning
    default_package()
register_strategies()

__version__ = "0.1.0"

__all__ = [
    "BEFT",
    "BOFT",
    "C3A",
    "CPT",
    "DEFT",
    "HRA",
    "IA3",
    "OFT",
    "OSF",
    "PEFT",
    "PSOFT",
    "ALoRA",
    "Activations",
    "AdaLoRA",
    "AdaMSS",
    "AdapterMonitor",
    "AdaptionPrompt",
    "Arrow",
    "BDLoRA",
    "BitFit",
    "BottleneckAdapter",
    "Cartridge",
    "DeLoRA",
    "DiffPruning",
    "DoRA",
    "ExportReport",
    "ExtractReport",
    "FourierFT",
    "Full",
    "GLoRA",
    "GatedLoRA",
    "GraLoRA",
    "HardPrompt",
    "HiRA",
    "KaSA",
    "LastLayers",
    "Lily",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAPlus",
    "MergeReport",
    "MethodHooks",
    "MiSS",
    "MonteCLoRA",
    "MultitaskPrompt",
    "NormTuning",
    "PEANuT",
    "PEFTDDPStrategy",
    "PEFTFSDPStrategy",
    "PTuning",
    "PVeRA",
    "Plan",
    "Poly",
    "PrefixTuning",
    "PromptTuning",
    "PruneReport",
    "QuantAwareLoRA",
    "Quantization",
    "RandLoRA",
    "Recommendation",
    "Report",
    "RoAd",
    "SHiRA",
    "SparseLoRA",
    "SuperTuning",
    "TinyLoRA",
    "TrainableTokens",
    "UniLoRA",
    "VBLoRA",
    "VeLoRA",
    "VeRA",
    "WaveFT",
    "XLoRA",
    "adapter_names",
    "adapter_state_dict",
    "attach",
    "chunk_losses",
    "chunked_cross_entropy",
    "combine",
    "convert_optimizer",
    "cpt_loss",
    "detach",
    "disable_adapters",
    "estimate_memory",
    "export_merged",
    "extract_lora",
    "hard_prompt_ids",
    "limit_activations",
    "load_adapter",
    "load_adapter_state_dict",
    "load_checkpoint",
    "load_from_checkpoint",
    "load_packed",
    "merge",
    "merge_and_unload",
    "parameter_report",
    "prune_rank",
    "quantize",
    "read_base",
    "recommend",
    "register_strategies",
    "reset_adapters",
    "route",
    "save_adapter",
    "save_checkpoint",
    "set_adapter",
    "start_from_data",
    "task_ids",
    "tokens_per_expert",
    "unmerge",
    "use_adapters",
]
