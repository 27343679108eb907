"""Elements and bytes of a prepared model, by what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_peft.core.names import in_adapter
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.models.modules import hf_models, input_embeddings, output_embeddings
from lightning_peft.planner.preparation import Unmade
from lightning_peft.storage import held_tensors

__all__ = ["Sizes", "count"]


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
        embedding: Bytes of the embedding; 0 if it is tied to the head.
        head: Bytes of the output head; 0 if it is tied to the embedding.
        tied: Bytes of embedding and head if they are tied.
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
    embedding: int = 0
    head: int = 0
    tied: int = 0
    rest: int = 0
    kv_width: int = 0
    trained_bytes: int = 0

    @property
    def base_bytes(self) -> int:
        """Bytes of the frozen base."""
        return sum(n for _, n in self.base.values())


def count(model: nn.Module, unmade: Unmade) -> Sizes:
    """Elements and bytes of a prepared model."""
    sizes = Sizes()
    for name, module, key, t in _tensors(model):
        inside = in_adapter(name)
        if t.requires_grad or inside:
            _add_adapted(sizes, t, in_full=not inside or isinstance(module, CopyAdapter))
        else:
            _add_base(sizes, module, key, t, unmade)
    _measure_units(model, sizes)
    return sizes


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield every parameter and buffer once, with its module."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                yield name, module, key, t


def _nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _elements(t: Tensor) -> int:
    """Elements of a parameter; those of buffers do not count."""
    return t.numel() if isinstance(t, nn.Parameter) else 0


def _add_adapted(sizes: Sizes, t: Tensor, *, in_full: bool) -> None:
    """Count a tensor of an adapter, or a weight that is trained in full."""
    nbytes, numel = _nbytes(t), _elements(t)
    sizes.full += nbytes if in_full else 0
    sizes.adapters += 0 if in_full else nbytes
    sizes.trained_bytes += nbytes if t.requires_grad else 0
    sizes.trainable += numel if t.requires_grad else 0
    sizes.total += numel


def _add_base(sizes: Sizes, module: nn.Module, key: str, t: Tensor, unmade: Unmade) -> None:
    """Count a frozen tensor, packed weights by their logical elements."""
    label, nbytes, numel = str(t.dtype).removeprefix("torch."), _nbytes(t), _elements(t)
    held = held_tensors(module).get(key)
    if held is not None:
        label, numel = held.storage.label, 0
        if key == held.weight:
            shape = held.storage.shape(module, key)
            numel = shape.numel()
            sizes.dequantised = max(sizes.dequantised, shape[-2:].numel())
    elif id(t) in unmade.nbytes:
        label, nbytes = unmade.label, unmade.nbytes[id(t)]
    elements, total = sizes.base.get(label, (0, 0))
    sizes.base[label] = elements + numel, total + nbytes
    sizes.total += numel


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
    inputs: dict[int, int] = {}
    outputs: dict[int, int] = {}
    for _, net in hf_models(model):
        for module, found in (
            (input_embeddings(net), inputs),
            (output_embeddings(net), outputs),
        ):
            weight = None if module is None else module._parameters.get("weight")
            if module is not None and weight is not None:
                found[id(weight)] = max(found.get(id(weight), 0), _bytes(module)[0])
        config = net.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 0
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        hidden = getattr(config, "hidden_size", None) or 0
        head = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
        sizes.kv_width = max(sizes.kv_width, kv_heads * head)
    tied = inputs.keys() & outputs.keys()
    sizes.tied = sum(max(inputs[i], outputs[i]) for i in tied)
    sizes.embedding = sum(n for i, n in inputs.items() if i not in tied)
    sizes.head = sum(n for i, n in outputs.items() if i not in tied)
    ends = sizes.tied + sizes.embedding + sizes.head
    sizes.rest = max(0, whole - sum(n for n, _ in outermost) - ends)


def _bytes(module: nn.Module) -> tuple[int, int]:
    pairs = [(p.numel() * p.element_size(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in pairs), sum(n for n, trained in pairs if trained)
