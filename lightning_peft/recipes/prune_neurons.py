"""Structured pruning: neurons of feed-forward blocks removed, so that the model is smaller and
faster on any machine.

A neuron j of h = f(x W_inᵀ), y = h W_outᵀ is row j of W_in (of both, where a gate multiplies) and
column j of W_out. Those with the smallest product of norms go. Li et al. 2017, arXiv:1608.08710.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_peft.core.names import matches_suffix
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.models.outputs import output_of, relative_change

__all__ = ["NeuronReport", "remove_neurons"]

#: (layers into the block, layer out of it), as children of one module or by the end of their names.
_BLOCKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("fc_in",), "fc_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)
_RUNS = 5


@dataclass
class NeuronReport:
    """Savings and error of a removal.

    Attributes:
        blocks: Layer out of the block → neurons before and after.
        parameters: Number of parameters of the model, before and after.
        seconds: Median time of 5 forward passes on `batch`, before and after; None if no batch
            is given.
        output_error: ‖after − before‖ / ‖before‖ of the output on that batch.
    """

    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    seconds: tuple[float, float] | None = None
    output_error: float | None = None

    def __str__(self) -> str:
        """Return blocks, parameters, time and the error of the output as text."""
        before, after = self.parameters
        text = (
            f"{len(self.blocks)} blocks, {before:,} → {after:,} parameters "
            f"({1 - after / before:.1%} fewer)"
        )
        if self.seconds is not None:
            slow, fast = self.seconds
            text += (
                f"; forward {1e3 * slow:.1f} → {1e3 * fast:.1f} ms ({1 - fast / slow:.1%} less); "
                f"output on the batch differs by {self.output_error:.2e} (relative)"
            )
        return text


def remove_neurons(
    model: nn.Module,
    share: float,
    *,
    blocks: Sequence[tuple[Sequence[str], str]] | None = None,
    batch: object = None,
) -> NeuronReport:
    """Remove neurons of every feed-forward block, in place; call it before attaching and
    quantising.

    Args:
        model: A dense model without adapters.
        share: Fraction of a block's neurons to remove, in [0, 1).
        blocks: (names of the layers in, name of the layer out), full names; None finds the usual
            ones.
        batch: An example input on which time and error are measured.

    Returns:
        Neurons, parameters, time, error.

    Raises:
        ValueError: share out of range, no block found, layers that do not fit; nothing is changed.
        RuntimeError: adapters are attached.
    """
    if not 0 <= share < 1:
        raise ValueError(f"remove_neurons: share: expected 0 <= share < 1, got {share}")
    if any(True for _ in adapted_modules(model)):
        raise RuntimeError(
            "remove_neurons: expected a model without adapters, found some; remove first, then "
            "attach"
        )
    found = list(_found(model)) if blocks is None else [(list(i), o) for i, o in blocks]
    if not found:
        raise ValueError(
            f"remove_neurons: expected feed-forward blocks of plain linear layers in "
            f"{type(model).__name__}, found none; name them with blocks="
        )
    cuts = [(i, o, _kept(model, i, o, share)) for i, o in found]
    report = NeuronReport()
    size = _size(model)
    before = slow = None
    if batch is not None:
        before, slow = output_of(model, batch), _seconds(model, batch)
    for ins, out, kept in cuts:
        report.blocks[out] = (_linear(model, out).in_features, len(kept))
        for name in ins:
            _cut_rows(_linear(model, name), kept)
        _cut_columns(_linear(model, out), kept)
    _tell_config(model, report)
    report.parameters = (size, _size(model))
    if before is not None and slow is not None:
        report.seconds = (slow, _seconds(model, batch))
        report.output_error = relative_change(output_of(model, batch), before)
    return report


def _found(model: nn.Module) -> Iterator[tuple[list[str], str]]:
    plain = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    taken: set[str] = set()
    for ins, out in _BLOCKS:
        for name in sorted(plain):
            head = name[: -len(out)]
            if name in taken or not matches_suffix(name, [out]):
                continue
            layers = [head + i for i in ins]
            if all(i in plain and i not in taken for i in layers):
                taken |= {name, *layers}
                yield layers, name


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise ValueError(
            f"remove_neurons: {name!r}: expected a plain dense nn.Linear, got "
            f"{type(module).__name__}"
        )
    return module


def _kept(model: nn.Module, ins: Sequence[str], out: str, share: float) -> Tensor:
    """Return the indices of the remaining neurons, in order."""
    last = _linear(model, out)
    score = last.weight.detach().float().norm(dim=0)
    for name in ins:
        layer = _linear(model, name)
        if layer.out_features != last.in_features:
            raise ValueError(
                f"remove_neurons: {name!r}: expected {last.in_features} outputs, as {out!r} reads, "
                f"got {layer.out_features}"
            )
        score = score * layer.weight.detach().float().norm(dim=1)
    count = max(1, len(score) - int(share * len(score)))
    kept: Tensor = score.topk(count).indices.sort().values
    return kept


def _cut_rows(layer: nn.Linear, kept: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[kept], layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept], layer.bias.requires_grad)
    layer.out_features = len(kept)


def _cut_columns(layer: nn.Linear, kept: Tensor) -> None:
    weight = layer.weight.detach()[:, kept].contiguous()
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    layer.in_features = len(kept)


def _tell_config(model: nn.Module, report: NeuronReport) -> None:
    """Write the width to the config if all blocks share it, so that the model saves and loads."""
    widths = set(report.blocks.values())
    config = getattr(model, "config", None)
    if len(widths) == 1 and config is not None:
        ((before, after),) = widths
        for key in ("intermediate_size", "ffn_dim", "d_ff", "hidden_dim"):
            if getattr(config, key, None) == before:
                setattr(config, key, after)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _seconds(model: nn.Module, batch: object) -> float:
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        output_of(model, batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
