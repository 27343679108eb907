"""Peak memory of loading a released mixture of experts of 2 GB and of one training step.

The weights are random bytes under the released names, written to a temporary folder. Each format is
measured in a process of its own. ``peak_mb`` is the largest resident size beyond that after the
imports. ``budget_mb`` allows the packed base, adapters, their gradients, the bytes of one layer,
the activations that autograd keeps, and 300 MB; ``left_mb`` is what the run did not need of it.

    python -m benchmarks.cpu.released_memory [--smoke] [--formats fp8 mxfp4]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

from benchmarks.lib.side_by_side import write

TOKENS = 128
LAYERS = {"fp8": 9, "mxfp4": 17}
_ALLOWANCE = 300_000_000  # bytes, for everything that is not listed


def config(form: str, smoke: bool) -> Any:
    """The model's configuration, with its ``quantization_config``."""
    size = 4 if smoke else 1
    common: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 1536 // size,
        "num_hidden_layers": LAYERS[form] if not smoke else 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 128 // size,
        "tie_word_embeddings": False,
    }
    if form == "mxfp4":
        return GptOssConfig(
            intermediate_size=1536 // size,
            num_local_experts=32,
            num_experts_per_tok=4,
            architectures=["GptOssForCausalLM"],
            quantization_config={
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"],
            },
            **common,
        )
    return Qwen3MoeConfig(
        intermediate_size=1536 // size,
        moe_intermediate_size=1536 // size,
        num_experts=32,
        num_experts_per_tok=4,
        architectures=["Qwen3MoeForCausalLM"],
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "mlp.gate"],
        },
        **common,
    )


def checkpoint(form: str, folder: Path, smoke: bool) -> None:
    """Write config.json and one file per layer."""
    settings = config(form, smoke)
    with torch.device("meta"):
        plain = settings.to_dict()
        plain.pop("quantization_config")
        model: Any = AutoModelForCausalLM.from_config(type(settings)(**plain))
    layers: dict[str, dict[str, Tensor]] = {}
    for name, p in model.named_parameters():
        part = ".".join(name.split(".")[:3]) if ".layers." in name else "other"
        layers.setdefault(part, {}).update(_tensors(form, name, p.shape))
    listed = {}
    for i, (_, tensors) in enumerate(sorted(layers.items())):
        file = f"model-{i:05d}.safetensors"
        made = {k: t() for k, t in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(made, file)
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(settings.to_dict(), default=str))


def _tensors(form: str, name: str, shape: torch.Size) -> Iterator[tuple[str, Any]]:
    """(name in the file, function that makes the values) of one parameter."""
    if form == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
        experts, K, N = shape
        yield f"{name}_blocks", lambda: _codes(experts, N, K // 32, 16)
        yield f"{name}_scales", lambda: torch.full((experts, N, K // 32), 120, dtype=torch.uint8)
    elif form == "fp8" and ".experts." in name:
        experts, N, K = shape
        layer, _, leaf = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for e in range(experts):
            for part in parts:
                yield from _fp8(f"{layer}.{e}.{part}.weight", N // len(parts), K)
    elif form == "fp8" and ".self_attn." in name and len(shape) == 2:
        yield from _fp8(name, *shape)
    else:
        yield name, lambda: torch.full(shape, 0.02, dtype=torch.float32)


def _fp8(name: str, N: int, K: int) -> Iterator[tuple[str, Any]]:
    yield name, lambda: (_codes(N, K) & 0xBF).view(torch.float8_e4m3fn)
    yield f"{name}_scale_inv", lambda: torch.full((-(-N // 128), -(-K // 128)), 0.02)


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# ---- one process


def resident(line: str) -> int:
    """Bytes in a line of this process's status, such as ``VmRSS``."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in status if row.startswith(f"{line}:"))


def measure(folder: str) -> dict[str, int]:
    """Load, attach and take one step; bytes."""
    from lightning_peft import LoRA, attach, load_packed, parameter_report

    torch.manual_seed(0)
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    model: Any = load_packed(AutoModelForCausalLM, folder, dtype=torch.float32)
    peak_loading = resident("VmHWM") - start
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    attach(model.train(), LoRA(r=8, target_modules="all-linear"))
    ids = torch.randint(0, 4096, (1, TOKENS))
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        data = t.untyped_storage()
        if data.data_ptr() not in held:
            kept[data.data_ptr()] = data.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    peak = resident("VmHWM") - start
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    report = parameter_report(model)
    return {
        "base": sum(report.nbytes[part] for part in ("base", "quantised base")),
        "layer": layer,
        "adapters": sum(p.nbytes for p in trained),
        "activations": sum(kept.values()),
        "peak_loading": peak_loading,
        "peak": peak,
    }


def main() -> None:
    """Write the checkpoints, run the processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a smaller model; writes no file")
    parser.add_argument("--formats", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure)))
        return
    rows = []
    for form in chosen.formats:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint(form, Path(folder), chosen.smoke)
            found = _process(folder)
        gradients = found["adapters"]
        needed = sum(found[k] for k in ("base", "layer", "adapters", "activations")) + gradients
        budget = needed + _ALLOWANCE
        row = {f"{part}_mb": round(n / 1e6) for part, n in found.items()}
        row |= {"budget_mb": round(budget / 1e6), "left_mb": round((budget - found["peak"]) / 1e6)}
        rows.append({"format": form, "tokens": TOKENS, **row})
    if chosen.smoke:
        print(*rows, sep="\n")
    else:
        write("released_memory", rows)


def _process(folder: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.cpu.released_memory", "--measure", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
