"""Where further positions enter: the stack of a Hugging Face model that consumes embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.adapters.placement.blocks import block_width
from lightning_peft.core.class_swap import base_class
from lightning_peft.core.site import SequenceSite
from lightning_peft.layers import PLAIN, ops_for
from lightning_peft.layers.prompt.forward import forward_names
from lightning_peft.layers.prompt.gating import gated_attention
from lightning_peft.models.target_modules import hf_models, name_rule
from lightning_peft.storage import storage_of

__all__ = ["attention_site", "find_custom_prompt_placement", "find_prompt_placements"]

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForMultipleChoice": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def find_prompt_placements(model: nn.Module, method: Any) -> tuple[SequenceSite, nn.Module | None]:
    """The site, and the module that gets hooks: the decoder whose mask over the encoder's output
    becomes longer, or the stack whose attention gates a prefix.

    Raises:
        ValueError: no model, or several, or one that cannot take further positions; with the
            reason.
    """
    found = list(hf_models(model))
    if len(found) != 1:
        raise ValueError(
            f"{method.label}: expected one Hugging Face transformer in {type(model).__name__}, got "
            f"{[type(m).__name__ for _, m in found] or 'none'}; a prompt enters where embeddings "
            "do, which is not known elsewhere: name the module that gives embeddings (for "
            "PrefixTuning the nn.MultiheadAttention modules) in target_modules, use an adapter of "
            "layers, or attach to the model itself"
        )
    prefix, hf = found[0]
    stack = _stack(hf, method)
    _refuse(hf, stack, method)
    name = next(n for n, m in hf.named_modules() if m is stack)
    name = ".".join(part for part in (prefix, name) if part)
    embeddings = stack.get_input_embeddings()
    path = next(n for n, m in stack.named_modules() if m is embeddings)
    weight = f"{path}.weight"
    site = SequenceSite(
        stack,
        weight,
        name,
        PLAIN,
        storage_of(stack, weight),
        width=int(embeddings.weight.shape[-1]),
        layers=_attention_layers(hf, method) if method.acts == "attention" else (),
        strip=_strips(hf),
        embedding=path,
        task=_task(hf),
    )
    if getattr(method, "gating", False):
        site.hidden = int(hf.config.get_text_config(decoder=True).hidden_size)
        gated_attention(stack, len(site.layers))
        return site, stack
    crosses = method.acts == "prepend" and hf.config.is_encoder_decoder
    return site, hf.get_decoder() if crosses else None


def attention_site(name: str, module: Any) -> SequenceSite:
    """One `nn.MultiheadAttention` of a transformer of the user's own."""
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


def find_custom_prompt_placement(model: nn.Module, method: Any) -> SequenceSite:
    """The one module of the user's that gives embeddings.

    Raises:
        ValueError: none or several, a width that is not known, or prompts that are added.
    """
    rule = name_rule(method.target_modules)
    found = [(n, m) for n, m in model.named_modules() if n and rule(n) and "peft" not in n]
    if len(found) != 1 or method.acts != "prepend":
        raise ValueError(
            f"{method.label}: expected target_modules to name the one module that gives "
            f"embeddings, for a prompt that stands before them, got "
            f"{[n for n, _ in found] or 'none'} and {method.acts!r}"
        )
    name, module = found[0]
    attention = (m.embed_dim for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    width = block_width(module) or next(attention, 0)
    weight = next((n for n, _ in module.named_parameters()), "")
    if not width or not weight:
        raise ValueError(
            f"{method.label} on {name!r}: expected a module with parameters whose output's width "
            f"is known (Embedding, Linear, a normalisation), got {type(module).__name__}; name "
            "such a module"
        )
    return SequenceSite(
        module, weight, name, PLAIN, storage_of(module, weight), width=width, strip=True
    )


def _stack(hf: Any, method: Any) -> Any:
    """The part of the model that consumes embeddings."""
    if hf.config.is_encoder_decoder:
        return hf.get_decoder() if method.acts == "attention" else hf.get_encoder()
    embeddings = _input_embeddings(hf)
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


def _refuse(hf: Any, stack: Any, method: Any) -> None:
    kind = base_class(hf).__name__
    names = forward_names(base_class(stack))
    reason = ""
    embeddings = _input_embeddings(stack)
    if getattr(hf, "main_input_name", "input_ids") != "input_ids":
        reason = f"its input is {hf.main_input_name}, not tokens"
    elif not isinstance(embeddings, nn.Module) or getattr(embeddings, "weight", None) is None:
        reason = f"{base_class(stack).__name__} has no single input embedding (two towers?)"
    elif method.acts == "attention" and "past_key_values" not in names:
        reason = f"{base_class(stack).__name__} takes no past_key_values to put a prefix in"
    elif method.acts != "attention" and "inputs_embeds" not in names:
        reason = f"{base_class(stack).__name__} takes no inputs_embeds"
    if reason:
        other = "PromptTuning, or " if method.acts == "attention" else ""
        raise ValueError(
            f"{method.label}: expected a transformer that takes further positions, got {kind}: "
            f"{reason}; use {other}an adapter of layers"
        )


def _input_embeddings(stack: Any) -> Any:
    """None where there is not one: transformers asks its classes and has no query before."""
    try:
        return stack.get_input_embeddings()
    # A class without one table raises the second, one whose own lookup expects other parts the
    # first. The caller refuses the model by name.
    except (AttributeError, NotImplementedError):
        return None


def _attention_layers(hf: Any, method: Any) -> tuple[tuple[int, int], ...]:
    """(heads, features) of the cached keys of every layer, as the config says."""
    config = hf.config.get_text_config(decoder=True)

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
    return ((heads, features or width // all_heads),) * layers


def _strips(hf: Any) -> bool:
    """Whether the prompt's positions come off: not under a head that reads the first position, and
    not in an encoder whose output is attended to.
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
