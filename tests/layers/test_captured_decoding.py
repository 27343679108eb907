"""Decoding with a static cache: what a CUDA graph and `torch.compile` need, shown on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.layers.adapted import adapted_modules
from tests.helpers.decoding_calls import WAITS, Recorded, decoder, static_step
from tests.helpers.forks import run_function

pytest.importorskip("transformers")
PROMPT = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    """Tokens of `generate` with a cache that grows."""
    return generated(decoder())


def generated(model: Any, **more: Any) -> Tensor:
    tokens: Tensor = model.generate(
        PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0, **more
    )
    return tokens


def test_every_step_makes_the_same_calls_on_the_same_memory(wanted: Tensor) -> None:
    model = decoder()
    step, (ids, cache) = static_step(model, PROMPT)
    tokens, found = [int(ids)], []
    for _ in range(5):
        lasting = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        with Recorded(model, [ids, *lasting]) as record:
            step()
        tokens.append(int(ids))
        found.append(record.calls)
        assert record.in_layers
        assert not WAITS & set(record.in_layers)
    assert found[1] == found[2] == found[3] == found[4]
    assert tokens == wanted[0, 3:].tolist()


def test_every_step_makes_the_same_launches_on_a_gpu(tmp_path: Path) -> None:
    """Kernels of ours where a chip would run them; the launches are recorded and dropped."""
    pytest.importorskip("triton")
    printed = run_function(
        "tests.helpers.decoding_calls:run_decoding",
        ["sm_90"],
        tmp_path,
        environment={"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    layers, _, launches, ops = printed.split()
    assert layers == "14"
    assert int(launches) == 28  # per layer: decode and epilogue, which adds the low rank
    assert float(ops) <= 12  # per layer, views included


def test_a_compiled_step_gives_the_same_tokens(wanted: Tensor) -> None:
    model = decoder()
    step, (ids, _) = static_step(model, PROMPT)
    forward = model.forward
    model.forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    tokens = [int(ids)]
    for _ in range(5):
        step()
        tokens.append(int(ids))
    assert tokens == wanted[0, 3:].tolist()
    assert next(adapted_modules(model))


@pytest.mark.slow
def test_reduce_overhead_in_generate(wanted: Tensor) -> None:
    """As transformers compiles on CUDA by itself; on a CPU, inductor's code runs without graphs."""
    from transformers import CompileConfig

    compile_config = CompileConfig(mode="reduce-overhead", fullgraph=True)
    compile_config._compile_all_devices = True
    found = generated(decoder(), cache_implementation="static", compile_config=compile_config)
    assert torch.equal(found, wanted)
