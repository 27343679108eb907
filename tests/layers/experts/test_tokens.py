"""Experts without tokens: a zero gradient, told from one that does not arrive; tokens in the
report.
"""

from __future__ import annotations

import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.callback.gradient_checks import dead_gradients
from lightning_peft.layers.adapted import adapted_modules
from tests.helpers.peft_exchange import build, randomise

LORA = lp.LoRA(r=2, target_modules=["experts"])
QUANTIZED = {"dense": None, "nf4": lp.Quantization("nf4", block_size=32)}


def closed(model, expert):
    """No token goes to this expert: its routing logit is always the smallest."""
    for layer in model.model.layers:
        gate = layer.mlp.gate

        def lowest(module, args, output, e=expert):
            logits, weights, index = output
            allowed = torch.arange(logits.shape[-1]) != e
            weights, index = (
                (logits * allowed + (-1e9) * ~allowed).softmax(-1).topk(index.shape[-1])
            )
            return logits, weights, index

        gate.register_forward_hook(lowest)
    return model


class Language(pl.LightningModule):
    def __init__(self, net, cut=False):
        super().__init__()
        self.net, self.cut = net, cut

    def training_step(self, batch):
        if self.cut:
            for layer in self.net.model.layers:
                layer.mlp.experts.register_forward_hook(lambda m, a, y: y.detach())
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(net, method, tmp_path, **kwargs):
    module = Language(net, **kwargs)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[lp.PEFT(method)], default_root_dir=tmp_path,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(torch.randint(3, 90, (8, 7)), batch_size=2))
    return module


def test_tokens_of_the_first_step_are_printed(tmp_path, capsys):
    net = closed(build("qwen3_moe")[0], 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*got no gradient after the first step")
        module = fit(net, LORA, tmp_path)
    lines = [x for x in capsys.readouterr().out.splitlines() if "tokens per expert" in x]
    assert len(lines) == len(net.model.layers)
    # Two batches of two rows of seven tokens, each to two experts.
    for line in lines:
        counts = [int(n) for n in re.search(r"per expert ([\d ]+);", line)[1].split()]
        assert sum(counts) == 2 * 2 * 7 * 2
        assert counts[2] == 0
        assert "no token yet: 1 of 4 (2)" in line
    # The second step is not counted any more.
    assert all(sum(n) == 56 for n in lp.tokens_per_expert(module).values())


def test_experts_that_are_cut_off_are_named(tmp_path):
    """Their output is detached: tokens they had, gradients they had not."""
    method = lp.LoRA(r=2, target_modules=["experts", "q_proj"])
    with pytest.warns(UserWarning, match=r"experts: LoRA 'default' A, B: no gradient"):
        fit(build("qwen3_moe")[0], method, tmp_path, cut=True)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_no_token_yet_is_told_from_not_connected(factor):
    base, inputs = build("qwen3_moe")
    lp.attach(base, LORA)
    randomise(base)
    base.train()
    (base(**inputs).loss * factor).backward()
    lines = dead_gradients(base)
    assert all("though its experts had" in line for line in lines)
    assert bool(lines) == (factor == 0.0)
    for _, module in adapted_modules(base):
        telemetry = module._peft.telemetry
        telemetry.expert_tokens = torch.zeros_like(telemetry.expert_tokens)
    assert dead_gradients(base) == []


@pytest.mark.parametrize("storage", QUANTIZED)
def test_an_expert_without_tokens_has_a_zero_gradient(storage):
    base, inputs = build("qwen3_moe")
    lp.attach(closed(base, 1), LORA, quantization=QUANTIZED[storage])
    randomise(base)
    base.train()
    base(**inputs).loss.backward()
    for tokens, (_, module) in zip(
        lp.tokens_per_expert(base).values(), adapted_modules(base), strict=True
    ):
        assert tokens[1] == 0
        for key, p in module.peft.named_parameters():
            for e, n in enumerate(tokens):
                assert bool(p.grad[e].abs().sum()) == bool(n), (key, e)


@pytest.mark.parametrize("storage", QUANTIZED)
def test_a_batch_without_any_token(storage):
    base, _ = build("qwen3_moe")
    lp.attach(base, LORA, quantization=QUANTIZED[storage])
    experts = base.model.layers[0].mlp.experts.train()
    x = torch.randn(0, 32, requires_grad=True)
    y = experts(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, 32)
    y.sum().backward()
    for key, p in experts.peft.named_parameters():
        assert p.grad is not None, key
        assert not p.grad.any(), key


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_once(reentrant):
    base, _ = build("qwen3_moe")
    lp.attach(base, LORA)
    experts = base.model.layers[0].mlp.experts.train()
    x = torch.randn(5, 32, requires_grad=True)
    index, weights = torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    checkpoint(experts, x, index, weights, use_reentrant=reentrant).sum().backward()
    (tokens,) = lp.tokens_per_expert(base).values()
    assert tokens == torch.bincount(index.flatten(), minlength=4).tolist()
