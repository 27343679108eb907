"""The card names the base by its id, the method, its settings, and how to use the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_peft as lp
from tests.helpers.peft_exchange import build


def card(directory: Path, name: str, **settings) -> str:
    model, _ = build("llama")
    model.config._name_or_path = name
    lp.attach(model, lp.LoRA(r=4, alpha=16))
    lp.save_adapter(model, directory, **settings)
    return (directory / "README.md").read_text()


def test_a_base_of_the_hub(tmp_path) -> None:
    text = card(tmp_path, "org/tiny-llama", metrics={"val_loss": 1.25})
    header, body = text.split("---\n")[1:3]
    assert "base_model: org/tiny-llama\n" in header
    assert "pipeline_tag: text-generation\n" in header
    assert "- base_model:adapter:org/tiny-llama\n- lightning_peft\n- lightning\n- lora\n" in header
    assert "| alpha | 16 |" in body
    assert "| val_loss | 1.25 |" in body
    assert 'AutoModelForCausalLM.from_pretrained("org/tiny-llama")' in body


def test_a_local_path_is_not_published(tmp_path) -> None:
    text = card(tmp_path / "adapter", str(tmp_path))
    assert str(tmp_path) not in text
    assert "# LoRA adapter for LlamaForCausalLM" in text


def test_the_hub_cannot_be_reached(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"push_to_hub='org/name': .*hf upload org/name"):
        card(tmp_path, "org/base", push_to_hub="org/name")
    assert (tmp_path / "adapter_config.json").is_file()


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_file_in_the_place_of_the_directory(inside, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"save_adapter: expected a directory .* is a file"):
        card(file / inside, "org/tiny-llama")
    assert file.read_text() == "mine"
