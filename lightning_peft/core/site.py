"""Sites: the weights that an Edit acts on, and the places of added modules and prompts.

A method sees a `Site` only: its canonical shape, its channels, its weight read through the storage.
It never sees whether the weight is packed (`Storage`) nor whether the layer is a convolution
(`LayerOps`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.names import quoted, strip_compile
from lightning_peft.core.protocols import LayerOps, Storage
from lightning_peft.core.pruning_masks import held

__all__ = ["BlockSite", "RouterSite", "SequenceSite", "Site"]

#: Elements of experts that are read at once: 4 MB in fp32 stay in a CPU's second cache.
_SLAB = 1 << 20


@dataclass
class Site:
    """One weight of one module.

    Attributes:
        module: The module whose forward reads the weight.
        parameter: Path of the weight inside the module, usually ``"weight"``.
        name: Fully qualified name of the module, for messages and patterns.
        ops: How an Edit acts on this kind of layer.
        storage: Where the weight lives.
        tied_to: The embedding's site whose trained tensors this site reads: a method that keeps
            tied weights tied has one set of tensors for both.
    """

    module: nn.Module
    parameter: str
    name: str
    ops: LayerOps
    storage: Storage
    tied_to: Site | None = field(default=None, kw_only=True)

    @property
    def label(self) -> str:
        """Name of the weight for messages and files, without torch.compile's wrappers."""
        own = self.name if self.parameter == "weight" else f"{self.name}.{self.parameter}"
        return strip_compile(own)

    @property
    def quoted(self) -> str:
        """The label as messages write it; of a model that is itself one layer, ``the model``."""
        return quoted(self.label)

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
    def wide_dtype(self) -> torch.dtype:
        """Dtype that changes of the weight are computed in: fp32, fp64 if the weight is fp64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the stored weight."""
        return held(self.module, self.parameter).device

    def shares_weight_with(self, other: Site) -> bool:
        """Whether the weights are one tensor (tied layers)."""
        return held(self.module, self.parameter) is held(other.module, other.parameter)

    @property
    def is_embedding(self) -> bool:
        """Whether the layer's input is ids (an embedding)."""
        return self.ops.is_embedding

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        return self.ops.bias(self.module, self.parameter) is not None

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The layer's bias [out], detached; None without one."""
        path = self.ops.bias(self.module, self.parameter)
        return None if path is None else held(self.module, path).detach().to(dtype)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Canonical weight [*batch, out, in], detached, dequantised where packed."""
        natural = self.storage.read(self.module, self.parameter, dtype)
        return self.ops.to_canonical(self.module, self.parameter, natural)

    def iter_expert_chunks(
        self, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
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
            yield part, self.ops.to_canonical(self.module, self.parameter, natural)

    def write(self, M: Tensor) -> None:
        """Store a canonical weight."""
        natural = self.ops.from_canonical(self.module, self.parameter, M)
        self.storage.write(self.module, self.parameter, natural)

    def quantization_roundtrip(self, M: Tensor) -> Tensor:
        """The canonical weight as it would read after `write(M)`."""
        natural = self.ops.from_canonical(self.module, self.parameter, M)
        read = self.storage.quantization_roundtrip(self.module, self.parameter, natural)
        return self.ops.to_canonical(self.module, self.parameter, read)


@dataclass
class BlockSite(Site):
    """Where an added module acts.

    Attributes:
        width_in: Features that it reads.
        width_out: Features that it adds to.
        role: ``"output"``: y + u(y); ``"norm"``: a normalisation f(r) becomes f(r + u(f(r)));
            ``"parallel"``: y + u(x).
    """

    width_in: int = 0
    width_out: int = 0
    role: Literal["output", "norm", "parallel"] = "output"

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


@dataclass
class RouterSite(Site):
    """A model whose hidden states say which adapters act, and how much.

    Attributes:
        width: Features of a hidden state.
        layers: The layers that the adapters lie in, in the order of `named_modules()`.
    """

    width: int = 0
    layers: tuple[nn.Module, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """[layers, features of a hidden state]."""
        return torch.Size((len(self.layers), self.width))
