"""Models whose weights are torchao's tensors, quantised in memory.

Each check runs on a stand-in with torchao's layout, and slowly on torchao itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lightning_peft as lp
from lightning_peft import LoRA, Quantization
from lightning_peft.storage import held_tensors, storage_of
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.fake_torchao import float8_weight, int4_weight, int8_weight

Quantise = Callable[[nn.Module, type[nn.Module]], None]


def _by_stand_in(make: Callable[[Tensor], nn.Parameter]) -> Quantise:
    def quantise(model: nn.Module, kind: type[nn.Module] = nn.Linear) -> None:
        for m in model.modules():
            if type(m) is kind:
                m._parameters["weight"] = make(m.get_parameter("weight"))

    return quantise


def _by_torchao(config: str, **options: Any) -> Quantise:
    def quantise(model: nn.Module, kind: type[nn.Module] = nn.Linear) -> None:
        made = pytest.importorskip("torchao.quantization")
        values = {k: getattr(made, v[0])(*v[1:]) for k, v in options.items()}
        chosen = getattr(made, config)(**values)
        made.quantize_(model, chosen, filter_fn=lambda m, _: type(m) is kind)

    return quantise


STAND_INS: dict[str, Quantise] = {
    "int8": _by_stand_in(int8_weight),
    "int8 groups, zero points": _by_stand_in(lambda W: int8_weight(W, 16, zero=3)),
    "float8": _by_stand_in(float8_weight),
}
REAL: dict[str, Quantise] = {
    "torchao int8": _by_torchao("Int8WeightOnlyConfig"),
    "torchao int8 groups": _by_torchao("Int8WeightOnlyConfig", granularity=("PerGroup", 16)),
    "torchao int8 tensor": _by_torchao("Int8WeightOnlyConfig", granularity=("PerTensor",)),
    "torchao int8 activations": _by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": _by_torchao("Float8WeightOnlyConfig"),
    "torchao float8 tensor": _by_torchao("Float8WeightOnlyConfig", granularity=("PerTensor",)),
}
QUANTISERS = STAND_INS | REAL
KINDS = pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k in STAND_INS else [pytest.mark.slow]) for k in QUANTISERS],
)


def made(kind: str) -> tuple[Any, Any]:
    """(quantised, the same dequantised) model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32, bias=False))
    oracle = copy.deepcopy(model)
    QUANTISERS[kind](model, nn.Linear)
    for mine, plain in zip(model, oracle, strict=True):
        if isinstance(plain, nn.Linear):
            held: Any = mine.weight
            plain.weight.data = held.dequantize().detach()
    return model, oracle


def attached(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    lp.attach(model, LoRA(r=4, target_modules=["0", "2"]))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    return model


def parts(p: Any) -> dict[str, Tensor]:
    return {name: getattr(p, name) for name in p.__tensor_flatten__()[0]}


@KINDS
def test_trains_as_the_dequantised_model(kind: str) -> None:
    model, oracle = made(kind)
    classes = [type(m.weight) for m in (model[0], model[2])]
    before = [parts(m.weight) for m in (model[0], model[2])]
    for m in (model, oracle):
        attached(m)
    x = torch.randn(5, 32, requires_grad=True)
    results = []
    for m in (model, oracle):
        y = m(x)
        trained = [p for p in m.parameters() if p.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(f"output and gradients {i}", got, want, floor=1e-6)
    assert {t.dtype for t in model.state_dict().values() if t.ndim == 2} == {
        torch.uint8, torch.float32
    }  # fmt: skip
    lp.detach(model)
    assert [type(m.weight) for m in (model[0], model[2])] == classes
    for m, was in zip((model[0], model[2]), before, strict=True):
        for name, t in was.items():
            assert_same_bits(name, parts(m.weight)[name], t)
    assert set(model[0]._parameters) == {"weight", "bias"}


@KINDS
def test_merges(kind: str) -> None:
    """To dense and back bit for bit; into the format; into plain layers."""
    model = attached(made(kind)[0])
    x = torch.randn(5, 32)
    before = model(x).detach()
    lp.merge(model)
    assert_close("merged", model(x).detach(), before)
    lp.unmerge(model)
    assert_same_bits("unmerged", model(x).detach(), before)
    report = lp.merge(model, into="storage")
    assert all(site.noise is not None for site in report.sites)
    assert_close("in the format", model(x).detach(), before, floor=0.1)
    lp.unmerge(model)
    plain = lp.merge_and_unload(copy.deepcopy(model))
    assert_close("plain", plain(x).detach(), before)
    assert {type(p) for p in plain.parameters()} == {nn.Parameter}


@KINDS
def test_transcodes(kind: str) -> None:
    model, oracle = made(kind)
    for m in (model, oracle):
        lp.quantize(m, Quantization("nf4", block_size=32))
    x = torch.randn(5, 32)
    assert_same_bits("output", model(x), oracle(x))


def test_dtype_and_bits() -> None:
    model = attached(made("int8")[0])
    assert storage_of(model[0]).label == "int8 (torchao)"
    report = lp.parameter_report(model)
    weights = 2 * 32 * 48
    assert report.nbytes["quantised base"] == weights + (48 + 32) * 5


def test_input_scales_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].weight = int8_weight(model[0].weight)
    model[1].weight = int8_weight(model[1].weight, act_pre_scale=torch.ones(32))
    before = [m.weight for m in model]
    with pytest.raises(ValueError, match=r"'1': int8 \(torchao\) .* got one whose input is scaled"):
        lp.attach(model, LoRA(target_modules=["0"]))
    assert [m.weight for m in model] == before
    assert not any(held_tensors(m) for m in model)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_damaged_scales_are_refused(bad: float) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    weight: Any = int8_weight(model[0].weight)
    weight.scale[3] = bad
    model[0].weight = weight
    with pytest.raises(ValueError, match=r"got 1 of 32 that are not, the first"):
        lp.attach(model, LoRA(target_modules=["0"]))
    assert model[0].weight is weight


def test_int4_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight = int4_weight(model[0].weight)
    with pytest.raises(ValueError, match="its weight is a Int4Tensor"):
        lp.attach(model, LoRA(target_modules=["0"]))


# ---- files written by transformers with torchao


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
def test_files_of_transformers(experts: bool, tmp_path: Path) -> None:
    """Read by `load_packed`, written again, and read by transformers with torchao."""
    made = pytest.importorskip("torchao.quantization")
    import transformers as tr

    from tests.helpers.released import llama, qwen3_moe

    config = qwen3_moe() if experts else llama()
    eight: Any = made.Int8WeightOnlyConfig()
    if experts:
        float8 = made.Float8WeightOnlyConfig()
        table = {"_default": eight, r"re:.*experts\.(gate_up|down)_proj": float8}
        eight = made.FqnToConfig(table)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, quantization_config=tr.TorchAoConfig(eight)
    )
    theirs.save_pretrained(tmp_path / "packed")
    ids = torch.randint(0, 64, (2, 7))
    want = theirs(ids).logits.detach()
    model: Any = lp.load_packed(AutoModelForCausalLM, tmp_path / "packed", dtype=torch.float32)
    assert_close("output", model(ids).logits.detach(), want, floor=1e-6)
    labels = {h.storage.label for m in model.modules() for h in held_tensors(m).values()}
    assert labels == {"int8 (torchao)"} | ({"fp8 (torchao)"} if experts else set())
    model.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert_same_bits("written again", again(ids).logits.detach(), want)
    # The same with the model that transformers loaded.
    lp.attach(theirs, LoRA(r=2, target_modules="all-linear"))
    with lp.disable_adapters(theirs):
        base = theirs(ids).logits.detach()
    assert_close("adopted", base, want, floor=1e-6)
    lp.merge(theirs, into="storage")
    base = theirs(ids).logits.detach()
    theirs.save_pretrained(tmp_path / "adopted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adopted", dtype=torch.float32)
    assert_close("written from adopted", again(ids).logits.detach(), base, floor=1e-6)
    lp.unmerge(theirs)
    lp.detach(theirs)
    assert_same_bits("detached", theirs(ids).logits.detach(), want)
