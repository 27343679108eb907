"""PrefixTuning: n trained keys and values before those of the text, in every attention layer.

softmax(q [K_P; K]ᵀ) [V_P; V], with K_P, V_P = table(l) of layer l: trained as they are (P-tuning
v2), or through a network, E → h → 2 Σ heads · features with tanh.

Source: Li and Liang 2021, "Prefix-Tuning", sections 4.2–4.3; Liu et al. 2022, "P-Tuning v2". Layout
as in Hugging Face peft 0.21: [n, keys of layer 0, values of layer 0, keys of layer 1, …].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFEntry, HFFormat, SequenceMethod
from lightning_peft.methods.checks import require
from lightning_peft.methods.prompt_exchange import model_config, sequence_site, submodule_count
from lightning_peft.methods.registry import register

__all__ = ["PrefixTuning"]


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    site = sequence_site(entries)
    heads, features = site.layers[0]
    config.update(model_config(site, heads * features), num_attention_heads=heads)
    config.update(num_transformer_submodules=submodule_count(site))
    config.update(prefix_projection=False, encoder_hidden_size=heads * features)


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """The network is not in the file: what it made is trained on."""
    return {"projection": False}


def _unpack(
    method: PrefixTuning,
    site: SequenceSite,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    P = tensors["P"]
    expected = (method.n, method.columns(site))
    require(
        tuple(P.shape) == expected,
        f"prompt_embeddings: expected shape {list(expected)}, got {list(P.shape)}",
    )
    submodules = int(config.get("num_transformer_submodules") or submodule_count(site))
    if submodules == 2:
        parts = P.view(method.n, 2 * len(site.layers), -1)
        P = parts[:, _peft_rows(len(site.layers))].reshape(expected)
    return {"P": P}


def _pack(
    method: PrefixTuning, site: SequenceSite, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    P = tensors["P"]
    if submodule_count(site) == 1:
        return {"P": P}
    parts = P.view(P.shape[0], 2 * len(site.layers), -1)
    rows = _peft_rows(len(site.layers))
    theirs = torch.zeros_like(parts)
    theirs[:, rows] = parts
    require(
        torch.equal(theirs[:, rows], parts),
        f"save_adapter: {method.label} on {site.quoted} has no equal in peft: its layout for "
        f"encoder-decoders gives {len(site.layers)} decoder layers (an even number) one prefix for "
        "two layers; keep the adapter with adapter_state_dict()",
    )
    return {"P": theirs.reshape(P.shape)}


def _peft_rows(layers: int) -> list[int]:
    """Return the rows at which peft reads the keys and values of a decoder's layers.

    Peft writes the table twice in a row, and gives layer l the pair (4l, 4l + 1).
    """
    pairs = 2 * layers
    return [(4 * (i // 2) + i % 2) % pairs for i in range(pairs)]


def _refuse(method: PrefixTuning, site: SequenceSite) -> str:
    if method.gating:
        return "peft's prefixes have no gates"
    if not site.embedding:
        return "a transformer of your own has no equal there"
    return "" if len(set(site.layers)) == 1 else "its layers have different heads"


class _Prefix(nn.Module):
    """The trained tensors of a prefix; the method's options say which of them exist."""

    P: nn.Parameter
    E: nn.Parameter
    network: nn.Sequential
    gate_w: nn.Parameter
    gate_c: nn.Parameter


@register
@dataclass(frozen=True)
class PrefixTuning(SequenceMethod):
    """Trained keys and values. In an encoder-decoder those of the decoder's self-attention, which
    is where Hugging Face peft has them too: encoders take no cached keys, and keys of
    cross-attention are recomputed from the encoder's output. In a transformer of your own those of
    the `nn.MultiheadAttention` modules that `target_modules` names.

    Attributes:
        n: Number of virtual tokens.
        projection: Whether a network makes the table. Saving to Hugging Face peft keeps only the
            table; our checkpoints keep the network too.
        hidden: Width of the network; None: the model's width.
        init: ``"random"``: N(0, 1) as in peft, or the network's own start. ``"zero"``: keys and
            values 0.
        gating: A factor a layer on its keys and values, σ(Linear(what the attention reads))
            averaged over the tokens of the forward that they are made in: while generating, those
            of the text at hand.
    """

    n: int = 20
    projection: bool = False
    hidden: int | None = None
    init: Literal["random", "zero"] = "random"
    gating: bool = False

    hf: ClassVar[HFFormat | None] = HFFormat(
        peft_type="PREFIX_TUNING",
        tensors={},
        prefix={"P": "prompt_embeddings"},
        config={"n": "num_virtual_tokens"},
        ignored=(
            *("prefix_projection", "encoder_hidden_size", "init_weights", "token_dim"),
            *("num_layers", "num_attention_heads", "num_transformer_submodules"),
        ),
        saved_prefix="base_model.",
        pack=_pack,
        unpack=_unpack,
        to_config=_to_config,
        from_config=_from_config,
        refuse=_refuse,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(self.n >= 1, f"{self.label}: expected n >= 1, got n = {self.n}")
        require(
            self.hidden is None or self.hidden >= 1,
            f"{self.label}: expected hidden >= 1, got hidden = {self.hidden}",
        )
        require(
            self.init in ("random", "zero"),
            f"{self.label}: expected init 'random' or 'zero', got {self.init!r}",
        )

    @property
    def insertion(self) -> Literal["attention"]:
        """Return "attention": the prefix enters keys and values."""
        return "attention"

    def columns(self, site: SequenceSite) -> int:
        """Keys and values of one virtual token, all layers."""
        return sum(2 * heads * features for heads, features in site.layers)

    def module(self, site: SequenceSite) -> nn.Module:
        """P [n, columns], or E [n, width] and the network."""
        made = _Prefix()
        if self.projection:
            width = site.layers[0][0] * site.layers[0][1]
            hidden = self.hidden or site.width or width
            made.E = nn.Parameter(torch.randn(self.n, width))
            into, out = nn.Linear(width, hidden), nn.Linear(hidden, self.columns(site))
            made.network = nn.Sequential(into, nn.Tanh(), out)
            if self.init == "zero":
                nn.init.zeros_(out.weight)
                nn.init.zeros_(out.bias)
        else:
            made.P = nn.Parameter(torch.zeros(self.n, self.columns(site)))
            if self.init == "random":
                nn.init.normal_(made.P)
        if self.gating:
            made.gate_w = nn.Parameter(0.02 * torch.randn(len(site.layers), site.hidden))
            made.gate_c = nn.Parameter(torch.zeros(len(site.layers)))
        return made

    def gate(self, module: nn.Module, layer: int, x: Tensor) -> Tensor:
        """Factor [B, 1] of a layer's keys and values, from what its attention reads [B, L, d]."""
        made = cast(_Prefix, module)
        w, c = made.gate_w[layer], made.gate_c[layer]
        gate = torch.sigmoid(x.to(w.dtype) @ w + c)
        return gate.mean(dim=1, keepdim=True)

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """[n, columns]."""
        made = cast(_Prefix, module)
        table: Tensor = made.network(made.E) if self.projection else made.P
        return table

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Copy into P.

        Raises:
            ValueError: a network makes the table.
        """
        require(
            not self.projection,
            f"{self.label}: expected projection=False for a table without its network, got True",
        )
        made = cast(_Prefix, module)
        made.P.data.copy_(table)
