"""`load_from_checkpoint`: builds a LightningModule with the adapters of a checkpoint."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from lightning_peft.adapters.activation import activate
from lightning_peft.adapters.attach import attach_within
from lightning_peft.adapters.followers import follow_outside
from lightning_peft.callback.attach import averaged_parts
from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.contents import KEY, complete_checkpoint
from lightning_peft.checkpoint.shard_folder import is_folder, read_folder
from lightning_peft.checkpoint.structure import check_structure
from lightning_peft.core.allocation_limit import AllocationLimit
from lightning_peft.core.registry import registry_of
from lightning_peft.core.value_types import shown
from lightning_peft.hf.config import CONFIG
from lightning_peft.methods.registry import from_dict
from lightning_peft.models.frozen_parts import frozen_copies
from lightning_peft.models.history import start_history
from lightning_peft.models.saving import save_plainly
from lightning_peft.storage import config_from_dict

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["load_from_checkpoint"]

M = TypeVar("M", bound="pl.LightningModule")


def load_from_checkpoint(
    module_class: type[M],
    path: str | os.PathLike[str],
    *,
    weights_only: bool = True,
    **init_args: Any,
) -> M:
    """Build the module, attach the adapters that the file describes, and load them strictly.

    A class with its own `load_from_checkpoint` builds the module with it.

    Args:
        module_class: A LightningModule class of `lightning` or `pytorch_lightning`. It builds
            the pretrained base itself.
        path: A checkpoint of the callback or of `save_checkpoint`, a file or a folder of shards.
        weights_only: If False, hyper-parameters that are objects are unpickled, which may run code
            of the file.
        **init_args: Arguments of the class. They override the stored hyper-parameters.

    Returns:
        The module on the CPU, in the mode that its constructor leaves it in.

    Raises:
        UnpicklingError: the file holds objects, and `weights_only` is True.
        TypeError: no LightningModule class, or no path.
        ValueError: no adapters in the file, another base, tensors that do not fit, or a net that
            only `setup` builds.
    """
    source = _checked(module_class, path)
    if is_folder(source):
        checkpoint = read_folder(Path(source))
    else:
        checkpoint = atomic_file.read(path, weights_only=weights_only)
    stored = checkpoint.get(KEY)
    if not isinstance(stored, dict) or not stored.get("roots"):
        raise ValueError(
            f"{source}: expected a checkpoint with adapters, got keys {sorted(checkpoint)}; load a "
            f"full model with {module_class.__name__}.load_from_checkpoint"
        )
    check_structure(checkpoint, source)
    if "state_dict" not in checkpoint:
        raise ValueError(f"{source}: expected a state_dict, got keys {sorted(checkpoint)}")
    if _has_own_loader(module_class):
        module = _load_own(module_class, path, weights_only, init_args)
    else:
        hparams = _init_arguments(module_class, checkpoint)
        module = module_class(**{**hparams, **init_args})
    module.configure_model()  # Lightning's own does nothing
    _require_net(module, source)
    teachers = {pair.teacher for pair in frozen_copies(module)}
    with AllocationLimit.for_loading(module, checkpoint["state_dict"].values()):
        for prefix, root in stored["roots"].items():
            if prefix not in teachers:
                _attach(module, prefix, root, source)
    for prefix in stored["roots"]:
        save_plainly(module, around=module.get_submodule(prefix))
    follow_outside(module)
    start_history(module)
    if not _has_own_loader(module_class):
        module.on_load_checkpoint(checkpoint)
    completed = complete_checkpoint(module, checkpoint, source, resuming=False)
    module.load_state_dict(completed["state_dict"], strict=True)
    return module


def _checked(module_class: object, path: object) -> str:
    """Return the path as a string.

    Raises:
        TypeError: one of the two arguments is another thing.
        ValueError: the path is a peft directory.
    """
    form = "write load_from_checkpoint(MyModule, 'last.ckpt')"
    if not (isinstance(module_class, type) and hasattr(module_class, "configure_optimizers")):
        instead, got = "", shown(module_class)
        if isinstance(module_class, nn.Module):
            got = f"an instance of {type(module_class).__name__}"
            instead = "; load_checkpoint(model, path) reads into a model that has its adapters"
        elif isinstance(module_class, type):
            got = module_class.__name__
            instead = "; build a plain model, attach its adapters, and load_checkpoint(model, path)"
        raise TypeError(
            f"load_from_checkpoint: expected a LightningModule class, got {got}; {form}{instead}"
        )
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"load_from_checkpoint: expected a path, got {shown(path)}; {form}")
    if module_class.__name__ == "LightningModule":
        raise TypeError(
            f"load_from_checkpoint: expected a class derived from LightningModule, got that class; "
            f"{form}"
        )
    source = os.fspath(path)
    if os.path.isfile(os.path.join(source, CONFIG)):
        raise ValueError(
            f"{source}: expected a checkpoint, got a directory of save_adapter or peft; build the "
            "module and read it with load_adapter(module, directory)"
        )
    if os.path.isdir(source) and not is_folder(source):
        raise ValueError(f"{source}: expected a checkpoint, got a directory; name the file in it")
    return source


def _has_own_loader(cls: type) -> bool:
    """Whether a class outside of Lightning defines `load_from_checkpoint`."""
    owner = next((c for c in cls.__mro__ if "load_from_checkpoint" in vars(c)), None)
    return owner is not None and owner.__module__.partition(".")[0] not in (
        "lightning",
        "pytorch_lightning",
    )


def _load_own(
    cls: type[M], path: str | os.PathLike[str], weights_only: bool, init_args: Mapping[str, Any]
) -> M:
    """Build the module as its class does; keys of adapters and missing ones of the base are fine.

    The file was read with `weights_only` before, so the class unpickles nothing else.
    """
    function: Any = cls.load_from_checkpoint
    parameters = inspect.signature(function).parameters
    options: dict[str, Any] = {"map_location": "cpu", "strict": False}
    if not weights_only:
        options["weights_only"] = False
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        options = {k: v for k, v in options.items() if k in parameters}
    module: M = function(path, **options, **init_args)
    return module


def _init_arguments(cls: Any, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored hyper-parameters as arguments of the class, as Lightning does."""
    hparams = checkpoint.get("hyper_parameters") or {}
    kind = checkpoint.get("hparams_type")
    if callable(kind):
        hparams = kind(hparams)
    parameters = inspect.signature(cls).parameters
    name = checkpoint.get("hparams_name")
    if isinstance(name, str) and name in parameters:
        return {name: hparams}
    found = {k: v for k, v in dict(hparams).items() if k not in ("_instantiator", "_class_path")}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return found
    return {k: v for k, v in found.items() if k in parameters}


def _require_net(module: pl.LightningModule, source: str) -> None:
    if next(module.parameters(), None) is None:
        raise ValueError(
            f"{source}: expected {type(module).__name__} to have parameters after __init__ and "
            "configure_model, found none: a net built in setup() needs a run; use "
            "trainer.test(module, ckpt_path=…) or build it earlier"
        )


def _attach(module: nn.Module, prefix: str, stored: Mapping[str, Any], source: str) -> None:
    """Attach the adapters that the file describes for one root.

    Raises:
        ValueError: the module lacks the root or the layers; it is another class, or another net.
    """
    kind = type(module).__name__
    try:
        root = module.get_submodule(prefix)
    except AttributeError:
        raise ValueError(
            f"{source}: expected a module with a part {prefix!r}, which the file's adapters belong "
            f"to, got {kind} without it; give the class and arguments of the trained module"
        ) from None
    try:
        _attach_all(module, root, prefix, stored)
    except ValueError as error:
        raise ValueError(
            f"{source}: expected a module with the layers of the file's adapters, got {kind}, "
            f"which does not take them ({error}); give the class and arguments of the trained "
            "module"
        ) from error


def _attach_all(module: nn.Module, root: nn.Module, prefix: str, stored: Mapping[str, Any]) -> None:
    quantization = config_from_dict(stored["quantization"])
    averaged = averaged_parts(module, prefix, quantization)
    for name, adapter in stored["adapters"].items():
        attach_within(
            root,
            [from_dict(m) for m in adapter["methods"]],
            adapter_name=name,
            quantization=quantization,
            modules_to_save=adapter["modules_to_save"],
            device=None,
            averaged=averaged,
            separate_copies=bool(adapter.get("separate_copies")),
        )
        quantization = None
    record = registry_of(root)
    assert record is not None
    activate(root, record, list(stored["active"]))
