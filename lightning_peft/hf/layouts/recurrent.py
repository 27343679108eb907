"""LSTM, GRU and RNN, which peft does not adapt."""

from __future__ import annotations

from torch import nn

from lightning_peft.hf.layouts.base import MatrixLayout

__all__ = ["RecurrentLayout"]


class RecurrentLayout(MatrixLayout[nn.RNNBase]):
    """Refuses every weight."""

    def refusal(self, name: str) -> str:
        """No weight of a recurrent layer has an adapter in peft."""
        return f"peft adapts no {type(self.module).__name__}"
