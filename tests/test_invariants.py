"""What every method promises on every kind of layer and storage. Each skip carries its reason."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_peft import (
    Quantization,
    adapter_names,
    adapter_state_dict,
    attach,
    detach,
    disable_adapters,
    load_adapter_state_dict,
    merge,
    quantize,
    reset_adapters,
    set_adapter,
    unmerge,
)
from lightning_peft.core.edit import apply_edits
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.layer_cases import LAYERS, Layer
from tests.helpers.method_cases import CASES, Case

GRID = [
    pytest.param(c, y, id=f"{c.name}-{y.name}", marks=c.marks(y.name))
    for c in CASES
    for y in LAYERS
]


def method_for(case: Case, **fields):
    return dataclasses.replace(case.method, target_modules=["0"], **fields)


def skip_if_told(case: Case, layer: Layer) -> None:
    reason = case.skip.get(layer.name)
    if reason:
        pytest.skip(reason)
    if case.name == "loftq" and layer.quantization is None and layer.name != "bnb4":
        pytest.skip("LoftQ needs a quantised base")


def base_of(layer: Layer) -> nn.Module:
    """The model that adapters are attached to, quantised already where the row says so."""
    model = layer.build()
    if layer.quantization is not None:
        quantize(model, layer.quantization)
    return model


def attached(case: Case, layer: Layer, *, moved: bool = True):
    model = layer.build()
    attach(model, method_for(case), quantization=layer.quantization)
    if moved:
        move(model)
    return model


def move(model: nn.Module) -> None:
    """Away from the start, as training would."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)
    }


def assert_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for key, value in want.items():
        assert_same_bits(key, got[key], value)


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize(("case", "layer"), GRID)
def test_adapter(case, layer):
    """Start, gradients, base untouched, switch off, state dict, merge, unmerge, copies, detach: one
    model, in turn.
    """
    skip_if_told(case, layer)
    x = layer.inputs()
    torch.manual_seed(1)
    base = base_of(layer)
    torch.manual_seed(1)
    model = layer.build()
    y_base = layer.run(base, x).detach()
    before = bits(base)
    attach(model, method_for(case), quantization=layer.quantization)

    y = y_start = layer.run(model, x).detach()
    if case.exact_start:
        twin = trainable(base, weights_that_change(model, base))
        assert_same_bits("output at the start", y, layer.run(twin, x).detach())
    elif layer.quantization is None and case.same_start:
        assert_close("output at the start", y, y_base)

    move(model)
    start = bits(model)
    y = layer.run(model, x)
    (y * torch.randn_like(y)).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            cancelled = name.rpartition(".")[2] in case.no_gradient
            assert cancelled or p.grad.abs().sum() > 0, f"{name} has a zero gradient"
        else:
            assert p.grad is None, f"{name} is frozen and has a gradient"
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    saved = adapter_state_dict(model)
    assert trained <= set(saved)
    assert_bits(bits(model), start)  # forward and backward change no bit
    assert (y - y_base).abs().max() > 1e-3, "the adapter has no effect"
    y = y.detach()

    with disable_adapters(model):
        y_frozen = layer.run(trainable(base, set()), x).detach()
        assert_same_bits("output with adapters off", layer.run(model, x).detach(), y_frozen)
    assert_same_bits("output after switching on again", layer.run(model, x).detach(), y)

    fresh = attached(case, layer)
    fresh.load_state_dict(base_weights(model), strict=False) if layer.quantization is None else None
    load_adapter_state_dict(fresh, saved)
    assert_bits(adapter_state_dict(fresh), saved)

    merge(model)
    assert_close("output after merge", layer.run(model, x).detach(), y, floor=layer.tolerance)
    unmerge(model)
    assert_bits(bits(model), start)
    assert_same_bits("output after unmerge", layer.run(model, x).detach(), y)

    for how, twin in copies(model).items():
        assert_same_bits(f"output of a {how} copy", layer.run(twin, x).detach(), y)

    detach(model)
    assert_bits(bits(model), before)
    assert type(model[0]) is type(base[0])
    assert_same_bits("output after detach", layer.run(model, x).detach(), y_base)
    torch.manual_seed(1)
    attach(model, method_for(case), quantization=None)
    if case.exact_start:
        assert_same_bits("output after attaching again", layer.run(model, x).detach(), y_start)


def weights_that_change(model: nn.Module, base: nn.Module) -> set[str]:
    """Dense weights that take a gradient once edited: not where the bias alone is edited."""
    dense = {n for n, p in base.named_parameters() if p.is_floating_point() and p.ndim > 1}
    sites = [
        (f"{name}.{a.site.parameter}", a)
        for name, module in adapted_modules(model)
        for a in adapters_of(module)
    ]
    return {n for n, a in sites if n in dense and apply_edits(a.site, [a.edit()]).requires_grad}


def trainable(base: nn.Module, names: set[str]) -> nn.Module:
    """A copy in which those parameters are trained. Over a transposed input torch.matmul takes one
    product for a weight that takes a gradient and a batched one for a frozen weight: on some CPUs
    their last bits differ.
    """
    twin = copy.deepcopy(base)
    for name, p in twin.named_parameters():
        p.requires_grad_(name in names and p.is_floating_point())
    return twin


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if ".peft." not in k}


def copies(model: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {
        "deep": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "saved": torch.load(file, weights_only=False),
    }


DTYPES = [torch.bfloat16, torch.float16]
FLOAT_LAYERS = [
    y for y in LAYERS if y.name in ("linear", "conv1d_gpt2", "conv2d", "nf4", "fp4", "embedding")
]


HALVES = [
    pytest.param(c, y, d, id=f"{c.name}-{y.name}-{d}", marks=c.marks(y.name))
    for c in CASES
    for y in FLOAT_LAYERS
    for d in DTYPES
]


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize(("case", "layer", "dtype"), HALVES)
def test_half_precision(case, layer, dtype):
    """`.to(dtype)` after attaching, and autocast, stay near fp32; packed bytes stay as they are."""
    skip_if_told(case, layer)
    model = attached(case, layer)
    x = layer.inputs()
    want = layer.run(model, x).detach()
    if x.is_floating_point():
        with torch.autocast("cpu", dtype=dtype):
            assert_close("autocast", layer.run(model, x).detach().float(), want, floor=0.05)
    packed = {k: v for k, v in bits(model).items() if v.dtype == torch.uint8}
    model.to(dtype)
    y = layer.run(model, x.to(dtype) if x.is_floating_point() else x)
    assert_close("output", y.detach().float(), want, floor=0.05)
    for key, value in packed.items():
        assert_same_bits(key, model.state_dict()[key], value)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda y: y.name)
def test_activation_checkpointing(layer, reentrant):
    """Outputs and gradients are those of the plain run."""
    case = CASES[0]
    model = attached(case, layer)
    x = layer.inputs()
    if x.is_floating_point():
        x.requires_grad_()
    elif reentrant:
        pytest.skip("reentrant checkpointing gives no gradient to a function of ids alone")
    y = layer.run(model, x)
    dY = torch.randn_like(y)
    y.backward(dY)
    with torch.set_grad_enabled(not reentrant):  # as its first run
        y = layer.run(model, x)
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    again = torch.utils.checkpoint.checkpoint(
        lambda t: layer.run(model, t), x, use_reentrant=reentrant
    )
    again.backward(dY)
    assert_same_bits("output", again.detach(), y.detach())
    for name, p in model.named_parameters():
        if name in want:
            assert_same_bits(name, p.grad, want[name])


COMPILED = [y for y in LAYERS if y.name not in ("lstm", "gru", "bnb4", "bnb8")]


def compiled_pairs():
    """LoRA on every layer, every method on a dense and on a packed one."""
    dense, packed = (next(y for y in LAYERS if y.name == name) for name in ("linear", "nf4"))
    pairs = [(CASES[0], y) for y in COMPILED]
    # QuantAwareLoRA reads a tensor's value to know whether it rounds: its graph has a break.
    others = [c for c in CASES[1:] if c.name != "quant_aware"]
    pairs += [(c, y) for c in others for y in (dense, packed)]
    return [pytest.param(c, y, id=f"{c.name}-{y.name}", marks=c.marks(y.name)) for c, y in pairs]


@pytest.mark.sweep(0.35)
@pytest.mark.parametrize(("case", "layer"), compiled_pairs())
def test_compiles_in_one_graph(case, layer):
    """Output and gradients. Recurrent layers are refused by Dynamo with or without adapters;
    bitsandbytes' own layers break the graph.
    """
    shadows = layer.name == "mha" or case.name == "lora_trains_biases"
    if shadows and torch.__version__ < "2.13":
        pytest.skip("this torch's Dynamo breaks the graph where a module's parameter is replaced")
    model = attached(case, layer)
    x = layer.inputs()
    trained = [p for p in model.parameters() if p.requires_grad]
    y = layer.run(model, x)
    dY = torch.randn_like(y)
    want = torch.autograd.grad(y, trained, dY, allow_unused=True)
    torch._dynamo.reset()
    got = torch.compile(lambda t: layer.run(model, t), fullgraph=True, backend="eager")(x)
    assert_close("compiled", got.detach(), y.detach())
    for i, g in enumerate(torch.autograd.grad(got, trained, dY, allow_unused=True)):
        assert (g is None) == (want[i] is None)
        if g is not None:
            assert_close(f"gradient {i}", g, want[i])


ROWS = [y for y in LAYERS if y.name not in ("mha", "lstm", "gru")]


@pytest.mark.parametrize("layer", ROWS, ids=lambda y: y.name)
def test_rows_under_different_adapters(layer):
    """Each row equals the run under its adapter alone; a row under none equals the base."""
    model = layer.build()
    for name in ("a", "b"):
        attach(
            model,
            method_for(CASES[0]),
            adapter_name=name,
            quantization=layer.quantization if name == "a" else None,
        )
        move(model)
    x = layer.inputs()[:3] if layer.inputs().shape[0] >= 3 else torch.cat([layer.inputs()] * 2)[:3]
    want = []
    for i, name in enumerate(("a", "b", None)):
        set_adapter(model, name)
        want.append(layer.run(model, x)[i].detach())
    set_adapter(model, ["a", "b"])
    with adapter_names(["a", "b", "__base__"]):
        got = layer.run(model, x).detach()
    for i, row in enumerate(want):
        assert_close(f"row {i}", got[i], row)


@pytest.mark.parametrize("layer_name", ["linear", "nf4", "no_bias"])
def test_rows_under_every_method_at_once(layer_name):
    """One batch, a row for each method and one for the base: each equals its run alone."""
    layer = next(y for y in LAYERS if y.name == layer_name)
    cases = [c for c in CASES if layer_name not in c.skip and not c.method.rewrites_base]
    model = base_of(layer)
    for case in cases:
        attach(model, method_for(case), adapter_name=case.name)
        move(model)
    names = [*(c.name for c in cases), "__base__"]
    x = torch.randn(len(names), *layer.inputs().shape[1:])
    want = []
    for i, name in enumerate(names):
        set_adapter(model, None if name == "__base__" else name)
        want.append(layer.run(model, x[i : i + 1]).detach()[0])
    set_adapter(model, [c.name for c in cases])
    with adapter_names(names):
        got = layer.run(model, x)
        (got * torch.randn_like(got)).sum().backward()
    for name, row, alone in zip(names, got.detach(), want, strict=True):
        assert_close(f"row under {name}", row, alone)
    cancelled = tuple(f".peft.{c.name}.{leaf}" for c in cases for leaf in c.no_gradient)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith(cancelled):
            assert p.grad is not None, f"{name} has no gradient"
            assert p.grad.any(), f"{name} has a zero gradient"


@pytest.mark.parametrize("name", ["b", "unknown"])
def test_rows_of_an_adapter_that_is_not_active_raise(name):
    """Attached but inactive, or not attached at all: the rows would be the base's in silence."""
    model = LAYERS[0].build()
    for attached_name in ("a", "b"):
        attach(model, method_for(CASES[0]), adapter_name=attached_name)
    set_adapter(model, "a")
    with pytest.raises(ValueError, match=rf"\['a'\] .*got '{name}'"), adapter_names(["a", name]):
        LAYERS[0].run(model, LAYERS[0].inputs()[:2])
    with adapter_names([name, name]):
        pass  # nothing ran
    with pytest.raises(RuntimeError, match="own"), adapter_names([name]):
        raise RuntimeError("own")


def test_rows_are_refused_where_they_cannot_be_told_apart():
    layer = next(y for y in LAYERS if y.name == "mha")
    model = attached(CASES[0], layer)
    with adapter_names(["default"] * 3), pytest.raises(ValueError, match="SelfAttention"):
        layer.run(model, layer.inputs())


@pytest.mark.parametrize(
    "layer", [y for y in LAYERS if y.quantization is None], ids=lambda y: y.name
)
def test_order_of_adapters_is_the_order_named(layer):
    """Two adapters: active in the order of the call, merged as they act."""
    model = layer.build()
    for name in ("a", "b"):
        attach(model, method_for(CASES[0]), adapter_name=name)
        move(model)
    set_adapter(model, ["b", "a"])
    x = layer.inputs()
    y = layer.run(model, x).detach()
    merge(model)
    assert_close("merged", layer.run(model, x).detach(), y, floor=layer.tolerance)
    unmerge(model)
    detach(model, "b")
    set_adapter(model, "a")
    assert "b" not in str(adapter_state_dict(model).keys())


DRAWS = [
    c for c in CASES if c.name in (CASES[0].name, "lora_fa", "shira_drawn", "vblora", "unilora")
]


@pytest.mark.parametrize("case", DRAWS, ids=lambda c: c.name)
def test_start_depends_on_the_seed_alone_and_leaves_the_stream_of_data_alone(case):
    layer = LAYERS[0]
    torch.manual_seed(5)
    base = layer.build()
    drawn_without = torch.rand(3)
    torch.manual_seed(5)
    model = layer.build()
    attach(model, method_for(case))
    assert_same_bits("what the user draws next", torch.rand(3), drawn_without)
    torch.manual_seed(5)
    attach(base, method_for(case))
    assert_bits(adapter_state_dict(base), adapter_state_dict(model))
    want = bits(model)
    move(model)
    torch.manual_seed(5)
    reset_adapters(model)
    assert_bits(bits(model), want)


@pytest.mark.parametrize("name", ["lora", "weight", "adapters", "a.b", "lora_A.weight"])
def test_layer_names_that_look_like_ours(name):
    model = nn.Module()
    parent = model
    *path, leaf = name.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(leaf, nn.Linear(8, 8))
    attach(model, dataclasses.replace(CASES[0].method, target_modules=[name]))
    move(model)
    state = adapter_state_dict(model)
    assert set(state) == {f"{name}.peft.default.A", f"{name}.peft.default.B"}
    load_adapter_state_dict(model, state)
    detach(model)
    assert set(model.state_dict()) == {f"{name}.weight", f"{name}.bias"}


def test_the_encoder_layer_runs_its_adapters_in_eval_too():
    """`nn.TransformerEncoderLayer` has a fused path that reads its children's weights and never
    calls them.
    """
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    attach(
        model,
        dataclasses.replace(CASES[0].method, target_modules=["linear1", "linear2", "self_attn"]),
    )
    move(model)
    with torch.no_grad():
        y = model(x)
        model.train()
        assert_close("train against eval", y, model(x))
        model.eval()
        merge(model)
        assert_close("merged", model(x), y)
        unmerge(model)
        detach(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_encoder_layer_runs_packed_layers_in_eval_too():
    """Its fused path would read the bytes of a packed child as a weight."""
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 32)
    quantize(model, Quantization("nf4", block_size=32))
    with torch.no_grad():
        y = model.train()(x)
        assert_close("quantised", model.eval()(x), y)
        attach(model, dataclasses.replace(CASES[0].method, target_modules=["linear1"]))
        detach(model)
        assert_close("detached", model(x), y)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_rows(case):
    """A batch without rows, as an expert without tokens gets: no rows come out, gradients are 0."""
    layer = next(y for y in LAYERS if y.name == "linear")
    skip_if_told(case, layer)
    model = attached(case, layer)
    for shape in ((0, 16), (0, 5, 16)):
        x = torch.randn(shape, requires_grad=True)
        y = layer.run(model, x)
        assert y.shape == (*shape[:-1], 12)
        y.sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is None or not p.grad.any(), name
