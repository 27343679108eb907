"""The model that is planned for: from a configuration or a module to a copy on the meta device."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.adapters.adoption import adopted_layers
from lightning_peft.adapters.attach import attach
from lightning_peft.adapters.quantize import plan_quantization
from lightning_peft.core.modules import parameter_at
from lightning_peft.core.names import in_adapter
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.methods.base import Method
from lightning_peft.models.modules import hf_models, input_embeddings, output_embeddings
from lightning_peft.models.packed_layers import declare_packed, dense_patterns, released_config
from lightning_peft.storage import StorageConfig, held_tensors, storage_for
from lightning_peft.storage.registry import released_formats

__all__ = ["PRECISIONS", "Sizes", "Unmade", "count", "meta_model", "prepare"]

# precision → (dtype of the base, None as the module has it; dtype of what is trained; autocast)
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype, torch.dtype | None]] = {
    "bf16": (torch.bfloat16, torch.float32, torch.bfloat16),
    "16": (torch.float16, torch.float32, torch.float16),
    "bf16-mixed": (None, torch.float32, torch.bfloat16),
    "16-mixed": (None, torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16, None),
    "16-true": (torch.float16, torch.float16, None),
    "32-true": (torch.float32, torch.float32, None),
}

_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "hidden_sizes", "embed_dim")


@dataclass
class Sizes:
    """Elements and bytes of one model as it would be trained.

    Attributes:
        base: Storage or dtype → (logical elements, bytes) of what is not trained.
        adapters: Bytes of adapters, buffers included.
        full: Bytes of weights that are trained in full: copies, selected parameters, all weights.
        trainable: Trained elements.
        total: Logical elements, adapters included.
        dequantised: Elements of the largest packed weight.
        block: Bytes of the largest block, what it trains included.
        block_trained: Bytes of what that block trains.
        end: Bytes of the larger one of embedding and head; of both if they are tied.
        rest: Bytes of what is outside of blocks, embedding and head.
        kv_width: Features of the keys of one layer.
        trained_bytes: Bytes of the trained tensors.
    """

    base: dict[str, tuple[int, int]] = field(default_factory=dict)
    adapters: int = 0
    full: int = 0
    trainable: int = 0
    total: int = 0
    dequantised: int = 0
    block: int = 0
    block_trained: int = 0
    end: int = 0
    rest: int = 0
    kv_width: int = 0
    trained_bytes: int = 0

    @property
    def base_bytes(self) -> int:
        """Bytes of the frozen base."""
        return sum(n for _, n in self.base.values())


@dataclass(frozen=True)
class Unmade:
    """Weights that a storage would hold, were there values to quantise.

    Attributes:
        label: The storage's label.
        nbytes: Bytes by id of the dense parameter.
    """

    label: str = ""
    nbytes: dict[int, int] = field(default_factory=dict)


def meta_model(model_or_config: Any) -> nn.Module:
    """A copy on the meta device that may be changed.

    Args:
        model_or_config: A module, a Hugging Face configuration, its dictionary, the path of a
            config.json or of the directory that holds it, or a hub id in the local cache.

    Raises:
        ValueError: an unknown architecture, a configuration without sizes.
    """
    if isinstance(model_or_config, nn.Module):
        return _to_meta(model_or_config)
    config = model_or_config
    if isinstance(config, str | Path):  # a path or a hub id
        config = _read(Path(config))
    if isinstance(config, dict):
        config = _config(config)
    if not isinstance(getattr(config, "model_type", None), str):
        raise ValueError(
            "estimate_memory: expected a module, a Hugging Face configuration or the path of a "
            f"config.json, got {type(model_or_config).__name__}; build the module under "
            'torch.device("meta") and give it'
        )
    return _build(config)


def _to_meta(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    trainer = vars(model).get("_trainer")
    if trainer is not None:
        memo[id(trainer)] = None
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    return copy.deepcopy(model, memo)


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        file = _cached(str(path)) or file
    if not file.is_file():
        raise ValueError(
            f"model: expected a config.json, a directory with one or a hub id in the local cache, "
            f"found none at {str(path)!r}; give the path of a model saved with save_pretrained, or "
            "download the model first (hf download)"
        )
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON ({error}); give the model's config.json") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an object of settings, got {type(found).__name__}")
    return found


def _cached(name: str) -> Path | None:
    """The config.json of a hub id in the local cache; nothing is downloaded."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def _config(data: dict[str, Any]) -> Any:
    if find_spec("transformers") is None:
        raise ValueError(
            "plan: expected transformers to read a config.json with, found none; pip install "
            "transformers, or give estimate_memory a module"
        )
    from transformers import CONFIG_MAPPING

    kind = data.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type: expected an architecture that transformers knows, got {kind!r}; update "
            'transformers, or build the module under torch.device("meta") and give it to '
            "estimate_memory"
        )
    kinds = [data, *(v for v in data.values() if isinstance(v, dict))]
    names = set(getattr(CONFIG_MAPPING[kind], "attribute_map", {}).values()) | set(_SIZES)
    if not any(name in part for part in kinds for name in names):
        raise ValueError(
            f"config of {kind!r}: expected its sizes (hidden_size, num_hidden_layers …), found "
            f"only {sorted(data)}; give the model's full config.json"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(data)
    except Exception as error:  # huggingface_hub's own types for a field of a wrong kind
        raise ValueError(
            f"config of {kind!r}: {error}; give the model's full config.json"
        ) from None


def _build(config: Any) -> nn.Module:
    import transformers

    config = copy.deepcopy(config)
    names = [n for n in getattr(config, "architectures", None) or () if hasattr(transformers, n)]
    makers: list[Any] = [getattr(transformers, n) for n in names[:1]]
    both = getattr(config, "is_encoder_decoder", False)
    first = ("Seq2SeqLM", "SpeechSeq2Seq") if both else ("MaskedLM", "CausalLM")
    for auto in (*first, "ImageClassification", ""):
        cls = getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel")
        if type(config) in cls._model_mapping:
            makers.append(cls.from_config)
    if not makers:
        raise ValueError(
            f"model_type: expected an architecture that transformers can build, got "
            f'{config.model_type!r}; build the module under torch.device("meta") and give it'
        )
    try:
        with torch.device("meta"):
            model: nn.Module = makers[0](config)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"config of {config.model_type!r}: expected sizes that make a model, got an error "
            f"({error}); give the model's full config.json"
        ) from error
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    model = model.to(dtype).train()
    released = released_config(config)
    if released is not None and released_formats(released):  # as `load_packed` loads it
        for layer in declare_packed(model, released, dense_patterns(model, released)):
            layer.hold(dtype)
    return model


def prepare(
    model: nn.Module,
    methods: Sequence[Method] | None,
    quantization: StorageConfig | None,
    precision: str,
    modules_to_save: Sequence[str] = (),
) -> Unmade:
    """Bring a meta model to what is trained, in place; `methods` None is plain full fine-tuning.

    Returns:
        What a storage that quantises values only would hold; its weights stay dense here.
    """
    base, trained, _ = PRECISIONS[precision]
    with adopted_layers(model):  # before a cast would reach their scales
        return _prepare(model, methods, quantization, base, trained, modules_to_save)


def _prepare(
    model: nn.Module,
    methods: Sequence[Method] | None,
    quantization: StorageConfig | None,
    base: torch.dtype | None,
    trained: torch.dtype,
    modules_to_save: Sequence[str],
) -> Unmade:
    unmade = Unmade()
    if methods is None:
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
    if base is not None:
        model.to(base)
    if methods is not None:
        if quantization is not None and not storage_for(quantization).quantizes_meta:
            unmade = _unmade(model, quantization, modules_to_save)
            quantization = None
        attach(
            model,
            [_plain_start(m) for m in methods],
            quantization=quantization,
            modules_to_save=modules_to_save,
        )
    for p in model.parameters():
        if p.requires_grad and p.is_floating_point():
            p.data = p.data.to(trained)
    return unmade


def _unmade(
    model: nn.Module, quantization: StorageConfig, modules_to_save: Sequence[str]
) -> Unmade:
    plan = plan_quantization(model, quantization, keep=list(modules_to_save))
    nbytes = {}
    for _, module, layout in plan.layers:
        for name in layout.names:
            W = parameter_at(module, name)
            shape = W.mT.shape if layout.transposed else W.shape
            bits = plan.storage.bits_per_weight(shape, quantization)
            nbytes[id(W)] = round(W.numel() * bits / 8)
    return Unmade(plan.storage.label, nbytes)


def _plain_start(method: Method) -> Method:
    """Start values do not matter here, and there are no weights to take them from."""
    named = {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    if getattr(method, "starts_from_weight", False) and "init" in named:
        try:
            return dataclasses.replace(method, init="default")  # type: ignore[type-var]
        except ValueError:  # its starts have other names
            return method
    return method


def count(model: nn.Module, unmade: Unmade) -> Sizes:
    """Elements and bytes of a prepared model."""
    sizes = Sizes()
    base: Counter[str] = Counter()
    logical: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in model.named_modules():
        inside = in_adapter(name)
        quantized = held_tensors(module)
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for key, t in tensors:
            if t is None or id(t) in seen:
                continue
            seen.add(id(t))
            nbytes = t.numel() * t.element_size()
            numel = t.numel() if isinstance(t, nn.Parameter) else 0
            if t.requires_grad or inside:
                in_full = not inside or isinstance(module, CopyAdapter)
                sizes.full += nbytes if in_full else 0
                sizes.adapters += 0 if in_full else nbytes
                sizes.trained_bytes += nbytes if t.requires_grad else 0
                sizes.trainable += numel if t.requires_grad else 0
                sizes.total += numel
                continue
            label = str(t.dtype).removeprefix("torch.")
            held = quantized.get(key)
            if held is not None:
                label, numel = held.storage.label, 0
                if key == held.weight:
                    shape = held.storage.shape(module, key)
                    numel = shape.numel()
                    sizes.dequantised = max(sizes.dequantised, shape[-2:].numel())
            elif id(t) in unmade.nbytes:
                label, nbytes = unmade.label, unmade.nbytes[id(t)]
            base[label] += nbytes
            logical[label] += numel
            sizes.total += numel
    sizes.base = {label: (logical[label], n) for label, n in base.items()}
    _measure_units(model, sizes)
    return sizes


def _measure_units(model: nn.Module, sizes: Sizes) -> None:
    """Set the bytes of what FSDP gathers at once, and the width of keys."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    blocks = {id(b): b for m in lists for b in m}
    inner = {id(m) for b in blocks.values() for m in b.modules() if m is not b}
    outermost = [_bytes(b) for key, b in blocks.items() if key not in inner]
    whole, trained = _bytes(model)
    if not outermost:
        sizes.block, sizes.block_trained = whole, trained
        return
    sizes.block, sizes.block_trained = max(outermost)
    ends: dict[int, int] = {}
    for _, net in hf_models(model):
        for module in (input_embeddings(net), output_embeddings(net)):
            weight = None if module is None else module._parameters.get("weight")
            if module is not None and weight is not None:
                ends[id(weight)] = max(ends.get(id(weight), 0), _bytes(module)[0])
        config = net.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 0
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        hidden = getattr(config, "hidden_size", None) or 0
        head = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
        sizes.kv_width = max(sizes.kv_width, kv_heads * head)
    sizes.end = max(ends.values(), default=0)
    sizes.rest = max(0, whole - sum(n for n, _ in outermost) - sum(ends.values()))


def _bytes(module: nn.Module) -> tuple[int, int]:
    pairs = [(p.numel() * p.element_size(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in pairs), sum(n for n, trained in pairs if trained)
