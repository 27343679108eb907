"""CPT: a prompt of worked examples, moved within a ball around their embeddings. Blau et al. 2024,
arXiv:2410.17222.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFEntry, HFFormat, StepContext
from lightning_peft.methods.checks import require
from lightning_peft.methods.prompt_exchange import model_config, sequence_site
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.registry import register

__all__ = ["CPT", "cpt_loss"]

_PROMPT = cast(HFFormat, PromptTuning.hf)


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    site, method = sequence_site(entries), entries[0].method
    config.update(model_config(site, site.width))
    config.update(
        cpt_mask=[1] * method.n,
        cpt_token_ids=list(method.init_ids),
        cpt_tokens_type_mask=list(method.types),
        opt_weighted_loss_type="none" if method.decay == 1.0 else "decay",
    )


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    fields: dict[str, Any] = {"init": "text"}
    for ours, theirs in (("init_ids", "cpt_token_ids"), ("types", "cpt_tokens_type_mask")):
        value = config.get(theirs)
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise ValueError(
                f"adapter_config.json: {theirs}: expected a list of integers, got {value!r}"
            )
        fields[ours] = value
    if config.get("opt_weighted_loss_type") != "decay":
        fields["decay"] = 1.0
    return fields


class _Table(nn.Module):
    """E [n, width], the embeddings of the examples; P [n, width], what is added."""

    E: Tensor
    P: nn.Parameter


@register
@dataclass(frozen=True)
class CPT(PromptTuning):
    """Embeddings of worked examples before the text, each moved by ‖δ‖ ≤ ε at most.

    The callback, or `MethodHooks`, projects δ back after each step. Embeddings of labels stay.

    Attributes:
        init_ids: Token ids of the examples.
        types: Kind of each token, 4 · example + 1: template of the input, 2: input, 3: template of
            the label, 4: label. 0: other, not moved.
        epsilon: ε of inputs is epsilon · √(width / 2048).
        format_epsilon: The same for templates.
        context_loss: Whether the output holds the positions of the prompt too, as `cpt_loss` needs,
            which also asks for the labels of the examples. Labels given to the model itself do not
            fit then.
        decay: Factor per example on its labels in `cpt_loss`, from the last one back.

    Raises:
        ValueError: no ids, a number of types other than that of ids, an ε ≤ 0, decay outside
            (0, 1], mode="add".
    """

    init: Literal["vocab", "random", "text"] = "text"
    types: tuple[int, ...] | list[int] = ()
    epsilon: float = 0.1
    format_epsilon: float = 0.1
    context_loss: bool = False
    decay: float = 1.0

    hf: ClassVar[HFFormat | None] = dataclasses.replace(
        _PROMPT,
        peft_type="CPT",
        config={
            "n": "num_virtual_tokens",
            "epsilon": "opt_projection_epsilon",
            "format_epsilon": "opt_projection_format_epsilon",
            "decay": "opt_loss_decay_factor",
        },
        fixed={},
        defaults={
            "opt_projection_epsilon": 0.1,
            "opt_projection_format_epsilon": 0.1,
            "opt_loss_decay_factor": 1.0,
        },
        ignored=(
            *_PROMPT.ignored,
            *("cpt_mask", "cpt_token_ids", "cpt_tokens_type_mask", "opt_weighted_loss_type"),
        ),
        to_config=_to_config,
        from_config=_from_config,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(
            bool(self.init_ids) and self.init == "text",
            f"{self.label}: expected init='text' with the init_ids of examples, got "
            f"{self.init!r} with {len(self.init_ids)} ids",
        )
        require(self.n >= 1, f"{self.label}: expected n >= 1, got n = {self.n}")
        object.__setattr__(self, "n", len(self.init_ids))
        super().__post_init__()
        require(
            len(self.types) == self.n and all(type(t) is int and t >= 0 for t in self.types),
            f"{self.label}: expected one type >= 0 per id, got {len(self.types)} for {self.n} ids",
        )
        require(
            min(self.epsilon, self.format_epsilon) > 0 and 0 < self.decay <= 1,
            f"{self.label}: expected epsilon and format_epsilon > 0 and 0 < decay <= 1, got "
            f"{self.epsilon}, {self.format_epsilon}, {self.decay}",
        )
        require(self.mode == "prepend", f"{self.label}: expected mode='prepend', got {self.mode!r}")

    @property
    def keeps_positions(self) -> bool:
        """Return `context_loss`."""
        return self.context_loss

    def _radii(self, width: int) -> Tensor:
        """ε of each position [n, 1]; 0 where it stays."""
        kinds = torch.tensor(list(self.types)) % 4
        scale = math.sqrt(width / 2048)
        radii = torch.where(kinds == 2, self.epsilon * scale, self.format_epsilon * scale)
        return torch.where(kinds == 0, 0.0, radii).unsqueeze(1)

    def module(self, site: SequenceSite) -> nn.Module:
        """E, kept and saved, and P zero."""
        made = _Table()
        made.register_buffer("E", self._start(site))
        made.P = nn.Parameter(torch.zeros(self.n, site.width))
        return made

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """E + δ; no gradient reaches positions that stay."""
        made = cast(_Table, module)
        moves = (self._radii(site.width) > 0).to(made.P)
        return made.E.to(made.P.dtype) + moves * made.P

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Set δ to what `table` adds to E; positions that stay take the table's embedding."""
        made = cast(_Table, module)
        moves = (self._radii(site.width) > 0).to(made.P.device)
        with torch.no_grad():
            table = table.to(made.P)
            made.P.copy_(torch.where(moves, table - made.E, 0.0))
            made.E.copy_(torch.where(moves, made.E, table.to(made.E.dtype)))

    def after_step(self, ctx: StepContext) -> None:
        """Project δ into its ball."""
        for _, p in ctx.entries:
            radii = self._radii(p["P"].shape[1]).to(p["P"])
            norm = torch.linalg.vector_norm(p["P"], dim=1, keepdim=True)
            p["P"].mul_(radii / norm.clamp(min=torch.finfo(norm.dtype).tiny).maximum(radii))


def cpt_loss(logits: Tensor, labels: Tensor, method: CPT, types: Tensor | None = None) -> Tensor:
    """Cross entropy of the next token on labels of the text and of the examples, as a mean.

    Args:
        logits: Output of the model under `method` with context_loss=True [batch, n + positions,
            vocabulary].
        labels: Token ids of the text [batch, positions]; −100 does not count.
        method: The method that is attached.
        types: Kind of each token of the text, as in `CPT.types`; None counts all of `labels`.

    Raises:
        ValueError: logits without the positions of the prompt.
    """
    batch, n = labels.shape[0], logits.shape[1] - labels.shape[1]
    require(
        n == method.n,
        f"cpt_loss: expected logits of {method.n} positions of the prompt and "
        f"{labels.shape[1]} of the text, got {logits.shape[1]}; attach CPT(context_loss=True) and "
        "give the model no labels",
    )
    device = labels.device
    own = torch.tensor(list(method.types), device=device)
    last = -(-int(own.max()) // 4) * 4
    text = torch.full_like(labels, 4) if types is None else types
    kinds = torch.cat([own.expand(batch, -1), torch.where(text > 0, text + last, text)], dim=1)
    ids = torch.tensor(list(method.init_ids), device=device).expand(batch, -1)
    target, kinds = torch.cat([ids, labels], dim=1)[:, 1:], kinds[:, 1:]
    example = torch.where((kinds > 0) & (kinds % 4 == 0), kinds // 4, 0)
    counted = (example > 0) & (target != -100)
    present = logits.new_zeros(batch, int(example.max()) + 1).scatter(1, example, 1.0)
    later = present.flip(1).cumsum(1).flip(1) - present
    weight = method.decay ** later.gather(1, example)
    rows = logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(rows, target.flatten(), reduction="none")
    return (loss * weight.flatten())[counted.flatten()].mean()
