"""TrainableTokens: W'[ids] = rows, the other rows of the embedding stay frozen. peft 0.21,
``TrainableTokensConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.names import matches_suffix
from lightning_peft.core.replaced_rows import ReplacedRows
from lightning_peft.core.site import Site
from lightning_peft.methods.base import FromWeight, HFFormat
from lightning_peft.methods.exchange import config_keys
from lightning_peft.methods.registry import register
from lightning_peft.methods.token_indices import (
    TokenIndices,
    check_token_indices,
    require_token_rows,
)

__all__ = ["TrainableTokens"]


@register
@dataclass(frozen=True)
class TrainableTokens(FromWeight):
    """Some rows of the input embedding, trained; no gradient, state or copy for the others.

    A head that is tied to the embedding reads the same rows, and stays tied.

    Attributes:
        token_indices: Token ids; the embedding is then the model's input embedding, or what
            `target_modules` names. Or layer name → token ids, for a separate head too. Tied layers
            that are named with different ids get rows of their own each.
        tied: Whether layers tied to the embedding read its rows.

    Raises:
        ValueError: no token id, a negative one, or one that occurs twice.
    """

    token_indices: TokenIndices = field(default_factory=list)
    tied: bool = True

    hf: ClassVar[HFFormat] = HFFormat(
        peft_type="TRAINABLE_TOKENS",
        tensors={"rows": "trainable_tokens_delta"},
        config=config_keys("token_indices"),
        own_defaults=True,
        inert={"init_weights": True},
        unwritten=("ids",),
        saves_modules=False,
    )
    start_dtype: ClassVar[torch.dtype | None] = None  # reads a large table without a copy

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_token_indices(f"{self.label} token_indices", self.token_indices)

    def named_layers(self) -> Mapping[str, Sequence[int]]:
        """Layer name → token ids; empty for ids of the input embedding."""
        return self.token_indices if isinstance(self.token_indices, dict) else {}

    def ids(self, site: Site) -> list[int]:
        """Token ids of a site, ascending."""
        if not isinstance(self.token_indices, dict):
            return sorted(self.token_indices)
        at = (site.tied_to or site).name
        found = [ids for name, ids in self.token_indices.items() if matches_suffix(at, [name])]
        return sorted(found[0]) if found else []

    @property
    def adapts_tied(self) -> bool:
        """Return `tied`."""
        return self.tied

    def check(self, site: Site) -> None:
        """Token ids against the size of the vocabulary; the layer's kind."""
        require_token_rows(self.label, site, self.ids(site))

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Return `rows` [k, width] from the weight, or nothing if a tied embedding holds them."""
        if site.tied_to is not None:
            return {}
        width = site.out_features if site.is_embedding else site.in_features
        return {"rows": torch.zeros(len(self.ids(site)), width)}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """ids [k]."""
        return {"ids": torch.tensor(self.ids(site))}

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """The weight's rows."""
        ids = p["ids"].to(W.device)
        p["rows"] = (W.mT if site.is_embedding else W)[ids].float()
        return None

    def replaced_ids(self, site: Site) -> Sequence[int]:
        """Return the ids of the trained rows."""
        return self.ids(site)

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """Rows in place of the weight's."""
        return Edit(replaced=ReplacedRows(p["rows"], p["ids"], site.is_embedding))
