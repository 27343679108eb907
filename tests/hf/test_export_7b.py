"""`export_merged` at the size of a 7B model: memory of one weight, not of the model.

Needs 29 GB of disk under pytest's temporary directory; skipped with less.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import lightning_peft as lp
from lightning_peft.hf.shards import PlannedTensor, write_directory
from lightning_peft.hf.skeleton import skeleton, weightless
from tests.helpers.peft_exchange import randomise

EXPORT = """
import json, resource, sys, time
from pathlib import Path
import lightning_peft as lp
at, quantization = Path(sys.argv[1]), sys.argv[2] or None
start = time.perf_counter()
report = lp.export_merged(
    at / "adapter", at / "base", at / "out", quantization=quantization, progress=False
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([peak, time.perf_counter() - start, report.error["trained"], str(report)]))
"""


def write_base(directory: Path, config: LlamaConfig) -> None:
    """A base of that shape: one block of normal values, repeated."""
    config.architectures = ["LlamaForCausalLM"]
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    values = torch.randn(1 << 20, dtype=torch.bfloat16) * 0.02

    def filled(shape: torch.Size) -> torch.Tensor:
        n = shape.numel()
        return values.repeat(-(-n // len(values)))[:n].reshape(shape)

    planned = [
        PlannedTensor(name, torch.bfloat16, tuple(p.shape), lambda p=p: filled(p.shape))
        for name, p in skeleton(directory).named_parameters()
    ]
    target = directory.with_name("weights")
    write_directory(target, planned, 5 * 10**9, lambda folder: None, lambda tensors: tensors)
    for file in target.iterdir():
        shutil.move(file, directory / file.name)
    target.rmdir()


def write_adapter(directory: Path, base: Path) -> None:
    model = weightless(skeleton(base))
    lp.attach(model, lp.LoRA(r=8))
    randomise(model, std=0.01)
    lp.save_adapter(model, directory)
    file = directory / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})  # no fingerprint of the empty base


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("quantization", ["", "nf4"])
def test_memory_of_one_weight(quantization, tmp_path) -> None:
    if shutil.disk_usage(tmp_path).free < 29 * 10**9:
        pytest.skip("needs 29 GB of disk")
    write_base(tmp_path / "base", LlamaConfig())  # its defaults are those of the 7B model
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    run = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), quantization],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peak, seconds, error, text = json.loads(run.stdout.splitlines()[-1])
    print(f"peak {peak / 2**30:.2f} GiB, {seconds:.0f} s\n{text}")
    assert peak < 3 * 2**30
    assert error < 1.0
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "out")
