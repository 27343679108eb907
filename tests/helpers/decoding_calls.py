"""What a decoding step calls: the order of ops and the memory that they are given.

A CUDA graph replays the calls of one step on the addresses of that step. It is right if every step
makes the same calls and reads weights, adapters, cache and inputs at the same addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules
from tests.helpers.fake_gpu import use_fake_gpu

__all__ = ["WAITS", "Recorded", "decoder", "run_decoding", "static_step"]

#: Ops that wait for the device, or that copy numbers of Python to it.
WAITS = {"aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero", "aten.is_nonzero"}


class Recorded(TorchDispatchMode):
    """Records every op that runs: its name, and which lasting tensors it is given.

    Attributes:
        calls: (op, names of lasting tensors) in order.
        in_layers: Names of the ops that ran inside adapted layers.
    """

    def __init__(self, model: nn.Module, lasting: Iterable[Tensor]) -> None:
        super().__init__()
        held = [*model.parameters(), *model.buffers(), *lasting]
        self._addresses = {t.untyped_storage().data_ptr() for t in held}
        self._depth = 0
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.in_layers: list[str] = []
        for _, layer in adapted_modules(model):
            layer.register_forward_pre_hook(lambda *_: self._enter(1))
            layer.register_forward_hook(lambda *_: self._enter(-1))

    def _enter(self, by: int) -> None:
        self._depth += by

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = f"{func.namespace}.{func._schema.name.partition('::')[2]}"
        given = [t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)]
        self.calls.append((name, tuple(a for a in given if a in self._addresses)))
        if self._depth:
            self.in_layers.append(name)
        return func(*args, **(kwargs or {}))


def decoder(dtype: torch.dtype = torch.bfloat16) -> Any:
    """A small Llama over NF4 with LoRA whose factors are not zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    every = lp.LoRA(r=4, alpha=8, target_modules="all-linear")
    lp.attach(model, every, quantization=lp.Quantization())
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05)
    return model.to(dtype).eval()


def static_step(model: Any, prompt: Tensor, length: int = 32) -> tuple[Callable[[], None], Any]:
    """Return (one greedy step, its ids and cache); the step writes the next id over the last."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        first = model(input_ids=prompt, past_key_values=cache).logits[:, -1]
    ids = first.argmax(-1, keepdim=True)

    def step() -> None:
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=cache).logits[:, -1]
            ids.copy_(logits.argmax(-1, keepdim=True))

    return step, (ids, cache)


def run_decoding(chip: str) -> None:
    """Print the ops and launches of one step on a chip that is not here; every step is the same."""
    model = decoder()
    prompt = torch.tensor([[1, 2, 3]])
    driver = use_fake_gpu(chip)
    step, (ids, cache) = static_step(model, prompt)
    step()  # compiles
    lasting = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    found = []
    for _ in range(3):
        driver.launched.clear()
        with Recorded(model, [ids, *lasting]) as record:
            step()
        addresses = record._addresses
        launches = [
            (one.kernel, tuple(
                t.untyped_storage().data_ptr() for t in one.arguments
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in addresses
            ))
            for one in driver.launched
        ]  # fmt: skip
        found.append((record.calls, launches))
        assert not WAITS & set(record.in_layers), WAITS & set(record.in_layers)
    assert found[0] == found[1] == found[2]
    layers = sum(1 for _ in adapted_modules(model))
    calls, launches = found[0]
    print(layers, len(calls), len(launches), len(record.in_layers) / layers, flush=True)
