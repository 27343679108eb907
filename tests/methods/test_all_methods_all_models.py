"""Every row of the methods × {decoder, encoder, encoder-decoder, plain module} × {dense, NF4}: what
the adapters promise, on whole models.

By default one cell a row, so that every model and both storages occur; `-m slow` (``make
invariants``) runs the whole product. A cell that has no meaning says why, and the error that says
so is checked. The numbers of cells are printed at the end.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.method_rows import (
    MODELS,
    NEEDS,
    ROWS,
    STORAGES,
    Row,
    build,
    diagonal,
    output,
    parts_of,
    placed,
)

CELLS = [(r, m, s) for r in ROWS for m in MODELS for s in STORAGES]
PARAMETERS = [
    pytest.param(*c, id="-".join(c), marks=() if diagonal(*c) else pytest.mark.slow) for c in CELLS
]


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
            if name.rpartition(".")[2] in row.no_gradient:
                continue
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
    # In eval: PVeRA(sample=False) is no field of peft, so the reader samples in training.
    assert_close("exchanged", output(again.eval(), x).detach(), y, floor=1e-4)


def refusal(model: nn.Module, folder: Path) -> str:
    """Why the adapter cannot be written; "" once it is."""
    try:
        lp.save_adapter(model, folder)
    except ValueError as error:
        return str(error)
    return ""
