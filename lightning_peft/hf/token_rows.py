"""Trained token rows in a Hugging Face peft directory, in both of its forms.

Alone (``TRAINABLE_TOKENS``) the rows of an embedding are `<layer>.trainable_tokens_delta`; beside
LoRA they are `<layer>.token_adapter.trainable_tokens_delta`. The name is peft's: they are the rows
themselves, in the order of the token ids in the config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.placement.placement import PlannedAdapter
from lightning_peft.core.names import matches_suffix
from lightning_peft.hf.keys import PREFIX
from lightning_peft.hf.targets import compact, declared_ties, tied_with, ties_rows
from lightning_peft.layers.adapter import Adapter
from lightning_peft.methods.base import Method
from lightning_peft.methods.token_indices import TokenIndices
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.models.modules import input_embeddings

__all__ = ["add_token_rows", "match_token_rows", "split_token_rows"]

_DELTA = ".trainable_tokens_delta"
_BESIDE = ".token_adapter"
#: (id of the module, weight, our tensor name) → value, as in `hf.values`.
_Values = dict[tuple[int, str, str], Tensor]


# ---- reading


def split_token_rows(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (rows by layer name, the other tensors) of a file."""
    rows: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(PREFIX) and key.endswith(_DELTA):
            path = key[len(PREFIX) : -len(_DELTA)].removesuffix(_BESIDE)
            rows[path] = tensor
        else:
            rest[key] = tensor
    return rows, rest


def match_token_rows(
    planned: Sequence[PlannedAdapter],
    rows: Mapping[str, Tensor],
    config: Mapping[str, Any],
    top: nn.Module,
    prefix: str,
) -> _Values:
    """Return the value of every tensor of rows that attaching will create.

    Raises:
        ValueError: missing, extra or misshapen rows, or other rows for a tied layer.
    """
    values: _Values = {}
    problems: list[str] = []
    left = dict(rows)
    by_path: dict[str, Tensor] = {}
    for each in planned:
        method, site = each.method, each.placement.site
        if not isinstance(method, TrainableTokens):
            continue
        path = each.placement.name.removeprefix(prefix).removeprefix(".")
        found = left.pop(path, None)
        shape = (
            len(method.ids(site)),
            site.out_features if site.is_embedding else site.in_features,
        )
        if site.tied_to is not None:
            if not ties_rows(top, site.tied_to.module):
                problems.append(f"{path}: {_NOT_TIED.format(site.tied_to.name)}")
            leader = by_path.get(site.tied_to.name)
            if found is not None and (leader is None or not torch.equal(found, leader)):
                problems.append(
                    f"{path}: expected the rows of {site.tied_to.name!r}, which it is tied to"
                )
            continue
        apart = declared_ties(top, path) - tied_with(top, [path]) - rows.keys()
        if ties_rows(top, site.module) and apart:
            problems.append(f"{path}: {_APART.format(sorted(apart))}")
        elif _drops_bias(site.module):
            problems.append(f"{path}: {_BIAS}")
        elif found is None:
            problems.append(f"missing {PREFIX}{path}{_DELTA}")
        elif tuple(found.shape) != shape:
            problems.append(
                f"{path}: expected rows of shape {list(shape)}, got {list(found.shape)}"
            )
        else:
            by_path[each.placement.name] = found
            order = torch.tensor(_ids(method, config, path)).argsort()
            values[id(site.module), site.parameter, "rows"] = found[order]
    problems += [f"extra {PREFIX}{path}{_DELTA}" for path in left]
    if problems:
        raise ValueError(
            "adapter file: trained tokens: nothing was loaded:\n  " + "\n  ".join(problems[:20])
        )
    return values


def _ids(method: TrainableTokens, config: Mapping[str, Any], path: str) -> list[int]:
    """Token ids in the order of the config, which is that of the rows."""
    given: TokenIndices = config.get("token_indices") or config["trainable_token_indices"]
    if isinstance(given, dict):
        return next(ids for name, ids in given.items() if matches_suffix(path, [name]))
    return given


_BIAS = (
    "expected a head without a bias, got one with a bias, which peft 0.21 leaves out of the output "
    "of a layer with trained tokens"
)


_APART = (
    "expected that {} share its weight, as the model's config.tie_word_embeddings says and peft "
    "takes for granted, got weights of their own; call model.tie_weights(), or set "
    "config.tie_word_embeddings to False"
)
_NOT_TIED = (
    "expected a layer whose rows peft ties to those of {!r}, got one that shares its weight, but "
    "the model's config.tie_word_embeddings does not say so: in peft its rows stay the base's"
)


def _drops_bias(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and getattr(module, "bias", None) is not None


# ---- writing


def add_token_rows(
    top: nn.Module,
    found: Sequence[tuple[str, nn.Module, Adapter]],
    method: Method,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Add trained token rows and their config.

    Raises:
        ValueError: rows that peft cannot hold, or would compute differently.
    """
    adapters = [(p, m, a) for p, m, a in found if isinstance(a.method, TrainableTokens)]
    if not adapters:
        return
    _check_writable(top, adapters)
    leaders = [(p, a) for p, _, a in adapters if a.site.tied_to is None]
    by_layer = {
        p: a.method.ids(a.site) for p, a in leaders if isinstance(a.method, TrainableTokens)
    }
    alone = isinstance(method, TrainableTokens)
    beside = "" if alone else _BESIDE
    for path, _, adapter in adapters if alone else ((p, None, a) for p, a in leaders):
        tensors[f"{PREFIX}{path}{beside}{_DELTA}"] = adapter.tensors()["rows"].detach()
    if alone:
        lists = list(by_layer.values())
        if any(ids != lists[0] for ids in lists):
            raise ValueError(
                "save_adapter: TrainableTokens: expected the same token ids for every layer, got "
                f"{by_layer}; peft's TrainableTokensConfig has one list: give them to "
                "LoRA(trainable_token_indices=...)"
            )
        config["token_indices"] = lists[0]
        config["target_modules"] = compact(top, list(by_layer))
        return
    config["trainable_token_indices"] = _beside(top, by_layer)


def _ids_of(adapter: Adapter) -> list[int]:
    method = adapter.method
    return method.ids(adapter.site) if isinstance(method, TrainableTokens) else []


def _beside(top: nn.Module, by_layer: Mapping[str, list[int]]) -> TokenIndices:
    inputs = input_embeddings(top)
    ((path, ids), *others) = by_layer.items()
    if not others and inputs is not None and top.get_submodule(path) is inputs:
        return ids
    return dict(by_layer)


def _check_writable(top: nn.Module, adapters: Sequence[tuple[str, nn.Module, Adapter]]) -> None:
    paths = {path for path, _, _ in adapters}
    for path, module, adapter in adapters:
        if _drops_bias(module):
            raise ValueError(
                f"save_adapter: TrainableTokens on {path!r}: {_BIAS}; keep the adapter with "
                "adapter_state_dict()"
            )
        leader = adapter.site.tied_to
        if leader is not None and not ties_rows(top, leader.module):
            raise ValueError(
                f"save_adapter: TrainableTokens on {path!r}: {_NOT_TIED.format(leader.name)}; "
                "attach TrainableTokens(tied=False), or keep the adapter with adapter_state_dict()"
            )
        others = {p for p, _, a in adapters if _ids_of(a) != _ids_of(adapter)}
        apart = declared_ties(top, path) - tied_with(top, [path]) - others
        if ties_rows(top, module) and apart:
            raise ValueError(
                f"save_adapter: TrainableTokens on {path!r}: {_APART.format(sorted(apart))}"
            )
        left = tied_with(top, [path]) - paths if ties_rows(top, module) else set[str]()
        if adapter.site.is_embedding and left:
            raise ValueError(
                f"save_adapter: TrainableTokens on {path!r}: expected that {sorted(left)}, tied to "
                "it, reads the same rows, as in peft; attach with tied=True, or keep the adapter "
                "with adapter_state_dict()"
            )
