"""Every adapter type of the installed peft is read by a method here, or refused with the reason."""

from __future__ import annotations

import dataclasses

import peft
import pytest

from lightning_peft.hf.method_config import method_class
from lightning_peft.methods import METHODS, Method
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


CARRIED = [
    (cls, ours, theirs)
    for cls in METHODS.values()
    if cls.hf is not None and cls.hf.peft_type != "PROMPT_TUNING"
    for ours, theirs in cls.hf.config.items()
    if theirs in cls.hf.defaults
]


@pytest.mark.parametrize(
    ("cls", "ours", "theirs"), CARRIED, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_a_key_that_a_file_leaves_out_is_pefts_default(
    cls: type[Method], ours: str, theirs: str
) -> None:
    assert cls.hf is not None
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(cls.hf.peft_type)]
    fields = {f.name: f for f in dataclasses.fields(config)}
    made = fields[theirs].default_factory
    default = fields[theirs].default if made is dataclasses.MISSING else made()
    assert cls.hf.defaults[theirs] == default or (not cls.hf.defaults[theirs] and not default)
