"""What a step of adapted experts makes: no tensor as large as a layer's experts, and on the device
path nothing that the host waits for.
"""

from __future__ import annotations

import pytest
import torch

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.dispatch import count_on_host
from tests.helpers.expert_trace import Trace

EXPERTS, WIDTH, INNER, RANK = 16, 64, 48, 4
STORAGES = {
    "dense": None,
    "nf4": lp.Quantization("nf4"),
    "nf4 plain scales": lp.Quantization("nf4", double_quant=False),
    "fp4": lp.Quantization("fp4"),
}
METHODS = {
    "LoRA": lp.LoRA(r=RANK, target_modules=["experts"]),
    "LoRA dropout": lp.LoRA(r=RANK, dropout=0.1, target_modules=["experts"]),
    "LoRA unaligned rank": lp.LoRA(r=3, target_modules=["experts"]),
    "IA3": lp.IA3(target_modules=["experts"]),
    "VeRA": lp.VeRA(r=8, target_modules=["experts"]),
    "LoKr": lp.LoKr(r=2, target_modules=["experts"]),
    "LoHa": lp.LoHa(r=2, target_modules=["experts"]),
    "DoRA": lp.DoRA(r=RANK, target_modules=["experts"]),
    "MiSS": lp.MiSS(r=8, target_modules=["experts"]),
    "MiSS mini": lp.MiSS(r=7, mini_r=4, form="mini", target_modules=["experts"]),
}
#: Operations by which the host waits for a device.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::masked_select",
    "aten::repeat_interleave.Tensor",
}


def layer(storage: str, method: lp.LoRA) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """One layer's experts, adapted, and 12 tokens for them of which each takes 2."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model = torch.nn.ModuleDict({"experts": experts})
    lp.attach(model, method, quantization=STORAGES[storage])
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(12, WIDTH, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(12)])
    return model["experts"].train(), (x, index, torch.rand(12, 2))


def traced(experts: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Trace:
    with Trace([*experts.parameters(), *experts.buffers()]) as trace:
        y = experts(*inputs)
        y.square().sum().backward()
    return trace


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("dtype", ["fp32", "bf16 autocast"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", STORAGES)
def test_no_tensor_as_large_as_the_experts(storage: str, method: str, dtype: str) -> None:
    """Neither ΔW nor a dequantised or cast copy: at most a quarter of the experts at a time."""
    experts, inputs = layer(storage, METHODS[method])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "fp32"):
        trace = traced(experts, inputs)
    smaller_weight = EXPERTS * WIDTH * INNER
    name, numel, shape = trace.largest()
    assert numel <= smaller_weight / 2, (name, shape)
    assert inputs[0].grad is not None
    assert any("grouped_mm" in op or "mm" in op for op in trace.ops)


def test_the_trace_sees_what_peft_makes() -> None:
    """The measure itself: ΔW by `target_parameters` is as large as the experts."""
    import peft
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=INNER, num_experts=EXPERTS, vocab_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, experts_implementation="eager",
    )  # fmt: skip
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(
        Qwen3MoeForCausalLM(config), peft.LoraConfig(r=RANK, target_parameters=targets)
    )
    ids = torch.zeros(1, 12, dtype=torch.long)
    with Trace([*model.parameters(), *model.buffers()]) as trace:
        model(input_ids=ids).logits.sum().backward()
    assert trace.largest()[1] >= EXPERTS * WIDTH * INNER * 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", STORAGES)
def test_nothing_waits_for_the_host_on_the_device_path(
    storage: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, inputs = layer(storage, METHODS[method])
    y = experts.eval()(*inputs)
    experts.train(not METHODS[method].dropout if hasattr(METHODS[method], "dropout") else True)
    y.square().sum().backward()
    want = inputs[0].grad.clone()
    inputs[0].grad = None
    count_on_host(monkeypatch, False)
    with Trace([*experts.parameters(), *experts.buffers()]) as trace:
        got = experts(*inputs)
        got.square().sum().backward()
    assert not WAITS & set(trace.ops), sorted(WAITS & set(trace.ops))
    assert any("_grouped_mm" in op for op in trace.ops)
    if "dropout" not in method:
        assert_close("y", got, y)
        assert_close("dX", inputs[0].grad, want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_device_path_reads_no_values(storage: str, method: str) -> None:
    """On meta there are none: whoever reads one on the host raises."""
    experts, inputs = layer(storage, METHODS[method])
    model = torch.nn.ModuleDict({"experts": experts}).to("meta")
    x, index, weights = (t.detach().to("meta") for t in inputs)
    y = model["experts"](x.requires_grad_(), index, weights)
    y.square().sum().backward()
    assert x.grad is not None


def test_the_host_path_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure itself: counts cannot be read there."""
    experts, inputs = layer("nf4", METHODS["LoRA"])
    experts.to("meta")
    count_on_host(monkeypatch, True)
    with pytest.raises(RuntimeError, match="meta"):
        experts(*(t.detach().to("meta") for t in inputs))
