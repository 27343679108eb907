"""Every configuration in the tables of peft's own tests: no wrong number, every refusal explained.

The tables are in peft's sdist, not in its wheel: `make peft-tables` fetches it and runs this file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.peft_tables import Result, run_case, table_cases

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
    "got 'LILY'": "a method that is not here",
    "got 'CPT'": "a method that is not here",
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
