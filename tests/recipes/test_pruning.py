"""Sparsity through training, merging and saving; neurons and ranks removed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.recipes import (
    factorise,
    prune_magnitude,
    remove_neurons,
    sparsity,
)
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, randomise, run

LAYERS = ["0", "2"]


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 2, **more: Any) -> None:
    g = torch.Generator().manual_seed(0)
    rows = [(torch.randn(8, generator=g), torch.tensor(i % 4)) for i in range(32)]
    pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False, **more},
    ).fit(module, DataLoader(rows, batch_size=8))  # fmt: skip


def by_ours(module: Net) -> list[pl.Callback]:
    prune_magnitude(module, 0.5)
    return []


def by_torch(module: Net) -> list[pl.Callback]:
    for i in (0, 2):
        prune.l1_unstructured(module.net[i], "weight", amount=0.5)
    return []


def by_lightning(module: Net) -> list[pl.Callback]:
    """In training: half of what is left after each of the two epochs."""
    return [
        ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(module.net[0], "weight"), (module.net[2], "weight")],
            amount=0.5,
            use_global_unstructured=False,
            use_lottery_ticket_hypothesis=False,
        )
    ]


WAYS = {"ours": (by_ours, 0.5), "torch": (by_torch, 0.5), "ModelPruning": (by_lightning, 0.75)}


@pytest.mark.parametrize("way", WAYS)
def test_sparsity_is_kept_through_training_merge_and_save(way: str, tmp_path: Path) -> None:
    pl.seed_everything(0)
    module = Net()
    prepare, share = WAYS[way]
    callbacks = prepare(module)
    peft = lp.PEFT(lp.SparseLoRA(r=2, target_modules=LAYERS))
    fit(module, peft, *callbacks)
    module.eval()
    x = torch.randn(16, 8)
    found = sparsity(module)
    assert abs(found.share - share) < 0.01
    with torch.no_grad():
        want = module(x)
        with lp.disable_adapters(module):
            assert not torch.equal(module(x), want), "nothing was trained"
    lp.merge(module, keep_base=False)
    assert sparsity(module).layers == found.layers
    with torch.no_grad():
        assert_close("merged", module(x), want)
    weights = {k: t for k, t in module.state_dict().items() if k.endswith((".weight", "_orig"))}
    torch.save(weights, tmp_path / "w.pt")
    kept = torch.load(tmp_path / "w.pt", weights_only=True)
    masks = {k: t for k, t in module.state_dict().items() if k.endswith("_mask")}
    ones = torch.ones(())
    zeros = [t * masks.get(k.replace("_orig", "_mask"), ones) == 0 for k, t in kept.items()]
    assert abs(float(torch.cat([z.flatten() for z in zeros]).float().mean()) - share) < 0.01


def test_plain_lora_fills_the_zeros_when_merged() -> None:
    """Why SparseLoRA is there."""
    module = Net()
    prune_magnitude(module, 0.5)
    lp.attach(module, lp.LoRA(r=2, target_modules=LAYERS))
    randomise(module)
    lp.merge(module)
    assert sparsity(module).share < 0.01


@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2), lp.SparseLoRA(r=2)], ids=str)
def test_torchs_pruning_under_adapters(method: Any) -> None:
    """Masked before or after attaching: everything sees the masked weight."""
    method = dataclasses.replace(method, target_modules=["0"])
    x = torch.randn(5, 8)
    for first in ("mask", "attach"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8))
        plain = copy.deepcopy(model)
        for step in ("mask", "attach") if first == "mask" else ("attach", "mask"):
            if step == "mask":
                prune.l1_unstructured(model[0], "weight", amount=0.5)
            else:
                lp.attach(model, method)
        prune.l1_unstructured(plain[0], "weight", amount=0.5)
        prune.remove(plain[0], "weight")
        lp.attach(plain, method)
        randomise(model)
        randomise(plain)
        if isinstance(method, lp.DoRA) and first == "attach":
            lp.load_adapter_state_dict(model, lp.adapter_state_dict(plain))
        with torch.no_grad():
            want = model(x)
            assert_close(f"{first} first", want, plain(x))
            if isinstance(method, lp.SparseLoRA):  # what torch masks cannot hold what LoRA adds
                lp.merge(model)
                assert_close("merged", model(x), want)
                lp.unmerge(model)
                assert_same_bits("unmerged", model(x), want)
        lp.detach(model)
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_smallest_go(scope: Any) -> None:
    base, _ = build("bert")
    old = {n: p.detach().clone() for n, p in base.named_parameters()}
    report = prune_magnitude(base, 0.3, scope=scope, target_modules=["query", "dense"])
    sizes = {n: old[n].abs() for n in report.layers}
    flat = torch.cat([s.flatten() for s in sizes.values()])
    for name, (zeros, total) in report.layers.items():
        now, among = base.get_parameter(name), sizes[name].flatten() if scope == "layer" else flat
        limit = among.sort().values[int(0.3 * len(among)) - 1]
        want = torch.where(sizes[name] > limit, old[name], 0.0)
        assert_same_bits(name, now.detach(), want)
        assert (zeros, total) == (int((want == 0).sum()), want.numel())
    assert abs(report.share - 0.3) < 0.01
    for name, p in base.named_parameters():
        if name not in report.layers:
            assert_same_bits(name, p.detach(), old[name])


def test_pruned_then_quantised_stays_sparse() -> None:
    """0 is one of NF4's values."""
    base, inputs = build("llama")
    share = prune_magnitude(base, 0.5).share
    lp.attach(base, lp.SparseLoRA(r=2, target_modules="all-linear"),
              quantization=lp.Quantization("nf4"))  # fmt: skip
    randomise(base)
    assert sparsity(base).share >= share
    want = run(base, inputs)
    found = sparsity(base)
    lp.merge(base)
    assert sparsity(base).layers == found.layers
    assert_close("merged", run(base, inputs), want, floor=1e-4)


def test_prune_magnitude_refuses() -> None:
    base, inputs = build("bert")
    with pytest.raises(ValueError, match=r"0 <= amount < 1, got 1\.0"):
        prune_magnitude(base, 1.0)
    with pytest.raises(ValueError, match="'global' or 'layer', got 'all'"):
        prune_magnitude(base, 0.5, scope="all")  # type: ignore[arg-type]
    lp.quantize(base, lp.Quantization("nf4"))
    before = run(base, inputs)
    with pytest.raises(ValueError, match="prune before quantising"):
        prune_magnitude(base, 0.5)
    assert_same_bits("logits", run(base, inputs), before)


def test_sparse_lora_refuses_what_fills_zeros() -> None:
    with pytest.raises(ValueError, match="leaves the base alone, got 'pissa'"):
        lp.SparseLoRA(init="pissa")


# ---- neurons


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "flan_t5", "bart", "vit")]


@pytest.mark.parametrize("name", ["bert", "llama", "opt", *SLOW])
def test_neurons_that_do_nothing_are_the_ones_removed(name: str) -> None:
    """Every other neuron made dead: removing half leaves the output as it was."""
    base, inputs = build(name)
    probe = remove_neurons(copy.deepcopy(base), 0.0)
    with torch.no_grad():
        for out in probe.blocks:
            base.get_submodule(out).weight[:, 1::2] = 0  # type: ignore[index, union-attr]
    want, size = run(base, inputs), sum(p.numel() for p in base.parameters())
    report = remove_neurons(base, 0.5, batch=inputs)
    assert_close("logits", run(base, inputs), want, floor=1e-4)
    assert all(after == before // 2 for before, after in report.blocks.values())
    assert report.parameters == (size, sum(p.numel() for p in base.parameters()))
    assert report.parameters[1] < size
    assert report.seconds is not None
    assert report.output_error is not None
    assert report.output_error < 1e-4


def test_a_smaller_model_is_adapted_and_saved(tmp_path: Path) -> None:
    base, inputs = build("llama")
    remove_neurons(base, 0.25)
    base.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(base).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert_same_bits("loaded", run(again.eval(), inputs), run(base, inputs))
    lp.attach(base, lp.LoRA(r=4, target_modules="all-linear"), quantization=lp.Quantization("nf4"))
    base(**inputs).loss.backward()
    assert all(p.grad is not None for p in base.parameters() if p.requires_grad)


def test_named_blocks_and_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    with pytest.raises(ValueError, match="found none; name them with blocks="):
        remove_neurons(model, 0.5)
    with pytest.raises(ValueError, match="0 <= share < 1, got 1"):
        remove_neurons(model, 1)
    with pytest.raises(ValueError, match="'2': expected 4 outputs, as '0' reads, got 3"):
        remove_neurons(model, 0.5, blocks=[(["2"], "0")])
    remove_neurons(model, 0.5, blocks=[(["0"], "2")])
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 4), (5,), (3, 5), (3,)]
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))
    with pytest.raises(RuntimeError, match="remove first, then attach"):
        remove_neurons(model, 0.5)


# ---- factorisation


def test_factorised_layers_are_the_best_of_their_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))
    nn.init.orthogonal_(model[2].weight)  # type: ignore[arg-type]  # no small singular value
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    x = torch.randn(7, 40)
    report = factorise(model, energy=0.6, target_modules=LAYERS, batch=x)
    first, second = report.layers
    U, S, Vh = torch.linalg.svd(weights[0].double())
    want = (U[:, : first.rank] * S[: first.rank]) @ Vh[: first.rank]
    got = model[0].up.weight @ model[0].down.weight  # type: ignore[union-attr, operator]
    assert_close("product", got.detach().double(), want, floor=1e-5)
    share = S.square().cumsum(0) / S.square().sum()
    assert share[first.rank - 1] >= 0.6 > share[first.rank - 2]
    assert abs(first.energy - float(share[first.rank - 1])) < 1e-6
    assert first.parameters == (1200, first.rank * 70)
    assert (second.rank, model[2].weight.shape) == (0, (2, 30)), "factors would be larger"
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    assert report.output_error is not None


def test_full_energy_changes_nothing_and_saves_nothing() -> None:
    base, inputs = build("bert")
    want = run(base, inputs)
    report = factorise(base, energy=1.0)
    assert all(e.rank == 0 for e in report.layers)
    assert_same_bits("logits", run(base, inputs), want)


def test_factorised_then_adapted_and_quantised() -> None:
    base, inputs = build("llama")
    report = factorise(base, rank=8)
    assert report.parameters[1] < report.parameters[0]
    lp.attach(base, lp.LoRA(r=2, target_modules=["up", "down"]),
              quantization=lp.Quantization("nf4"))  # fmt: skip
    randomise(base)
    want = run(base, inputs)
    lp.merge(base)
    assert_close("merged", run(base, inputs), want, floor=1e-4)


def test_a_layer_whose_weight_another_reads_is_left() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 1, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 3, 16)
    report = factorise(model, rank=2, target_modules=["linear1"], batch=x)
    assert report.layers == []
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected energy= or rank="),
        ({"energy": 0.0}, "got 0.0"),
        ({"energy": 2.0}, "got 2.0"),
        ({"rank": 0}, "rank >= 1, got 0"),
    ],
)
def test_factorise_refuses(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message):
        factorise(model, **arguments)
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))
    with pytest.raises(RuntimeError, match="factorise first, then attach"):
        factorise(model, rank=2)
