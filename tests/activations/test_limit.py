"""Losses and gradients with a limit equal those without, bit for bit; the model comes back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    Activations,
    BottleneckAdapter,
    LoRA,
    PrefixTuning,
    PromptTuning,
    adapter_names,
    attach,
    detach,
    limit_activations,
    set_adapter,
)
from tests.helpers.tiny_models import BUILDERS, example_inputs, main_output

KINDS = ("checkpoint", "offload", "checkpoint+offload")
QUICK = {"llama", "gpt2", "bert", "t5", "mixtral", "mamba", "vit", "resnet", "whisper"}
MODELS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BUILDERS]


def built(name: str, method: Any, quantization: str | None = None) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = BUILDERS[name]().train()
    attach(net, method, quantization=quantization)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return net, example_inputs(name)


def step(net: nn.Module, x: dict[str, Tensor], autocast: bool = False) -> dict[str, Tensor]:
    """Loss and gradients of one step from one random state."""
    torch.manual_seed(1)
    net.zero_grad()
    if "use_cache" in getattr(getattr(net, "config", None), "__dict__", {}):
        net.config.use_cache = False  # a cache lays out keys differently
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = net(**x)
    loss = getattr(out, "loss", None)
    loss = main_output(out).square().mean() if loss is None else loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert len(want) > 1
    different = [k for k in want if not torch.equal(got[k], want[k])]
    assert different == []


def all_small(kind: Any) -> Activations:
    return Activations(kind, min_bytes=0)


@pytest.mark.parametrize("name", MODELS)
def test_equal_steps(name: str) -> None:
    where = ["convolution"] if name == "resnet" else "all-linear"
    net, x = built(name, LoRA(r=2, dropout=0.3, target_modules=where))
    want = step(net, x)
    before = {n: dict(vars(m)) for n, m in net.named_modules()}
    for kind in KINDS:
        with limit_activations(net, all_small(kind)) as limit:
            assert_equal(step(net, x), want)
            assert (limit.moved > 0) == ("offload" in kind)
            net.eval()
            with torch.no_grad():
                net(**x)
            net.train()
    assert {n: dict(vars(m)) for n, m in net.named_modules()} == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        (LoRA(r=2, target_modules="all-linear"), "nf4"),
        (PromptTuning(n=3), None),
        (PrefixTuning(n=3), "nf4"),
        (BottleneckAdapter(), None),
        (BottleneckAdapter(style="parallel"), None),
        (LoRA(r=2, target_modules=["embed_tokens", "q_proj"]), None),
    ],
    ids=["nf4", "prompt", "prefix", "bottleneck", "parallel", "embedding"],
)
def test_methods_and_precision(method: Any, quantization: str | None, kind: str) -> None:
    net, x = built("llama", method, quantization)
    for autocast in (False, True):
        want = step(net, x, autocast)
        with limit_activations(net, all_small(kind)):
            assert_equal(step(net, x, autocast), want)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_under_different_adapters(kind: str) -> None:
    net, x = built("llama", LoRA(r=2, target_modules="all-linear"))
    attach(net, LoRA(r=3, alpha=5.0, target_modules="all-linear"), adapter_name="b")
    set_adapter(net, ["default", "b"])
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)

    def mixed() -> dict[str, Tensor]:
        net.zero_grad()
        with adapter_names(["b", "default"]):
            loss = net(**x).loss
        loss.backward()  # outside: the second run finds its rows by what the first one saved
        return {
            "loss": loss.detach(),
            **{n: p.grad for n, p in net.named_parameters() if p.requires_grad},
        }

    want = mixed()
    with limit_activations(net, all_small(kind)):
        assert_equal(mixed(), want)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_around_the_model_get_what_is_moved(kind: str) -> None:
    net, x = built("llama", LoRA(r=2, target_modules="all-linear"))
    want = step(net, x)
    with torch.autograd.graph.save_on_cpu(), limit_activations(net, all_small(kind)):
        assert_equal(step(net, x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_may_be_kept(kind: str) -> None:
    net, x = built("llama", LoRA(r=2, target_modules="all-linear"))
    with limit_activations(net, all_small(kind)):
        loss = net(**x).loss
        first = torch.autograd.grad(
            loss, [p for p in net.parameters() if p.requires_grad], retain_graph=True
        )
        loss.backward()
    grads = [p.grad for p in net.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_eval_mode_is_limited_too(kind: str) -> None:
    """`from_pretrained` returns one, and its default cache must not fill twice."""
    net, x = built("llama", LoRA(r=2, target_modules="all-linear"))
    net.eval()
    want = step(net, x)
    with limit_activations(net, all_small(kind)):
        assert_equal(step(net, x), want)
        net.config.use_cache = True
        torch.testing.assert_close(net(**x).loss, want["loss"])
        assert net(**x).past_key_values.get_seq_length() == 0


def test_a_growing_cache_is_refused() -> None:
    net, x = built("llama", PrefixTuning(n=3))
    net.eval()
    with limit_activations(net), pytest.raises(ValueError, match=r"with \d+ positions.*train mode"):
        step(net, x)


class Normed(nn.Module):
    """Blocks with running statistics."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), norm(8)) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x).tanh()
        return SimpleNamespace(loss=x.square().mean())


class Counting(nn.Module):
    """A normalisation whose output depends on how often it ran."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("ran", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return x * self.ran


def test_running_statistics_move_once() -> None:
    torch.manual_seed(0)
    nets = [Normed()]
    nets.append(copy.deepcopy(nets[0]))
    x = {"x": torch.randn(4, 8)}
    with limit_activations(nets[1]):
        assert_equal(step(nets[1], x), step(nets[0], x))
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(a, b)


def test_other_state_is_refused_by_name() -> None:
    net = Normed(Counting)
    with limit_activations(net), pytest.raises(RuntimeError, match=r"blocks\.0\.1\.ran.*'offload'"):
        net(torch.randn(4, 8))


def test_in_place_changes_are_found() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return x.add_(y)

    net = nn.Sequential(nn.Linear(8, 8), InPlace(), nn.Linear(8, 8))
    for kind in KINDS:
        with limit_activations(net, Activations(kind, ["InPlace"], 0)):
            loss = net(torch.randn(2, 8)).sum()
            with pytest.raises(RuntimeError, match=r"in-?place"):
                loss.backward()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Blocks(nn.Module):
    """Two blocks that compile fast."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=x.square().mean())


def small() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Blocks()
    attach(net, LoRA(r=2, target_modules=["linear"]))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net, {"x": torch.randn(4, 8)}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks(kind: str) -> None:
    net, x = small()
    for block in net.blocks:
        block.compile(backend="aot_eager")
    want = step(net, x)
    with limit_activations(net, all_small(kind)) as limit:
        assert_equal(step(net, x), want)
        assert limit.moved > 0 or kind == "checkpoint"
    compiled = [vars(b)["_compiled_call_impl"] for b in net.blocks]
    assert all(hasattr(c, "_torchdynamo_orig_callable") for c in compiled)


def test_blocks_compiled_later_are_followed() -> None:
    net, x = small()
    limit = limit_activations(net)
    for block in net.blocks:
        block.compile(backend="aot_eager")
    limit.settle()
    got = step(net, x)
    limit.remove()
    assert_equal(got, step(net, x))


def test_a_whole_compiled_model() -> None:
    net, x = small()
    want = step(net, x)
    for kind in KINDS:
        torch.compiler.reset()
        with limit_activations(net, all_small(kind)):
            got = step(torch.compile(net, backend="aot_eager"), x)  # type: ignore[arg-type]
        for name, value in got.items():
            torch.testing.assert_close(value, want[name.removeprefix("_orig_mod.")])
    net.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="compile the blocks instead"):
        limit_activations(net, "offload")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_of_transformers(kind: str) -> None:
    net, x = built("llama", LoRA(r=2, target_modules="all-linear"))
    for block in net.model.layers:
        block.compile(backend="aot_eager")
    want = step(net, x)
    with limit_activations(net, all_small(kind)):
        assert_equal(step(net, x), want)


def test_copies_and_pickles_run() -> None:
    net, x = built("llama", LoRA(r=2, target_modules="all-linear"))
    want = step(net, x)
    with limit_activations(net, all_small("checkpoint+offload")):
        twin = copy.deepcopy(net)
        assert_equal(step(twin, x), want)
        assert twin.model.layers[0].forward.block is twin.model.layers[0]


def test_adapters_may_go_while_a_limit_is_there() -> None:
    net, x = built("llama", LoRA(r=2, target_modules="all-linear"))
    with limit_activations(net):
        detach(net)
        net.requires_grad_(True)
        got = step(net, x)
    assert_equal(got, step(net, x))


def test_the_models_own_switch_gives_way() -> None:
    net, x = built("llama", LoRA(r=2, target_modules="all-linear"))
    net.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        limit_activations(net, "offload")
    want = step(net, x)
    with limit_activations(net, "checkpoint+offload"):
        assert not net.is_gradient_checkpointing
        assert_equal(step(net, x), want)
    assert net.is_gradient_checkpointing


def test_bad_input() -> None:
    net, _ = built("llama", LoRA(r=2))
    for given, error, message in (
        ("recompute", ValueError, "activations: expected one of"),
        (3, TypeError, "activations: expected one of"),
        (None, ValueError, "got None"),
    ):
        with pytest.raises(error, match=message):
            limit_activations(net, given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a list"):
        Activations("checkpoint", "LlamaDecoderLayer")
    with pytest.raises(ValueError, match="empty list"):
        Activations("checkpoint", [])
    with pytest.raises(ValueError, match="whole number"):
        Activations("offload", min_bytes=-1)
    with pytest.raises(
        ValueError, match=r"got 'LlamaDecoderLayr'; the nearest are .*LlamaDecoderLayer"
    ):
        limit_activations(net, Activations("checkpoint", ["LlamaDecoderLayr"]))
    with pytest.raises(ValueError, match="found none; name blocks"):
        limit_activations(nn.Sequential(nn.Linear(2, 2)))
    with limit_activations(net), pytest.raises(ValueError, match="remove that limit first"):
        limit_activations(net)
    assert not any("forward" in vars(m) for m in net.modules())
