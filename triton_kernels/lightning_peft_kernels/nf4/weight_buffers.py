"""Where dequantised weights live while a product reads them.

Three ways to spend less on them, each equal bit for bit to a fresh dequantisation:
    a buffer of one thread, used again and again on a CPU (fresh pages cost more than the values);
    reuse: a weight made in the recomputation of an activation checkpoint is kept for the backward
        of the same layer, which follows at once (one dequantisation of three less, for the memory
        of the checkpointed block's dense weights);
    prefetch: on CUDA the weight of the layer that came next last time is made on a second stream
        while this layer's product runs, in two buffers that take turns.
`configure` switches the last two, which are off unless asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft_kernels.nf4.cpu import fresh
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit

__all__ = [
    "Prefetch",
    "configure",
    "keeps_for_backward",
    "kept_weights",
    "release",
    "stacked_weights",
    "thread_buffer",
    "weights",
]


class Settings(NamedTuple):
    """What is on."""

    reuse: bool = False
    prefetch: bool = False


_settings = [Settings()]
_local = threading.local()
_prefetchers: dict[torch.device, Prefetch] = {}


def configure(*, reuse: bool | None = None, prefetch: bool | None = None) -> Settings:
    """Switch what is given; returns what was on before."""
    before = _settings[0]
    _settings[0] = Settings(
        before.reuse if reuse is None else reuse,
        before.prefetch if prefetch is None else prefetch,
    )
    return before


def release() -> None:
    """Free the buffers and what is known about the order of layers."""
    _local.__dict__.clear()
    _prefetchers.clear()


def weights(
    q: Packed4bit, shape: Sequence[int], dtype: torch.dtype, kind: str, block_size: int
) -> Tensor:
    """W in `dtype` for products that follow at once; the next call may write over it."""
    device = q.packed.device
    plain = type(q.packed) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    # A product that is recorded (create_graph) keeps the weight.
    if plain and not torch.is_grad_enabled():
        if device.type == "cpu":
            out = thread_buffer(torch.Size(shape).numel(), dtype).view(tuple(shape))
            return dequantize_4bit(q, shape, dtype, kind=kind, block_size=block_size, out=out)
        if device.type == "cuda" and _settings[0].prefetch and not _capturing():
            own = _prefetchers.setdefault(device, Prefetch(device))
            return own.take(q, tuple(shape), dtype, kind, block_size)
    return kept_weights(q, shape, dtype, kind, block_size)


def kept_weights(
    q: Packed4bit, shape: Sequence[int], dtype: torch.dtype, kind: str, block_size: int
) -> Tensor:
    """W in a tensor of its own, for as long as it is wanted."""
    return dequantize_4bit(q, shape, dtype, kind=kind, block_size=block_size)


def stacked_weights(
    packed: Sequence[Packed4bit],
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    *,
    keep: bool,
) -> Tensor:
    """Weights of one width below each other, [ΣN, K], each dequantised into its own rows; unless
    `keep`, the next call may write over them.
    """
    rows, K = [int(shape[0]) for shape in shapes], int(shapes[0][1])
    how: dict[str, Any] = {"kind": kind, "block_size": block_size}
    if torch.compiler.is_compiling():
        parts = zip(packed, shapes, strict=True)
        return torch.cat([dequantize_4bit(q, shape, dtype, **how) for q, shape in parts])
    first = packed[0].packed
    if keep or first.device.type != "cpu" or torch.is_grad_enabled():
        W = torch.empty(sum(rows), K, dtype=dtype, device=first.device)
    else:
        W = thread_buffer(sum(rows) * K, dtype).view(sum(rows), K)
    for q, part, shape in zip(packed, W.split(rows), shapes, strict=True):
        dequantize_4bit(q, shape, dtype, out=part, **how)
    return W


def keeps_for_backward() -> bool:
    """Whether a forward that runs now should save its dense weight.

    True under a checkpoint: with the non-reentrant one in both runs, so that both save the same
    tensors (the first run's are dropped); with the reentrant one in the recomputation. Tensors
    saved under anybody else's hooks are not added to.
    """
    if not _settings[0].reuse or torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return bool(torch._C._current_graph_task_id() >= 0)  # type: ignore[attr-defined]
    return str(getattr(hooks[0], "__module__", "")) == "torch.utils.checkpoint"


def thread_buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """Elements [numel] on the CPU for one use that follows at once; the next call in this thread
    may write over them.
    """
    size = numel * dtype.itemsize
    held: Tensor | None = getattr(_local, "buffer", None)
    if held is None or held.nbytes < size:
        _local.buffer = None  # freed before the larger one is made
        with torch.inference_mode(False):
            held = _local.buffer = fresh((numel,), dtype)
    return held[: -(-size // held.itemsize)].view(dtype)[:numel]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


Key = tuple[int, int, tuple[int, ...], torch.dtype]


class Prefetch:
    """Two buffers and a second stream of one device.

    Layer i+1 is written into one buffer while the product of layer i reads the other. The second
    stream waits for everything that the first was given before layer i's product, so the product
    of layer i−1, which read the buffer, is over. On a CPU there is one stream, for the tests.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor | None] = [None, None]
        self.turn = 0
        self.following: dict[tuple[Key, Key], tuple[Any, ...]] = {}
        self.before: Key | None = None
        self.current: tuple[Key, Tensor] | None = None
        self.ready: tuple[Key, Tensor, Any] | None = None
        self.hits = 0

    def take(
        self, q: Packed4bit, shape: tuple[int, ...], dtype: torch.dtype, kind: str, block_size: int
    ) -> Tensor:
        """W, made before or now; then the one that followed last time is begun.

        Two layers tell what follows: forward and backward pass the same layer in two directions.
        """
        key = self._key(q, shape, dtype)
        current = self.current
        if current is not None and self.before is not None:
            self.following[self.before, current[0]] = (q, shape, dtype, kind, block_size)
        if current is not None and current[0] == key:
            W = current[1]
            self.hits += 1
        else:
            W = self._next(key, q, shape, dtype, kind, block_size)
        self.before, self.current = None if current is None else current[0], (key, W)
        coming = None if self.before is None else self.following.get((self.before, key))
        if coming is not None and self._key(*coming[:3]) not in (key, self._ready_key()):
            self._begin(coming)
        return W

    def _ready_key(self) -> Key | None:
        return None if self.ready is None else self.ready[0]

    def _next(
        self,
        key: Key,
        q: Packed4bit,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kind: str,
        block_size: int,
    ) -> Tensor:
        ready, self.ready = self.ready, None
        self.turn ^= 1
        if ready is not None and ready[0] == key:
            self.hits += 1
            if self.stream is not None:
                torch.cuda.current_stream(self.device).wait_event(ready[2])
            return ready[1]
        if ready is not None and self.stream is not None:  # a guess that was wrong
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return self._into(self.turn, q, shape, dtype, kind, block_size)

    def _begin(self, coming: tuple[Any, ...]) -> None:
        side = self.stream
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side) if side is not None else nullcontext():
            W = self._into(self.turn ^ 1, *coming)
            done = side.record_event() if side is not None else None
        self.ready = (self._key(*coming[:3]), W, done)

    def _into(
        self,
        turn: int,
        q: Packed4bit,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kind: str,
        block_size: int,
    ) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        held = self.buffers[turn]
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8, device=self.device)
            if self.stream is not None:  # made on one stream, used on both
                held.record_stream(self.stream)
                held.record_stream(torch.cuda.default_stream(self.device))
            self.buffers[turn] = held
        out = held[:size].view(dtype).view(shape)
        return dequantize_4bit(q, shape, dtype, kind=kind, block_size=block_size, out=out)

    @staticmethod
    def _key(q: Packed4bit, shape: tuple[int, ...], dtype: torch.dtype) -> Key:
        """Bytes written over since are another weight."""
        version = 0 if q.packed.is_inference() else q.packed._version
        return q.packed.data_ptr(), version, shape, dtype
