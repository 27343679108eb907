"""llama.cpp continues a prompt with the tokens that transformers chooses.

Needs llama-cpp-python, sentencepiece and gguf, and the converters: `LLAMA_CPP` names a checkout of
llama.cpp, or ``vendor/llama.cpp`` of the source distribution of llama-cpp-python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from tests.helpers.peft_exchange import randomise

llama_cpp = pytest.importorskip("llama_cpp", exc_type=ImportError)
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("gguf")

CONVERTERS = os.environ.get("LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTERS, reason="LLAMA_CPP names no checkout of llama.cpp"),
]

PROMPT = [1, 17, 42, 99, 7]
VOCABULARY = 512
NEW = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tokenizer is part of a GGUF file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        input=str(Path(__file__).parents[2] / "README.md"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return (folder / "tokenizer.model").read_bytes()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def saved(model: LlamaForCausalLM, folder: Path, tokenizer: bytes) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def converted(script: str, source: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, str(Path(CONVERTERS, script)), str(source), "--outfile", str(out)]
    done = subprocess.run(
        [*command, "--outtype", "f32", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def of_transformers(model: nn.Module) -> list[int]:
    generated = model.generate(  # type: ignore[operator]
        torch.tensor([PROMPT]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return generated[0, len(PROMPT) :].tolist()


def of_llama_cpp(model: Path, **settings: str) -> list[int]:
    read = llama_cpp.Llama(str(model), n_ctx=64, n_threads=1, verbose=False, **settings)
    tokens = read.generate(PROMPT, temp=0.0, repeat_penalty=1.0)
    return [next(tokens) for _ in range(NEW)]


def test_a_merged_directory(tokenizer: bytes, tmp_path: Path) -> None:
    """A QLoRA adapter, merged in memory and on disk."""
    model = llama()
    base = saved(model, tmp_path / "base", tokenizer)
    untrained = of_transformers(model)
    lp.attach(model, lp.LoRA(r=4, target_modules="all-linear"), quantization="nf4")
    randomise(model, std=0.3)
    want = of_transformers(model)
    assert want != untrained
    lp.save_adapter(model, tmp_path / "adapter")
    lp.export_merged(tmp_path / "adapter", base, tmp_path / "out", dtype=None, progress=False)
    merged = saved(lp.merge_and_unload(model), tmp_path / "merged", tokenizer)
    for folder in (merged, tmp_path / "out"):
        file = converted("convert_hf_to_gguf.py", folder, folder.with_suffix(".gguf"))
        assert of_llama_cpp(file) == want


def test_an_adapter_next_to_its_base(tokenizer: bytes, tmp_path: Path) -> None:
    model = llama()
    base = saved(model, tmp_path / "base", tokenizer)
    untrained = of_transformers(model)
    lp.attach(model, lp.LoRA(r=4, target_modules="all-linear"))
    randomise(model, std=0.3)
    want = of_transformers(model)
    assert want != untrained
    lp.save_adapter(model, tmp_path / "adapter")
    file = converted("convert_hf_to_gguf.py", base, tmp_path / "base.gguf")
    adapter = converted(
        "convert_lora_to_gguf.py", tmp_path / "adapter", tmp_path / "a.gguf", "--base", str(base)
    )
    assert of_llama_cpp(file) == untrained
    assert of_llama_cpp(file, lora_path=str(adapter)) == want
