"""Tensor names in LoRA files of Kohya, diffusers and loralib: the layer and the factor.

Kohya       lora_unet_<name with _ for .>.lora_down.weight [r, in], .lora_up.weight [out, r], .alpha
diffusers   <unet|text_encoder|…>.<name>.lora.down.weight, .lora_linear_layer.down.weight,
            .lora_A.weight, or <attention>.processor.to_q_lora.down.weight
loralib     <name>.lora_A [r, in], <name>.lora_B [out, r]; MergedLinear: [k·r, in], [out·k/n, r]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_peft.core.names import join
from lightning_peft.hf.keys import PREFIX

__all__ = ["COMPONENTS", "FLAT", "PARSERS", "Layer", "check_complete", "kind_of"]

#: The part of a pipeline before a layer's name with _ for its dots; LyCORIS's for any module.
FLAT = re.compile(r"(lora_(?:unet|te\d?|transformer|prior)|lycoris)_")
_KOHYA = re.compile(rf"{FLAT.pattern}(.+?)\.(.+)")
_KOHYA_PARTS = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}
_DIFFUSERS = re.compile(
    r"(.+?)\.(?:processor\.(to_[qkv]|to_out|add_[kqv]_proj|to_add_out)_lora"
    r"|lora|lora_linear_layer)\.(down|up)\.weight"
)
_DIFFUSERS_NEW = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_MAGNITUDE = re.compile(r"(.+)\.(?:lora_magnitude_vector(?:\.weight)?|dora_scale)")
_LORALIB = re.compile(r"(?:(.+)\.)?lora_([AB])")
#: Component of a pipeline → names that the module has in programs that hold several.
COMPONENTS = {
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer",),
    "lora_prior": ("prior",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "diffusion_model": ("diffusion_model", "transformer", "unet"),  # ComfyUI's word
    **{n: (n,) for n in ("unet", "transformer", "prior", "text_encoder")},
    **{f"text_encoder_{i}": (f"text_encoder_{i}",) for i in (2, 3)},
}


@dataclass
class Layer:
    """The tensors of one layer in a file, by the file's names."""

    component: str
    name: str
    A: Tensor | None = None
    B: Tensor | None = None
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank that alpha is divided by; only after `check_complete`."""
        return int(self.factors()[0].shape[0])

    @property
    def label(self) -> str:
        """For messages."""
        return join(self.component, self.name)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B); only after `check_complete`."""
        assert self.A is not None
        assert self.B is not None
        return self.A, self.B


def kind_of(keys: Sequence[str]) -> str:
    """Return ``"kohya"``, ``"loralib"``, ``"diffusers"`` or "" by the tensors' names."""
    if any(_KOHYA.fullmatch(k) for k in keys):
        return "kohya"
    if any(_LORALIB.fullmatch(k) for k in keys):
        return "loralib"
    if any(_DIFFUSERS.fullmatch(k) or _DIFFUSERS_NEW.fullmatch(k) for k in keys):
        return "" if any(k.startswith(PREFIX) for k in keys) else "diffusers"
    return ""


def _kohya(tensors: Mapping[str, Tensor], source: str) -> tuple[list[Layer], dict[str, Tensor]]:
    layers: dict[tuple[str, str], Layer] = {}
    other = {}
    for key, tensor in tensors.items():
        found = _KOHYA.fullmatch(key)
        if found is None:
            other[key] = tensor
            continue
        component, name, part = found.groups()
        if part not in _KOHYA_PARTS:
            raise ValueError(
                f"{source}: {key}: expected {list(_KOHYA_PARTS)} of plain LoRA, got {part!r} of "
                "another method (LyCORIS); nothing was loaded"
            )
        layer = layers.setdefault((component, name), Layer(component, name))
        _set(layer, _KOHYA_PARTS[part], tensor)
    return list(layers.values()), other


def _diffusers(tensors: Mapping[str, Tensor], source: str) -> tuple[list[Layer], dict[str, Tensor]]:
    layers: dict[str, Layer] = {}
    other = {}
    for key, tensor in tensors.items():
        old, new = _DIFFUSERS.fullmatch(key), _DIFFUSERS_NEW.fullmatch(key)
        if old is not None:
            name, projection, side = old.groups()
            if projection:
                name = f"{name}.{'to_out.0' if projection == 'to_out' else projection}"
            part = "A" if side == "down" else "B"
        elif new is not None:
            name, part = new.groups()
        elif (scaled := _MAGNITUDE.fullmatch(key)) is not None:
            name, part = scaled[1], "magnitude"
        elif key.endswith(".alpha"):
            name, part = re.sub(r"\.(lora|lora_linear_layer)$", "", key[: -len(".alpha")]), "alpha"
        else:
            other[key] = tensor
            continue
        head, _, rest = name.partition(".")
        component, inner = (head, rest) if head in COMPONENTS and rest else ("", name)
        _set(layers.setdefault(name, Layer(component, inner)), part, tensor)
    return list(layers.values()), other


def _loralib(tensors: Mapping[str, Tensor], source: str) -> tuple[list[Layer], dict[str, Tensor]]:
    layers: dict[str, Layer] = {}
    other = {}
    for key, tensor in tensors.items():
        found = _LORALIB.fullmatch(key)
        if found is None:
            other[key] = tensor
            continue
        name, part = found.group(1) or "", found.group(2)
        _set(layers.setdefault(name, Layer("", name)), part, tensor)
    return list(layers.values()), other


_Parser = Callable[[Mapping[str, Tensor], str], tuple[list[Layer], dict[str, Tensor]]]
PARSERS: dict[str, _Parser] = {"kohya": _kohya, "diffusers": _diffusers, "loralib": _loralib}


def _set(layer: Layer, part: str, tensor: Tensor) -> None:
    setattr(layer, part, float(tensor) if part == "alpha" else tensor)


def check_complete(layers: Sequence[Layer], source: str) -> None:
    """Check that every layer has both factors, of fitting shapes.

    Raises:
        ValueError: some layers do not, with the list.
    """
    problems = []
    for e in layers:
        if e.A is None or e.B is None:
            problems.append(f"{e.label}: expected both factors, got one or none")
        elif e.A.ndim not in (2, 3, 4, 5) or e.A.ndim != e.B.ndim or e.A.shape[0] < 1:
            problems.append(
                f"{e.label}: expected factors [r, in] and [out, r], got {list(e.A.shape)} and "
                f"{list(e.B.shape)}"
            )
    if problems:
        raise ValueError(f"{source}: nothing was loaded:\n  " + "\n  ".join(problems[:20]))
