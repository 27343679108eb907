"""Start values, hard prompts' tokens, and refused settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.methods import HardPrompt, PrefixTuning, PromptTuning, PTuning
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.prompt_cases import attached, built


def test_starts() -> None:
    model, _ = built("gemma2")  # its embeddings are scaled behind the table
    embed = model.get_input_embeddings()
    report = lp.attach(model, PromptTuning(n=5, init="text", init_ids=[7, 8, 9]))
    (P,) = trained_tensors(model).values()
    assert report.trainable == P.numel()
    with torch.no_grad():
        assert_same_bits("text", P.detach(), embed(torch.tensor([7, 8, 9, 7, 8])))
    lp.detach(model)
    lp.attach(model, PromptTuning(n=4))
    (P,) = trained_tensors(model).values()
    with torch.no_grad():
        rows = embed(torch.arange(99))
        assert all((rows == p).all(dim=1).any() for p in P)
    start = P.detach().clone()
    with torch.no_grad():
        P.zero_()
    lp.reset_adapters(model)
    assert_same_bits("reset", P.detach(), start)

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    assert PromptTuning.from_text("a bc def", tokenizer).init_ids == [1, 2, 3]
    assert PromptTuning.from_text("a bc def", tokenizer, n=8).n == 8


def test_hard_prompt_is_made_of_tokens() -> None:
    model, x = attached("gpt2", HardPrompt(n=3))
    ids = lp.hard_prompt_ids(model)
    tokens = torch.tensor([ids, ids])
    base, _ = built("gpt2")
    mask = torch.ones_like(x["attention_mask"])
    with torch.no_grad():
        want = base(input_ids=torch.cat([tokens, x["input_ids"]], dim=1)).logits[:, 3:]
        got = model(input_ids=x["input_ids"], attention_mask=mask).logits
    assert_close("as if the tokens were given", got, want)
    with pytest.raises(KeyError, match="found none"):
        lp.hard_prompt_ids(base)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (PromptTuning, {"n": 0}),
        (PromptTuning, {"mode": "behind"}),
        (PromptTuning, {"init": "text"}),
        (PromptTuning, {"init_ids": [1]}),
        (HardPrompt, {"mode": "add"}),
        (PTuning, {"encoder": "gru"}),
        (PTuning, {"hidden": 0}),
        (PTuning, {"dropout": 1.0}),
        (PrefixTuning, {"n": 0}),
        (PrefixTuning, {"init": "ones"}),
    ],
    ids=str,
)
def test_bad_values(cls: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        cls(**fields)


def test_ids_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary's size 99"):
        lp.attach(built("gpt2")[0], PromptTuning(init="text", init_ids=[99]))


def test_a_transformer_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="one Hugging Face transformer"):
        lp.attach(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), PromptTuning())
    two = nn.ModuleList([built("gpt2")[0], built("bert")[0]])
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        lp.attach(two, PromptTuning())
