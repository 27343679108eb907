"""Every row of the methods × {decoder, encoder, encoder-decoder, plain module} × {dense, NF4}: what
the adapters promise, on whole models.

By default one cell a row, so that every model and both storages occur; `-m slow` (``make
invariants``) runs the whole product. A cell that has no meaning says why, and the error that says
so is checked. The numbers of cells are printed at the end.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.methods import GatedLoRA, mam, unipelt
from lightning_peft.methods.base import BlockMethod, SelectMethod, WeightMethod
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.method_cases import CASES
from tests.helpers.tiny_models import BUILDERS, example_inputs


class Plain(nn.Module):
    """A transformer of the user's own; in training mode, since the fused path that torch takes in
    eval rounds otherwise than the layers that it stands for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


@dataclass(frozen=True)
class Model:
    """One kind of model; `linears` are ordinary linear layers of it."""

    build: str
    linears: tuple[str, ...]
    attention: tuple[str, ...] = ()


MODELS = {
    "decoder": Model("llama", ("q_proj", "v_proj", "down_proj")),
    "encoder": Model("bert", ("query", "value", "intermediate.dense")),
    "encoder-decoder": Model("t5", ("q", "v", "wo")),
    "plain": Model("", ("linear1", "linear2"), ("self_attn",)),
}
NF4 = lp.Quantization("nf4", block_size=32)
STORAGES: dict[str, lp.Quantization | None] = {"dense": None, "nf4": NF4}


@dataclass(frozen=True)
class Row:
    """One row of the methods.

    Attributes:
        method: What is attached.
        skip: Kind of model or storage → the reason, which the error at attach says too.
        exact: Whether the model starts as the base, bit for bit.
    """

    method: Any
    skip: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True


_DENSE_COPY = {"nf4": "expected a dense weight"}
_OWN = {"plain": "target_modules"}
ROWS: dict[str, Row] = {
    **{c.name: Row(c.method, {}, c.exact_start) for c in CASES},
    "houlsby": Row(lp.BottleneckAdapter("houlsby", reduction_factor=2, non_linearity="gelu")),
    "pfeiffer": Row(lp.BottleneckAdapter("pfeiffer", reduction_factor=2, non_linearity="gelu")),
    "parallel": Row(lp.BottleneckAdapter("parallel", non_linearity="gelu")),
    "bottleneck_gated": Row(
        lp.BottleneckAdapter(
            "houlsby", non_linearity="gelu", gating=True, ln_before=True, scaling="channel"
        )
    ),
    "prompt": Row(lp.PromptTuning(n=3), exact=False),
    "prompt_add": Row(lp.PromptTuning(n=3, mode="add"), _OWN),
    "hard_prompt": Row(lp.HardPrompt(n=3), exact=False),
    "ptuning_mlp": Row(lp.PTuning(n=3, hidden=8), exact=False),
    "ptuning_lstm": Row(lp.PTuning(n=3, encoder="lstm", hidden=8), exact=False),
    "prefix": Row(lp.PrefixTuning(n=3), exact=False),
    "prefix_projection": Row(lp.PrefixTuning(n=3, projection=True, hidden=8), exact=False),
    "prefix_gated": Row(lp.PrefixTuning(n=3, gating=True), exact=False),
    "bitfit": Row(lp.BitFit(), {"decoder": "at least one", "encoder-decoder": "at least one"}),
    "norm_tuning": Row(lp.NormTuning()),
    "last_layers": Row(lp.LastLayers(1), _DENSE_COPY),
    "full": Row(lp.Full(), _DENSE_COPY),
    "diff_pruning_gates": Row(lp.DiffPruning(sample=False, alpha_init=0.5, density=0.5)),
    "gated_lora": Row(GatedLoRA(r=2)),
    "hybrid": Row([lp.LoRA(r=2), lp.BottleneckAdapter("houlsby", non_linearity="gelu")]),
    "mam": Row(mam(n=3, hidden=8), exact=False),
    "unipelt": Row(unipelt(n=3, hidden=8, r=2, reduction_factor=2), exact=False),
    "loftq": Row(lp.LoRA(r=2, init="loftq"), exact=False),
}
# Why a row cannot run on a storage although attach takes it.
NEEDS = {
    ("loftq", "dense"): "LoftQ starts from what quantising loses, and a dense base loses nothing"
}
CELLS = [(r, m, s) for r in ROWS for m in MODELS for s in STORAGES]
_KINDS = list(MODELS)


def diagonal(row: str, model: str, storage: str) -> bool:
    i = list(ROWS).index(row)
    return _KINDS.index(model) == i % 4 and (storage == "nf4") == (i // 4 % 2 == 1)


PARAMETERS = [
    pytest.param(*c, id="-".join(c), marks=() if diagonal(*c) else pytest.mark.slow) for c in CELLS
]


def build(model: Model) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    if not model.build:
        return Plain().train().requires_grad_(False), {"input_ids": torch.randint(3, 99, (2, 7))}
    return BUILDERS[model.build]().requires_grad_(False), example_inputs(model.build)


def placed(method: Any, kind: str) -> Any:
    """The method on this kind of model: weight methods on its linear layers, others where they go
    by themselves; in a plain module where they are told to.
    """
    if isinstance(method, list):
        return [placed(m, kind) for m in method]
    model = MODELS[kind]
    if isinstance(method, WeightMethod):
        targets = list(model.linears)
    elif kind != "plain" or isinstance(method, SelectMethod):
        return method
    elif isinstance(method, BlockMethod):
        targets = ["linear2"]
    else:
        targets = list(model.attention) if method.insertion == "attention" else ["embed"]
    return dataclasses.replace(method, target_modules=targets)


def output(model: nn.Module, x: Mapping[str, Tensor]) -> Tensor:
    y = model(**x)
    logits: Tensor = y if isinstance(y, Tensor) else y.logits
    return logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)}


def assert_bits(what: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert set(got) == set(want), what
    for key, value in want.items():
        assert_same_bits(f"{what}: {key}", got[key], value)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)


def parts_of(row: Row) -> list[Any]:
    return row.method if isinstance(row.method, list) else [row.method]


@pytest.mark.parametrize(("row_name", "kind", "storage"), PARAMETERS)
def test_cell(row_name: str, kind: str, storage: str, tmp_path: Path) -> None:
    row, quantization = ROWS[row_name], STORAGES[storage]
    if (row_name, storage) in NEEDS:
        pytest.skip(NEEDS[row_name, storage])
    model, x = build(MODELS[kind])
    if quantization is not None:
        lp.quantize(model, quantization)
    y_base, before, hooks_before = output(model, x).detach(), bits(model), hooks(model)
    method = placed(row.method, kind)
    attach = {"quantization": quantization} if quantization is not None else {}
    reason = row.skip.get(kind) or row.skip.get(storage)
    if reason:  # an error leaves the model as it was
        with pytest.raises(ValueError, match=reason) as caught:
            lp.attach(model, method)
        assert_bits("after the error", bits(model), before)
        pytest.skip(f"refused: {str(caught.value).split(';')[0]}")
    fresh, _ = build(MODELS[kind])  # what rewrites the base needs it before it is packed
    lp.attach(fresh, method, **attach)
    model, _ = build(MODELS[kind])
    lp.attach(model, method, **attach)
    if row_name == "full" and kind == "encoder-decoder":
        # A position bias that takes a gradient has torch choose another attention kernel.
        assert_close("start", output(model, x).detach(), y_base)
    elif row.exact:
        # torch.matmul takes another routine for a frozen weight, on some CPUs with other last bits.
        chosen = {n.replace(".peft.default", "") for n in trained_tensors(model)}
        twin, _ = build(MODELS[kind])
        if quantization is None and chosen & set(dict(twin.named_parameters())):
            for n, p in twin.named_parameters():
                p.requires_grad_(n in chosen)
            assert_same_bits("start", output(model, x).detach(), output(twin, x).detach())
        else:
            assert_same_bits("start", output(model, x).detach(), y_base)
    report = lp.parameter_report(model)
    assert 0 < report.trainable < report.total

    move(model)
    start = bits(model)
    y = output(model, x)
    (y * torch.randn_like(y)).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            assert p.grad.any(), f"{name} has a zero gradient"
        else:
            assert p.grad is None, f"{name} is frozen and has a gradient"
    assert_bits("forward and backward", bits(model), start)
    y = y.detach()
    assert (y - y_base).abs().max() > 1e-4 * y_base.abs().max(), "the adapter has no effect"

    saved = lp.adapter_state_dict(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= set(saved)
    assert {k for k in start if k not in saved} <= set(before)  # base keys as they were
    lp.load_adapter_state_dict(fresh, saved)
    assert_same_bits("loaded", output(fresh, x).detach(), y)
    with lp.disable_adapters(model):
        assert_same_bits("off", output(model, x).detach(), y_base)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits("copy", output(twin, x).detach(), y)

    exchange(model, row, kind, x, y, quantization, tmp_path)
    if all(m.mergeable for m in parts_of(row)):
        lp.merge(model)
        assert_close("merged", output(model, x).detach(), y, floor=2e-5)
        lp.unmerge(model)
        assert_bits("unmerged", bits(model), start)
    else:
        with pytest.raises(RuntimeError, match="no merged form"):
            lp.merge(model)
    assert_same_bits("still", output(model, x).detach(), y)

    lp.detach(model)
    assert_bits("detached", bits(model), before)
    assert_same_bits("detached", output(model, x).detach(), y_base)
    assert hooks(model) == hooks_before


def exchange(
    model: nn.Module,
    row: Row,
    kind: str,
    x: Mapping[str, Tensor],
    y: Tensor,
    quantization: Any,
    folder: Path,
) -> None:
    """Out as a Hugging Face directory and in again, where the method has one; else the reason."""
    reason = refusal(model, folder / "adapter")
    if reason:
        assert re.search(r"has no equal in peft|no equal|one method|expected", reason), reason
        assert not (folder / "adapter").exists()
        return
    if quantization is not None and any(getattr(m, "rewrites_base", False) for m in parts_of(row)):
        return  # the file is for the original base, which packing rounds otherwise
    again, _ = build(MODELS[kind])
    lp.load_adapter(again, folder / "adapter", quantization=quantization)
    assert_close("exchanged", output(again, x).detach(), y, floor=1e-4)


def refusal(model: nn.Module, folder: Path) -> str:
    """Why the adapter cannot be written; "" once it is."""
    try:
        lp.save_adapter(model, folder)
    except ValueError as error:
        return str(error)
    return ""
