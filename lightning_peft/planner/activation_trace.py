"""What one training step keeps: a pass over fake tensors, storages counted while they live.

Long stacks of equal blocks are run at two lengths and extrapolated; so is the batch.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from lightning_peft.models.modules import head_names, hf_models

__all__ = [
    "ACTIVATIONS",
    "BACKWARD",
    "GRADIENTS",
    "LOGITS",
    "UNTRACEABLE",
    "Meter",
    "NoInputs",
    "Trace",
    "trace",
]

ACTIVATIONS, LOGITS = "activations", "logits and loss"
BACKWARD, GRADIENTS = "backward", "gradients"

# A pass over fake tensors meets a value it does not have, or a layer that refuses them.
UNTRACEABLE = (RuntimeError, TypeError)

_SHORT, _LONG = 2, 4  # blocks that are run of a longer stack
_ATTENTION = "lightning_peft_plan"


class NoInputs(ValueError):
    """The module cannot be run without data: nothing says what its inputs are, or it looks at
    values.
    """


@dataclass
class Trace:
    """Bytes by part when most of them live.

    Attributes:
        forward: At the fullest moment of forward.
        backward: At the fullest moment of backward, gradients made so far included.
    """

    forward: Mapping[str, float] = field(default_factory=dict)
    backward: Mapping[str, float] = field(default_factory=dict)

    def along(self, other: Trace, steps: float) -> Trace:
        """The line through this and `other`, `steps` of their distance from here."""
        return Trace(
            _along(self.forward, other.forward, steps), _along(self.backward, other.backward, steps)
        )


def _along(a: Mapping[str, float], b: Mapping[str, float], steps: float) -> dict[str, float]:
    line = {k: a.get(k, 0) + steps * (b.get(k, 0) - a.get(k, 0)) for k in {**a, **b}}
    return {k: max(0.0, n) for k, n in line.items()}


class Meter(TorchDispatchMode):
    """Sums the storages made under it while they live, by the label in force when they were made.

    Args:
        uncounted: Labels that do not decide which moment is the fullest, and are left out of it.
    """

    def __init__(self, uncounted: Sequence[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = ACTIVATIONS
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.phase = "forward"
        self._known: dict[int, tuple[Any, str, int]] = {}
        self._uncounted = set(uncounted)
        self._total = 0
        self._highest: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and count what it made."""
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._count(t)
        return out

    def know(self, tensor: Tensor) -> None:
        """Leave a tensor made before out of the count."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = (storage, "", 0)

    def relabel(self, tensor: Tensor, label: str) -> None:
        """What a tensor holds belongs to `label` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._known and self._known[key][1]:
            ref, old, n = self._known[key]
            self._add(old, -n)
            self._known[key] = (ref, label, n)
            self._add(label, n)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            entry = self._known.pop(key, None)
            if entry is not None:
                self._add(entry[1], -entry[2])

        self._known[key] = (weakref.ref(storage, gone), self.label, storage.nbytes())
        self._add(self.label, storage.nbytes())

    def _add(self, label: str, n: int) -> None:
        self.live[label] += n
        if label in self._uncounted:
            return
        self._total += n
        if self._total > self._highest[self.phase]:
            self._highest[self.phase] = self._total
            self.peaks[self.phase] = Counter(
                {k: v for k, v in self.live.items() if k not in self._uncounted}
            )


def trace(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    *,
    autocast: torch.dtype | None,
    checkpointing: bool = False,
    fused_loss: bool = False,
) -> Trace:
    """One training step of a prepared meta model.

    Raises:
        NoInputs: no Hugging Face model inside and no `example_input_array`.
    """
    stacks = _stacks(model)
    long = max((len(s) for s in stacks), default=0)
    how = (batch_size, sequence_length, autocast, checkpointing, fused_loss)
    if long <= _LONG:
        return _run(model, *how)
    try:
        with _shortened(stacks, _SHORT):
            short = _run(model, *how)
        with _shortened(stacks, _LONG):
            longer = _run(model, *how)
    except (RuntimeError, IndexError):  # it needs all of its blocks (a cache that counts them …)
        return _run(model, *how)
    return short.along(longer, (long - _SHORT) / (_LONG - _SHORT))


# ---- one run


def _run(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    autocast: torch.dtype | None,
    checkpointing: bool,
    fused_loss: bool,
) -> Trace:
    from torch._subclasses.fake_tensor import FakeTensorMode

    net, kind = _runnable(model)
    meter = Meter((LOGITS,) if fused_loss else ())
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_filled(model, meter))
        stack.enter_context(_plain_attention(net))
        stack.enter_context(_checkpointed(net, checkpointing))
        stack.enter_context(_labels(net, meter))
        inputs = _inputs(net, kind, batch_size, sequence_length)
        for p in model.parameters():
            if p.requires_grad:
                stack.callback(
                    p.register_post_accumulate_grad_hook(
                        lambda p: meter.relabel(p.grad, GRADIENTS)
                    ).remove
                )
        stack.enter_context(meter)
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            out = net(**inputs) if isinstance(inputs, dict) else net(*inputs)
            loss = _loss(out)
        del out
        meter.phase = "backward"
        if loss.requires_grad:
            loss.backward()
        del loss
    return Trace(meter.peaks.get("forward", {}), meter.peaks.get("backward", {}))


def _runnable(model: nn.Module) -> tuple[Any, str]:
    for _, net in hf_models(model):
        return net, "hf"
    if getattr(model, "example_input_array", None) is not None:
        return model, "example"
    raise NoInputs(
        f"{type(model).__name__}: expected a Hugging Face model inside or an example_input_array, "
        "found neither; set example_input_array to have activations counted"
    )


def _inputs(net: Any, kind: str, batch_size: int, sequence_length: int) -> Any:
    if kind == "example":

        def resized(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return torch.zeros(batch_size, *t.shape[1:], dtype=t.dtype)

        example = tree_map(resized, net.example_input_array)
        return example if isinstance(example, tuple | dict) else (example,)
    config = net.config.get_text_config() if hasattr(net.config, "get_text_config") else net.config
    accepted = inspect.signature(type(net).forward).parameters
    name = getattr(net, "main_input_name", "input_ids")
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
    inputs: dict[str, Any] = {}
    if name == "pixel_values":
        size = net.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs[name] = torch.zeros(batch_size, net.config.num_channels, height, width)
    elif name == "input_ids":
        inputs[name] = ids
    else:
        raise NoInputs(f"{type(net).__name__}: inputs {name!r} are not known to the planner")
    if "labels" in accepted:
        short = "SequenceClassification" in type(net).__name__ or name == "pixel_values"
        inputs["labels"] = torch.zeros(batch_size, dtype=torch.long) if short else ids
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in accepted or hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _loss(out: Any) -> Tensor:
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    first = next(t for t in tree_iter(out) if isinstance(t, Tensor))
    return first.float().mean()


# ---- the model as the run needs it, and back


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Outermost lists of blocks of one class; all of the same length, else none."""
    found: list[nn.ModuleList] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(i) for i in inside) or not isinstance(module, nn.ModuleList):
            continue
        if len(module) > _LONG and len({type(m) for m in module}) == 1:
            found.append(module)
            inside.append(f"{name}.")
    same = len({len(s) for s in found}) == 1 and any(True for _ in hf_models(model))
    return found if same else []


@contextmanager
def _shortened(stacks: Sequence[nn.ModuleList], n: int) -> Iterator[None]:
    kept = [s._modules for s in stacks]
    for s in stacks:
        s._modules = dict(list(s._modules.items())[:n])
    try:
        yield
    finally:
        for s, modules in zip(stacks, kept, strict=True):
            s._modules = modules


@contextmanager
def _filled(model: nn.Module, meter: Meter) -> Iterator[None]:
    """Fake tensors on the CPU in the place of meta tensors."""
    made: dict[int, Tensor] = {}
    undo: list[tuple[Any, str, Tensor]] = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, t in tensors.items():
                if t is None:
                    continue
                if id(t) not in made:
                    fresh = torch.empty(t.shape, dtype=t.dtype, device="cpu")
                    if isinstance(t, nn.Parameter):
                        fresh = nn.Parameter(fresh, requires_grad=t.requires_grad)
                    meter.know(fresh)
                    made[id(t)] = fresh
                undo.append((tensors, key, t))
    for tensors, key, t in undo:
        tensors[key] = made[id(t)]
    try:
        yield
    finally:
        for tensors, key, t in undo:
            tensors[key] = t


@contextmanager
def _plain_attention(net: Any) -> Iterator[None]:
    """Scaled-dot-product attention without a mask, as a batch without padding has it."""
    configs = {id(c): c for m in net.modules() if (c := getattr(m, "config", None)) is not None}
    changed = [
        c for c in configs.values() if getattr(c, "_attn_implementation_internal", None) == "sdpa"
    ]
    if changed:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    for c in changed:
        c._attn_implementation_internal = _ATTENTION
    try:
        yield
    finally:
        for c in changed:
            c._attn_implementation_internal = "sdpa"


@contextmanager
def _checkpointed(net: Any, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    if not hasattr(net, "gradient_checkpointing_enable"):
        raise ValueError(
            f"checkpointing=True: expected a Hugging Face model, got {type(net).__name__}; for "
            "other modules leave it out: what their forward checkpoints is seen"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 has another name for it
        net.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        try:
            yield
        finally:
            net.gradient_checkpointing_disable()


@contextmanager
def _labels(net: nn.Module, meter: Meter) -> Iterator[None]:
    """Labels change where the output head begins, and where its gradient has come through."""
    heads = head_names(net)
    first = next((m for n, m in net.named_modules() if n in heads), None)

    def backward(_: Tensor) -> None:
        meter.label = BACKWARD

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        meter.label = LOGITS
        for t in args:
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(backward)

    handle = None if first is None else first.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
