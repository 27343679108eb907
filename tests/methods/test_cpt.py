"""CPT: peft's loss, gradients, projection and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, in_peft, loaded, run

IDS = [5, 9, 17, 33, 6, 10, 18, 34]
TYPES = [1, 2, 3, 4, 5, 6, 7, 8]


def theirs_of(base: Any, decay: float) -> Any:
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=IDS,
        cpt_mask=[1] * 8,
        cpt_tokens_type_mask=TYPES,
        opt_weighted_loss_type="none" if decay == 1.0 else "decay",
        opt_loss_decay_factor=decay,
        opt_projection_epsilon=0.3,
        opt_projection_format_epsilon=0.2,
    )
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def ours_of(base: Any, decay: float = 1.0, **fields: Any) -> Any:
    model = copy.deepcopy(base)
    method = lp.CPT(
        init_ids=IDS, types=TYPES, decay=decay, epsilon=0.3, format_epsilon=0.2, **fields
    )
    lp.attach(model, method)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "mistral", "opt"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_loss_gradients_projection_and_files_are_pefts(
    name: str, decay: float, tmp_path: Path
) -> None:
    base, _ = build(name)
    theirs, ours = theirs_of(base, decay), ours_of(base, decay, context_loss=True)
    ids = torch.randint(3, 90, (2, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    types = torch.tensor([[1, 2, 3, 4, 4, 4], [1, 2, 2, 3, 4, 4]])
    method = next(iter(vars(ours)["_peft_registry"].adapters.values())).methods[0]
    delta = theirs.prompt_encoder["default"].delta_embedding.weight
    (mine,) = [p for n, p in ours.named_parameters() if n.endswith(".P")]
    optimizers = [torch.optim.SGD([p], lr=3.0) for p in (delta, mine)]
    hooks = lp.MethodHooks(ours, optimizers[1])
    for _ in range(2):  # the second step starts from a projected prompt
        want = theirs(input_ids=ids, labels=labels, input_type_mask=types.clone()).loss
        got = lp.cpt_loss(ours(input_ids=ids).logits, labels, method, types)
        torch.testing.assert_close(got, want)
        want.backward()
        got.backward()
        assert_close("gradient", mine.grad, delta.grad, floor=1e-5)
        assert not mine.grad[3].any()
        hooks.before_step(optimizers[1])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    run(theirs, {"input_ids": ids, "labels": labels})  # peft projects in the forward
    assert_close("δ", mine, delta, floor=1e-5)
    radius = 0.3 * (mine.shape[1] / 2048) ** 0.5
    assert abs(float(mine.detach()[1].norm()) - radius) < 1e-5
    lp.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    text = {"input_ids": ids}
    want = run(ours, text)[:, 8:]
    again = loaded(base, tmp_path / "theirs")
    found = next(iter(vars(again)["_peft_registry"].adapters.values())).methods[0]
    assert (list(found.types), found.decay, found.epsilon) == (TYPES, decay, 0.3)
    assert_close("peft's in ours", run(again, text), want, floor=1e-5)
    (moved,) = [p for n, p in again.named_parameters() if n.endswith(".P")]
    torch.testing.assert_close(moved, mine)
    there = in_peft(base, tmp_path / "ours")
    with torch.no_grad():
        logits = there(input_ids=ids, labels=None).logits
    assert_close("ours in peft", logits[:, 8:], want, floor=1e-5)


def test_without_the_context_it_is_a_prompt() -> None:
    base, _ = build("llama")
    model, ids = ours_of(base), torch.randint(3, 90, (2, 6))
    whole = torch.cat([torch.tensor(IDS).expand(2, -1), ids], dim=1)
    assert_close(
        "start", run(model, {"input_ids": ids}), run(base, {"input_ids": whole})[:, 8:], floor=1e-5
    )
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="expected logits of 8 positions of the prompt"):
        lp.cpt_loss(model(input_ids=ids).logits, ids, lp.CPT(init_ids=IDS, types=TYPES))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "init_ids of a text"),
        ({"init_ids": [1, 2], "types": [1]}, "one type >= 0 per id"),
        ({"init_ids": [1], "types": [1], "epsilon": 0.0}, "epsilon > 0"),
        (
            {"init_ids": [1, 2], "types": [1, 2], "n": 20},
            "n = 2, the number of .*got n = 20",
        ),
    ],
)
def test_bad_values(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        lp.CPT(**fields)


def test_the_length_is_that_of_the_ids() -> None:
    assert lp.CPT(init_ids=IDS, types=TYPES).n == lp.CPT(init_ids=IDS, types=TYPES, n=8).n == 8


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"logits": [1.0]},
            TypeError,
            r"logits: expected numbers \[batch, positions",
        ),
        ({"logits": torch.zeros(2, 14)}, ValueError, r"logits: expected .*, got \[2, 14\]"),
        (
            {"labels": torch.zeros(2, 6)},
            TypeError,
            "labels: expected token ids .* torch.float32",
        ),
        ({"labels": torch.zeros(6).long()}, ValueError, r"labels: expected .* got \[6\]"),
        ({"labels": torch.zeros(3, 6).long()}, ValueError, "labels: expected 2 rows"),
        (
            {"types": torch.zeros(2, 5).long()},
            ValueError,
            "types: expected the shape of",
        ),
        ({"method": lp.LoRA()}, TypeError, r"method: expected the CPT\(\.\.\.\)"),
    ],
)
def test_loss_refuses_what_does_not_fit(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    given = {
        "logits": torch.zeros(2, 14, 50),
        "labels": torch.zeros(2, 6).long(),
        "method": lp.CPT(init_ids=IDS, types=TYPES),
        **changes,
    }
    with pytest.raises(error, match=text):
        lp.cpt_loss(**given)
