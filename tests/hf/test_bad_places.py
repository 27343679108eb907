"""Integers in files: out of range, repeated, of another type, or left out. The model stays as it
was.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_peft as lp
from tests.helpers.peft_exchange import build, by_peft

SHIRA = peft.ShiraConfig, {"r": 1, "random_seed": 1}
SUPER = peft.SupertuningConfig, {"sparsity": 0.9}
BANK = (
    peft.VBLoRAConfig,
    {"r": 2, "num_vectors": 12, "vector_length": 8, "save_only_topk_weights": True},
)
UNI = peft.UniLoraConfig, {"r": 2, "theta_d_length": 32, "save_indices": True}

MSS = peft.AdamssConfig, {"r": 9}


def first(t: torch.Tensor, value: int) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[0] = value
    return t


CASES = {
    "row outside": (SHIRA, "shira_indices", lambda t: first(t, 9999), "0 to 31, got .* 9999"),
    "negative": (SHIRA, "shira_indices", lambda t: first(t, -1), "from 0 to 31, got -1"),
    "repeated": (SHIRA, "shira_indices", lambda t: t[:, :1].expand_as(t).contiguous(), "differ"),
    "floats": (SHIRA, "shira_indices", lambda t: t.double(), "int64, got torch.float64"),
    "place outside": (SUPER, "supertuning_indices", lambda t: first(t, 10**6), "got .* 1000000"),
    "places left out": (SUPER, "supertuning_indices", lambda t: None, "missing .*_indices"),
    "vector outside": (BANK, "logits_A_topk_indices", lambda t: first(t, 12), "0 to 11, got"),
    "bank left out": (BANK, "vblora_vector_bank", lambda t: None, "which all layers share"),
    "other clusters": (MSS, "adamss_B.0", lambda t: t[1:].contiguous(), "rows in cluster 0, as th"),
    "entry outside": (UNI, "unilora_indices_A", lambda t: first(t, 32), "0 to 31, got"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    (config, settings), key, change, match = CASES[name]
    model, _ = build("llama")
    by_peft(model, tmp_path, config, target_modules=["q_proj"], **settings)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    place = next(k for k in tensors if k.endswith(key))
    changed = change(tensors.pop(place))
    save_file(tensors if changed is None else {**tensors, place: changed}, file)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        lp.load_adapter(model, tmp_path)
    assert {k for k, _ in model.named_parameters()} <= set(before)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_bank_of_chosen_vectors_alone(tmp_path: Path) -> None:
    """A file with the chosen vectors and their weights computes what peft's model did."""
    base, inputs = build("llama")
    config, settings = BANK
    theirs = by_peft(base, tmp_path, config, target_modules=["q_proj"], **settings)
    lp.load_adapter(base, tmp_path)
    with torch.no_grad():
        got, want = base.eval()(**inputs).logits, theirs(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
