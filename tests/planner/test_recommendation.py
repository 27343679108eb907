"""`recommend`: answers rest on measured rows, memory chooses the storage, empty ones say why."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from lightning_peft import LoRA, recommend
from lightning_peft.guideline.measurements import MEASURED
from lightning_peft.planner import recommendation
from lightning_peft.planner.recommendation import TASKS

CONFIG = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, architectures=["LlamaForCausalLM"],
)  # fmt: skip


def test_an_answer_is_a_measured_row() -> None:
    found = recommend(CONFIG, "classification")
    assert found
    assert found.measured in MEASURED
    assert found.measured.tied
    assert isinstance(found.method, LoRA)
    assert found.method.target_modules == "all-linear"
    assert found.learning_rate == found.measured.learning_rate
    assert found.settings == {}
    assert f"{found.measured.score:.1f}" in str(found)
    assert found.measured not in found.alternatives


def test_no_faster_row_with_an_equal_score_is_passed_over() -> None:
    found = recommend(CONFIG, "classification")
    assert found.measured is not None
    for other in found.alternatives:
        if "NF4" not in other.variant:
            assert other.step_ms * recommendation.TIMING_NOISE >= found.measured.step_ms


def test_memory_chooses_the_storage() -> None:
    dense = recommend(CONFIG, "classification", memory=10**9, sequence_length=64)
    assert dense.plan is not None
    assert dense.settings == {}
    packed = recommend(CONFIG, "classification", memory=dense.plan.peak - 1, sequence_length=64)
    assert packed.settings == {"quantization": "nf4"}
    assert packed.plan is not None
    assert packed.plan.peak < dense.plan.peak
    assert any("over NF4" in reason for reason in packed.why)


def test_the_rate_follows_a_known_rate() -> None:
    found = recommend(CONFIG, "classification", full_rate=3e-5)
    assert found.measured is not None
    assert found.learning_rate == pytest.approx(found.measured.rate_to_full * 3e-5)


def test_an_empty_answer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    small = recommend(CONFIG, "language", memory="1MB", sequence_length=64)
    assert not small
    assert "more than 1.00 MB" in str(small)
    monkeypatch.setattr(recommendation, "MEASURED", ())
    assert "no method was measured on 'vision'" in str(recommend(CONFIG, "vision"))


def test_an_unknown_task_raises() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        recommend(CONFIG, "speech")


def test_every_measured_task_belongs_to_a_task_of_the_user() -> None:
    assert {m.task for m in MEASURED} <= {name for names in TASKS.values() for name in names}
