"""Every configuration in the tables of peft's own tests: no wrong number, every refusal explained.

The tables are in peft's sdist, not in its wheel: `make peft-tables` fetches it and runs this file.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lightning_peft as lp
from tests.helpers.peft_tables import (
    Result,
    difference,
    namespace_of,
    perturb,
    run_case,
    table_cases,
)

FOLDER = os.environ.get("PEFT_TESTS", "")
TABLES = [
    *("test_custom_models", "test_decoder_models", "test_encoder_decoder_models"),
    *("test_feature_extraction_models", "test_seq_classifier", "token_cls_configs"),
    *("qa_configs", "test_target_parameters", "test_vision_models"),
]
#: Part of a refusal's reason → why it stays, where peft does not disagree with itself.
EXPLAINED = {
    "equal diagonal blocks": "peft's A of a grouped convolution mixes the groups: no weight has it",
    "folds overlapping patches": "peft's OFT sums patches; with one patch per image it agrees",
    "got FROD": "replaces the weights by factors of them",
    "got SHADOW": "a second model",
    "psoft_svd": "peft draws the factors at random and leaves them out of the file",
    r"found none, but \[\]": "a file without tensors: peft's OSF leaves GPT-2's Conv1D alone",
}


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="PEFT_TESTS: the folder tests/ of peft's sdist")
@pytest.mark.parametrize("table", TABLES)
def test_table(table: str) -> None:
    cases = [case for case in table_cases(Path(FOLDER)) if case.table == table]
    assert cases, "a table of this peft has another name"
    results = [run_case(case) for case in cases]
    counts = Counter(result.verdict for result in results)
    print(f"\n{table}: {len(cases)} rows, {dict(counts)}")
    refused = [r for r in results if r.verdict.startswith("refused")]
    for result in refused:
        print(f"  {_line(result)}")
    bad = [r for r in results if r.verdict in ("wrong", "crash")]
    assert not bad, "\n".join(map(_line, bad))
    # A token that no batch has, and a token that stands for it.
    idle = [r for r in results if r.verdict == "no effect"]
    assert all(r.case.options.get("alora_invocation_tokens") == [1000] for r in idle), idle
    unexplained = [r for r in refused if not _explained(r)]
    assert not unexplained, "\n".join(map(_line, unexplained))


def _explained(result: Result) -> bool:
    known = any(re.search(part, result.reason) for part in EXPLAINED)
    return known or bool(result.peft_itself)


def _line(result: Result) -> str:
    reason = " ".join(result.reason.split())[:200]
    itself = f" [peft: {result.peft_itself}]" if result.peft_itself else ""
    return f"{result.verdict}: {result.case.label} {result.case.options}: {reason}{itself}"


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="PEFT_TESTS: the folder tests/ of peft's sdist")
def test_two_active_adapters(tmp_path: Path) -> None:
    names = namespace_of(Path(FOLDER) / "test_custom_models.py")
    counts: Counter[str] = Counter()
    x = torch.arange(90).view(9, 10)
    for i, (name, tuner, kind, *both) in enumerate(names["MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"]):
        torch.manual_seed(0)
        base = names["ModelEmbConv1D" if "trainable_tokens" in tuner else "MLP"]().eval()
        model: Any = copy.deepcopy(base)
        folder = tmp_path / str(i)
        try:
            theirs = peft.get_peft_model(copy.deepcopy(base), kind(**both[0]), adapter_name="a")
            theirs.add_adapter("b", kind(**both[1]))
            for adapter in "ab":
                theirs.set_adapter(adapter)
                perturb(theirs, 0.1)
            theirs.base_model.set_adapter(["a", "b"])
            want = theirs.eval()(x).detach()
            theirs.save_pretrained(str(folder))
        except ValueError:  # peft takes no two of them
            counts["not in peft"] += 1
            continue
        if kind is peft.FrodConfig:  # refused, as above
            continue
        for adapter in "ab":
            lp.load_adapter(model, folder / adapter, adapter_name=adapter)
        lp.set_adapter(model, ["a", "b"])
        assert difference(model(x).detach(), want) < 1e-4, name
        counts["pass"] += 1
    print(f"\ntwo active adapters: {dict(counts)}")
    assert counts["pass"] > 50
