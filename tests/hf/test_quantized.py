"""LoRA on our NF4 equals peft on bitsandbytes' Linear4bit: outputs, gradients, a few steps."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, in_peft, loaded, randomise, run

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def in_4bit(model: nn.Module, kind: str, nested: bool) -> nn.Module:
    """As transformers loads it: every linear layer but the head a Linear4bit."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None,
                quant_type=kind, compress_statistics=nested, compute_dtype=torch.float32,
            )  # fmt: skip
            layer.load_state_dict({"weight": module.weight.data}, strict=False)
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.data.clone(), requires_grad=False, quant_type=kind,
                compress_statistics=nested,
            )  # fmt: skip
            # On a CPU with AVX512-BF16 it would compute in bf16 in eval: no reference for fp32.
            layer.support_avx512bf16_for_cpu = False
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_lora_on_ours_is_lora_on_bitsandbytes(kind, nested, tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 99, (2, 9))}
    model = copy.deepcopy(base)
    quantization = lp.Quantization(kind, double_quant=nested)
    lp.attach(model, lp.LoRA(r=4, target_modules=TARGETS), quantization=quantization)
    randomise(model)
    lp.save_adapter(model, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(
        in_4bit(base, kind, nested), str(tmp_path), is_trainable=True
    ).eval()
    for name, module in adapted_modules(model):
        layer = theirs.base_model.model.get_submodule(name).base_layer
        assert_same_bits(name, module._parameters["weight"].reshape(-1), layer.weight.reshape(-1))
    assert_close("logits", run(model, inputs), run(theirs, inputs), floor=1e-4)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for m in (model, theirs)
    ]
    for _ in range(3):
        for m, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            m(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
    assert_close("after 3 steps", run(model, inputs), run(theirs, inputs), floor=1e-4)


@pytest.mark.parametrize("what", ["4bit", "8bit"])
def test_layers_as_found_in_a_model_loaded_by_bitsandbytes(what, tmp_path) -> None:
    base, inputs = build("llama")
    if what == "4bit":
        found = in_4bit(base, "nf4", True)
    else:
        found = copy.deepcopy(base)
        lp.quantize(found, lp.Quantization("int8"))
    model = copy.deepcopy(found)
    lp.attach(model, lp.LoRA(r=4, target_modules=TARGETS))
    randomise(model)
    lp.save_adapter(model, tmp_path)
    want = run(in_peft(found, tmp_path), inputs)
    assert_close("logits", run(model, inputs), want, floor=1e-4 if what == "4bit" else 1e-2)
    again = loaded(found, tmp_path)
    assert_close("again", run(again, inputs), run(model, inputs), floor=1e-5)


def test_a_start_that_was_rounded_with_the_base_warns(tmp_path) -> None:
    """The file fits the dense weight; the packed base was Q(W - B0 A0), which no file holds."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    method = lp.LoRA(r=4, init="olora", target_modules="all-linear")
    lp.attach(model, method, quantization="nf4")
    with pytest.warns(UserWarning, match=r"2 layers, '0' first, were quantised after"):
        lp.save_adapter(model, tmp_path)


def test_eight_bit_layers_that_we_made_log_nothing_per_forward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """bitsandbytes logs a line per layer and forward on an input that is not fp16."""
    model, inputs = build("llama")
    lp.quantize(model, "int8")
    run(model.eval(), inputs)
    assert not caplog.records
