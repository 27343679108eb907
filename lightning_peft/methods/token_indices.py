"""Token ids as methods take them, checked."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_peft.core.site import Site
from lightning_peft.methods.checks import require

__all__ = ["TokenIndices", "check_token_indices", "require_token_rows"]

#: Token ids of the input embedding, or layer name → its token ids.
TokenIndices = list[int] | dict[str, list[int]]


def check_token_indices(label: str, indices: TokenIndices) -> None:
    """Raise ValueError unless these are token ids, or token ids by layer name."""
    lists = list(indices.items()) if isinstance(indices, dict) else [("", indices)]
    require(
        bool(lists) and all(isinstance(name, str) for name, _ in lists),
        f"{label}: expected token ids, or layer names with token ids, got {indices!r}",
    )
    for name, ids in lists:
        at = f"{label} {name!r}" if name else label
        require(
            isinstance(ids, list | tuple) and len(ids) > 0,
            f"{at}: expected a list of token ids, got {ids!r}; take them from the tokenizer "
            "(tokenizer.convert_tokens_to_ids)",
        )
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        require(not wrong, f"{at}: expected token ids of at least 0, got {wrong[:5]}; remove them")
        twice = sorted({i for i in ids if ids.count(i) > 1})
        require(not twice, f"{at}: expected each token id once, got {twice[:5]} more than once")


def require_token_rows(label: str, site: Site, ids: Sequence[int]) -> None:
    """Raise ValueError unless a layer has a row of its own for each of these token ids."""
    where = f"{label} on {site.quoted}"
    require(
        site.is_embedding or (site.ops.features_last and not site.batch_shape),
        f"{where}: expected an embedding or a linear head, got "
        f"{type(site.module).__name__}; name the embedding in target_modules",
    )
    size = site.in_features if site.is_embedding else site.out_features
    beyond = [i for i in ids if i >= size]
    require(
        not beyond,
        f"{where}: expected token ids below the vocabulary's size {size}, got "
        f"{beyond[:5]}; call model.resize_token_embeddings(len(tokenizer)) before attach",
    )
    require(
        not site.is_embedding or getattr(site.module, "max_norm", None) is None,
        f"{where}: expected an embedding without max_norm, which changes its "
        "weight in the forward, got one; train it with modules_to_save",
    )
