"""Whether the layers that adapters were attached to are still there, with the same shapes.

`resize_token_embeddings` puts a new head in the place of an adapted one, and resizes an adapted
embedding. The adapter is then lost, or no longer fits, and nothing in the forward says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_peft.adapters.rehome import seen_from
from lightning_peft.core.modules import parameter_at
from lightning_peft.core.names import join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.layers.adapted import Adapted, adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter

__all__ = ["check_intact"]


def check_intact(model: nn.Module, what: str, adapter_name: str | None = None) -> None:
    """Raise if an adapted layer was replaced or resized after attach.

    Args:
        model: A model with adapters.
        what: The call that needs them, for the message.
        adapter_name: The adapter that the call needs; None for all.

    Raises:
        RuntimeError: with the layer's name and what to do.
    """
    for prefix, root, registry in registries_in(model):
        seen = seen_from(root, registry)
        modules = {strip_compile(name): module for name, module in adapted_modules(root)}
        for name, entry in seen.adapters.items():
            if adapter_name is not None and name != adapter_name:
                continue
            live: dict[str, list[tuple[int, ...]]] = {}  # a layer may have several adapters
            for label, found in _weights(modules, name):
                live.setdefault(label, []).append(found)
            for label, shape, _ in entry.sites:
                shapes = live.get(strip_compile(label))
                if shapes is None:
                    _raise(what, join(prefix, label), name, "a new layer without it")
                elif tuple(shape) not in shapes:
                    got = f"shape {shapes[0]} instead of {tuple(shape)}"
                    _raise(what, join(prefix, label), name, got)
        for path, module in modules.items():
            _check_copies(what, join(prefix, path), adapters_of(module, adapter_name))


def _weights(
    modules: dict[str, Adapted], adapter_name: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, module in modules.items():
        for adapter in adapters_of(module, adapter_name):
            site = adapter.site
            if not adapter.copies():
                label = path if site.parameter == "weight" else f"{path}.{site.parameter}"
                yield label, tuple(site.shape)


def _check_copies(what: str, path: str, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        for key, copied in adapter.copies().items():
            shape = parameter_at(adapter.site.module, key).shape
            if copied.shape != shape:
                got = f"shape {tuple(shape)} instead of {tuple(copied.shape)}"
                _raise(what, join(path, key), adapter.adapter_name, got)


def _raise(what: str, label: str, adapter_name: str, got: str) -> None:
    raise RuntimeError(
        f"{what}: expected {label!r} as adapter {adapter_name!r} was attached to it, got {got}: "
        "the model was changed after attach. Call model.resize_token_embeddings(...) before "
        "attach or load_adapter; build the model again, resize it, and attach to that"
    )
