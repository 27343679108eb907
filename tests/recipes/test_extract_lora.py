"""extract_lora and prune_rank: against dense SVD, every kind of source, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_peft as lp
from lightning_peft.recipes.svd import factors, rank_for, thin_svd
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, in_peft, randomise, run, trained


def moved(base: nn.Module, std: float = 0.1, seed: int = 5, linear: bool = True) -> nn.Module:
    """A copy as full fine-tuning might leave it: linear weights alone, or every parameter."""
    tuned = copy.deepcopy(base)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            module, _, leaf = name.rpartition(".")
            kind = type(tuned.get_submodule(module)).__name__
            if not linear or (kind in ("Linear", "Conv1D") and leaf == "weight"):
                p.add_(torch.randn(p.shape, generator=g), alpha=std)
    return tuned


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (3, 9, 5)], ids=str)
def test_thin_svd_is_the_dense_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    *batch, out, inner = shape
    A, B = torch.randn(*batch, 4, inner).double(), torch.randn(*batch, out, 4).double()
    U, S, Vh = thin_svd(A, B)
    want = torch.linalg.svdvals(B @ A)[..., :4]
    assert_close("singular values", S, want)
    assert_close("product", (U * S.unsqueeze(-2)) @ Vh, B @ A)


def test_rank_for() -> None:
    S = torch.tensor([3.0, 2.0, 1.0, 0.0])  # energies 9, 4, 1, 0 of 14
    assert [rank_for(S, e) for e in (9 / 14, 0.65, 13 / 14, 0.99, 1.0)] == [1, 2, 2, 3, 3]
    assert rank_for(torch.zeros(4), 0.5) == 1
    assert rank_for(torch.stack([S, torch.tensor([1.0, 1, 1, 1])]), 0.9) == 4


def test_randomised_factors_are_nearly_the_best() -> None:
    torch.manual_seed(0)
    signal, noise = torch.randn(2049, 30) @ torch.randn(30, 2049), torch.randn(2049, 2049)
    M = signal + 0.01 * noise
    A, B = factors(M, 30)
    # The best rank 30 leaves at most what `signal`, itself of rank 30, would leave.
    assert float((M - B @ A).norm()) < 1.01 * float(0.01 * noise.norm())


SOURCES = ["module", "file", "directory"]


def stored(model: nn.Module, kind: str, folder: Path) -> nn.Module | Path:
    if kind == "module":
        return model
    if kind == "directory":
        model.save_pretrained(folder / "tuned")  # type: ignore[operator]
        return folder / "tuned"
    save_file({k: t.clone() for k, t in model.state_dict().items()}, folder / "t.safetensors")
    return folder / "t.safetensors"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_at_full_rank_it_is_the_tuned_model(name: str, source: str, tmp_path: Path) -> None:
    """vit is written by transformers under its old names."""
    base, inputs = build(name)
    tuned = moved(base)
    targets = "all-linear"
    report = lp.extract_lora(
        base, stored(tuned, source, tmp_path), 64, target_modules=targets, batch=inputs,
        modules_to_save=[] if name == "gpt2" else ["classifier"],
    )  # fmt: skip
    assert_close("logits", run(base, inputs), run(tuned, inputs), floor=1e-4)
    assert report.energy > 1 - 1e-6
    assert report.output_error is not None
    assert report.output_change is not None
    assert report.output_error < 1e-3 < report.output_change


def test_energy_and_factors_are_the_svds() -> None:
    base, _ = build("bert")
    tuned = moved(base)
    report = lp.extract_lora(base, tuned, 4, target_modules=["query"])
    layer: Any = base.get_submodule("bert.encoder.layer.0.attention.self.query")
    other: Any = tuned.get_submodule("bert.encoder.layer.0.attention.self.query")
    delta = (other.weight - layer._parameters["weight"]).double()
    U, S, Vh = torch.linalg.svd(delta)
    adapter = layer.peft["default"]
    want = (U[:, :4] * S[:4]) @ Vh[:4]
    assert_close("change", (adapter.B @ adapter.A).double(), want, floor=1e-5)
    share = float((S[:4].square().sum() / S.square().sum()).detach())
    assert abs(report.layers[0].energy - share) < 1e-6
    left = dict(report.left_out)
    assert "bert.encoder.layer.0.attention.self.key.weight" in left
    assert not any("query.weight" in n for n in left)


@pytest.mark.parametrize("source", ["module", "file"])
def test_factors_are_fitted_to_inputs(source: str, tmp_path: Path) -> None:
    """On inputs that were not among them the output is nearer too; nothing else has moved."""
    base, inputs = build("bert")
    tuned = moved(base, std=0.02)
    plain, fitted = copy.deepcopy(base), copy.deepcopy(base)
    torch.manual_seed(0)
    given = [{"input_ids": torch.randint(1, 30, (4, 9))} for _ in range(40)]
    lp.extract_lora(plain, tuned, 4)
    state = torch.get_rng_state()
    report = lp.extract_lora(fitted, stored(tuned, source, tmp_path), 4, batch=inputs, inputs=given)
    assert torch.equal(state, torch.get_rng_state())
    before, after = report.fitted or (0.0, 0.0)
    assert after < 0.9 * before
    assert "fitted" in str(report)
    error = [float((run(m, inputs) - run(tuned, inputs)).norm()) for m in (plain, fitted)]
    assert error[1] < 0.9 * error[0]
    assert all(p.grad is None for p in fitted.parameters())
    for (name, p), q in zip(plain.named_parameters(), fitted.parameters(), strict=True):
        assert torch.equal(p, q) == (not name.endswith((".A", ".B"))), name


def test_fitting_that_does_not_help_is_undone() -> None:
    base, _ = build("bert")
    tuned = moved(base, std=0.02)
    plain, fitted = copy.deepcopy(base), copy.deepcopy(base)
    lp.extract_lora(plain, tuned, 64, modules_to_save=["classifier"])  # exact already
    given = [{"input_ids": torch.randint(1, 30, (4, 9))}]
    report = lp.extract_lora(fitted, tuned, 64, modules_to_save=["classifier"], inputs=given)
    assert report.fitted is not None
    assert report.fitted[0] == report.fitted[1]
    for p, q in zip(plain.parameters(), fitted.parameters(), strict=True):
        assert torch.equal(p, q)


def test_biases_and_head_are_copied() -> None:
    base, inputs = build("bert")
    tuned = moved(base, linear=False)
    report = lp.extract_lora(
        base,
        tuned,
        32,
        bias="all",
        modules_to_save=["classifier", "LayerNorm"],
        target_modules=r".*(query|key|value|dense|_embeddings)",
    )
    assert_close("logits", run(base, inputs), run(tuned, inputs), floor=1e-3)
    assert report.left_out == []


def test_a_quantised_base_is_made_up_for() -> None:
    base, inputs = build("llama")
    tuned = moved(base, std=0.02)
    lp.quantize(base, lp.Quantization("nf4"))
    lp.extract_lora(base, tuned, 64, modules_to_save=["lm_head"])
    assert_close("logits", run(base, inputs), run(tuned, inputs), floor=1e-4)


def test_the_base_need_not_be_loaded(tmp_path: Path) -> None:
    base, inputs = build("bert")
    tuned = moved(base)
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    lp.extract_lora(
        tmp_path / "base", tmp_path / "tuned", 64, directory=tmp_path / "out",
        modules_to_save=["classifier"],
    )  # fmt: skip
    want = run(tuned, inputs)
    assert_close("in peft", run(in_peft(base, tmp_path / "out"), inputs), want, floor=1e-4)
    lp.load_adapter(base, tmp_path / "out")
    assert_close("in ours", run(base, inputs), want, floor=1e-4)


def _pickle(tmp: Path) -> Path:
    torch.save({"a": torch.ones(1)}, tmp / "pytorch_model.bin")
    return tmp


def _truncated(tmp: Path) -> Path:
    save_file({"a": torch.ones(100)}, tmp / "model.safetensors")
    data = (tmp / "model.safetensors").read_bytes()
    (tmp / "model.safetensors").write_bytes(data[: len(data) // 2])
    return tmp


def _other_shape(tmp: Path) -> Path:
    base, _ = build("bert")
    state = {k: t.contiguous() for k, t in base.state_dict().items()}
    state["bert.encoder.layer.0.attention.self.query.weight"] = torch.ones(3, 3)
    save_file(state, tmp / "model.safetensors")
    return tmp


def _infinite(tmp: Path) -> Path:
    base, _ = build("bert")
    state = {k: t.clone().contiguous() for k, t in base.state_dict().items()}
    state["bert.encoder.layer.1.attention.self.query.weight"][0, 0] = float("inf")
    save_file(state, tmp / "model.safetensors")
    return tmp


def _other_model(tmp: Path) -> Path:
    model, _ = build("gpt2")
    save_file({k: t.clone() for k, t in model.state_dict().items()}, tmp / "model.safetensors")
    return tmp


BAD = {
    "a pickle": (_pickle, ValueError, "pytorch_model.bin: a whole model|pickle"),
    "nothing": (lambda tmp: tmp / "none", FileNotFoundError, "found none"),
    "an empty directory": (lambda tmp: tmp, ValueError, "found none"),
    "truncated": (_truncated, ValueError, "does not read as one"),
    "another shape": (_other_shape, ValueError, r"expected shape \[32, 32\], got \[3, 3\]"),
    "not finite": (_infinite, ValueError, "layer.1.attention.self.query.*finite"),
    "another model": (_other_model, ValueError, "expected the weights of Bert.*its own are named"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what: str, tmp_path: Path) -> None:
    make, error, message = BAD[what]
    base, inputs = build("bert")
    before, keys = run(base, inputs), list(base.state_dict())
    with pytest.raises(error, match=message):
        lp.extract_lora(base, make(tmp_path), 4)
    assert_same_bits("logits", run(base, inputs), before)
    assert list(base.state_dict()) == keys


def test_refused_arguments(tmp_path: Path) -> None:
    base, _ = build("bert")
    with pytest.raises(ValueError, match="rank r >= 1, got 0"):
        lp.extract_lora(base, base, 0)
    with pytest.raises(TypeError, match="r: expected a whole number"):
        lp.extract_lora(base, base, 4.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tuned: expected a model, or a path"):
        lp.extract_lora(base, base.state_dict(), 4)
    with pytest.raises(TypeError, match="base: expected a model, or a path"):
        lp.extract_lora(None, base, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected directory="):
        lp.extract_lora(tmp_path, base, 4)


METHODS: dict[str, Any] = {
    "lora": lp.LoRA(r=8, alpha=3.0, target_modules="all-linear"),
    "rslora, patterns": lp.LoRA(
        r=8, use_rslora=True, rank_pattern={"query": 4}, alpha_pattern={"dense": 2.0},
        target_modules=["query", "dense"],
    ),
    "bias": lp.LoRA(r=6, lora_bias=True, bias="all", target_modules=["value"]),
    "pissa": lp.LoRA(r=4, init="pissa", target_modules=["query", "value"]),
    "dora": lp.DoRA(r=6, target_modules=["query", "value"]),
    "plus": lp.LoRAPlus(r=6, target_modules=["query"]),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_pruning_nothing_changes_nothing(name: str) -> None:
    base, inputs = build("bert")
    model = trained(base, METHODS[name], modules_to_save=["classifier"])
    want = run(model, inputs)
    report = lp.prune_rank(model, energy=1.0, batch=inputs)
    assert_close("logits", run(model, inputs), want, floor=1e-4)
    assert report.output_error is not None
    assert report.output_error < 1e-4
    lp.detach(model)
    assert_same_bits("base", run(model, inputs), run(base, inputs))


@pytest.mark.parametrize("kept", [{"rank": 3}, {"energy": 0.7}], ids=str)
def test_pruned_to_the_best_of_that_rank(kept: dict[str, Any]) -> None:
    base, _ = build("bert")
    model = trained(base, METHODS["lora"])
    deltas = {n: m.peft["default"] for n, m in model.named_modules() if hasattr(m, "peft")}
    dense = {n: (3 / 8) * (a.B @ a.A).detach().double() for n, a in deltas.items()}
    report = lp.prune_rank(model, **kept)
    for layer in report.layers:
        U, S, Vh = torch.linalg.svd(dense[layer.name], full_matrices=False)
        want = (U[:, : layer.kept] * S[: layer.kept]) @ Vh[: layer.kept]
        adapter: Any = model.get_submodule(layer.name).peft["default"]  # type: ignore[union-attr, index]
        assert_close(layer.name, (adapter.B @ adapter.A).double(), want, floor=1e-4)
        share = float(S[: layer.kept].square().sum() / S.square().sum())
        assert abs(layer.energy - share) < 1e-6
        if "energy" in kept:
            assert share >= 0.7
            assert float(S[: layer.kept - 1].square().sum() / S.square().sum()) < 0.7
        else:
            assert layer.kept == min(3, *dense[layer.name].shape)
    before, after = report.parameters
    assert after < before
    assert after == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_pruned_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    base, inputs = build("bert")
    model = trained(base, METHODS["lora"])
    lp.prune_rank(model, energy=0.8)
    want = run(model, inputs)
    lp.save_adapter(model, tmp_path)
    assert_close("in peft", run(in_peft(base, tmp_path), inputs), want, floor=1e-4)


def test_other_adapters_stay() -> None:
    base, inputs = build("bert")
    model = trained(base, lp.LoRA(r=4, target_modules=["query"]))
    lp.attach(model, lp.LoRA(r=4, target_modules=["value"]), adapter_name="second")
    randomise(model, seed=8)
    lp.set_adapter(model, ["default", "second"])
    want = run(model, inputs)
    lp.prune_rank(model, rank=4)
    assert_close("logits", run(model, inputs), want, floor=1e-4)
    lp.set_adapter(model, "second")
    second = run(model, inputs)
    lp.prune_rank(model, rank=1)
    assert_same_bits("the other alone", run(model, inputs), second)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "expected energy= or rank="),
        ({"energy": 0.0}, ValueError, "0 < energy <= 1, got 0.0"),
        ({"energy": 1.5}, ValueError, "got 1.5"),
        ({"rank": 0}, ValueError, "rank >= 1, got 0"),
        ({"rank": 2, "adapter_name": "none"}, KeyError, r"\['default'\], got 'none'"),
    ],
    ids=str,
)
def test_prune_rank_refuses(arguments: dict[str, Any], error: Any, message: str) -> None:
    base, _ = build("bert")
    model = trained(base, lp.LoRA(r=4))
    with pytest.raises(error, match=message):
        lp.prune_rank(model, **arguments)


def test_prune_rank_refuses_what_has_no_rank() -> None:
    base, _ = build("bert")
    model = trained(base, lp.IA3())
    with pytest.raises(ValueError, match=r"expected an adapter of LoRA.*IA3"):
        lp.prune_rank(model, rank=2)
    merged = trained(base, lp.LoRA(r=4))
    lp.merge(merged)
    with pytest.raises(RuntimeError, match="unmerge first"):
        lp.prune_rank(merged, rank=2)
