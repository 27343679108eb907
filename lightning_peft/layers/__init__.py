"""How an Edit acts on each kind of layer, found by the module's class: most derived first."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_peft.core.protocols import LayerOps
from lightning_peft.layers.base import MatrixOps
from lightning_peft.layers.conv import ConvOps
from lightning_peft.layers.direct_parameters import DirectParametersOps, direct_matrices
from lightning_peft.layers.embedding import EmbeddingOps, has_other_rows
from lightning_peft.layers.experts.ops import ExpertsOps, is_experts
from lightning_peft.layers.grouped_linear import GroupedLinearOps
from lightning_peft.layers.linear import Conv1DOps, LinearOps
from lightning_peft.layers.multihead_attention import MultiheadAttentionOps
from lightning_peft.layers.recurrent import RecurrentOps
from lightning_peft.layers.router import RouterOps, is_router
from lightning_peft.storage.unknown import computed_weight

__all__ = [
    "PLAIN",
    "adaptable",
    "editable_ops",
    "ops_for",
    "parameter_ops",
    "register_layer",
    "uneditable",
]

_CONV, _RECURRENT, _DIRECT = ConvOps(), RecurrentOps(), DirectParametersOps()
_GROUPED = GroupedLinearOps()

#: Qualified class name → ops. By name, so that no optional package is imported to look one up.
_BY_CLASS: dict[str, LayerOps] = {
    "torch.nn.modules.linear.Linear": LinearOps(),
    "transformers.pytorch_utils.Conv1D": Conv1DOps(),
    "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear": _GROUPED,
    "transformers.integrations.finegrained_fp8.FP8GroupedLinear": _GROUPED,
    "torch_geometric.nn.dense.linear.Linear": LinearOps(),  # weight [out, in], F.linear
    "torch.nn.modules.conv.Conv1d": _CONV,
    "torch.nn.modules.conv.Conv2d": _CONV,
    "torch.nn.modules.conv.Conv3d": _CONV,
    "torch.nn.modules.sparse.Embedding": EmbeddingOps(),
    "torch.nn.modules.activation.MultiheadAttention": MultiheadAttentionOps(),
    "torch.nn.modules.rnn.LSTM": _RECURRENT,
    "torch.nn.modules.rnn.GRU": _RECURRENT,
    "torch.nn.modules.rnn.RNN": _RECURRENT,
}

#: Kinds known by what the instance has rather than by its class: (test, ops), tried after
#: `_BY_CLASS`.
_BY_TEST: list[tuple[Callable[[nn.Module], bool], LayerOps]] = [
    (is_experts, ExpertsOps()),
    (is_router, RouterOps()),
]

#: For modules that get no weight edit, only copies or added blocks.
PLAIN = MatrixOps()


def register_layer(
    kind: type[nn.Module] | str | Callable[[nn.Module], bool], ops: LayerOps
) -> None:
    """Add a layer kind, or replace the ops of one.

    Methods can then be attached to such layers and merged. ``target_modules="all-linear"`` selects
    them if ``ops.is_linear`` is true. Saving to Hugging Face peft's format refuses them.

    Args:
        kind: The module class; or its qualified name, which imports nothing; or a function that
            tells from an instance. Classes are looked up first, the most derived one before its
            bases. Functions come after them, the last one registered first.
        ops: How an Edit acts on such a layer.

    Raises:
        TypeError: `kind` or `ops` is something else.
    """
    if not isinstance(ops, LayerOps):
        raise TypeError(
            f"register_layer: ops: expected an instance of a LayerOps class, got {ops!r}; derive "
            "from MatrixOps and pass an instance"
        )
    if isinstance(kind, str):
        _BY_CLASS[kind] = ops
    elif isinstance(kind, type) and issubclass(kind, nn.Module):
        _BY_CLASS[_qualified_name(kind)] = ops
    elif callable(kind) and not isinstance(kind, type | nn.Module):
        _BY_TEST.insert(0, (kind, ops))
    else:
        raise TypeError(
            f"register_layer: kind: expected a module class, its qualified name or a function of a "
            f"module, got {kind!r}; pass the class of the layer"
        )


def ops_for(module: nn.Module) -> LayerOps | None:
    """Return the ops of the module's kind, None if weights of such a module cannot be edited."""
    for cls in type(module).__mro__:
        ops = _BY_CLASS.get(_qualified_name(cls))
        if ops is not None:
            return ops
    return next((ops for test, ops in _BY_TEST if test(module)), None)


def parameter_ops(module: nn.Module) -> LayerOps | None:
    """Ops for single weights of a module: those of its kind, or of its own parameters.

    None if it has none that could be named.
    """
    if uneditable(module):
        return None
    return ops_for(module) or (_DIRECT if direct_matrices(module) else None)


def editable_ops(module: nn.Module) -> LayerOps | None:
    """Ops of a module whose weights can be edited in place, None for any other module."""
    return None if uneditable(module) else ops_for(module)


def uneditable(module: nn.Module) -> str:
    """Return why the weights of a module of a known kind cannot be edited; "" if they can."""
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "read by nn.MultiheadAttention: target that module"
    if has_other_rows(module):
        return "its forward computes more than rows of its weight: train it with modules_to_save"
    return computed_weight(module)


def adaptable(module: nn.Module) -> bool:
    """Whether weights of this module can be edited in place."""
    return editable_ops(module) is not None


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
