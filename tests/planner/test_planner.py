"""The memory planner: golden figures, what a step keeps, bad input, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_peft_kernels.nf4 import weight_buffers
from torch import nn
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    MT5Config,
    ViTConfig,
)

from lightning_peft import PEFT, Activations, LoRA, Plan, Quantization, attach, estimate_memory
from lightning_peft.__main__ import main
from lightning_peft.planner import activation_trace
from lightning_peft.planner.byte_sizes import parse_bytes
from lightning_peft.planner.storage_meter import ACTIVATIONS, LOGITS, Meter

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYWHERE = LoRA(r=8, target_modules=[*LINEAR, "embed_tokens", "lm_head"])
SIZES: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def mistral(vocabulary: int = 32_005) -> MistralConfig:
    return MistralConfig(vocab_size=vocabulary)  # the defaults are Mistral-7B's sizes


def tiny(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=layers, **SIZES)


def test_the_length_is_one_that_the_model_has_positions_for() -> None:
    short = GPT2Config(n_positions=64, n_layer=2, n_embd=32, n_head=2, vocab_size=64)
    plan = estimate_memory(short, LoRA(r=2))
    assert plan.choice.sequence_length == 64
    assert plan.parts[ACTIVATIONS] > 0
    assert estimate_memory(tiny(), LoRA()).choice.sequence_length == 512


def test_nothing_is_logged_about_fake_tensors(caplog: pytest.LogCaptureFixture) -> None:
    short = BertConfig(max_position_embeddings=64, num_hidden_layers=2)
    assert "needs data to run" in str(estimate_memory(short, LoRA(r=2), sequence_length=65))
    assert not caplog.records


# ---- golden figures


def test_full_fine_tuning_of_mistral() -> None:
    plan = estimate_memory(mistral(32_000), "full")
    assert plan.total == plan.trainable == 7_241_732_096
    assert plan.resident == pytest.approx(16 * plan.total, abs=1e6)
    assert round(plan.resident / 1e9, 1) == 115.9


def test_lora_on_mistral() -> None:
    plan = estimate_memory(mistral(), EVERYWHERE)
    assert (plan.trainable, plan.total) == (21_549_136, 7_263_322_192)
    assert plan.percent == pytest.approx(0.2967, abs=1e-4)
    assert round(plan.resident / 1e9, 2) == 14.83


@pytest.mark.parametrize(("double", "expected"), [(True, 4.47), (False, 4.80)])
def test_qlora_on_mistral(double: bool, expected: float) -> None:
    quantization = Quantization("nf4", double_quant=double)
    plan = estimate_memory(mistral(), EVERYWHERE, quantization=quantization)
    assert plan.total == 7_263_322_192
    assert round(plan.resident / 1e9, 2) == expected


class Shapes(nn.Module):
    """GPT-3's attention projections."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in ("q", "k", "v", "o")})
            for _ in range(layers)
        )


@pytest.mark.parametrize(("r", "expected"), [(1, 4_718_592), (8, 37_748_736)])
def test_gpt3_shapes(r: int, expected: int) -> None:
    with torch.device("meta"):
        model = Shapes(96, 12_288)
    assert estimate_memory(model, LoRA(r=r, target_modules=["q", "v"])).trainable == expected


def test_mt0_large() -> None:
    config = MT5Config(
        **{"vocab_size": 250_112, "d_model": 1024, "d_kv": 64, "d_ff": 2816},
        **{"num_layers": 24, "num_decoder_layers": 24, "num_heads": 16},
    )
    plan = estimate_memory(config, LoRA(r=8, target_modules=["q", "v"]))
    assert plan.trainable == 2_359_296


def test_one_matrix() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 512, bias=False))
    plan = estimate_memory(model, LoRA(r=8, target_modules=["0"]))
    assert (plan.trainable, plan.total - plan.trainable) == (4_608, 32_768)


# ---- a step


def live(model: nn.Module, batch: int, length: int) -> tuple[int, int]:
    """(highest bytes of a real step beyond what is resident, logits' bytes)."""
    ids = torch.zeros(batch, length, dtype=torch.long)
    meter = Meter()
    for t in [*model.parameters(), *model.buffers(), ids]:
        meter.know(t)
    with meter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return max(sum(c.values()) for c in meter.peaks.values()), batch * length * 512 * 4


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_real_step_keeps_as_much(quantization: str | None) -> None:
    method = LoRA(r=4, target_modules=LINEAR)
    plan = estimate_memory(
        tiny(),
        method,
        quantization=quantization,
        precision="32-true",
        batch_size=2,
        sequence_length=64,
    )
    model = LlamaForCausalLM(tiny())
    attach(model, method, quantization=None if quantization is None else Quantization("nf4"))
    weight_buffers.release()  # another test's buffer may be larger than this model's
    measured, logits = live(model, 2, 64)
    planned = plan.peak - plan.resident - plan.parts["dequantise buffers"]
    assert planned == pytest.approx(measured, rel=0.05)
    assert plan.parts[LOGITS] >= 2 * logits


def test_long_stacks_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"sequence_length": 32, "precision": "32-true"}
    extrapolated = estimate_memory(tiny(6), LoRA(), **how).parts
    monkeypatch.setattr(activation_trace, "_LONG", 6)
    assert extrapolated == estimate_memory(tiny(6), LoRA(), **how).parts


def test_batch_checkpointing_and_next_steps() -> None:
    plan = estimate_memory(tiny(), LoRA(), sequence_length=64)
    budget = plan.peak_at(7)
    assert plan.largest_batch(budget) == 7
    assert plan.largest_batch(budget - 1) == 6
    saved = plan.changed(activations=Activations("checkpoint"))
    assert saved.parts[ACTIVATIONS] < plan.parts[ACTIVATIONS]
    steps = {s.what: s.saving for s in plan.next_steps}
    assert steps['activations="checkpoint"'] == plan.peak - saved.peak
    assert list(steps.values()) == sorted(steps.values(), reverse=True)
    text = str(plan)
    for word in ("full", "QLoRA", "peak", "next: ", "base in bfloat16"):
        assert word in text


def test_ranks_and_optimizers() -> None:
    def parts(**how: Any) -> dict[str, int]:
        return estimate_memory(tiny(), LoRA(), sequence_length=16, **how).parts

    one = parts()
    ddp, fsdp = (parts(strategy=s, world_size=4) for s in ("ddp", "fsdp"))
    bucket = "communication buckets"
    assert (one[bucket], ddp[bucket]) == (0, one["gradients"])
    assert fsdp["base weights"] == -(-one["base weights"] // 4)
    assert fsdp["optimizer state"] == -(-one["optimizer state"] // 4)
    assert fsdp[bucket] > 0
    assert parts(optimizer="sgd")["optimizer state"] == 0
    assert parts(optimizer="adamw_8bit")["optimizer state"] < one["optimizer state"] / 3.9


def test_the_given_model_stays_as_it_is() -> None:
    model = LlamaForCausalLM(tiny())
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    plan = estimate_memory(model, LoRA(), quantization="nf4", sequence_length=16)
    assert plan.peak > 0
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[n] is p and p.requires_grad == r for n, (p, r) in before.items())
    assert {p.device.type for p in after.values()} == {"cpu"}


def test_a_module_without_known_inputs_says_so() -> None:
    plan = estimate_memory(nn.Sequential(nn.Linear(8, 8)), LoRA(r=2, target_modules=["0"]))
    assert plan.parts[ACTIVATIONS] == 0
    assert "example_input_array" in str(plan)


def test_encoder_decoder_and_starts_from_weights() -> None:
    config = MT5Config(
        **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    )
    plan = estimate_memory(config, LoRA(r=2, init="pissa"), sequence_length=8)
    assert plan.parts[ACTIVATIONS] > 0
    assert plan.trainable == 6 * 2 * 2 * 2 * 32


def test_packed_experts_are_run_dense() -> None:
    config = MixtralConfig(num_hidden_layers=2, num_local_experts=2, **SIZES)
    how: dict[str, Any] = {"sequence_length": 8}
    packed = estimate_memory(config, LoRA(r=2), quantization="nf4", **how)
    dense = estimate_memory(config, LoRA(r=2), **how)
    assert packed.sizes.base_bytes < dense.sizes.base_bytes
    assert packed.parts[ACTIVATIONS] == dense.parts[ACTIVATIONS] > 0


# ---- bad input


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": -1}, "batch_size: expected a whole number >= 1, got -1"),
        ({"memory": 1000}, "memory: expected at least the weights'"),
        ({"memory": "1kB"}, "memory: expected at least the weights'"),
        ({"memory": "much"}, "memory: expected a size such as '24GB'"),
        ({"batch_size": True}, "batch_size: expected a whole number >= 1, got True"),
        ({"optimizer": "adamw_7bit"}, "optimizer: expected one of"),
        ({"precision": "8"}, "precision: expected one of"),
        ({"strategy": "dp"}, "strategy: expected one of"),
    ],
)
def test_bad_numbers_and_names(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_memory(tiny(), LoRA(), **how)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such"}, "expected an architecture that transformers knows"),
        ({"model_type": "llama"}, "give the model's full config.json"),
        ({"model_type": "llama", "hidden_size": None}, "give the model's full config.json"),
        ({"model_type": "llama", "hidden_size": 0}, "give the model's full config.json"),
        ({}, "expected an architecture"),
        (3, "expected a module, a Hugging Face configuration"),
        ("no/such/place", "expected a config.json"),
    ],
)
def test_bad_configurations(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_memory(config, LoRA())


def test_packed_weights_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="choose an adapter"):
        estimate_memory(tiny(), "full", quantization="nf4")


# ---- the command, the callback


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    line = f"plan {tmp_path} --method lora --r 4 --quantization nf4 --batch-size 2"
    assert main([*line.split(), "--sequence-length", "32", "--memory", "1GB"]) == 0
    assert "largest batch in 1.00 GB: " in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--memory", "1kB"]) == 2
    assert "quantise the base" in capsys.readouterr().err


def test_sizes_in_words() -> None:
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    with pytest.raises(ValueError, match="24GB"):
        parse_bytes("much")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = LlamaForCausalLM(tiny())

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)


@pytest.mark.parametrize("plan", [True, {"batch_size": 2, "sequence_length": 16}])
def test_callback(plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = PEFT(LoRA(r=2), plan=plan, report=False)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "fast_dev_run": True, "enable_progress_bar": False},
        **{"default_root_dir": tmp_path, "callbacks": [callback], "enable_model_summary": False},
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.zeros(2, 16, dtype=torch.long)))
    shown = capsys.readouterr().out
    assert "QLoRA r=16" in shown
    assert ("batch 2 × 16" in shown) == isinstance(plan, dict)
    assert isinstance(callback.memory_plan, Plan)


def test_the_table_names_what_is_trained_and_leaves_empty_rows_out() -> None:
    lines = str(estimate_memory(tiny(), LoRA(r=4), modules_to_save=["lm_head"])).splitlines()
    rows = {line[:24].strip(): line[24:] for line in lines if line[:24].strip()}
    assert rows["fully trained weights"].count("0 B") < 4
    assert "communication buckets" not in rows
    assert "512 tokens" in "".join(lines)


def test_a_plan_says_sizes_as_people_do_and_leaves_counters_out() -> None:
    plan = estimate_memory(BertConfig(num_hidden_layers=1), LoRA(), memory="24GB")
    assert plan.budget == 24 * 10**9
    assert "batch in 24.00 GB" in str(plan)
    assert "base in bfloat16" in str(plan)
    assert "int64" not in str(plan)


def test_a_plan_of_an_image_model() -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8,
    )  # fmt: skip
    assert "batch 1 × an image of 32 pixels" in str(estimate_memory(config, LoRA(r=2)))


def test_a_hub_id_is_looked_up_in_the_cache(tmp_path: Path, monkeypatch: Any) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(tiny().to_dict()))
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert estimate_memory("org/name", LoRA(r=2)).trainable > 0
    with pytest.raises(ValueError, match="hub id in the local cache, found none at 'org/other'"):
        estimate_memory("org/other", LoRA(r=2))
