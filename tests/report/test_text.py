"""The report as a user reads it: 80 columns, one line per group, bytes before and after."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from torch import nn

import lightning_peft as lp
from lightning_peft.callback.reporting import print_report
from lightning_peft.report.text import report_lines
from tests.helpers.peft_exchange import build


def report(**settings) -> lp.Report:
    model, _ = build("llama")
    return lp.attach(model, lp.LoRA(r=2, target_modules="all-linear"), **settings)


@pytest.mark.parametrize("width", [80, 120])
def test_every_line_fits(width) -> None:
    lines = report_lines(report(quantization="nf4", modules_to_save=["lm_head"]), width)
    assert max(map(len, lines)) <= width
    assert sum("×2" in line for line in lines) == 7
    assert max(map(len, str(report(quantization="nf4")).splitlines())) <= 80
    assert any(line.startswith("model.layers.*.self_attn.q_proj") for line in lines)


def test_a_long_path_loses_its_beginning() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    for _ in range(12):
        net = nn.ModuleDict({"a_very_long_name": net})
    lines = report_lines(lp.attach(net, lp.LoRA(r=2, target_modules="all-linear")), 80)
    assert lines[0].startswith("…")
    assert "long_name.* ×1 LoRA" in lines[0]
    assert len(lines[0]) <= 80


def test_bytes_before_and_after() -> None:
    model, _ = build("llama")
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    found = lp.attach(model, lp.LoRA(r=2), quantization="nf4")
    dense, packed = found.nbytes["base"], found.nbytes["quantised base"]
    assert found.base_before == before
    assert sum(found.dense_kinds.values()) == dense
    assert found.storages == {"nf4": packed}
    (line,) = [x for x in report_lines(found) if x.startswith("base")]
    assert "→" in line
    assert "dense: embeddings, linear layers" in line


def test_eval_mode_names_the_call() -> None:
    text = " ".join(str(report()).split())
    assert "call train() to train with dropout" in text


def test_advice_of_bitsandbytes_is_not_shown() -> None:
    """bitsandbytes advises to install a kernel that no code of ours calls."""
    code = (
        "import logging, sys, types\n"
        "ours = types.ModuleType('bitsandbytes'); ours.__path__ = []\n"
        "inner = types.ModuleType('bitsandbytes.cextension'); inner.lib = 1\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'bitsandbytes.cextension':\n"
        "            log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "            log.warning('Failed to load CPU gemm_4bit_forward from x')\n"
        "            log.warning('else')\n"
        "sys.modules['bitsandbytes'] = ours; sys.meta_path.insert(0, Finder())\n"
        "from lightning_peft_kernels.nf4.bitsandbytes_library import bitsandbytes_library\n"
        "try: bitsandbytes_library()\n"
        "except ModuleNotFoundError: pass\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.splitlines() == ["else"]
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").filters


def test_every_kernel_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Convolutions and linear layers run differently; the layers of one input are no news."""
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "linear": nn.Linear(8, 8)})
    found = lp.attach(model, lp.LoRA(r=2, target_modules=["conv", "linear"]))
    found.kernels.append("a, b read one input: one by one")
    print_report(found, "PEFT default")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("kernels: ")] == [
        "kernels: conv: dense: Conv2d has a forward of its own",
        "kernels: linear: fused",
    ]
    assert "read one input" not in lines[-1]
