"""Layers that are called with one tensor, computed as one: equal to the layers one by one."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_peft_kernels.nf4 import projections
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    DoRA,
    LoRA,
    Quantization,
    adapter_names,
    attach,
    detach,
    disable_adapters,
    merge,
    set_adapter,
    unmerge,
)
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.group_outputs import HAND_OFF
from lightning_peft.methods.base import Method
from lightning_peft.models.shared_inputs import children_sharing_input
from tests.helpers.dispatch import group_projections
from tests.helpers.tiny_models import BUILDERS, example_inputs, main_output

K = 32
NF4 = Quantization("nf4", block_size=32)


class Attention(nn.Module):
    """q, k and v over one tensor, and a layer behind them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="mpnet")  # which declares q, k and v
        for name, n in (("q", 48), ("k", 16), ("v", 16)):
            self.add_module(name, nn.Linear(K, n, bias=bias))
        self.o = nn.Linear(80, K)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        out: Tensor = self.o(torch.cat([q * q, k, v], -1))
        return out


class Cross(Attention):
    """Its k and v read another tensor if there is one."""

    def __init__(self, model_type: str = "mpnet") -> None:
        super().__init__()
        self.config.model_type = model_type

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:  # type: ignore[override]
        y = x if other is None else other
        out: Tensor = self.o(torch.cat([self.q(x), self.k(y), self.v(y)], -1))
        return out


class InPlace(Attention):
    """The tensor is written over between two calls."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        q = self.q(x)
        x.mul_(2.0)
        k = self.k(x)
        out: Tensor = self.o(torch.cat([q, k, self.v(x)], -1))
        return out


def build(cls: type[Attention] = Attention, method: Method | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    model = cls(**kwargs)
    attach(model, method or LoRA(r=4, target_modules="all-linear"), quantization=NF4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith("B"):
                p.normal_()
    return model.train()


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    yield
    group_projections(None)
    HAND_OFF.pending = None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each grouped call computed."""
    seen: list[int] = []
    forward = projections._GroupedProjections.forward

    def counted(ctx: Any, x: Tensor, group: Any, *rest: Any) -> Any:
        seen.append(len(group.rows))
        return forward(ctx, x, group, *rest)

    monkeypatch.setattr(projections._GroupedProjections, "forward", staticmethod(counted))
    return seen


def results(model: Any, *inputs: Tensor, together: bool, seed: int = 5) -> dict[str, Tensor]:
    group_projections(together)
    model.zero_grad()
    given = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    y = model(*given)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **{f"x{i}": x.grad for i, x in enumerate(given)}, **found}


def same(model: Any, *inputs: Tensor) -> None:
    alone = results(model, *inputs, together=False)
    together = results(model, *inputs, together=True)
    assert alone.keys() == together.keys()
    for name, want in alone.items():
        unit = float(want.abs().max()) if want.numel() else 1.0
        torch.testing.assert_close(together[name], want, rtol=1e-5, atol=1e-6 * unit, msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, K), (2, 3, K), (0, K)], ids=str)
def test_outputs_and_gradients(shape: tuple[int, ...], bias: bool, calls: list[int]) -> None:
    same(build(bias=bias), torch.randn(shape))
    assert calls == [3]


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=4, dropout=0.4, target_modules="all-linear"),
        LoRA(r=4, rank_pattern={"k": 2}, alpha_pattern={"v": 3.0}, target_modules="all-linear"),
    ],
    ids=["dropout", "patterns"],
)
def test_each_layer_keeps_its_own(method: Method, calls: list[int]) -> None:
    """Its rank, its scale, and the mask it would draw alone."""
    same(build(method=method), torch.randn(5, K))
    assert calls == [3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool, calls: list[int]) -> None:
    model = build(method=LoRA(r=4, dropout=0.3, target_modules="all-linear"))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            for _ in range(2):
                x = checkpoint(self.inner, x, use_reentrant=reentrant)
            return x

    same(Outer(), torch.randn(4, K))
    assert calls == [3] * 4  # two calls, and each again in backward


def test_another_tensor_runs_alone(calls: list[int]) -> None:
    """The table declares one tensor for q, k and v; the calls decide."""
    x, other = torch.randn(2, 4, K)
    same(build(Cross), x)
    same(build(Cross), x, other)
    assert calls == [3, 3]  # k and v did not take the second


def test_cross_attention_groups_key_and_value_alone(calls: list[int]) -> None:
    x, other = torch.randn(2, 4, K)
    torch.manual_seed(3)
    model = nn.Module()
    model.EncDecAttention = Cross("t5")
    attach(model, LoRA(r=4, target_modules="all-linear"), quantization=NF4)
    same(model.EncDecAttention, x, other)
    assert calls == [2]


def test_a_model_that_the_table_does_not_know_runs_one_by_one() -> None:
    model = Cross("my_own_model")
    attach(model, LoRA(r=4, target_modules="all-linear"), quantization=NF4)
    assert model.q._peft.projection_group is None  # type: ignore[union-attr]
    del model.config
    assert list(children_sharing_input(model)) == []


def test_another_config_inside_decides_for_its_part() -> None:
    model = nn.Module()
    model.config = SimpleNamespace(model_type="llama")  # type: ignore[assignment]
    model.own, model.unknown = Attention(), Cross("my_own_model")
    model.unknown.q_proj, model.unknown.k_proj = nn.Linear(K, K), nn.Linear(K, K)
    found = {(type(m).__name__, names) for m, names in children_sharing_input(model)}
    assert found == {("Attention", ("q", "k", "v")), ("Cross", ("q_proj", "k_proj"))}


def test_a_tensor_that_was_written_over_is_another(calls: list[int]) -> None:
    model, x = build(InPlace), torch.randn(4, K)
    found = []
    for together in (False, True):
        group_projections(together)
        with torch.no_grad():
            found.append(model(x))
    torch.testing.assert_close(*found)
    assert calls == [3]  # computed, and k and v not taken


def test_one_layer_alone_and_out_of_order(calls: list[int]) -> None:
    model = build()
    x = torch.randn(4, K)
    group_projections(False)
    want = {n: getattr(model, n)(x) for n in "qkv"}
    group_projections(True)
    for order in ("k", "vk", "q", "qv", "qqk", "kq"):
        for name in order:
            torch.testing.assert_close(getattr(model, name)(x), want[name])


def test_hooks_of_one_layer_act(calls: list[int]) -> None:
    model = build()
    x = torch.randn(4, K)
    model.k.register_forward_hook(lambda m, args, y: y * 2)
    model.v.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    same(model, x)
    assert calls == [3]


def test_states_of_adapters(calls: list[int]) -> None:
    model = build()
    attach(model, LoRA(r=2, target_modules=["k"]), adapter_name="other")
    x = torch.randn(4, K)
    for names in (["default"], ["default", "other"], ["other"], None):
        set_adapter(model, names)
        if names == ["default"] or names == ["default", "other"]:
            same(model, x)
        else:
            group_projections(True)
            together = model(x)
            group_projections(False)
            torch.testing.assert_close(together, model(x))
    assert calls == [3, 3]
    set_adapter(model, ["default", "other"])
    group_projections(True)
    with adapter_names(["default", "other", "default", "__base__"]):
        mixed = model(x)
    with disable_adapters(model):
        model(x)
    assert calls == [3, 3]
    torch.testing.assert_close(mixed[0], _only(model, "default", x)[0])


def _only(model: Any, name: str, x: Tensor) -> Tensor:
    set_adapter(model, name)
    y: Tensor = model(x)
    return y


def test_a_member_in_another_mode_or_merged_keeps_all_apart(calls: list[int]) -> None:
    model = build()
    x = torch.randn(3, K)
    model.k.eval()
    same(model, x)
    model.train()
    merge(model)
    group_projections(True)
    model(x)
    unmerge(model)
    assert calls == []
    same(model, x)
    assert calls == [3]


@pytest.mark.parametrize("merged", [["q"], ["k"], ["k", "v"]])
def test_a_member_that_a_merge_made_dense_keeps_all_apart(
    merged: list[str], calls: list[int]
) -> None:
    model = build().eval()
    attach(model, LoRA(r=2, target_modules=merged), adapter_name="merged")
    set_adapter(model, ["default", "merged"])
    with torch.no_grad():
        for name in merged:
            model.get_parameter(f"{name}.peft.merged.B").normal_()
    x = torch.randn(3, K)
    group_projections(False)
    want = model(x)
    group_projections(True)
    merge(model, "merged")
    calls.clear()
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert calls == []
    unmerge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert calls == [3]


def test_other_forms_and_dense_weights_run_alone(calls: list[int]) -> None:
    x = torch.randn(3, K)
    same(build(method=DoRA(r=4, target_modules="all-linear")), x)
    dense = Attention()
    attach(dense, LoRA(r=4, target_modules="all-linear"))
    same(dense, x)
    assert calls == []


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any, calls: list[int]) -> None:
    model = build().eval()
    x = torch.randn(3, K)
    group_projections(False)
    want = model(x)
    group_projections(True)
    with context():
        torch.testing.assert_close(model(x + 0), want)
    assert calls == ([3] if context is torch.no_grad else [])


def test_autocast_that_changes_between_calls(calls: list[int]) -> None:
    model = build()
    x = torch.randn(3, K)
    group_projections(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = model.q(x)
    assert q.dtype == torch.bfloat16
    assert model.k(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {getattr(model, n)(x).dtype for n in "qkv"} == {torch.bfloat16}


def test_threads_do_not_take_each_other_s_outputs(calls: list[int]) -> None:
    """A group hands outputs on within one thread."""
    model = build().eval()
    inputs = [torch.randn(3, K) for _ in range(4)]
    group_projections(False)
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    group_projections(True)
    start, wrong = threading.Barrier(4), []

    def serve(i: int) -> None:
        start.wait()
        for _ in range(10):
            with torch.no_grad():
                y = model(inputs[i])
            if not torch.allclose(y, wanted[i], rtol=1e-5, atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [3] * 40
    assert wrong == []


def test_nothing_is_kept() -> None:
    model = build()
    group_projections(True)
    x = torch.randn(3, K)
    seen = weakref.ref(x)
    model(x)
    assert HAND_OFF.pending is None
    del x
    gc.collect()
    assert seen() is None
    model.q(torch.randn(3, K))  # a forward that ends early
    assert HAND_OFF.pending is not None
    model.o(torch.randn(3, 80))  # the next adapted layer anywhere
    assert HAND_OFF.pending is None


def test_copies_and_pickles_run_alone_and_hold_no_other_layer(calls: list[int]) -> None:
    model = build()
    x = torch.randn(3, K)
    group_projections(True)
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), want)
    assert len(pickle.dumps(model.q)) < len(pickle.dumps(model)) * 0.7
    assert calls == [3]


def test_detaching_and_attaching_again(calls: list[int]) -> None:
    model = build()
    x = torch.randn(3, K)
    detach(model)
    attach(model, LoRA(r=2, target_modules=["q", "v"]))
    same(model, x)
    assert calls == [2]


def test_compiles_without_a_graph_break(calls: list[int]) -> None:
    model = build()
    group_projections(True)
    x = torch.randn(3, K)
    made = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)
    assert calls == [3]  # of the call that was not compiled


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "t5", "whisper"])
def test_models(name: str, calls: list[int]) -> None:
    model = BUILDERS[name]()
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization=NF4)
    inputs = example_inputs(name)
    group_projections(False)
    want = main_output(model(**inputs))
    group_projections(True)
    torch.testing.assert_close(main_output(model(**inputs)), want, rtol=1e-4, atol=1e-4)
    assert calls


# ---- the table

QKV = ("q_proj", "k_proj", "v_proj")
LLAMA = {QKV, ("gate_proj", "up_proj")}
BART = {QKV, ("k_proj", "v_proj")}
GROUPS: dict[str, set[tuple[str, ...]]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "phi": {QKV},
    "olmo2": LLAMA,
    "granite": LLAMA,
    "opt": {QKV},
    "mixtral": {QKV},
    "qwen3_moe": {QKV},
    "deepseek_v3": {("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")},
    "qwen2_moe": LLAMA,
    "olmoe": {QKV},
    "granitemoe": {QKV},
    "llama4_text": LLAMA,
    "gpt_oss": {QKV},
    "bert": {("query", "key", "value")},
    "roberta": {("query", "key", "value")},
    "distilbert": {("q_lin", "k_lin", "v_lin")},
    "t5": {("q", "k", "v"), ("k", "v")},
    "flan_t5": {("q", "k", "v"), ("k", "v"), ("wi_0", "wi_1")},
    "bart": BART,
    "whisper": BART,
    "vit": {QKV},
    "clip": {QKV},
}


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_declared_layers_read_one_tensor(name: str) -> None:
    """Every module's forward calls the declared children with one tensor, the first in front."""
    model: Any = BUILDERS[name]()
    declared = list(children_sharing_input(model))
    assert {names for _, names in declared} == GROUPS.get(name, set())
    calls: dict[int, list[tuple[str, Tensor]]] = {}
    for i, (module, names) in enumerate(declared):
        for child in names:

            def note(m: nn.Module, args: Any, i: int = i, child: str = child) -> None:
                calls.setdefault(i, []).append((child, args[0]))

            module.get_submodule(child).register_forward_pre_hook(note)
    model(**example_inputs(name))
    assert calls or not declared
    for i, seen in calls.items():
        names = declared[i][1]
        assert seen[0][0] == names[0]
        assert sorted(child for child, _ in seen) == sorted(names)
        assert len({id(x) for _, x in seen}) == 1


def test_the_group_of_every_adapted_model_is_the_declared_one() -> None:
    model: Any = BUILDERS["t5"]()
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization=NF4)
    names = {id(m): n for n, m in model.named_modules()}
    found = {
        tuple(names[id(member)] for member in m._peft.projection_group.members)
        for _, m in adapted_modules(model)
        if m._peft.projection_group is not None
    }
    assert len(found) == 6  # self-attention twice in both stacks, cross-attention twice
    for group in found:
        leaves = tuple(n.rpartition(".")[2] for n in group)
        assert leaves == (("k", "v") if "EncDecAttention" in group[0] else ("q", "k", "v"))


def test_on_a_cpu_they_run_apart_and_the_group_says_why() -> None:
    model = build()
    shared = model.q._peft.projection_group
    assert shared.members == (model.q, model.k, model.v)
    assert shared.reason_apart() == "cpu: no faster as one product"
    group_projections(True)
    assert shared.reason_apart() == ""
