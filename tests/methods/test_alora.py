"""aLoRA: the base before its invocation tokens, LoRA from them on; peft is the oracle."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.methods import ALoRA
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, trained

TOKENS = [5, 9]
TARGETS = ["q_proj", "v_proj", "down_proj"]
METHOD = ALoRA(r=4, alpha=8.0, invocation_tokens=TOKENS, target_modules=TARGETS)
CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "alora_invocation_tokens": TOKENS,
    "task_type": "CAUSAL_LM",
    "target_modules": TARGETS,
}


def ids() -> Tensor:
    """Rows with the tokens early, twice, not at all, and at the end."""
    x = torch.randint(10, 60, (4, 9), generator=torch.Generator().manual_seed(3))
    x[0, 2:4] = x[1, 0:2] = x[1, 5:7] = x[3, 7:9] = torch.tensor(TOKENS)
    return x


def logits(model: nn.Module, x: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(input_ids=x, **kwargs).logits


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return build("llama")[0].eval()


def test_both_ways(base, tmp_path: Path) -> None:
    x = ids()
    theirs = by_peft(base, tmp_path / "theirs", **CONFIG)
    ours = loaded(base, tmp_path / "theirs")
    assert_close("peft's in ours", logits(ours, x), logits(theirs, x))
    model = trained(base, METHOD)
    lp.save_adapter(model, tmp_path / "ours")
    assert_close("ours in peft", logits(in_peft(base, tmp_path / "ours"), x), logits(model, x))
    again = loaded(base, tmp_path / "ours")
    assert_same_bits("ours in ours", logits(again, x), logits(model, x))


def test_only_causal_models_are_exchanged(base, tmp_path: Path) -> None:
    """In the wrapper of another task peft's aLoRA changes nothing, and ours would."""
    x = ids()
    theirs = by_peft(base, tmp_path / "theirs", **{**CONFIG, "task_type": None})
    assert_same_bits("peft's", logits(theirs, x), logits(base, x))
    with pytest.raises(ValueError, match=r"task_type 'CAUSAL_LM' .*, got None: peft's aLo"):
        loaded(base, tmp_path / "theirs")
    model = trained(build("bert")[0], dataclasses.replace(METHOD, target_modules=["query"]))
    with pytest.raises(ValueError, match="expected task_type 'CAUSAL_LM'"):
        lp.save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_before_the_tokens_it_is_the_base(base) -> None:
    x, model = ids(), trained(base, METHOD)
    got, want = logits(model, x), logits(base, x)
    for row, start in enumerate((2, 5, 9, 7)):
        assert_close(f"row {row}", got[row, :start], want[row, :start])
        if start < 9:
            assert (got[row, start:] - want[row, start:]).abs().max() > 1e-2


def test_the_cache_of_the_base_is_reused(base) -> None:
    """The base fills the cache up to the tokens; aLoRA goes on from there."""
    x, model = ids()[:1], trained(base, METHOD)
    want = logits(model, x)
    with torch.no_grad(), lp.disable_adapters(model):
        cache = model(input_ids=x[:, :2], use_cache=True).past_key_values
    with torch.no_grad():
        got = model(input_ids=x[:, 2:], past_key_values=cache).logits
    assert_close("logits from the tokens on", got, want[:, 2:])


def test_generates_as_peft_does(base, tmp_path: Path) -> None:
    theirs = by_peft(base, tmp_path, **CONFIG)
    ours = loaded(base, tmp_path)
    x = ids()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    got, want = ours.generate(input_ids=x, **options), theirs.generate(input_ids=x, **options)
    assert torch.equal(got, want)
    # Step by step with a cache as in one forward.
    cached = logits(ours, got)[:, 8:-1].argmax(-1)
    assert torch.equal(cached, got[:, 9:])


def test_tokens_that_end_in_a_later_step(base) -> None:
    """The first of two tokens ends one step, the second is the next: active from there on."""
    model = trained(base, METHOD)
    x = torch.tensor([[20, 21, 5, 9, 22]])
    with torch.no_grad():
        cache = model(input_ids=x[:, :3], use_cache=True).past_key_values
        plain = base(input_ids=x[:, :3], use_cache=True).past_key_values
        got = [model(input_ids=x[:, i : i + 1], past_key_values=cache).logits for i in (3, 4)]
        frozen = [base(input_ids=x[:, i : i + 1], past_key_values=plain).logits for i in (3, 4)]
    for a, b in zip(got, frozen, strict=True):
        assert (a - b).abs().max() > 1e-2


def test_gradients_with_checkpointing(base) -> None:
    x, gradients = ids(), []
    for checkpointing in (False, True):
        model = trained(base, METHOD).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=x, use_cache=False).logits.pow(2).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert a.any()
        assert_close("gradient", b, a)


def test_rows_under_different_adapters(base) -> None:
    x = ids()[[0, 1, 0]]
    model = trained(base, METHOD)
    lp.attach(
        model, dataclasses.replace(METHOD, invocation_tokens=[int(x[1, 3])]), adapter_name="b"
    )
    want = []
    for name in ("default", "b", None):
        lp.set_adapter(model, name)
        want.append(logits(model, x))
    lp.set_adapter(model, ["default", "b"])
    with lp.adapter_names(["default", "b", "__base__"]):
        got = logits(model, x)
    for row, alone in enumerate(want):
        assert_close(f"row {row}", got[row], alone[row])


def test_copies_and_detach(base) -> None:
    x, model = ids(), trained(base, METHOD)
    want = logits(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        logits(model, x[:2, :3])  # facts of its own
        assert_same_bits("copy", logits(twin, x), want)
    with pytest.raises(RuntimeError, match="no merged form"):
        lp.merge(model)
    lp.detach(model)
    assert_same_bits("detached", logits(model, x), logits(base, x))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_refused(base) -> None:
    with pytest.raises(ValueError, match=r"invocation_tokens with ids >= 0, got \[\]"):
        ALoRA()
    with pytest.raises(ValueError, match="freeze_A=True"):
        dataclasses.replace(METHOD, freeze_A=True)
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="one Hugging Face decoder in Sequential"):
        lp.attach(plain, dataclasses.replace(METHOD, target_modules=["0"]))
    assert type(plain[0]) is nn.Linear
    model = trained(base, METHOD)
    with pytest.raises(ValueError, match="expected input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, base.config.hidden_size))
    with pytest.raises(RuntimeError, match="forward of the whole model"):
        trained(base, METHOD).model.layers[0].self_attn.q_proj(torch.zeros(1, 32))
