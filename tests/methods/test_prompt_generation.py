"""Generation under prompts and prefixes equals full forwards without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.methods import PromptTuning
from tests.helpers.compare import assert_close
from tests.helpers.prompt_cases import FEW, METHODS, attached, built, move, prompt_of, some

DECODERS = ["llama", "gpt2", "gemma2", "opt", "bloom", "t5", "bart"]


def stepwise(model: Any, x: dict[str, Tensor], sequences: Tensor, steps: int) -> Tensor:
    """Logits of every generated token by one full forward, without a cache."""
    if model.config.is_encoder_decoder:
        y = model(**x, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
        return y[:, -steps:]
    mask = torch.ones_like(sequences)
    y = model(input_ids=sequences, attention_mask=mask, use_cache=False).logits
    return y[:, -steps - 1 : -1]


@pytest.mark.parametrize("method_name", FEW)
@pytest.mark.parametrize("name", some(DECODERS, "bart"))
def test_generate_greedy_and_sampled(name: str, method_name: str) -> None:
    model, _ = attached(name, METHODS[method_name])
    x = prompt_of(name)
    for sample in (False, True):
        out = model.generate(
            **x,
            do_sample=sample,
            max_new_tokens=6,
            min_new_tokens=6,
            output_logits=True,
            return_dict_in_generate=True,
        )
        got = torch.stack(out.logits, dim=1)
        with torch.no_grad():
            want = stepwise(model, x, out.sequences, got.shape[1])
        assert_close("logits", got, want)


@pytest.mark.parametrize("method_name", ["prompt", "add", "prefix"])
@pytest.mark.parametrize("name", some(DECODERS, "bart"))
def test_generate_beams(name: str, method_name: str) -> None:
    model, _ = attached(name, METHODS[method_name])
    x = prompt_of(name)
    found = []
    for cache in (True, False):
        found.append(
            model.generate(
                **x,
                num_beams=3,
                do_sample=False,
                use_cache=cache,
                max_new_tokens=5,
                output_scores=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_close("scores", found[0].sequences_scores, found[1].sequences_scores)


@pytest.mark.parametrize("method_name", ["prompt", "add", "prefix"])
@pytest.mark.parametrize("name", some(["llama", "gpt2", "opt", "bloom"], "bloom"))
def test_generate_with_left_padding(name: str, method_name: str) -> None:
    model, _ = attached(name, METHODS[method_name])
    ids = torch.randint(3, 99, (1, 4))
    padded = torch.cat([F.pad(ids, (3, 0)), torch.randint(3, 99, (1, 7))])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    options: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    both = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert torch.equal(both[0, 7:], alone[0, 4:])


def test_rows_while_generating() -> None:
    model, _ = built("llama")
    for adapter, n in (("a", 2), ("b", 4)):
        lp.attach(model, PromptTuning(n=n), adapter_name=adapter)
        move(model)
    x = prompt_of("llama")
    options: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = []
    for i, adapter in enumerate(("a", None)):
        lp.set_adapter(model, adapter)
        alone.append(model.generate(**x, **options)[i])
    lp.set_adapter(model, ["a", "b"])
    with lp.adapter_names(["a", "__base__"]):
        both = model.generate(**x, **options)
    assert torch.equal(both, torch.stack(alone))


def test_masks_of_four_axes_are_refused() -> None:
    model, _ = attached("llama", PromptTuning(n=3))
    x = prompt_of("llama")
    with pytest.raises(ValueError, match="dynamic cache"):
        model.generate(**x, cache_implementation="static", max_new_tokens=3)
