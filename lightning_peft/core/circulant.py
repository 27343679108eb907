"""Block-circulant changes of a weight, by Fourier transforms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense, Term

__all__ = ["Circulant"]


@dataclass(frozen=True)
class Circulant(Term):
    """ΔW[m b + o, n b + i] = scaling · c[m, n, (i − o) mod b] with c [m, n, b]: a correlation."""

    c: Tensor
    scaling: float

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        m, n, b = self.c.shape
        i = torch.arange(b, device=self.c.device)
        blocks = self.c[..., (i - i.unsqueeze(1)) % b]  # [m, n, o, i]
        return self.scaling * blocks.permute(0, 2, 1, 3).reshape(m * b, n * b)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Y_m = Σ_n X_n conj(C_mn) at each of b/2 + 1 frequencies, in fp32 at least."""
        if not ops.features_last or not x.numel():  # MKL transforms no empty batch
            return Dense(self.matrix()).apply(ops, site, x)
        m, n, b = self.c.shape
        c, x = (t.float() if t.dtype.itemsize < 4 else t for t in (self.c, x))
        with torch.autocast(x.device.type, enabled=False):
            X = torch.fft.rfft(x.reshape(-1, n, b)).permute(2, 0, 1)  # [frequencies, M, n]
            C = torch.fft.rfft(c).permute(2, 1, 0).conj()  # [frequencies, n, m]
            Y = torch.fft.irfft((X @ C).permute(1, 2, 0), n=b)
        y: Tensor = self.scaling * Y.reshape(*x.shape[:-1], m * b)
        return y
