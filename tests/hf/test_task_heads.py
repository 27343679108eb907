"""Adapters trained under a task head, loaded into the bare base or under another head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft


@pytest.mark.parametrize("targets", [["query", "value"], r".*layer\.0\.attention.*(query|value)"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_into_the_bare_base(name: str, targets: Any, tmp_path: Path) -> None:
    model, inputs = build(name)
    theirs = by_peft(model, tmp_path, r=2, target_modules=targets, task_type="SEQ_CLS")
    bare = copy.deepcopy(getattr(model, name))
    with pytest.raises(ValueError, match="expected modules of"):
        lp.load_adapter(copy.deepcopy(bare), tmp_path)
    report = lp.load_adapter(bare, tmp_path, heads="skip")
    assert any("left out the trained heads ['classifier']" in note for note in report.notes)
    del inputs["labels"]
    with torch.no_grad():
        want = getattr(theirs.base_model.model, name)(**inputs).last_hidden_state
        assert_close("hidden", bare(**inputs).last_hidden_state, want, floor=1e-5)


def test_under_a_head_of_another_size(tmp_path: Path) -> None:
    model, _ = build("bert")
    by_peft(model, tmp_path, r=2, target_modules=["query"], task_type="SEQ_CLS")
    config = copy.deepcopy(model.config)
    config.num_labels = 7
    other = transformers.BertForSequenceClassification(config)
    with pytest.raises(ValueError, match="classifier"):
        lp.load_adapter(other, tmp_path)
    report = lp.load_adapter(other, tmp_path, heads="skip")
    assert any("classifier" in note for note in report.notes)
    assert not [n for n in lp.adapter_state_dict(other) if "classifier" in n]


def test_other_trained_modules_stay(tmp_path: Path) -> None:
    model, _ = build("bert")
    saved = ["classifier", "word_embeddings"]
    kwargs: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": saved}
    theirs = by_peft(model, tmp_path, peft.LoraConfig, r=2, **kwargs)
    bare = copy.deepcopy(model.bert)
    lp.load_adapter(bare, tmp_path, heads="skip")
    rows = theirs.base_model.model.bert.embeddings.word_embeddings
    ids = torch.arange(9)
    assert_close("rows", bare.embeddings.word_embeddings(ids), rows(ids), floor=1e-6)
