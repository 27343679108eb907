"""Every adapter type of the installed peft is read by a method here, or refused with the reason."""

from __future__ import annotations

import dataclasses

import peft
import pytest

from lightning_peft.hf.config import method_class
from lightning_peft.methods.refused import REFUSED_OPTIONS

REFUSED = {"FROD", "SHADOW"}


@pytest.mark.parametrize("kind", sorted(t.value for t in peft.PeftType))
def test_type(kind: str) -> None:
    if kind in REFUSED:
        with pytest.raises(ValueError, match=rf"got {kind}: .*(Merge|merge)"):
            method_class({"peft_type": kind})
        return
    assert method_class({"peft_type": kind}).hf is not None


def test_options_of_lora() -> None:
    """Two options are refused; all others of peft's LoRA have a meaning here."""
    assert set(REFUSED_OPTIONS) == {"layer_replication", "use_qalora"}
    described = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert set(REFUSED_OPTIONS) <= described
    for option in REFUSED_OPTIONS:
        with pytest.raises(ValueError, match=option):
            method_class({"peft_type": "LORA", option: True})
