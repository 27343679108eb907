"""Layers of transformers' quantised classes, as `from_pretrained` makes them on a GPU.

Here its guard against CPUs is off, and a stand-in takes the place of the MXFP4 kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels
from transformers.integrations.finegrained_fp8 import (
    FP8Embedding,
    FP8Experts,
    FP8GroupedLinear,
    FP8Linear,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

import lightning_peft as lp
from lightning_peft import LoRA, load_packed
from lightning_peft.storage import storage_of
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.fake_mxfp4_hub import HUB
from tests.helpers.released import fp8_blocks, fp8_values, write
from tests.storage.test_released import attached, bits, dense, gradients, logits, packed

NAMES = ["fp8", "fp8 static", "fp8 experts", "mxfp4", "fp4 experts"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {n: write(n, tmp_path_factory.mktemp(n.replace(" ", "_"))) for n in NAMES}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_guard(self: Any, *args: Any, **options: Any) -> None:
        pass

    before = Mxfp4HfQuantizer._process_model_before_weight_loading

    def with_kernels(self: Any, model: Any, use_kernels: bool = False, **options: Any) -> Any:
        return before(self, model, use_kernels=True, **options)

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", no_guard)
    monkeypatch.setattr(Mxfp4HfQuantizer, "validate_environment", no_guard)
    monkeypatch.setattr(Mxfp4HfQuantizer, "_process_model_before_weight_loading", with_kernels)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **options: HUB)


Folders = dict[str, tuple[Path, Path]]


def loaded(folders: Folders, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders[name][0], dtype=torch.float32).train()


def structure(model: nn.Module) -> dict[str, Any]:
    """Class, dtype, flag and bytes of everything, transformers' own tensors included."""
    found: dict[str, Any] = {n: type(m) for n, m in model.named_modules()}
    for n, p in model.named_parameters():
        raw = p.detach().reshape(-1).view(torch.uint8).tolist()
        found[f"{n} value"] = (p.dtype, tuple(p.shape), p.requires_grad, raw)
    for n, m in model.named_modules():
        for proj in ("gate_up_proj", "down_proj"):
            if proj in vars(m):
                found[f"{n}.{proj} held"] = vars(m)[proj].storage.data.tolist()
        found[f"{n} attributes"] = sorted(k for k in vars(m) if k != "hf_quantizer")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_trains_as_the_dequantised_model(name: str, folders: Folders) -> None:
    model, oracle = loaded(folders, name), dense(folders, name)
    before = structure(model)
    for m in (model, oracle):
        attached(m, LoRA(r=4, target_modules="all-linear"))
    assert_close("output", logits(model), logits(oracle), floor=1e-6)
    got, want = gradients(model), gradients(oracle)
    assert set(got) == set(want)
    for key, value in want.items():
        assert_close(f"gradient of {key}", got[key], value, floor=1e-6)
    lp.detach(model)
    assert structure(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_as_our_reader(name: str, folders: Folders, tmp_path: Path) -> None:
    """An adapter directory, a merge and a saved model are those of `load_packed`."""
    method = LoRA(r=4, target_modules="all-linear")
    model, twin = attached(loaded(folders, name), method), attached(packed(folders, name), method)
    one, other = bits(model), bits(twin)
    assert set(one) == set(other)
    for key, value in other.items():
        assert_same_bits(key, one[key].reshape(-1), value.reshape(-1))
    lp.merge(model)
    before = logits(model)
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").train()
    assert_close("saved dense", logits(again), before)
    lp.unmerge(model)
    lp.merge(model, into="storage")
    model.save_pretrained(tmp_path / "packed")
    again = load_packed(AutoModelForCausalLM, tmp_path / "packed", dtype=torch.float32).train()
    assert_same_bits("saved packed", logits(again), logits(model))


@pytest.mark.parametrize("name", NAMES)
def test_merge_and_unload(name: str, folders: Folders, tmp_path: Path) -> None:
    model = attached(loaded(folders, name), LoRA(r=4, target_modules="all-linear"))
    before = logits(model)
    plain = lp.merge_and_unload(model)
    assert {type(m) for m in plain.modules()} == {type(m) for m in dense(folders, name).modules()}
    assert_close("output", logits(plain), before)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert_close("saved and loaded", logits(again), before)


@pytest.mark.parametrize("name", ["fp8", "fp8 experts", "mxfp4"])
def test_transcoded(name: str, folders: Folders) -> None:
    method = LoRA(r=4, target_modules="all-linear")
    model, oracle = loaded(folders, name), dense(folders, name)
    for m in (model, oracle):
        torch.manual_seed(0)
        lp.attach(m, method, quantization=lp.Quantization("nf4", block_size=32))
    assert_close("output", logits(model), logits(oracle), floor=1e-6)
    lp.detach(model)
    plain = lp.merge_and_unload(model)
    assert {type(m) for m in plain.modules()} == {type(m) for m in oracle_classes(folders, name)}


def oracle_classes(folders: Folders, name: str) -> list[nn.Module]:
    return list(dense(folders, name).modules())


def test_biases_are_trained(folders: Folders) -> None:
    """transformers' own backward gives a bias no gradient."""
    model = loaded(folders, "fp8")
    lp.attach(model, lp.BitFit())
    got = gradients(model)
    assert len(got) == 2 * 4
    assert all(g.any() for g in got.values())


def test_hooks_of_accelerate(folders: Folders) -> None:
    """A hooked layer keeps its class's forward: ours, then theirs again."""
    model = loaded(folders, "fp8")
    for m in model.modules():
        if isinstance(m, FP8Linear):
            add_hook_to_module(m, ModelHook())
    want = packed(folders, "fp8")
    lp.attach(model, LoRA(r=2, target_modules=["q_proj"]))
    lp.attach(want, LoRA(r=2, target_modules=["q_proj"]))
    assert_close("output", logits(model), logits(want), floor=1e-6)
    lp.detach(model)
    layer = model.model.layers[0].mlp.up_proj
    assert layer._old_forward.__func__ is FP8Linear.forward


# ---- kinds of layers by themselves


def fp8_linear(W: Tensor, cls: Any = FP8Linear, **options: Any) -> Any:
    N, K = W.shape
    layer = cls(K, N, block_size=[128, 128], **options)
    codes, scales = fp8_blocks(W)
    layer.weight.data, layer.weight_scale_inv.data = codes, scales
    return layer


def test_grouped_linear() -> None:
    W = torch.randn(2 * 128, 96)
    layer = fp8_linear(W, FP8GroupedLinear, n_groups=2)
    values = fp8_values(layer.weight.data, layer.weight_scale_inv.data)
    model = nn.ModuleDict({"grouped": layer, "plain": nn.Linear(96, 96)})
    lp.attach(model, LoRA(r=2, target_modules=["plain"]))
    x = torch.randn(3, 2, 96, requires_grad=True)
    y = layer(x)
    want = torch.einsum("tgk,gnk->tgn", x, values.view(2, 128, 96))
    assert_close("output", y, want.detach(), floor=1e-6)
    (got,), (expected,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, want))
    assert_close("gradient", got, expected, floor=1e-6)


def test_embedding() -> None:
    table = FP8Embedding(10, 8)
    table.weight.data = torch.randn(10, 8).to(torch.float8_e4m3fn)
    table.weight_scale.data = torch.tensor([0.25])
    ids = torch.tensor([[1, 3], [9, 1]])
    want = table(ids)
    model = nn.ModuleDict({"table": table, "plain": nn.Linear(8, 8)})
    lp.attach(model, LoRA(r=2, target_modules=["plain"]))
    assert table.weight.dtype == torch.uint8
    assert_same_bits("rows", table(ids), want)
    lp.detach(model)
    assert type(table) is FP8Embedding
    assert table.weight.dtype == torch.float8_e4m3fn


# ---- what no encoder writes


def _damage(what: str, layer: Any) -> None:
    codes, scales = layer.weight, layer.weight_scale_inv
    if what == "NaN":
        raw = codes.data.view(torch.uint8)
        raw[3, 5] = 0x7F
        raw[7, 1] = 0xFF
    elif what == "missing":
        layer.weight_scale_inv = None
    elif what == "shape":
        scales.data = torch.ones(1, 1)
    elif what == "cast":
        codes.data = codes.data.half()
    elif what == "scale dtype":
        scales.data = scales.data.double()
    else:
        scales.data[0, 1] = {"zero": 0.0, "infinite": float("inf"), "negative": -1.0}[what]


BAD = {
    "NaN": r"'1': fp8 FP8Linear.weight codes: expected codes of numbers, got 2 NaN of",
    "missing": r"'1': fp8 FP8Linear.weight: expected scales beside the codes, found none",
    "shape": r"scales: expected shape \[2, 2\], got \[1, 1\]",
    "cast": r"codes: expected float8_e4m3fn, got float16; .* do not cast",
    "scale dtype": r"expected scales in fp32, .* got float64",
    "zero": r"expected positive scales, got 1 of 4 that are not, the first 0.0",
    "infinite": r"expected finite scales, got 1 of 4 that are not, the first inf",
    "negative": r"expected positive scales, got 1 of 4 that are not, the first -1.0",
}


@pytest.mark.parametrize("what", BAD)
def test_damaged_tensors(what: str) -> None:
    """Named with the layer; nothing is changed, in layers that are fine neither."""
    model = nn.Sequential(fp8_linear(torch.randn(64, 64)), fp8_linear(torch.randn(192, 160)))
    _damage(what, model[1])
    before = {n: (p.dtype, id(p), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=BAD[what]):
        lp.attach(model, LoRA(target_modules=["0"]))
    assert {n: (p.dtype, id(p), p.requires_grad) for n, p in model.named_parameters()} == before
    assert [type(m) for m in model] == [FP8Linear, FP8Linear]


def test_fused_blocks_of_gate_and_up() -> None:
    """Scales of one grid over gate and up, whose half is no multiple of the block: refused."""
    config = type("Config", (), {"hidden_size": 128, "num_experts": 2, "hidden_act": "silu"})()
    config.moe_intermediate_size = 192
    experts = FP8Experts(config, block_size=(128, 128))
    for p in experts.parameters():
        p.data = torch.ones_like(p.float()).to(p.dtype)
    model = nn.ModuleDict({"experts": experts, "plain": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"gate_up_proj scales: expected shape \[2, 4, 1\]"):
        lp.attach(model, LoRA(target_modules=["plain"]))


def test_unloaded_gpt_oss() -> None:
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=2)
    model = nn.ModuleDict({"experts": Mxfp4GptOssExperts(config), "plain": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"another library quantised .*load_packed"):
        lp.attach(model, LoRA(target_modules=["experts"]))


def test_dtype_of_the_model() -> None:
    """A layer without bias reads in the dtype of the model around it."""
    model = nn.Sequential(fp8_linear(torch.randn(64, 64)), nn.Linear(64, 64).bfloat16())
    lp.attach(model, LoRA(r=2, target_modules=["0"]))
    assert storage_of(model[0]).dtype(model[0], "weight") == torch.bfloat16
