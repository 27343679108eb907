"""How an Edit acts on each kind of layer, found by the module's class: most derived first."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_peft.layers.base import MatrixOps
from lightning_peft.layers.conv import ConvOps
from lightning_peft.layers.embedding import EmbeddingOps
from lightning_peft.layers.experts.ops import ExpertsOps, is_experts
from lightning_peft.layers.linear import Conv1DOps, LinearOps
from lightning_peft.layers.multihead_attention import MultiheadAttentionOps
from lightning_peft.layers.recurrent import RecurrentOps
from lightning_peft.layers.router import RouterOps, is_router

__all__ = ["KINDS", "PLAIN", "STRUCTURAL", "ops_for"]

_CONV, _RECURRENT = ConvOps(), RecurrentOps()

#: Class → ops. By name, so that no optional package is imported to look one up.
KINDS: dict[str, MatrixOps] = {
    "torch.nn.modules.linear.Linear": LinearOps(),
    "transformers.pytorch_utils.Conv1D": Conv1DOps(),
    "torch.nn.modules.conv.Conv1d": _CONV,
    "torch.nn.modules.conv.Conv2d": _CONV,
    "torch.nn.modules.conv.Conv3d": _CONV,
    "torch.nn.modules.sparse.Embedding": EmbeddingOps(),
    "torch.nn.modules.activation.MultiheadAttention": MultiheadAttentionOps(),
    "torch.nn.modules.rnn.LSTM": _RECURRENT,
    "torch.nn.modules.rnn.GRU": _RECURRENT,
    "torch.nn.modules.rnn.RNN": _RECURRENT,
}

#: Kinds known by what the instance has rather than by its class: (test, ops), tried after KINDS.
STRUCTURAL: list[tuple[Callable[[nn.Module], bool], MatrixOps]] = [
    (is_experts, ExpertsOps()),
    (is_router, RouterOps()),
]

#: For modules that get no weight edit, only copies or added blocks.
PLAIN = MatrixOps()


def ops_for(module: nn.Module) -> MatrixOps | None:
    """Ops of the module's kind, None where weights of such a module cannot be edited."""
    for cls in type(module).__mro__:
        ops = KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if ops is not None:
            return ops
    return next((ops for test, ops in STRUCTURAL if test(module)), None)
