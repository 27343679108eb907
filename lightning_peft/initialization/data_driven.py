"""Starts made from batches: EVA from the layers' inputs, LoRA-GA from gradients of their weights.

An adapter that is to start from data is attached with a default start and waits. The optimizer is
made afterwards: EVA moves ranks between layers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.initialization.incremental_pca import IncrementalPCA, seeded, share_ranks
from lightning_peft.initialization.restore import load_tensors, store_residual
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.models.outputs import run_on

__all__ = ["start_from_data", "waiting_adapters"]

Step = Callable[[Any], Any]
Found = Iterator[tuple[Tensor, Tensor | None]]
_MOST_PASSES = 1000


def waiting_adapters(model: nn.Module) -> list[Adapter]:
    """Adapters that are to start from data and have not yet."""
    return [a for _, m in adapted_modules(model) for a in adapters_of(m) if a.waiting]


def start_from_data(model: nn.Module, batches: Iterable[Any], step: Step | None = None) -> None:
    """Start every waiting adapter from batches; the output of the model does not change.

    Call it before the optimizer is made. The model runs in eval mode, as it is with its other
    adapters; no gradient and no drawn random number is left behind.

    Args:
        model: With adapters attached, on the device where it is to run.
        batches: On that device. As many as the method's ``batches`` are taken; EVA repeats them
            until its directions are settled.
        step: Runs the model on a batch and returns the loss (a tensor, or something with one under
            ``loss``). Default: the model on the batch, mappings as keywords.

    Raises:
        ValueError: no batches; a layer that did not run or got no gradient; too few rows.
    """
    waiting = waiting_adapters(model)
    run = step or (lambda batch: run_on(model, batch))
    most = max((int(a.method.data_options["batches"]) for a in waiting), default=0)
    taken = list(islice(batches, most)) if waiting else []
    if waiting and not taken:
        raise ValueError("start_from_data: expected at least one batch, got none")
    groups: dict[tuple[str, int], list[Adapter]] = {}
    for adapter in waiting:
        groups.setdefault((adapter.adapter_name, id(adapter.method)), []).append(adapter)
    for adapters in groups.values():
        method = adapters[0].method
        mine = taken[: int(method.data_options["batches"])]
        find = _from_inputs if method.needs_data == "inputs" else _from_gradients
        with _undisturbed(model):
            found = find(adapters, mine, run)
        for adapter, (what, singular_values) in zip(adapters, found, strict=True):
            _start(adapter, what, singular_values)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and nothing trained within it; modes, flags and random state as before after it."""
    modes = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    cuda = {p.device for p in flags if p.device.type == "cuda"}
    with torch.random.fork_rng(list(cuda)):
        try:
            model.eval()
            for p in flags:
                p.requires_grad_(False)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for p, flag in flags.items():
                p.requires_grad_(flag)


def _start(adapter: Adapter, found: Tensor, singular_values: Tensor | None) -> None:
    values = dict(adapter.tensors())
    with torch.no_grad(), seeded(found.device):
        adapter.method.from_data(values, adapter.site, found.float(), singular_values)
    load_tensors(adapter, values)
    store_residual(adapter)
    adapter.waiting = False


# ---- EVA


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """The input of a layer as rows [n, in], without the positions that do not count."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    if mask is not None and x.shape[: mask.ndim] == mask.shape:
        x = x[mask.to(x.device)]
    return x.detach().reshape(-1, x.shape[-1])


def _mask(batch: Any, options: Mapping[str, Any]) -> Tensor | None:
    """Positions of a text that are attended to and, where there are labels, learned from."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    labels, counted = batch.get("labels"), mask.bool()
    if options["use_label_mask"] and labels is not None and labels.shape == mask.shape:
        counted = counted & (labels != options["label_mask_value"])
    return counted


def _watch(
    stack: ExitStack, adapter: Adapter, see: Callable[[Tensor], object], mask: Tensor | None
) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(_rows(args, kwargs, mask))

    handle = adapter.site.module.register_forward_pre_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)


def _digest(x: Tensor) -> str:
    raw = x.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


@torch.no_grad()
def _from_inputs(adapters: Sequence[Adapter], batches: Sequence[Any], run: Step) -> Found:
    """IncrementalPCA directions of every layer's input, one set for layers that read the same."""
    method = adapters[0].method
    options, named = method.data_options, {a.site.label: a for a in adapters}
    masks = [_mask(batch, options) for batch in batches]
    owner = _owners(named, batches[0], masks[0], run)
    most = {n: _most(a, float(options["rho"])) for n, a in named.items()}
    for own in set(owner.values()):
        largest = max(most[n] for n in owner if owner[n] == own)
        most.update({n: largest for n in owner if owner[n] == own})
    found = {
        own: IncrementalPCA(most[own], float(options["tau"]))
        for own in dict.fromkeys(owner)
        if owner[own] == own
    }
    ranks = dict(most)
    budget = sum(method.rank(a.site) for a in adapters)
    for done, (batch, mask) in enumerate(cycle(zip(batches, masks, strict=True))):
        open_ = [n for n, pca in found.items() if not bool(pca.settled[: ranks[n]].all())]
        if not open_ or done >= _MOST_PASSES:
            break
        with ExitStack() as stack:
            for name in open_:
                _watch(stack, named[name], found[name].add, mask)
            run(batch)
        if done + 1 == len(batches):
            _require_found(found)
        if all(pca.components is not None for pca in found.values()):
            ranks = share_ranks(found, owner, most, budget)
    if open_:
        warnings.warn(
            f"init='eva': the directions of {len(open_)} layers still turned after {_MOST_PASSES} "
            f"passes ({open_[:3]}); they are taken as they are. Lower tau, or give more batches",
            stacklevel=4,
        )
    pcas = [(found[owner[name]], ranks[name]) for name in named]
    return iter([(p.components[:r], p.singular_values[:r]) for p, r in pcas])  # type: ignore[index]


def _most(adapter: Adapter, rho: float) -> int:
    wanted: int = round(adapter.method.rank(adapter.site) * rho)
    return min(wanted, adapter.site.out_features, adapter.site.in_features)


def _owners(
    named: Mapping[str, Adapter], batch: Any, mask: Tensor | None, run: Step
) -> dict[str, str]:
    """Layer → first layer with the same input; layers with an input of their own come first."""
    seen: dict[str, str] = {}
    with ExitStack() as stack:
        for name, adapter in named.items():
            _watch(
                stack,
                adapter,
                lambda x, name=name: seen.setdefault(name, _digest(x)),  # type: ignore[misc]
                mask,
            )
        run(batch)
    missing = [name for name in named if name not in seen]
    if missing:
        raise ValueError(
            f"init='eva': expected every adapted layer to run, found that {missing[:5]} did not; "
            "exclude them, or use init='default' for them"
        )
    first: dict[str, str] = {}
    for name in named:
        first.setdefault(seen[name], name)
    own = {n: n for n in named if first[seen[n]] == n}
    rest = {n: o for o in own for n in named if n != o and first[seen[n]] == o}
    return {**own, **rest}


def _require_found(found: Mapping[str, IncrementalPCA]) -> None:
    for name, pca in found.items():
        if pca.components is None:
            raise ValueError(
                f"init='eva': {name!r}: expected a batch with at least {pca.count} rows (r · rho), "
                "found none; give larger batches, or lower r or rho"
            )


# ---- LoRA-GA


def _from_gradients(adapters: Sequence[Adapter], batches: Sequence[Any], run: Step) -> Found:
    """The mean gradient of every layer's weight, formed from its input and its output's gradient.

    A layer's weight itself needs no gradient (it may be packed). The sums stand on the CPU.
    """
    for adapter in adapters:
        _refuse_shared_base(adapter)
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def take(adapter: Adapter, x: Tensor, dy: Tensor) -> None:
        key = id(adapter)
        G = (dy.detach().flatten(0, -2).float().mT @ x.flatten(0, -2).float()).cpu()
        sums[key] = sums[key].add_(G) if key in sums else G
        counts[key] = counts.get(key, 0) + 1

    def hook_for(adapter: Adapter) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
        ) -> Tensor:
            x: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach()
            if not y.requires_grad:  # nothing before it has a graph: begin one here
                y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
            y.register_hook(lambda dy: take(adapter, x, dy))
            return y

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for adapter in adapters:
            module = adapter.site.module
            handle = module.register_forward_hook(hook_for(adapter), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            _loss(run(batch)).backward()  # type: ignore[no-untyped-call]
    missing = [a.site.label for a in adapters if id(a) not in sums]
    if missing:
        raise ValueError(
            f"init='lora_ga': expected a gradient in every adapted layer, found none in "
            f"{missing[:5]}; exclude layers that do not run, and use use_reentrant=False with "
            "activation checkpointing"
        )
    return ((sums.pop(id(a)).div_(counts[id(a)]), None) for a in adapters)


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(
            "init='lora_ga': expected the step to return a loss (a scalar tensor, or one under "
            f"'loss'), got {type(loss).__name__}"
        )
    return loss


def _refuse_shared_base(adapter: Adapter) -> None:
    """As with every start that changes the base, one adapter at a time acts on it."""
    site = adapter.site
    state: Any = site.module._peft
    others = {a.adapter_name for a in state.edits} - {adapter.adapter_name}
    if others and site.storage.label == "dense":
        raise ValueError(
            f"{site.label!r}: expected one adapter at a time where an initialisation changes the "
            f"base, got {sorted({adapter.adapter_name, *others})}; activate one"
        )
