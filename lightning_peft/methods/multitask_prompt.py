"""MultitaskPrompt: one soft prompt for all tasks, times a low-rank matrix of each task. Wang et al.
2023, arXiv:2303.02861.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.prompt_parts import submodule_count, unpack_prompt
from lightning_peft.methods.limits import COUNT, only
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.registry import register
from lightning_peft.methods.tasks import tasks_of_rows

__all__ = ["MultitaskPrompt"]


class _Tables(nn.Module):
    """P [n, width], cols [tasks, n, ranks], rows [tasks, ranks, width]."""

    P: nn.Parameter
    cols: nn.Parameter
    rows: nn.Parameter


def _unpack(
    method: MultitaskPrompt,
    site: SequenceSite,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    stacks = int(config.get("num_transformer_submodules") or submodule_count(site))
    require(
        stacks == 1,
        f"num_transformer_submodules: expected 1, got {stacks}: peft puts a second prompt into the "
        "decoder, which this method does not have",
    )
    shared = unpack_prompt(method, site, tensors, config)
    require(
        {"cols", "rows"} <= set(tensors),
        f"prefix_task_cols, prefix_task_rows: expected both, got {sorted(tensors)}",
    )
    return {**shared, "cols": tensors["cols"], "rows": tensors["rows"]}


@register
@dataclass(frozen=True)
class MultitaskPrompt(PromptTuning):
    """P ∘ (cols[task] rows[task]) before the text.

    Run the model inside ``with task_ids([...])``, which says the task of each sample.

    Attributes:
        n, init, init_ids: As for PromptTuning, for the shared P.
        tasks: Number of tasks.
        ranks: Rank of a task's matrix.

    Raises:
        ValueError: as PromptTuning; tasks or ranks below 1; mode="add".
    """

    tasks: int = 1
    ranks: int = 1

    limits = {"mode": only("prepend"), "tasks": COUNT, "ranks": COUNT}
    hf: ClassVar[HFFormat | None] = dataclasses.replace(
        cast(HFFormat, PromptTuning.hf),
        peft_type="MULTITASK_PROMPT_TUNING",
        prefix={"P": "prompt_embeddings", "cols": "prefix_task_cols", "rows": "prefix_task_rows"},
        config={"n": "num_virtual_tokens", "tasks": "num_tasks", "ranks": "num_ranks"},
        defaults={"num_tasks": 1, "num_ranks": 1},
        ignored=(
            *cast(HFFormat, PromptTuning.hf).ignored,
            *("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"),
        ),
        unpack=_unpack,
    )

    def module(self, site: SequenceSite) -> nn.Module:
        """P as PromptTuning; cols and rows normal, with std 0.02."""
        made = _Tables()
        made.P = nn.Parameter(self._start(site))
        made.cols = nn.Parameter(0.02 * torch.randn(self.tasks, self.n, self.ranks))
        made.rows = nn.Parameter(0.02 * torch.randn(self.tasks, self.ranks, site.width))
        return made

    def prompts(
        self, module: nn.Module, site: SequenceSite, facts: Mapping[str, Tensor], batch: int
    ) -> Tensor:
        """[batch, n, width], each row that of its task."""
        made = cast(_Tables, module)
        tasks = tasks_of_rows(facts.get("tasks"), batch, self.tasks, self.label)
        tasks = tasks.to(made.cols.device)
        return made.P * (made.cols[tasks] @ made.rows[tasks])
