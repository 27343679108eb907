"""What the planner counts for limits of a step and for options of FSDP; against real steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lib.outside_memory import outside_memories
from benchmarks.lib.side_by_side import traced_peak
from lightning_peft import Activations, LoRA, Plan, attach, chunk_losses, estimate_memory
from lightning_peft.__main__ import main
from lightning_peft.activations.limit import ActivationLimit
from lightning_peft.planner.choice import ALLOWANCES
from lightning_peft.planner.storage_meter import ACTIVATIONS, LOGITS

HIDDEN, LENGTH, BUCKET = 64, 64, "communication buckets"
METHOD = LoRA(r=2, target_modules="all-linear")


def config(layers: int = 3, vocabulary: int = 2048) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def planned(layers: int = 3, **how: Any) -> Plan:
    how = {"precision": "32-true", "sequence_length": LENGTH, "batch_size": 2, **how}
    return estimate_memory(config(layers), METHOD, **how)


def all_sizes(kind: Any) -> Activations:
    return Activations(kind, min_bytes=0)


def measured(activations: Activations | None, loss: str | None) -> int:
    """Bytes that torch allocates for a real step, offloaded as on CUDA, at its fullest moment."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    attach(model, METHOD)
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    limits: list[Any] = []
    if activations is not None:
        limits.append(ActivationLimit(model, activations, outside_memories()))
    if loss is not None:
        limits.append(chunk_losses(model))
    tensors = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    try:
        peak = traced_peak(
            model,
            lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward(),
            1,
        )
    finally:
        for limit in limits:
            limit.remove()
    return peak - sum(held.values())


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("offload", None),
        ("checkpoint+offload", "chunked"),
        *(
            pytest.param(kind, loss, marks=pytest.mark.slow)
            for kind, loss in (("checkpoint", None), (None, "chunked"), ("offload", "chunked"))
        ),
    ],
)
def test_a_real_step_keeps_as_much(kind: str | None, loss: Any) -> None:
    activations = None if kind is None else all_sizes(kind)
    plan = planned(activations=activations, loss=loss)
    beyond = plan.peak - plan.resident - plan.parts["dequantise buffers"]
    assert beyond == pytest.approx(measured(activations, loss), rel=0.05)


def test_each_limit_saves() -> None:
    plain = planned(6)
    stream = 2 * LENGTH * HIDDEN * 4
    kept = {
        kind: planned(6, activations=all_sizes(kind))
        for kind in ("checkpoint", "offload", "checkpoint+offload")
    }
    parts = {kind: plan.parts[ACTIVATIONS] for kind, plan in kept.items()}
    assert max(parts.values()) < plain.parts[ACTIVATIONS] / 2
    assert parts["checkpoint+offload"] <= parts["checkpoint"] - 3 * stream
    assert kept["checkpoint+offload"].host == 6 * stream
    assert kept["offload"].host > plain.parts[ACTIVATIONS] / 2
    assert plain.host == kept["checkpoint"].host == 0
    chunked = planned(6, loss="chunked")
    assert chunked.parts[LOGITS] < plain.parts[LOGITS] / 2  # two chunks of 64 tokens
    checkpointed = planned(6, checkpointing=True)
    assert checkpointed.peak == kept["checkpoint"].peak


def fsdp(**how: Any) -> dict[str, int]:
    return planned(6, strategy="fsdp", world_size=8, **how).parts


def test_options_of_fsdp() -> None:
    plain = fsdp()
    offloaded = planned(6, strategy="fsdp", world_size=8, cpu_offload=True)
    for part in ("base weights", "adapters", "optimizer state"):
        assert offloaded.parts[part] == 0 < plain[part]
    assert offloaded.host >= plain["base weights"] + plain["optimizer state"]
    one = planned(6)
    assert fsdp(reshard_after_forward=False)[BUCKET] > one.parts["base weights"]
    assert plain[BUCKET] < one.parts["base weights"]
    assert fsdp(replicas=2)["base weights"] == -(-one.parts["base weights"] // 4)
    shared = fsdp(context_parallel=4)
    assert shared[ACTIVATIONS] == pytest.approx(plain[ACTIVATIONS] / 4, rel=0.2)
    assert shared["gathered keys and values"] == 2 * 2 * 2 * LENGTH * 2 * 16 * 4
    assert plain["gathered keys and values"] == 0


def test_allowances_lessen_the_memory() -> None:
    plan = planned(strategy="ddp", world_size=2, allowances=True)
    assert plan.allowance == sum(ALLOWANCES.values())
    bare = planned(strategy="ddp", world_size=2)
    assert (bare.allowance, bare.peak) == (0, plan.peak)
    budget = bare.peak_at(7)
    assert bare.largest_batch(budget) == 7
    assert plan.largest_batch(budget + plan.allowance) == 7
    assert planned(allowances=True).allowance == ALLOWANCES["CUDA context"]
    assert planned(allowances={"driver": 5}).allowance == 5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"activations": "recompute"}, "activations: expected one of"),
        ({"loss": "fused"}, "loss: expected one of"),
        ({"activations": "offload", "checkpointing": True}, r"'checkpoint\+offload' with"),
        ({"loss": "chunked", "liger": True}, "expected liger=False"),
        ({"cpu_offload": True}, "cpu_offload: expected strategy='fsdp', got None"),
        ({"replicas": 0}, "replicas: expected a whole number >= 1"),
        (
            {"strategy": "fsdp", "world_size": 8, "replicas": 3},
            r"world_size: expected a multiple of replicas × context_parallel = 3, got 8",
        ),
        ({"activations": Activations(blocks=["Nothing"])}, "got 'Nothing'; the nearest"),
    ],
)
def test_bad_input(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assert planned(**how).peak


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict()))
    line = f"plan {tmp_path} --method lora --r 4 --sequence-length 32 --strategy fsdp"
    line += " --world-size 4 --activations checkpoint+offload --loss chunked --cpu-offload"
    line += " --no-reshard-after-forward --replicas 2 --context-parallel 2 --allowances"
    assert main(line.split()) == 0
    text = capsys.readouterr().out
    for part in (
        "activations checkpoint+offload",
        "loss chunked",
        "CUDA context",
        "in host memory",
    ):
        assert part in text
