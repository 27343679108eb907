"""Recognises adapters and models written by other tools, by their file names."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["named"]


def named(path: Path) -> str:
    """Return a description of a directory or file of another tool, "" if it is none."""
    names = {path.name} if path.is_file() else {p.name for p in path.iterdir()}
    for pattern, label in _OTHERS:
        hit = next((n for n in sorted(names) if re.fullmatch(pattern, n)), None)
        if hit is not None:
            return f"{hit}: {label}"
    return ""


#: Files that tell what a directory is; the first that fits.
_OTHERS = (
    (
        r"pytorch_(model_)?adapter\.bin|pytorch_model_head\.bin",
        "an adapter of the adapters library",
    ),
    (r"adapters\.(safetensors|npz)", "an adapter of MLX"),
    (r"lit_model\.pth(\.\w+)?", "a checkpoint of LitGPT; convert it with litgpt convert_from"),
    (r"adapter_\d+\.pt|recipe_state\.pt", "an adapter of torchtune, a pickle"),
    (r".*\.ckpt", "a checkpoint of Lightning; load it with load_from_checkpoint or ckpt_path"),
    (r".*\.gguf", "a GGUF file; convert the adapter it was made from"),
    (
        r"model(-\d+-of-\d+)?\.safetensors|pytorch_model\.bin",
        "a whole model, not an adapter; extract_lora() makes an adapter of a fine-tuned one",
    ),
    (
        r".*\.(bin|pt|pth|pkl)",
        "a pickle, which can run any code when it is read; convert it where "
        "you trust it (safetensors.torch.save_file(torch.load(path, weights_only=True), ...))",
    ),
)
