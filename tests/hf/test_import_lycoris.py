"""LoHa, LoKr and DoRA files of LyCORIS: the weights that its formulas give, or a refusal."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close


class Net(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.ModuleDict({"one": nn.Conv2d(8, 8, 1), "proj": nn.Linear(16, 24)})
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down["proj"](self.down["one"](self.conv(x)).flatten(2))
        y: Tensor = self.last(h.relu())
        return y


LAYERS = {"conv": (8, 4, 3), "down.one": (8, 8, 1), "down.proj": (24, 16, 0), "last": (8, 24, 0)}
State = dict[str, Tensor]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def loha(out: int, inner: int, k: int, *, tucker: bool) -> tuple[State, Tensor]:
    """Return (factors, ΔW) of rank 3."""
    r, width = 3, max(k, 1) ** 2
    if tucker and k > 1:
        parts = {"hada_t1": (r, r, k, k), "hada_t2": (r, r, k, k)}
        parts |= {f"hada_w{i}_{s}": (r, n) for i in (1, 2) for s, n in (("a", out), ("b", inner))}
        p = {name: 0.3 * torch.randn(shape) for name, shape in parts.items()}
        first, second = (
            torch.einsum("ijkl,jr,ip->prkl", p[f"hada_t{i}"], p[f"hada_w{i}_b"], p[f"hada_w{i}_a"])
            for i in (1, 2)
        )
        return p, first * second
    shapes = {"a": (out, r), "b": (r, inner * width)}
    p = {f"hada_w{i}_{s}": 0.3 * torch.randn(shapes[s]) for i in (1, 2) for s in "ab"}
    return p, (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])


def lokr(out: int, inner: int, k: int, *, full: bool) -> tuple[State, Tensor]:
    """Return (factors, ΔW); w2 of rank 1 unless it is full."""
    a, c = (max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0) for n in (out, inner))
    kernel = (k, k) if k else ()
    w1 = 0.3 * torch.randn(a, c)
    if full:
        w2 = 0.3 * torch.randn(out // a, inner // c, *kernel)
        p = {"lokr_w1": w1, "lokr_w2": w2}
    else:
        B, A = torch.randn(out // a, 1), torch.randn(1, inner // c * max(k, 1) ** 2)
        p = {"lokr_w1": w1, "lokr_w2_a": B, "lokr_w2_b": A}
        w2 = (B @ A).reshape(out // a, inner // c, *kernel)
    return p, torch.kron(w1.reshape(a, c, *(1,) * len(kernel)), w2)


def file_of(kind: str, prefix: str = "lycoris_") -> tuple[State, Net]:
    """Return (a file's tensors, the net with the change in its weights)."""
    model = net()
    state: State = {}
    for name, (out, inner, k) in LAYERS.items():
        if kind.startswith("loha"):
            parts, delta = loha(out, inner, k, tucker=kind == "loha tucker")
            scale = 2.0 / 3
        else:
            parts, delta = lokr(out, inner, k, full=kind == "lokr full")
            scale = 1.0 if kind == "lokr full" else 2.0
        key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        state |= {f"{key}.{part}": t for part, t in parts.items()}
        state[f"{key}.alpha"] = torch.tensor(2.0)
        with torch.no_grad():
            weight = model.get_parameter(f"{name}.weight")
            weight.add_(scale * delta.reshape(weight.shape))
    return state, model


@pytest.mark.parametrize("kind", ["loha", "loha tucker", "lokr", "lokr full"])
def test_read(kind: str, tmp_path: Path) -> None:
    state, wanted = file_of(kind)
    save_file(state, tmp_path / "a.safetensors")
    model, x = net(), torch.randn(2, 4, 4, 4)
    lp.load_adapter(model, tmp_path / "a.safetensors")
    assert_close("output", model(x), wanted(x), floor=1e-5)
    assert (net()(x) - wanted(x)).abs().max() > 1e-2
    lp.merge(model)
    assert_close("merged", model.conv.weight, wanted.conv.weight, floor=1e-5)


def test_names_of_comfyui() -> None:
    state, wanted = file_of("loha", "diffusion_model.")
    holder, x = nn.ModuleDict({"transformer": net()}), torch.randn(2, 4, 4, 4)
    lp.load_adapter(holder, state)
    assert_close("output", holder["transformer"](x), wanted(x), floor=1e-5)


def test_scale() -> None:
    state, wanted = file_of("loha")
    without = {k: t for k, t in state.items() if not k.endswith("alpha")}
    with pytest.raises(ValueError, match="give alpha="):
        lp.load_adapter(net(), without)
    model, x = net(), torch.randn(2, 4, 4, 4)
    lp.load_adapter(model, without, alpha=2.0)
    assert_close("output", model(x), wanted(x), floor=1e-5)


def _dora(axis: int) -> State:
    state: State = {}
    for name, (out, inner, k) in LAYERS.items():
        kernel = (k, k) if k else ()
        key = f"lycoris_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = 0.3 * torch.randn(2, inner, *kernel)
        state[f"{key}.lora_up.weight"] = torch.randn(out, 2, *(1,) * len(kernel))
        shape = [1, inner] if axis else [out, 1]
        state[f"{key}.dora_scale"] = 1 + torch.rand(*shape, *(1,) * len(kernel))
        state[f"{key}.alpha"] = torch.tensor(2.0)
    return state


def _with_dora(state: Mapping[str, Tensor]) -> Net:
    model = net()
    for name in LAYERS:
        key = f"lycoris_{name.replace('.', '_')}"
        weight = model.get_parameter(f"{name}.weight")
        up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
        W = weight.detach().flatten(1) + up.flatten(1) @ down.flatten(1)
        m = state[f"{key}.dora_scale"].reshape(-1, 1)
        with torch.no_grad():
            weight.copy_((m * W / W.norm(dim=1, keepdim=True)).reshape(weight.shape))
    return model


def test_magnitudes() -> None:
    state = _dora(axis=0)
    model, x = net(), torch.randn(2, 4, 4, 4)
    lp.load_adapter(model, state)
    assert_close("output", model(x), _with_dora(state)(x), floor=1e-5)
    with pytest.raises(ValueError, match="norms of the inputs"):
        lp.load_adapter(net(), _dora(axis=1))


BAD = {
    "one factor": ("lycoris_last.hada_w1_a", None, "expected all factors"),
    "magnitudes": ("lycoris_last.dora_scale", torch.ones(8, 1), "no magnitudes here"),
    "a full change": ("lycoris_last.diff", torch.ones(8, 24), "a full change of the weight"),
    "both methods": ("lycoris_other.lokr_w1", torch.ones(2, 2), "all factors of LoHa or LoKr"),
    "no such layer": ("lycoris_nope", None, "without a certain place"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what: str) -> None:
    state, _ = file_of("loha")
    key, tensor, message = BAD[what]
    if what == "no such layer":
        state |= {k.replace("_last", "_nope"): t for k, t in state.items() if "_last" in k}
    elif tensor is None:
        del state[key]
    else:
        state[key] = tensor
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(model, state)
    assert before.keys() == model.state_dict().keys()


def test_sizes_without_a_bound() -> None:
    state, _ = file_of("lokr full")
    state["lycoris_last.lokr_w1"] = torch.randn(4, 4)  # [2, 4] follows from no bound
    state["lycoris_last.lokr_w2"] = torch.randn(2, 6)
    with pytest.raises(ValueError, match="one bound on them"):
        lp.load_adapter(net(), state)
