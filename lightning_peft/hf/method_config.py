"""Method and fields that an adapter_config.json describes, and the config of a new file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.hf.config import CONFIG, is_finite, is_int, shortened
from lightning_peft.methods import METHODS, Method
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.refused import check_not_refused

__all__ = ["base_config", "check_known", "format_of", "method_class", "method_fields"]
PEFT_VERSION = "0.21.2"  # the version whose files these are

# Keys that every adapter type may have; each is handled, or has no meaning here.
_COMMON = frozenset(
    [
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "auto_mapping",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "runtime_config",
        "target_parameters",
    ]
)


def method_class(config: Mapping[str, Any]) -> type[Method]:
    """Return the method that a config describes.

    Raises:
        ValueError: a ``peft_type`` that no method here writes, or a variant of it.
    """
    check_not_refused(config, CONFIG)
    known = {cls.hf.peft_type for cls in METHODS.values() if cls.hf is not None}
    peft_type = config["peft_type"]
    if peft_type not in known:
        raise ValueError(
            f"{CONFIG}: peft_type: expected one of {sorted(known)}, got {peft_type!r}; no method "
            "here reads it"
        )
    found = [
        cls
        for cls in METHODS.values()
        if cls.hf is not None
        and cls.hf.peft_type == peft_type
        and all(_is(config.get(k), v) for k, v in cls.hf.when.items())
    ]
    if not found:
        keys = {
            k: config.get(k)
            for cls in METHODS.values()
            if cls.hf is not None and cls.hf.peft_type == peft_type
            for k in cls.hf.when
        }
        raise ValueError(
            f"{CONFIG}: {peft_type}: expected a variant that a method here knows, got {keys}"
        )
    # LoRA+ writes what LoRA writes, a hard prompt what a soft one does: read as the base class.
    return min(found, key=lambda cls: len(cls.__mro__))


def _is(value: object, wanted: object) -> bool:
    """Whether a key is as a variant wants it; true and false ask whether it is set at all."""
    return bool(value) == wanted if isinstance(wanted, bool) else bool(value == wanted)


def format_of(cls: type[Method]) -> HFFormat:
    """Return the method's exchange table."""
    assert cls.hf is not None  # `method_class` chose it by the table
    return cls.hf


def method_fields(
    cls: type[Method], config: Mapping[str, Any], entries: Sequence[HFEntry]
) -> dict[str, Any]:
    """Return the constructor fields of the method, checked.

    Raises:
        ValueError: a required key is absent, a value has another type, or an option of unknown
            effect is on.
    """
    fmt = format_of(cls)
    check_known(fmt, config)
    fields: dict[str, Any] = {}
    for ours, theirs in fmt.config.items():
        if theirs not in config and theirs not in fmt.defaults:
            raise ValueError(
                f"{CONFIG}: expected {theirs!r}, which {fmt.peft_type} cannot do without, found "
                f"none among {sorted(config)}; take it from the run that made the adapter"
            )
        value = config.get(theirs, fmt.defaults.get(theirs))
        if value is None and fmt.defaults.get(theirs) is not None:
            value = fmt.defaults[theirs]
        fields[ours] = _typed(cls, ours, theirs, value)
    if fmt.from_config is not None:
        try:
            fields |= fmt.from_config({**fmt.defaults, **config}, entries)
        except (TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(
                f"{CONFIG}: expected values as peft writes them for {fmt.peft_type}, got others "
                f"({type(error).__name__}: {error})"
            ) from error
    return fields


def check_known(fmt: HFFormat, config: Mapping[str, Any]) -> None:
    """Raise ValueError if an option is on whose effect is not known."""
    carried = {*fmt.config.values(), *fmt.defaults, *fmt.ignored, *fmt.inert, *fmt.when}
    for key, value in config.items():
        if key in _COMMON or key in carried:
            continue
        if key in fmt.fixed and value == fmt.fixed[key]:
            continue
        if value not in (None, False, 0, "", [], {}):  # an option that is off changes nothing
            raise ValueError(
                f"{CONFIG}: expected the known fields of {fmt.peft_type}, got also {key} = "
                f"{shortened(value)}, which changes the layers or what they compute; merge the "
                "adapter with peft (merge_and_unload), or train without it"
            )


def _typed(cls: type[Method], ours: str, theirs: str, value: Any) -> Any:
    """Return the value if it has the type of the field's default.

    Raises:
        ValueError: the value has another type.
    """
    described = {f.name: f for f in dataclasses.fields(cast(Any, cls))}[ours]
    default = (
        described.default_factory()
        if described.default_factory is not dataclasses.MISSING
        else described.default
    )
    rules: list[tuple[type, Any, str]] = [
        (bool, lambda v: isinstance(v, bool), "true or false"),
        (int, is_int, "an integer"),
        (
            float,
            lambda v: isinstance(v, int | float) and not isinstance(v, bool) and is_finite(v),
            "a finite number",
        ),
        (str, lambda v: isinstance(v, str), "a string"),
        (dict, lambda v: isinstance(v, dict), "an object"),
    ]
    for kind, holds, rule in rules:
        if type(default) is kind:
            if not holds(value):
                raise ValueError(f"{CONFIG}: {theirs}: expected {rule}, got {shortened(value)}")
            return float(value) if kind is float else value
    return value  # a field whose default says nothing; the method checks it


def base_config(root: nn.Module, fmt: HFFormat) -> dict[str, Any]:
    """Return the config fields that do not depend on the adapter's tensors."""
    config = {**fmt.fixed, **fmt.inert}
    task = _task_type(root)
    cls = base_class(root)
    described = getattr(root, "config", None)
    name = getattr(root, "name_or_path", None) or getattr(described, "_name_or_path", None)
    config.update(
        peft_type=fmt.peft_type,
        peft_version=PEFT_VERSION,
        task_type=task,
        auto_mapping=None
        if task
        else {"base_model_class": cls.__name__, "parent_library": cls.__module__},
        base_model_name_or_path=name if isinstance(name, str) else "",
        revision=None,
        inference_mode=True,
    )
    return config


def _task_type(root: nn.Module) -> str | None:
    """Return the task type if it changes only the class of peft's wrapper.

    For classification it would also make peft train a head that is not in the file, so the type is
    null there.
    """
    name = base_class(root).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    reads_ids = getattr(root, "main_input_name", None) == "input_ids"
    if reads_ids and getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
    return None
