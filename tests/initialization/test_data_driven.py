"""LoRA's starts from data: equal to peft's, exact, made once, resumed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft as hf_peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import (
    PEFT,
    DoRA,
    LoRA,
    Quantization,
    attach,
    detach,
    load_from_checkpoint,
    merge,
    reset_adapters,
    save_adapter,
    start_from_data,
)
from lightning_peft.initialization.data_driven import waiting_adapters
from tests.helpers.nets import Plain, adapters_of, assert_same, base_of, trainer

TARGETS = ["q", "k", "up", "down"]


class Net(nn.Module):
    """Two layers on one input, and two of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.drop, self.norm = nn.Dropout(0.2), nn.BatchNorm1d(24)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        h = self.drop(torch.tanh(self.norm(self.q(x) * self.k(x))))
        out = h + self.down(torch.relu(self.up(h)))
        return out if y is None else {"loss": nn.functional.mse_loss(out, y)}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(64, 64, generator=g) * torch.linspace(2, 0.02, 64) ** 2 / 4
    rows = [torch.randn(3, 24, 64, generator=g) for _ in range(4)]
    return [{"x": x @ mix, "y": torch.randn(3, 24, 64, generator=g)} for x in rows]


def started(net: nn.Module, batches: Any, **kwargs: Any) -> Any:
    model = copy.deepcopy(net)
    quantization = kwargs.pop("quantization", None)
    attach(
        model, LoRA(**{"target_modules": TARGETS, "alpha": 8, **kwargs}), quantization=quantization
    )
    start_from_data(model, batches)
    return model


def pairs(ours: nn.Module, theirs: Any) -> Any:
    there = dict(theirs.base_model.model.named_modules())
    return [(ours.get_submodule(n), there[n]) for n in TARGETS]


@pytest.mark.parametrize(
    "options",
    [{}, {"rho": 1.0}, {"rho": 3.0, "whiten": True}, {"adjust_scaling_factors": False}],
    ids=str,
)
def test_eva_is_pefts(net: Net, batches: Any, options: dict[str, Any]) -> None:
    inputs = [{"x": b["x"]} for b in batches]
    ours = started(net, inputs, r=4, init="eva", init_options=options)
    config = hf_peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=hf_peft.EvaConfig(**options),
    )
    theirs = hf_peft.get_peft_model(copy.deepcopy(net), config)

    def rows(x: Any, *_: Any) -> Tensor:
        return (x[0] if isinstance(x, tuple) else x).flatten(0, -2)

    hf_peft.initialize_lora_eva_weights(
        theirs,
        inputs,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=rows,
        show_progress_bar=False,
    )
    ranks = set()
    for mine, other in pairs(ours, theirs):
        adapter = mine.peft.default
        ranks.add(adapter.A.shape[0])
        if not hasattr(other, "lora_A"):
            assert adapter.A.shape[0] == 0
            continue
        if not (options.get("whiten") and mine in (ours.q, ours.k)):
            # peft divides in place, so twice where two layers share an input
            want = other.lora_A["default"].weight
            torch.testing.assert_close(adapter.A, want, atol=1e-4, rtol=0)
        assert adapter.method.scaling(adapter.site, adapter.A.shape[0]) == pytest.approx(
            other.scaling["default"]
        )
    assert len(ranks) > 1 or options.get("rho") == 1.0


def test_eva_leaves_out_what_peft_does() -> None:
    """Padding and positions without a label, on a language model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data *= torch.linspace(60, 1, 32) ** 2 / 40
    texts = []
    for _ in range(3):
        ids = torch.randint(0, 50, (4, 24))
        mask = (torch.arange(24) >= torch.tensor([[0], [3], [5], [9]])).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(24) < 12), -100)
        texts.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = hf_peft.get_peft_model(
        copy.deepcopy(model),
        hf_peft.LoraConfig(
            r=2, target_modules=targets, init_lora_weights="eva", eva_config=hf_peft.EvaConfig()
        ),
    )
    hf_peft.initialize_lora_eva_weights(theirs, texts, show_progress_bar=False)
    ours = started(model, texts, r=2, init="eva", target_modules=targets)
    there, compared = dict(theirs.base_model.model.named_modules()), 0
    for name, module in ours.named_modules():
        if name.rpartition(".")[2] in targets:
            A, other = module.peft.default.A, there[name]
            compared += 1
            if not hasattr(other, "lora_A"):
                assert not A.shape[0]
                continue
            torch.testing.assert_close(A, other.lora_A["default"].weight, atol=1e-4, rtol=0)
    assert compared == 6


def exact(G: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return (U * sign)[:, :q], S[:q], (Vh.mT * sign)[:, :q]


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_pefts(
    net: Net, batches: Any, direction: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exact factors in place of drawn ones on both sides."""
    monkeypatch.setattr(torch, "svd_lowrank", exact)
    net.drop.p = 0.0
    net.norm = nn.Identity()  # type: ignore[assignment]  # peft takes the gradient in train mode
    options = {"direction": direction, "scale": scale}
    ours = started(net, batches, r=2, init="lora_ga", init_options=options)
    config = hf_peft.LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=hf_peft.LoraGAConfig(**options),
    )
    prepared = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="Full backward hook"):
        preprocess_loraga(
            prepared, config, lambda: [prepared(**b)["loss"].backward() for b in batches] and None
        )
    theirs = hf_peft.get_peft_model(prepared, config)
    for mine, other in pairs(ours, theirs):
        a, b = mine.peft.default.A, mine.peft.default.B
        for got, want in (
            (a, other.lora_A["default"].weight),
            (b, other.lora_B["default"].weight),
        ):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_pefts(net: Net, batches: Any, mode: str) -> None:
    rows = [{"x": x[None]} for b in batches for x in b["x"]]  # peft counts one text per call
    options = {"corda_method": mode}
    ours = started(net, rows, r=3, init="corda", init_options=options)
    prepared = copy.deepcopy(net)
    config = hf_peft.LoraConfig(
        r=3,
        lora_alpha=8,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(prepared, config, run_model=lambda: [prepared(**b) for b in rows] and None)
    theirs = hf_peft.get_peft_model(prepared, config)
    for mine, other in pairs(ours, theirs):
        p = mine.peft.default
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        # Each pair of singular vectors has a sign that is free.
        signs = (A * p.A).sum(1).sign()
        for got, want in ((p.A * signs[:, None], A), (p.B * signs, B)):
            near = 2e-3 * float(want.detach().abs().max())
            torch.testing.assert_close(got, want, atol=near, rtol=0)
        base = mine._parameters["weight"]
        torch.testing.assert_close(base, other.base_layer.weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(rows[0]["x"]), net(rows[0]["x"]), atol=2e-5, rtol=0)


def test_corda_ignores_padding_and_refuses_zeros(net: Net, batches: Any) -> None:
    with pytest.raises(ValueError, match="inputs that are not all zero with init='corda'"):
        started(net, [{"x": torch.zeros(1, 24, 64)}], init="corda")
    text = torch.randint(1, 50, (2, 12))
    mask = torch.ones_like(text)
    mask[1, 8:] = 0
    junk = torch.where(mask.bool(), text, 49 - text)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).eval()
    found = []
    for ids in (text, junk):
        model = copy.deepcopy(llama)
        attach(model, LoRA(r=2, init="corda", target_modules=["q_proj", "down_proj"]))
        start_from_data(model, [{"input_ids": ids, "attention_mask": mask}])
        found.append(adapters_of(model))
    assert_same(found[0], found[1])


@pytest.mark.parametrize("init", ["eva", "lora_ga", "corda"])
@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("cls", [LoRA, DoRA])
def test_the_start_is_exact_and_leaves_no_trace(
    net: Net, batches: Any, init: str, kind: Any, cls: Any
) -> None:
    if cls is DoRA and init != "eva":
        with pytest.raises(ValueError, match=f"init other than '{init}'"):
            DoRA(init=init)
        return
    quantization = kind and Quantization(kind)
    plain = copy.deepcopy(net)
    attach(plain, LoRA(target_modules=TARGETS), quantization=quantization)
    want, before = plain(batches[0]["x"]), base_of(plain)
    model = copy.deepcopy(net)
    attach(model, cls(r=2, init=init, target_modules=TARGETS), quantization=quantization)
    assert len(waiting_adapters(model)) == 4
    model.train()
    model.drop.eval()
    drawn = torch.get_rng_state()
    start_from_data(model, batches)
    assert not waiting_adapters(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    assert not model.drop.training
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad == (".peft." in n) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    torch.testing.assert_close(model(batches[0]["x"]), want, atol=2e-5, rtol=0)
    loss = model(**batches[0])["loss"]
    loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match="detach and attach again"):
        reset_adapters(model)
    detach(model)
    assert_same(base_of(model), before)


@pytest.mark.parametrize("init", ["eva", "lora_ga", "corda"])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_export_is_plain(net: Net, batches: Any, init: str, kind: Any, tmp_path: Path) -> None:
    """peft reads it on the untouched base; ranks moved and layers left out included."""
    rho = {"rho": 30.0} if init == "eva" else {}
    quantization = kind and Quantization(kind)
    model = started(net, batches, r=2, init=init, init_options=rho, quantization=quantization)
    ranks = [model.get_submodule(n).peft.default.A.shape[0] for n in TARGETS]
    assert (0 in ranks) == (init == "eva")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batches[1])["loss"].backward()
    optimizer.step()
    want = model(batches[0]["x"])
    save_adapter(model, tmp_path)
    base = copy.deepcopy(net)
    if kind:
        attach(base, LoRA(target_modules=TARGETS), quantization=quantization)
        for name in TARGETS:
            dense = nn.Linear(*reversed(net.get_submodule(name).weight.shape))
            dense.weight.data = base.get_submodule(name).peft.default.site.weight(torch.float32)
            dense.bias = base.get_submodule(name).bias
            setattr(base, name, dense)
    theirs = hf_peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs(batches[0]["x"]), want, atol=1e-4, rtol=0)
    if not kind:
        merge(model)
        torch.testing.assert_close(model(batches[0]["x"]), want, atol=1e-4, rtol=0)


def run(module: Plain, epochs: int, folder: Path, init: str, **kwargs: Any) -> PEFT:
    ckpt, seed = kwargs.pop("ckpt", None), kwargs.pop("seed", 5)
    pl.seed_everything(seed, verbose=False)
    method = LoRA(
        r=1, dropout=0.1, init=init, target_modules=["net.0", "net.3"], init_options={"batches": 3}
    )
    callback = PEFT(method, report=False, **kwargs)
    trainer(callback, folder=folder, max_epochs=epochs).fit(module, ckpt_path=ckpt)
    return callback


@pytest.mark.parametrize("init", ["eva", "lora_ga", "corda"])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_the_callback_starts_once_and_resume_is_uninterrupted(
    init: str, kind: Any, tmp_path: Path
) -> None:
    whole, first, second = Plain(), Plain(), Plain()
    untouched = base_of(whole)
    run(whole, 3, tmp_path / "whole", init, quantization=kind)
    run(first, 1, tmp_path / "parts", init, quantization=kind)
    last = tmp_path / "parts" / "last.ckpt"
    calls: list[int] = []
    step = second.training_step
    second.training_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
        calls.append(batch_idx) or step(batch, batch_idx)
    )
    run(second, 3, tmp_path / "parts", init, quantization=kind, ckpt=last, seed=99)
    assert len(calls) == 8  # 2 epochs of 4 batches: none for a start
    assert not waiting_adapters(whole)
    assert_same(dict(second.state_dict()), dict(whole.state_dict()))
    loaded = load_from_checkpoint(Plain, last)
    assert_same(dict(loaded.state_dict()), dict(second.state_dict()))
    run(loaded, 1, tmp_path / "again", init)  # a second fit goes on
    if kind is None:
        detach(whole)
        assert_same(base_of(whole), untouched)


@pytest.mark.parametrize("init", ["eva", "lora_ga", "corda"])
def test_resume_with_an_average_and_moved_ranks(init: str, tmp_path: Path) -> None:
    ranks = {"net.0": 1, "net.3": 3 if init == "eva" else 1}
    method = LoRA(init=init, rank_pattern=ranks, target_modules=list(ranks))

    def fit(folder: Path, ckpt: Path | None = None) -> Plain:
        module = Plain()
        pl.seed_everything(3, verbose=False)
        both = [PEFT(method, report=False), EMAWeightAveraging(decay=0.9)]
        trainer(*both, folder=folder, max_epochs=3).fit(module, ckpt_path=ckpt)
        return module

    whole = fit(tmp_path / "whole")
    again = fit(tmp_path / "parts", tmp_path / "whole" / "epoch=0.ckpt")
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))
    moved = {k: whole.get_submodule(k).peft.default.A.shape[0] for k in ranks}
    assert (moved != ranks) == (init == "eva")


def test_a_moved_rank_is_in_the_optimizer(tmp_path: Path) -> None:
    module = Plain()
    run(module, 1, tmp_path, "eva")
    trained = {id(p) for g in module.optimizers().optimizer.param_groups for p in g["params"]}
    assert {id(p) for p in module.parameters() if p.requires_grad} <= trained
    assert any(v.abs().sum() > 0 for k, v in adapters_of(module).items() if k.endswith(".B"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"init_options": {"rho": 1.0}}, "expected init_options for init='default' in []"),
        ({"init": "eva", "init_options": {"rho": 0.5}}, "rho >= 1, got 0.5"),
        ({"init": "lora_ga", "init_options": {"direction": "x"}}, "direction in ('ArB2r'"),
        ({"init": "corda", "init_options": {"corda_method": "x"}}, "corda_method in ('ipm'"),
    ],
)
def test_bad_options(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        LoRA(**fields)


def test_what_cannot_start(net: Net, batches: Any) -> None:
    with pytest.raises(ValueError, match="expected a linear layer with init='eva', got Embedding"):
        attach(nn.Sequential(nn.Embedding(9, 16)), LoRA(init="eva", target_modules=["0"]))
    with pytest.raises(ValueError, match=r"expected r <= .* = 32 with init='lora_ga'"):
        attach(copy.deepcopy(net), LoRA(r=33, init="lora_ga", target_modules=TARGETS))
    with pytest.raises(ValueError, match="at least one batch, got none"):
        started(net, [], init="eva")
    with pytest.raises(ValueError, match="at least 16 rows"):
        started(net, [{"x": b["x"][:, :1].expand(-1, 24, -1)[:0]} for b in batches], init="eva")
    with pytest.raises(ValueError, match="return a loss"):
        started(net, [{"x": b["x"]} for b in batches], init="lora_ga")


class Manual(Plain):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_manual_optimization_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"automatic optimization.*start_from_data\(module"):
        run(Manual(), 1, tmp_path, "eva")  # type: ignore[arg-type]
