"""A site: one weight that an Edit acts on, and the two protocols that serve it.

A method sees a `Site` only: its canonical shape, its channels, its weight read through the storage.
It never sees whether the weight is packed (`Storage`) nor whether the layer is a convolution
(`LayerOps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lightning_peft.masked import held

if TYPE_CHECKING:
    from lightning_peft.edit import Edit, Rotation

__all__ = ["BlockSite", "LayerOps", "Reason", "SequenceSite", "Site", "Storage"]

#: Elements of experts that are read at once: 4 MB in fp32 stay in a CPU's second cache.
_SLAB = 1 << 20


@dataclass(frozen=True)
class Reason:
    """Why something was not done; printed in the report."""

    text: str

    def __str__(self) -> str:
        return self.text


class Storage(Protocol):
    """Where the frozen weight lives: read, written, counted and fused, a layer at a time."""

    label: str  # "dense", "nf4", "int8" …: the word the report prints

    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """Natural shape of the weight, never the packed one."""
        ...

    def numel(self, m: nn.Module, name: str) -> int:
        """Logical number of parameters, never of packed elements."""
        ...

    def nbytes(self, m: nn.Module, name: str) -> int:
        """Bytes held, scales included."""
        ...

    def dtype(self, m: nn.Module, name: str) -> torch.dtype:
        """Floating dtype that `read` returns when none is asked for."""
        ...

    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """The weight in its natural shape, detached; dense storage returns it without a copy. With
        `part` these of its leading axis alone: some experts of a stack.
        """
        ...

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Replace the weight (quantising it where the storage is quantised)."""
        ...

    def roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """What `read` would give after `write(W)`, without writing."""
        ...

    def snapshot(self, m: nn.Module, name: str) -> Any:
        """The stored bits, on the CPU."""
        ...

    def restore(self, m: nn.Module, name: str, bits: Any) -> None:
        """Put back what `snapshot` returned, bit for bit."""
        ...

    def densify(self, m: nn.Module, name: str, W: Tensor) -> Callable[[], None]:
        """Make the weight an ordinary dense parameter with this value; returns how to undo it."""
        ...

    def fused(self, form: frozenset[str], site: Site) -> Callable[..., Tensor] | Reason:
        """A kernel that runs base and edit of this form in one call, or why there is none."""
        ...


class LayerOps(Protocol):
    """How an Edit acts on one kind of layer. Canonical weight: M [*batch, out, in]."""

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """Paths of the weights of `m` that may be edited."""
        ...

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Canonical shape [*batch, out, in]."""
        ...

    def channels(self, m: nn.Module, name: str, natural: torch.Size) -> int:
        """Length of an `in_scale`: input features, or channels of a convolution."""
        ...

    def to_matrix(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Natural → canonical, a view where possible."""
        ...

    def from_matrix(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """Canonical → natural, a view where possible."""
        ...

    def bias(self, m: nn.Module, name: str) -> str | None:
        """Path of the bias that goes with this weight, None where there is none."""
        ...

    def op(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's function with another (natural) weight and bias."""
        ...

    def low_rank(self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: Any) -> Tensor:
        """scaling · B A acting on x, without forming B A."""
        ...

    def scale_in_matrix(self, m: nn.Module, M: Tensor, scale: Tensor) -> Tensor:
        """M diag(scale), `scale` per channel."""
        ...

    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The adapted forward; `run` is the forward of the class underneath."""
        ...

    def shadowed(self, m: nn.Module, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within it, the module reads these tensors by path instead of its own parameters."""
        ...

    @property
    def lookup(self) -> bool:
        """Whether the input is ids rather than features."""
        ...

    def supports(self, part: str) -> bool:
        """Whether this part of an Edit acts on activations here; otherwise it takes the weight
        path.
        """
        ...

    def rotate(self, m: nn.Module, x: Tensor, rotation: Rotation) -> Tensor:
        """X R."""
        ...

    # ---- exchange with Hugging Face peft; see layers/hf_layout.py
    def hf_refusal(self, m: nn.Module, name: str) -> str:
        """Why an adapter of this weight cannot be exchanged; "" where it can."""
        ...

    def hf_places(self, m: nn.Module, adapted: Sequence[str]) -> dict[str, str]:
        """Weight → path below the module under which its tensors stand in a file."""
        ...

    def hf_found(self, m: nn.Module, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
        """Place → weight, from what a file holds below this module."""
        ...

    def hf_by_parameter(self, m: nn.Module, name: str) -> bool:
        """Whether a config names this weight under ``target_parameters``."""
        ...

    def hf_swaps(self, m: nn.Module, name: str) -> bool:
        """Whether peft takes the weight for its transpose."""
        ...

    def hf_rank(self, m: nn.Module, name: str, r: int) -> int:
        """The rank that peft's config states for a canonical rank r."""
        ...

    def hf_pack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """Canonical → peft's shape."""
        ...

    def hf_unpack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """peft's shape → canonical."""
        ...


@dataclass
class Site:
    """One weight of one module.

    Attributes:
        module: The module whose forward reads the weight.
        parameter: Path of the weight inside the module, usually ``"weight"``.
        name: Fully qualified name of the module, for messages and patterns.
        ops: How an Edit acts on this kind of layer.
        storage: Where the weight lives.
    """

    module: nn.Module
    parameter: str
    name: str
    ops: LayerOps
    storage: Storage

    @property
    def label(self) -> str:
        """Name of the weight for messages."""
        return self.name if self.parameter == "weight" else f"{self.name}.{self.parameter}"

    @property
    def shape(self) -> torch.Size:
        """Canonical shape [*batch, out_features, in_features]."""
        natural = self.storage.shape(self.module, self.parameter)
        return self.ops.shape(self.module, self.parameter, natural)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Axes of the stored weight beyond [out, in] (a convolution's kernel), else empty."""
        natural = self.storage.shape(self.module, self.parameter)
        return () if self.batch_shape else tuple(natural[2:])

    @property
    def batch_shape(self) -> torch.Size:
        """Leading axes: empty, or [experts]."""
        return self.shape[:-2]

    @property
    def out_features(self) -> int:
        """Rows of the canonical weight."""
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        """Columns of the canonical weight (channels · kernel size for a convolution)."""
        return self.shape[-1]

    @property
    def channels(self) -> int:
        """Length of an `in_scale`."""
        natural = self.storage.shape(self.module, self.parameter)
        return self.ops.channels(self.module, self.parameter, natural)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the (dequantised) weight."""
        return self.storage.dtype(self.module, self.parameter)

    @property
    def device(self) -> torch.device:
        """Device of the stored weight."""
        return held(self.module, self.parameter).device

    @property
    def lookup(self) -> bool:
        """Whether the layer's input is ids (an embedding)."""
        return self.ops.lookup

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        return self.ops.bias(self.module, self.parameter) is not None

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Canonical weight [*batch, out, in], detached, dequantised where packed."""
        natural = self.storage.read(self.module, self.parameter, dtype)
        return self.ops.to_matrix(self.module, self.parameter, natural)

    def slabs(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(which experts, their canonical weights) a few at a time, never more than a quarter of a
        stack; a weight without experts comes at once.
        """
        if not self.batch_shape:
            yield slice(None), self.weight(dtype)
            return
        experts, out, width = self.shape
        most = max(1, min(_SLAB // (out * width), experts // 4))
        for first in range(0, experts, most):
            part = slice(first, first + most)
            natural = self.storage.read(self.module, self.parameter, dtype, part)
            yield part, self.ops.to_matrix(self.module, self.parameter, natural)

    def write(self, M: Tensor) -> None:
        """Store a canonical weight."""
        natural = self.ops.from_matrix(self.module, self.parameter, M)
        self.storage.write(self.module, self.parameter, natural)

    def roundtrip(self, M: Tensor) -> Tensor:
        """The canonical weight as it would read after `write(M)`."""
        natural = self.ops.from_matrix(self.module, self.parameter, M)
        read = self.storage.roundtrip(self.module, self.parameter, natural)
        return self.ops.to_matrix(self.module, self.parameter, read)

    def edited(self, edits: Sequence[Edit], W: Tensor | None = None) -> Tensor:
        """Canonical weight after `edits`, applied in order."""
        M = self.weight() if W is None else W
        for edit in edits:
            M = edit.matrix(M, self.ops, self)
        return M


@dataclass
class BlockSite(Site):
    """Where an added module acts.

    Attributes:
        width_in: Features that it reads.
        width_out: Features that it adds to.
        role: ``"output"``: y + u(y); ``"norm"``: a normalisation f(r) becomes f(r + u(f(r)));
            ``"beside"``: y + u(x).
    """

    width_in: int = 0
    width_out: int = 0
    role: str = "output"

    @property
    def shape(self) -> torch.Size:
        """[width_out, width_in]."""
        return torch.Size((self.width_out, self.width_in))


@dataclass
class SequenceSite(Site):
    """A model, or a part of one, that takes further positions.

    Attributes:
        width: Features of an embedding.
        layers: (heads, features of a head) of the keys and values of every attention layer.
        strip: Whether the further positions are taken off the output again.
        embedding: Path of the module from ids to embeddings, inside the site's module; "" for a
            module of the user's that is named.
        task: peft's word for the model's task.
        hidden: Features that attention reads, where a gate asks for them.
    """

    width: int = 0
    layers: tuple[tuple[int, int], ...] = ()
    strip: bool = True
    embedding: str = ""
    task: str = ""
    hidden: int = 0

    @property
    def shape(self) -> torch.Size:
        """[features of a position, attention layers]."""
        return torch.Size((self.width, len(self.layers)))

    @property
    def embeddings(self) -> Any:
        """The module from ids to embeddings."""
        return self.module.get_submodule(self.embedding)

    @property
    def vocabulary(self) -> int:
        """Number of embeddings; 0 in a module of the user's that is no table."""
        table = self.embeddings
        if not self.embedding and not isinstance(table, nn.Embedding):
            return 0
        return int(table.weight.shape[0])

    def embed(self, ids: Tensor) -> Tensor:
        """What the text's tokens enter with [..., width], detached, fp32, on the CPU (or where
        `ids` are); ids beyond the vocabulary are the last one.
        """
        embeddings = self.embeddings
        ids_there = ids.clamp(max=self.vocabulary - 1).to(embeddings.weight.device)
        with torch.no_grad():
            # A module of the user's is the site itself, whose forward would add the prompt.
            found = embeddings(ids_there) if self.embedding else embeddings.weight[ids_there]
            rows: Tensor = found.float()
        return rows if rows.device.type == "meta" else rows.to(ids.device)

    @property
    def hf_submodules(self) -> int:
        """What peft takes for the number of stacks where a file does not say."""
        return 2 if self.task == "SEQ_2_SEQ_LM" else 1

    def hf_config(self, token_dim: int) -> dict[str, Any]:
        """What a config of peft says about the model."""
        return {
            "task_type": self.task,
            "auto_mapping": None,
            "token_dim": token_dim,
            "num_layers": len(self.layers) or 1,
            "num_attention_heads": 1,
            "num_transformer_submodules": 1,
        }
