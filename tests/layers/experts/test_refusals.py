"""Experts that are not served say so by name; sentinels and undecorated forms that are served equal
the module's own forward.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.experts.ops import is_experts
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, randomise, run, trained

LORA = lp.LoRA(r=2, target_modules=["experts"])


def filled(module: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if p.is_floating_point() and p.element_size() > 1:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return module


def config(name: str, **fields):
    import transformers

    made = getattr(transformers, name)(**fields)
    made._experts_implementation = "eager"
    return made


def qwen(**fields) -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4} | fields
    return filled(Qwen3MoeExperts(config("Qwen3MoeConfig", **sizes)))


def with_extra() -> nn.Module:
    experts = qwen()
    experts.per_expert_scale = nn.Parameter(torch.ones(4))
    return experts


def jetmoe() -> nn.Module:
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    return filled(JetMoeParallelExperts(4, 16, 32))


def dbrx() -> nn.Module:
    from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

    made = config("DbrxConfig", d_model=32).ffn_config
    made.hidden_size, made.ffn_hidden_size, made.moe_num_experts = 32, 16, 4
    return filled(DbrxExpertGLU(made))


def longcat() -> nn.Module:
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    sizes = {"hidden_size": 32, "expert_ffn_hidden_size": 16, "n_routed_experts": 4}
    return filled(LongcatFlashExperts(config("LongcatFlashConfig", **sizes, zero_expert_num=2)))


def mxfp4() -> nn.Module:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    return Mxfp4GptOssExperts(
        config("GptOssConfig", hidden_size=32, intermediate_size=32, num_local_experts=4)
    )


def cast_to_fp8() -> nn.Module:
    experts = qwen()
    for name, p in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(p.data.to(torch.float8_e4m3fn), requires_grad=False))
    return experts


def shared_by_bmm() -> nn.Module:
    from transformers.models.inkling.modeling_inkling import InklingSharedExperts

    made = type("Config", (), {})()
    made.n_shared_experts, made.moe_intermediate_size, made.hidden_size = 2, 16, 32
    made.hidden_act = "silu"
    return filled(InklingSharedExperts(made))


REFUSED = {
    "extra parameters": (with_extra, r"further parameters \['per_expert_scale'\]"),
    "jetmoe": (jetmoe, r"not known \(JetMoeParallelExperts: weight \[4, 32, 16\]"),
    "dbrx": (dbrx, r"not known \(DbrxExpertGLU: w1 \[64, 32\]"),
    "longcat": (longcat, "not known .LongcatFlashExperts"),
    "inkling": (shared_by_bmm, "not known .InklingSharedExperts"),
    "mxfp4": (mxfp4, r"another library quantised \(Mxfp4GptOssExperts: gate_up_proj in uint8"),
    "float8 weights": (cast_to_fp8, r"another library quantised \(Qwen3MoeExperts: .*float8"),
}


@pytest.mark.parametrize("targets", [["experts"], "all-linear"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, targets) -> None:
    make, why = REFUSED[case]
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "experts": make()})
    before = {k: t.clone() for k, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    trained_before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=f"'experts'.*{why}"):
        lp.attach(model, lp.LoRA(r=2, target_modules=targets))
    assert [type(m) for m in model.modules()] == kinds
    assert set(model.state_dict()) == set(before)
    assert [p.requires_grad for p in model.parameters()] == trained_before
    # The ways out: left frozen, and left as they are when the rest is quantised.
    lp.attach(model, lp.LoRA(r=2, target_modules="all-linear", exclude_modules=["experts"]))
    lp.detach(model)
    report = lp.quantize(model, lp.Quantization("nf4"))
    assert any(name == "experts" and "experts" in reason for name, reason in report.dense)


def test_the_decorated_form_without_the_decorator_is_served() -> None:
    """Step-3.7's experts, sentinels included, against their own forward with W + s B A."""
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    made = type("Config", (), {"num_local_experts": 4, "hidden_size": 32})()
    made.moe_intermediate_size, made.hidden_act = 16, "silu"
    experts = filled(Step3p7Experts(made, swiglu_limit=0.05))
    model = nn.ModuleDict({"experts": copy.deepcopy(experts)})
    lp.attach(model, LORA)
    randomise(model)
    for p in model["experts"].peft.default.children():
        delta = p.method.alpha / 2 * (p.B @ p.A)
        experts.get_parameter(p.site.parameter).data += delta.detach()
    x, index = torch.randn(9, 32), torch.randint(0, 5, (9, 2))  # 4: another process's expert
    weights = torch.rand(9, 2)
    assert_close("y", model["experts"](x, index, weights), experts(x, index, weights))


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_rows_of_other_processes_experts(storage) -> None:
    """Sentinels as transformers' own grouped forward treats them, values and gradients."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    plain = qwen()
    if storage:
        lp.quantize(nn.ModuleDict({"experts": plain}), lp.Quantization(storage, block_size=32))
    model = nn.ModuleDict({"experts": copy.deepcopy(plain)})
    lp.attach(model, LORA)
    dense = qwen()
    if storage:
        for name in ("gate_up_proj", "down_proj"):
            site = next(a for a in model["experts"].peft.default.children()
                        if a.site.parameter == name).site  # fmt: skip
            dense.get_parameter(name).data.copy_(site.weight(torch.float32))
    dense._is_expert_parallel = model["experts"]._is_expert_parallel = True
    x = torch.randn(9, 32, requires_grad=True)
    index, weights = torch.randint(0, 5, (9, 2)), torch.rand(9, 2)
    index[3], index[5] = 4, torch.tensor([4, 1])
    assert (index == 4).sum() >= 3
    want = grouped_mm_experts_forward(dense, x, index, weights)
    want.square().sum().backward()
    dX, x.grad = x.grad, None
    got = model["experts"](x, index, weights)
    got.square().sum().backward()
    assert_close("y", got, want)
    assert_close("dX", x.grad, dX)
    assert not got[3].any()
    for key, p in model["experts"].peft.named_parameters():
        assert torch.isfinite(p.grad).all(), key


def test_a_rank_above_an_experts_smaller_side_is_refused() -> None:
    base, _ = build("qwen3_moe")  # 16 inner features
    before = set(base.state_dict())
    with pytest.raises(ValueError, match=r"experts.*16, got r = 17.*rank_pattern"):
        lp.attach(base, lp.LoRA(r=17, target_modules=["experts"]))
    assert set(base.state_dict()) == before
    lp.attach(base, lp.LoRA(r=16, target_modules=["experts"]))


def _fewer_experts(tensors):
    return {k: (t[: len(t) // 2] if "lora_A" in k else t[:, : t.shape[1] // 2]).contiguous()
            for k, t in tensors.items()}  # fmt: skip


def _one_weight_short(tensors):
    keys = sorted(tensors)
    return {k: tensors[k] for k in keys if ".base_layer." not in k or "layers.1" not in k}


def _swapped(tensors):
    """As a module that stores [E, in, out] would be written by somebody who does not know."""
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    made = {}
    for k, t in tensors.items():
        old = next(n for n in swap if n in k)
        made[k.replace(old, swap[old])] = t.mT.contiguous()
    return made


@pytest.mark.parametrize("broken", [_fewer_experts, _one_weight_short, _swapped])
def test_a_directory_of_other_experts_is_refused_whole(tmp_path: Path, broken) -> None:
    base, inputs = build("qwen3_moe")
    lp.save_adapter(trained(base, LORA), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(broken(load_file(file)), file, metadata={"format": "pt"})
    before, y = set(base.state_dict()), run(base, inputs)
    with pytest.raises(ValueError, match="experts"):
        lp.load_adapter(base, tmp_path)
    assert set(base.state_dict()) == before
    assert not any(is_experts(m) and hasattr(m, "peft") for m in base.modules())
    assert torch.equal(run(base, inputs), y)


def test_counts_and_routers_in_the_report() -> None:
    """Packed experts are counted as the weights they are; what is left out is named."""
    base, _ = build("qwen2_moe")
    logical = sum(p.numel() for p in base.parameters())
    report = lp.attach(
        base,
        lp.LoRA(r=2, target_modules="all-linear"),
        quantization=lp.Quantization("nf4", block_size=32),
    )
    assert report.total == logical + report.trainable
    left = {name.rpartition(".")[2] for name, why in report.skipped if why == "router"}
    assert left == {"gate", "shared_expert_gate"}
    experts = [m for m in base.modules() if is_experts(m)]
    packed = sum(
        p.numel() * p.element_size() for m in experts for n, p in m.named_parameters(recurse=False)
    )
    assert report.nbytes["quantised base"] > packed
    shown = [g for g in report.groups if g.layers == "experts"]
    assert {g.storage for g in shown} == {"nf4"}
    assert sum(g.count for g in shown) == 2 * len(experts)
