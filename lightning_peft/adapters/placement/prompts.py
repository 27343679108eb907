"""Placements of prompts: the stack of a model that consumes embeddings, or its attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from lightning_peft.adapters.placement.blocks import block_width
from lightning_peft.adapters.placement.placement import PromptPlacement
from lightning_peft.core.class_swap import base_class
from lightning_peft.core.names import in_adapter, quoted
from lightning_peft.core.site import SequenceSite
from lightning_peft.layers import PLAIN, ops_for
from lightning_peft.layers.prompt.adapter import PromptAdapter, PromptHooks
from lightning_peft.layers.prompt.custom_model import CustomModelHooks
from lightning_peft.layers.prompt.encoder_mask import EncoderMaskHook
from lightning_peft.layers.prompt.forward import forward_names
from lightning_peft.layers.prompt.gating import PrefixGateHooks, gated_attention
from lightning_peft.layers.prompt.multihead_attention import refusal
from lightning_peft.methods.base import SequenceMethod
from lightning_peft.models.modules import hf_models, input_embeddings
from lightning_peft.models.target_modules import Selection, select
from lightning_peft.models.target_rules import name_rule
from lightning_peft.storage import storage_of

__all__ = ["find_prompt_placements"]

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForMultipleChoice": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def find_prompt_placements(
    method: SequenceMethod, model: nn.Module
) -> tuple[list[PromptPlacement], Selection | None]:
    """The Hugging Face model, or the modules that the method's targets name.

    Raises:
        ValueError: no model or several models, or one that cannot take further positions.
    """
    if method.target_modules is None:
        return [_hf_placement(method, model)], None
    if method.insertion != "attention":
        return [_custom_placement(method, model)], None
    selection = select(
        model,
        method.target_modules,
        exclude_modules=method.exclude_modules,
        layers_to_transform=method.layers_to_transform,
        layers_pattern=method.layers_pattern,
        adaptable=lambda module: not refusal(module),
    )
    sites = [_attention_site(n, model.get_submodule(n)) for n in selection.names]
    return [PromptPlacement(site) for site in sites], selection


def _hf_placement(method: SequenceMethod, model: nn.Module) -> PromptPlacement:
    """The stack of the one Hugging Face model that consumes embeddings.

    Raises:
        ValueError: no model or several models, or one that cannot take further positions.
    """
    prefix, hf = _the_hf_model(method, model)
    stack = _stack(hf, method)
    _check_takes_positions(hf, stack, method)
    name = next(n for n, m in hf.named_modules() if m is stack)
    site = _hf_site(method, hf, stack, ".".join(part for part in (prefix, name) if part))
    if getattr(method, "gating", False):
        site.hidden = int(hf.config.get_text_config(decoder=True).hidden_size)
        gated_attention(stack, len(site.layers))
        return PromptPlacement(site, hook=partial(_gate_hooks, stack))
    if method.insertion == "prepend" and hf.config.is_encoder_decoder:
        return PromptPlacement(site, hook=partial(_mask_hook, hf.get_decoder()))
    return PromptPlacement(site)


def _gate_hooks(stack: nn.Module, adapter: PromptAdapter) -> PromptHooks:
    """Hooks on the attention that gates a prefix."""
    return PrefixGateHooks(adapter, stack)


def _mask_hook(decoder: nn.Module, adapter: PromptAdapter) -> PromptHooks:
    """Hook on the decoder, whose mask over the encoder's output becomes longer."""
    return EncoderMaskHook(adapter, decoder)


def _model_hooks(model: nn.Module, adapter: PromptAdapter) -> PromptHooks:
    """Hooks on a custom model, whose masks and output become longer."""
    return CustomModelHooks(adapter, model)


def _the_hf_model(method: SequenceMethod, model: nn.Module) -> tuple[str, Any]:
    found = list(hf_models(model))
    if len(found) != 1:
        raise ValueError(
            f"{method.label}: expected one Hugging Face transformer in {type(model).__name__}, got "
            f"{[type(m).__name__ for _, m in found] or 'none'}; a prompt enters where embeddings "
            "do, which is not known elsewhere: name the module that gives embeddings (for "
            "PrefixTuning the nn.MultiheadAttention modules) in target_modules, use an adapter of "
            "layers, or attach to the model itself"
        )
    return found[0]


def _hf_site(method: SequenceMethod, hf: Any, stack: Any, name: str) -> SequenceSite:
    embeddings: Any = input_embeddings(stack)  # `_check_takes_positions` requires one
    path = next(n for n, m in stack.named_modules() if m is embeddings)
    weight = f"{path}.weight"
    return SequenceSite(
        stack,
        weight,
        name,
        PLAIN,
        storage_of(stack, weight),
        width=int(embeddings.weight.shape[-1]),
        layers=_attention_layers(hf, method) if method.insertion == "attention" else (),
        strip=_strips(hf),
        embedding=path,
        task=_task(hf),
    )


def _attention_site(name: str, module: nn.Module) -> SequenceSite:
    """The site of one `nn.MultiheadAttention` of a custom transformer."""
    assert isinstance(module, nn.MultiheadAttention)  # `refusal` said so
    weight = "in_proj_weight" if module.in_proj_weight is not None else "q_proj_weight"
    return SequenceSite(
        module,
        weight,
        name,
        ops_for(module) or PLAIN,
        storage_of(module, weight),
        width=int(module.embed_dim),
        layers=((int(module.num_heads), int(module.head_dim)),),
        hidden=int(module.embed_dim),
    )


def _custom_placement(method: SequenceMethod, model: nn.Module) -> PromptPlacement:
    """The one module of a custom model that gives embeddings.

    Raises:
        ValueError: no module or several modules, an unknown width, or prompts that are added.
    """
    rule = name_rule(method.target_modules)
    found = [(n, m) for n, m in model.named_modules() if n and rule(n) and not in_adapter(n)]
    if len(found) != 1 or method.insertion != "prepend":
        raise ValueError(
            f"{method.label}: expected target_modules to name the one module that gives "
            f"embeddings, for a prompt that is prepended to them, got "
            f"{[n for n, _ in found] or 'none'} and {method.insertion!r}"
        )
    name, module = found[0]
    attention = (m.embed_dim for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    width = block_width(module) or next(attention, 0)
    weight = next((n for n, _ in module.named_parameters()), "")
    if not width or not weight:
        raise ValueError(
            f"{method.label} on {quoted(name)}: expected a module with parameters whose output's "
            "width "
            f"is known (Embedding, Linear, a normalisation), got {type(module).__name__}; name "
            "such a module"
        )
    site = SequenceSite(
        module, weight, name, PLAIN, storage_of(module, weight), width=width, strip=True
    )
    return PromptPlacement(site, hook=partial(_model_hooks, model))


def _stack(hf: Any, method: SequenceMethod) -> Any:
    """The part of the model that consumes embeddings."""
    if hf.config.is_encoder_decoder:
        return hf.get_decoder() if method.insertion == "attention" else hf.get_encoder()
    embeddings = input_embeddings(hf)
    stack = hf
    while embeddings is not None:  # the innermost model around them: heads may call it directly
        inner = [
            child
            for child in stack.children()
            if hasattr(child, "get_input_embeddings")
            and any(m is embeddings for m in child.modules())
        ]
        if not inner:
            break
        stack = inner[0]
    return stack


def _check_takes_positions(hf: Any, stack: Any, method: SequenceMethod) -> None:
    kind = base_class(hf).__name__
    names = forward_names(base_class(stack))
    reason = ""
    embeddings = input_embeddings(stack)
    if getattr(hf, "main_input_name", "input_ids") != "input_ids":
        reason = f"its input is {hf.main_input_name}, not tokens"
    elif getattr(embeddings, "weight", None) is None:
        reason = f"{base_class(stack).__name__} has no single input embedding (two towers?)"
    elif method.insertion == "attention" and "past_key_values" not in names:
        reason = f"{base_class(stack).__name__} takes no past_key_values to put a prefix in"
    elif method.insertion != "attention" and "inputs_embeds" not in names:
        reason = f"{base_class(stack).__name__} takes no inputs_embeds"
    if reason:
        prompts = getattr(hf, "main_input_name", "input_ids") == "input_ids"
        other = "PromptTuning, or " if method.insertion == "attention" and prompts else ""
        raise ValueError(
            f"{method.label}: expected a transformer that takes further positions, got {kind}: "
            f"{reason}; use {other}an adapter of layers, as LoRA(...)"
        )


def _attention_layers(hf: Any, method: SequenceMethod) -> tuple[tuple[int, int], ...]:
    """(heads, features) of the cached keys of every layer that has keys of its own, as the config
    says. In Gemma 4 they vary, and the last layers read those of earlier ones.
    """
    config = hf.config.get_text_config(decoder=True)
    shared = int(getattr(config, "num_kv_shared_layers", 0) or 0)
    if {"head_dim", "num_key_value_heads"} & set(getattr(config, "per_layer_attributes", ()) or ()):
        own = [config.per_layer_config[i] for i in range(config.num_hidden_layers - shared)]
        return tuple((int(c.num_key_value_heads), int(c.head_dim)) for c in own)

    def value(*keys: str) -> int | None:
        found = (getattr(config, k, None) for k in keys)
        return next((int(v) for v in found if isinstance(v, int) and v > 0), None)

    layers = value("num_decoder_layers", "num_hidden_layers")
    all_heads = value("num_attention_heads")
    features = value("head_dim", "d_kv")
    width = value("hidden_size", "d_model")
    heads = value("num_key_value_heads", "num_kv_heads") or all_heads
    if getattr(config, "multi_query", False):
        heads = value("num_kv_heads") if getattr(config, "new_decoder_architecture", False) else 1
    mixed = getattr(config, "kv_lora_rank", None) or getattr(config, "global_head_dim", None)
    mixed = mixed or {"mamba", "linear_attention", "recurrent"} & set(
        getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or ()
    )
    if mixed or layers is None or heads is None or all_heads is None or width is None:
        raise ValueError(
            f"{method.label}: expected a transformer whose attention layers have keys and values "
            f"of one known width, got {base_class(hf).__name__}; use PromptTuning, or an adapter "
            "of layers"
        )
    return ((heads, features or width // all_heads),) * (layers - shared)


def _strips(hf: Any) -> bool:
    """Whether the prompt's positions are removed from the output.

    They stay under a head that reads the first position, and in an encoder whose output is
    attended to.
    """
    config = hf.config
    if config.is_encoder_decoder:
        return False
    sentence = base_class(hf).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))
    mean = getattr(config, "classifier_pooling", "cls") == "mean"
    return not sentence or hasattr(hf, "score") or mean


def _task(hf: Any) -> str:
    name = base_class(hf).__name__
    for end, task in _TASKS.items():
        if name.endswith(end):
            return task
    if hf.config.is_encoder_decoder and name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return "FEATURE_EXTRACTION"
