"""Step of one linear layer with LoRA on released formats, next to NF4 and dense, on a CPU.

Forward and backward, x trained too. The candidates take turns; `ratio` is over NF4, and a second
layer in NF4 shows how far two equal candidates differ. Times are CPU seconds of the process, which
a busy machine disturbs less. Each format's weights are written under the released names and loaded
by `load_packed`.

    python -m benchmarks.cpu.released_step [--dry] [--repeats 21] [--tokens 16 256 1024]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import lightning_peft as lp
from benchmarks.lib.side_by_side import interleaved, rows, write
from tests.helpers.released import RELEASED, Released, State, compressed, mxfp4, write_case

REFERENCE = "NF4"
FORMATS = (
    "fp8", "fp8 static", "mxfp8", "mxfp4", "int4", "int4 zero points", "int8", "fp8 rows", "nvfp4",
    "modelopt nvfp4", "modelopt fp8", "awq", "gptq", "gptq desc_act", "torchao int8", "torchao fp8",
)  # fmt: skip


def pack_mxfp4(key: str, W: torch.Tensor) -> State:
    """MXFP4 of a linear layer, as compressed-tensors writes it; gpt-oss has it in experts alone."""
    blocks, scales = mxfp4(W)
    return {f"{key}_packed": blocks.flatten(-2), f"{key}_scale": scales}


def case_of(name: str) -> Released:
    """The format's packer and configuration."""
    if name != "mxfp4":
        return RELEASED[name]
    settings = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    quantization = compressed("mxfp4-pack-quantized", symmetric=True, **settings)
    return replace(RELEASED["nvfp4"], quantization=quantization, pack=pack_mxfp4, values=dict)


def config(size: int) -> LlamaConfig:
    """A model of one layer whose q_proj is size × size."""
    return LlamaConfig(
        vocab_size=64, hidden_size=size, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=size // 64, num_key_value_heads=size // 64, tie_word_embeddings=False,
    )  # fmt: skip


def packed(name: str, size: int) -> nn.Module:
    """One linear layer in a released format."""
    case = replace(case_of(name), config=lambda: config(size))
    with tempfile.TemporaryDirectory() as folder:
        directory, _ = write_case(case, Path(folder))
        model: Any = lp.load_packed(AutoModelForCausalLM, directory, dtype=torch.float32)
    layer: nn.Module = model.model.layers[0].self_attn.q_proj
    return layer


def candidates(size: int, chosen: list[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Layers with LoRA, by name."""
    method = lp.LoRA(r=16, target_modules=["0"])
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(size, size, bias=False)).to(dtype)
    made = {"dense": copy.deepcopy(dense)}
    lp.attach(made["dense"], method)
    for name in (REFERENCE, "NF4 again"):
        made[name] = copy.deepcopy(dense)
        lp.attach(made[name], method, quantization=lp.Quantization("nf4"))
    for name in chosen:
        made[name] = nn.Sequential(packed(name, size)).to(dtype)
        lp.attach(made[name], method)
    return made


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def call() -> None:
        y = model(x)
        y.backward(torch.ones_like(y))
        for t in (x, *model.parameters()):
            t.grad = None

    return call


def main() -> None:
    """Time all candidates and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--dry", action="store_true", help="print, write no file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = []
    for word in options.dtypes:
        dtype = getattr(torch, word)
        layers = candidates(options.size, options.formats, dtype)
        for tokens in options.tokens:
            x = torch.randn(tokens, options.size, dtype=dtype, requires_grad=True)
            calls = {name: step(layer, x) for name, layer in layers.items()}
            times = interleaved(calls, options.repeats, again=1, clock=time.process_time)
            table += rows(times, REFERENCE, size=options.size, tokens=tokens, dtype=word)
    if options.dry:
        print(*("  ".join(map(str, row.values())) for row in table), sep="\n")
    else:
        write("released_step", table)


if __name__ == "__main__":
    main()
