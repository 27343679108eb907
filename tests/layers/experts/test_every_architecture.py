"""Every experts class and every mixture's model type of the installed transformers.

The classes are found in its source by the decorator, so that a new one is tried without being
listed here.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.edit import apply_edits
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.experts.ops import experts_refusal, is_experts
from lightning_peft.models.target_table import MODEL_TYPES
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import randomise

pytestmark = pytest.mark.slow

#: By whatever names the configs of these models have.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "moe_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_intermediate_size", "moe_ffn_hidden_size", "moe_latent_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_moe_experts", "moe_num_routed_experts"), 4),
}
#: Of those, what a text model that also exists without experts leaves open.
WITHOUT_DEFAULT = ("num_experts", "n_routed_experts", "moe_intermediate_size")
#: Modules without the decorator whose forward is theirs alone: refused by name.
REFUSED = {"inkling_text": {"shared_experts"}}


def decorated() -> list[tuple[str, str]]:
    """(model's folder, class) of every decorated experts class."""
    import transformers.models

    found = []
    for path in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        text = path.read_text()
        if "use_experts_implementation" not in text:
            continue
        found += [
            (f"{path.parent.name}.{path.stem}", node.name)
            for node in ast.parse(text).body
            if isinstance(node, ast.ClassDef)
            and any("use_experts" in ast.unparse(d) for d in node.decorator_list)
        ]
    return found


def more(cls: type) -> list[int]:
    """Sizes that the class takes beside the config."""
    needed = list(inspect.signature(cls.__init__).parameters.values())[2:]
    return [16 for p in needed if p.name == "intermediate_size"]


def small_experts(where: str, name: str) -> nn.Module:
    """The class under the first config of its model that it can be made from."""
    cls = getattr(importlib.import_module(f"transformers.models.{where}"), name)
    folder, stem = where.split(".")
    configs = importlib.import_module(
        f"transformers.models.{folder}.{stem.replace('modeling', 'configuration')}"
    )
    errors = []
    for _, kind in inspect.getmembers(configs, inspect.isclass):
        if not kind.__name__.endswith("Config") or kind.__module__ != configs.__name__:
            continue
        try:
            config: Any = kind()
            for key, value in SMALL.items():
                held = getattr(config, key, None)
                if held is not None or (key in WITHOUT_DEFAULT and hasattr(config, key)):
                    setattr(config, key, [value] * len(held) if isinstance(held, list) else value)
            config._experts_implementation = "eager"
            with torch.device("meta"):
                made = cls(config, *more(cls))
                shapes = [p.shape for p in made.parameters() if p.dim() == 3]
            if shapes and max(s.numel() for s in shapes) < 1 << 16:
                return cls(config, *more(cls))
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            errors.append(f"{kind.__name__}: {error}")
    raise AssertionError(f"{where}.{name}: no config makes it: {errors}")


@pytest.mark.parametrize(("where", "name"), decorated())
def test_own_forward_with_edited_weights(where: str, name: str) -> None:
    """Ours with LoRA = the class's own eager forward over W + s B A; dense and in 4 bits."""
    plain = small_experts(where, name)
    g = torch.Generator().manual_seed(1)
    for p in plain.parameters():
        p.data.copy_(0.2 * torch.randn(p.shape, generator=g))
    E = plain.num_experts
    W = plain.down_proj
    width = W.shape[2] if plain.is_transposed else W.shape[1]
    x = torch.randn(7, width, generator=g)
    index = torch.stack([torch.randperm(E, generator=g)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, generator=g)
    for quantization in (None, lp.Quantization("nf4", block_size=32)):
        model = nn.ModuleDict({"experts": copy.deepcopy(plain)})
        lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"), quantization=quantization)
        randomise(model)
        edited = copy.deepcopy(plain)
        for adapter in adapters_of(model["experts"]):
            site = adapter.site
            M = apply_edits(site, [adapter.edit()], site.weight(torch.float32).double()).float()
            natural = site.ops.from_canonical(site.module, site.parameter, M)
            edited.get_parameter(site.parameter).data.copy_(natural)
        want = edited(x, index, weights)
        assert_close(f"{name} {quantization}", model["experts"](x, index, weights), want)


def model_types() -> list[str]:
    """Causal language models of which some module holds experts, by the source."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folders = {where.split(".")[0] for where, _ in decorated()}
    names = [n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if n in CONFIG_MAPPING]
    return [n for n in names if CONFIG_MAPPING[n].__module__.split(".")[2] in folders]


def fewer_layers(config: Any, layers: int = 4) -> Any:
    """Of default width, but few layers: the first one is often a plain feed-forward."""
    text = getattr(config, "text_config", None) or config
    before = getattr(text, "num_hidden_layers", layers)
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before and before > layers:
            setattr(text, key, value[:layers])
    if before > layers and "num_hidden_layers" in vars(text):
        text.num_hidden_layers = layers
    return config


@pytest.mark.parametrize("model_type", model_types())
def test_all_linear_takes_attention_and_experts(model_type: str) -> None:
    """At the default width, on meta: every fused experts module, never a router or the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = fewer_layers(AutoConfig.for_model(model_type))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        pytest.skip(f"{model_type}: its default config builds no model on meta: {error}")
    fused = {n for n, m in model.named_modules() if is_experts(m)}
    if not fused:
        pytest.skip(f"{model_type}: no experts under the default config")
    refused = {n for n, m in model.named_modules() if experts_refusal(m)}
    assert {n.rpartition(".")[2] for n in refused} == REFUSED.get(model_type, set())
    if refused:
        with pytest.raises(ValueError, match="leave them frozen with exclude_modules"):
            lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"))
    method = lp.LoRA(r=2, target_modules="all-linear", exclude_modules=sorted(refused) or None)
    report = lp.attach(model, method)
    adapted = {n for n, _ in adapted_modules(model)}
    assert fused <= adapted
    assert not refused & adapted
    assert adapted - fused, "no attention"
    routers = {n for n in adapted if n.rpartition(".")[2] in ("gate", "router")}
    assert not {n for n in routers if hasattr(model.get_submodule(n), "top_k")}
    named = {n for n, why in report.skipped if why == "router"}
    assert not named & adapted
    owners = {n.rpartition(".")[0] for n in fused}
    silent = [
        n
        for n in owners
        if not any(r == n or r.startswith(f"{n}.") for r in named)
        and not any(r.rpartition(".")[0] == n.rpartition(".")[0] for r in named)
    ]
    assert not silent, f"routers of {silent[:3]} are not named in the report"
    assert model_type in MODEL_TYPES, "the architecture has no usual choice"
