"""Prompts, prefixes and task mixtures to and from peft on architectures that only the exact
exchange of weight methods runs on.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lightning_peft as lp
from tests.helpers.compare import assert_close, relative_error
from tests.helpers.more_models import base_of
from tests.helpers.peft_exchange import in_peft, loaded, randomise
from tests.hf.test_prompts import OURS, both_ways

DECODERS = ["gptj", "starcoder2"]
TASKS: dict[str, Any] = {"task_ids": torch.tensor([2, 0])}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cartridge": (peft.CartridgeConfig, {"num_virtual_tokens": 4, "num_frozen_tokens": 1}),
    "cpt": (
        peft.CPTConfig,
        {
            "cpt_token_ids": [5, 9, 17, 33],
            "cpt_mask": [1] * 4,
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            "opt_weighted_loss_type": "none",
        },
    ),
    "multitask": (
        peft.MultitaskPromptTuningConfig,
        {
            "num_virtual_tokens": 3,
            "num_tasks": 3,
            "num_ranks": 2,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        },
    ),
    "poly": (
        peft.PolyConfig,
        {"r": 2, "n_tasks": 3, "n_skills": 4, "target_modules": ["q_proj", "v_proj"]},
    ),
}


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", OURS)
def test_prompts(kind: str, name: str, tmp_path: Path) -> None:
    base, inputs = base_of(name)
    both_ways(base, inputs, kind, "CAUSAL_LM", tmp_path)


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_methods_with_facts(kind: str, name: str, tmp_path: Path) -> None:
    base, inputs = base_of(name)
    config, fields = CONFIGS[kind]
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), config(task_type="CAUSAL_LM", **fields)
    ).eval()
    randomise(theirs, std=0.05 if kind == "cpt" else 0.5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = loaded(base, tmp_path / "theirs").eval()
    lp.save_adapter(ours, tmp_path / "ours")
    again = in_peft(base, tmp_path / "ours")
    more = TASKS if kind in ("multitask", "poly") else {}
    with torch.no_grad():
        with lp.task_ids(more["task_ids"]) if more else contextlib.nullcontext():
            got = ours(**inputs).logits
        for where, model in (("theirs in ours", theirs), ("ours in peft", again)):
            want = model(**inputs, **more).logits[:, -got.shape[1] :]
            assert_close(where, got, want, floor=1e-5)
        assert relative_error(base(**inputs).logits, got) > 1e-4
