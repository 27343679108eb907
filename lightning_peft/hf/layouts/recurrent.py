"""Peft's layout of LSTM, GRU and RNN, whose weights it adapts as parameters."""

from __future__ import annotations

from lightning_peft.hf.layouts.parameters import ParametersLayout

__all__ = ["RecurrentLayout"]


class RecurrentLayout(ParametersLayout):
    """Each weight under its own name, as ``weight_ih_l0``."""

    @property
    def kind(self) -> str:
        """``"recurrent"``."""
        return "recurrent"
