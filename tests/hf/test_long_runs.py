"""A hundred steps from one start, in peft and here: the losses stay equal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.prompt.adapter import PromptAdapter
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, loaded

STEPS = 100


def losses(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    found = []
    for batch in batches:
        optimizer.zero_grad()
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :]  # peft's has the prompt's too
        loss = nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:])
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 99, (2, 6), generator=g) for _ in range(4)]
    return [{"input_ids": i} for i in ids * (STEPS // 4)]


@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True},
        pytest.param({"use_rslora": True, "bias": "lora_only"}, marks=pytest.mark.slow),
        pytest.param({"use_dora": True}, marks=pytest.mark.slow),
    ],
    ids=["lora_bias", "rslora", "dora"],
)
def test_lora(options: dict[str, Any], tmp_path: Path) -> None:
    base, _ = build("qwen2")
    theirs = by_peft(base, tmp_path, r=2, lora_alpha=3, target_modules=["q_proj"], **options)
    ours = loaded(base, tmp_path)
    data = batches()
    want = losses(theirs.train(), data)
    assert want[-4:].mean() < want[:4].mean()
    assert_close("losses", losses(ours.train(), data), want, floor=1e-5)


@pytest.mark.parametrize("encoder", ["lstm", pytest.param("mlp", marks=pytest.mark.slow)])
def test_prompt_encoder(encoder: str) -> None:
    base, _ = build("llama")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        encoder_hidden_size=8,
        encoder_reparameterization_type=encoder.upper(),
    )
    torch.manual_seed(0)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    ours = copy.deepcopy(base)
    lp.attach(ours, lp.PTuning(n=3, encoder=encoder, hidden=8, layers=2))  # type: ignore[arg-type]
    (adapter,) = (
        a for _, m in adapted_modules(ours) for a in adapters_of(m) if isinstance(a, PromptAdapter)
    )
    mine, source = adapter.block, theirs.prompt_encoder["default"]
    with torch.no_grad():
        mine.E.copy_(source.embedding.weight)
    mine.head.load_state_dict(source.mlp_head.state_dict())
    if encoder == "lstm":
        mine.lstm.load_state_dict(source.lstm_head.state_dict())
    data = batches()
    want = losses(theirs.train(), data)
    assert want[-4:].mean() < want[:4].mean()
    assert_close("losses", losses(ours.train(), data), want, floor=1e-5)
