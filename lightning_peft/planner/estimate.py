"""`estimate_memory`: whether a run fits, before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from lightning_peft.activations.config import ActivationKind, Activations, as_activations
from lightning_peft.core.value_types import shown
from lightning_peft.methods.base import Method
from lightning_peft.models.modules import head_names, hf_models
from lightning_peft.planner.activation_trace import UNTRACEABLE, Trace, trace
from lightning_peft.planner.byte_sizes import parse_bytes
from lightning_peft.planner.choice import ALLOWANCES, NCCL, OPTIMIZER_BYTES, Choice
from lightning_peft.planner.example_inputs import NoInputs, usual_length
from lightning_peft.planner.meta_model import meta_model
from lightning_peft.planner.plan import Plan, Step
from lightning_peft.planner.preparation import PRECISIONS, prepare
from lightning_peft.planner.sizes import count
from lightning_peft.storage import StorageConfig, as_config, storage_for

__all__ = ["Plan", "Step", "estimate_memory"]

_SAME = {
    **{"fp32": "32-true", "32": "32-true", "float32": "32-true", "bfloat16": "bf16"},
    **{"fp16": "16", "float16": "16"},
}
_STRATEGIES = {
    **{"auto": None, "ddp": "ddp", "peft_ddp": "ddp", "fsdp": "fsdp", "fsdp2": "fsdp"},
    **{"peft_fsdp": "fsdp"},
}


def estimate_memory(
    model_or_config: Any,
    method: Method | Sequence[Method] | Literal["full"] | None,
    *,
    quantization: StorageConfig | str | None = None,
    optimizer: str | None = None,
    precision: str = "bf16",
    batch_size: int = 1,
    sequence_length: int | None = None,
    checkpointing: bool = False,
    activations: Activations | ActivationKind | None = None,
    loss: Literal["chunked"] | None = None,
    strategy: str | None = None,
    world_size: int = 1,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    replicas: int = 1,
    context_parallel: int = 1,
    allowances: bool | Mapping[str, int] = False,
    liger: bool = False,
    modules_to_save: Sequence[str] = (),
    memory: int | str | None = None,
) -> Plan:
    """Count the memory of one rank on the meta device; nothing is loaded, nothing is changed.

    Activations come from one training step over fake tensors, traced on first use:
    of the Hugging Face model inside, or of a module with an `example_input_array`.

    Args:
        model_or_config: A module (built under ``torch.device("meta")``, or any), a Hugging Face
            configuration, the path of a config.json or of its directory, or a hub id in the local
            cache.
        method: One method, several as a hybrid, or ``"full"``: every weight trained, no adapters.
        quantization: How the frozen base is stored.
        optimizer: ``"adamw"`` (default), ``"sgd"``, ``"adamw_8bit"``, ``"lion_8bit"`` …
        precision: ``"bf16"``: frozen weights in bf16, trained ones in fp32, computed in bf16; or
            Lightning's ``"bf16-mixed"`` (the base as the module has it), ``"bf16-true"``,
            ``"32-true"`` and the same with 16.
        batch_size: Samples per rank.
        sequence_length: Tokens per sample; None for 512, or fewer if the model has fewer positions.
        checkpointing: Whether blocks are recomputed in backward; ``activations="checkpoint"``.
        activations: What blocks keep for backward, as `PEFT` takes it.
        loss: ``"chunked"`` for logits a few tokens at a time, as `PEFT` takes it.
        strategy: None, ``"ddp"`` or ``"fsdp"``.
        world_size: Number of ranks.
        reshard_after_forward: Whether FSDP frees a block between its forward and its backward.
        cpu_offload: Whether FSDP keeps shards, gradients and optimizer state in host memory.
        replicas: Number of groups of ranks that each hold all shards (HSDP).
        context_parallel: Number of ranks that share the tokens of one sample.
        allowances: What a rank needs besides tensors, in bytes by name, for instance
            ``{"CUDA context": 6 * 10**8}``; True for `ALLOWANCES`. They lessen `memory`.
        liger: Whether liger-kernel's fused loss is used; its other layers are not counted.
        modules_to_save: Names or suffixes of modules trained fully.
        memory: Bytes that a rank has, or ``"24GB"``, for the largest batch in the printed table.

    Raises:
        ValueError: an unknown architecture, a configuration without sizes, a number below 1, an
            unknown name, memory below the weights.
    """
    if isinstance(memory, str):
        memory = parse_bytes(memory)
    for name, n in (
        *(("batch_size", batch_size), ("world_size", world_size)),
        *(("replicas", replicas), ("context_parallel", context_parallel)),
        ("sequence_length", 1 if sequence_length is None else sequence_length),
        ("memory", 1 if memory is None else memory),
    ):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {shown(n)}")
    quantization = as_config(quantization)
    methods = _methods(method, modules_to_save)
    if methods is None and quantization is not None:
        raise ValueError(
            "quantization: expected none with method='full', got "
            f"{storage_for(quantization).label!r}; packed weights cannot be trained: choose an "
            "adapter, for instance LoRA()"
        )
    source = meta_model(model_or_config)
    chosen = as_activations(activations)
    if checkpointing:
        if chosen is not None and not chosen.recomputes:
            raise ValueError(
                f"activations: expected 'checkpoint+offload' with checkpointing=True, got "
                f"{chosen.kind!r}; leave checkpointing out"
            )
        chosen = chosen or Activations("checkpoint")
    length = usual_length(source) if sequence_length is None else sequence_length
    choice = Choice(
        method=methods,
        quantization=quantization,
        optimizer=_named("optimizer", optimizer or "adamw", OPTIMIZER_BYTES),
        precision=_named("precision", _SAME.get(precision, precision), PRECISIONS),
        batch_size=batch_size,
        sequence_length=length,
        activations=chosen,
        loss=None if loss is None else _named("loss", loss, ("chunked",)),
        strategy=_STRATEGIES[_named("strategy", strategy or "auto", _STRATEGIES)],
        world_size=world_size,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
        replicas=replicas,
        context_parallel=context_parallel,
        allowances=_allowances(allowances, world_size),
        liger=liger,
        modules_to_save=tuple(modules_to_save),
    )
    _check_mesh(choice)
    plan = _plan(source, choice, memory, {})
    if memory is not None:
        plan.require_weights(memory)
    return plan


def _plan(
    source: nn.Module, choice: Choice, memory: int | None, traces: dict[tuple[str, int], Trace]
) -> Plan:
    """Plan for a pristine meta model, which stays as it is; `traces` are shared with others."""
    model = copy.deepcopy(source)
    heads = _head(model)
    unmade = prepare(
        model, choice.method, choice.quantization, choice.precision, choice.modules_to_save
    )
    fused_loss = None
    if choice.liger:
        if heads is None:
            raise ValueError(
                "liger=True: expected a language model with an output head, found none; leave it "
                "out"
            )
        hidden, vocabulary = heads
        head_trained = choice.method is None
        fused_loss = (hidden, vocabulary, 4 * hidden * vocabulary if head_trained else 0)

    key = replace(
        choice,
        optimizer="",
        strategy=None,
        world_size=1,
        replicas=1,
        allowances=(),
        reshard_after_forward=True,
        cpu_offload=False,
    )

    def run(prepared: nn.Module, batch_size: int) -> Trace:
        return trace(
            prepared,
            batch_size,
            -(-choice.sequence_length // choice.context_parallel),
            autocast=PRECISIONS[choice.precision][2],
            activations=choice.activations,
            loss=choice.loss,
            fused_loss=choice.liger,
        )

    def traced(batch_size: int) -> Trace:
        if (known := (repr(key), batch_size)) not in traces:
            try:
                traces[known] = run(model, batch_size)
            except UNTRACEABLE as error:
                if choice.quantization is None:
                    raise NoInputs(f"{type(source).__name__} needs data to run ({error})") from None
                dense = _plan(source, replace(choice, quantization=None), memory, traces)
                assert dense._tracer is not None  # it was just made
                traces[known] = dense._tracer(batch_size)
        return traces[known]

    if choice.loss is not None and heads is None:
        raise ValueError(
            "loss='chunked': expected a language model with an output head, found none; leave it "
            "out"
        )

    return Plan(
        choice,
        count(model, unmade),
        memory,
        _sample(source, choice.sequence_length),
        _tracer=traced,
        _again=lambda changed: _plan(source, changed, memory, traces),
        _fused_loss=fused_loss,
    )


def _check_mesh(choice: Choice) -> None:
    """Raise ValueError unless the groups of ranks divide them, and the strategy has such groups."""
    c = choice
    parts = c.replicas * c.context_parallel
    if c.world_size % parts:
        raise ValueError(
            f"world_size: expected a multiple of replicas × context_parallel = {parts}, got "
            f"{c.world_size}"
        )
    options = {
        "replicas": c.replicas > 1,
        "context_parallel": c.context_parallel > 1,
        "cpu_offload": c.cpu_offload,
        "reshard_after_forward": not c.reshard_after_forward,
    }
    given = [name for name, is_given in options.items() if is_given]
    if given and c.strategy != "fsdp":
        raise ValueError(
            f"{given[0]}: expected strategy='fsdp', got {c.strategy!r}; leave {given[0]} out"
        )
    if c.loss is not None and c.liger:
        raise ValueError(
            "loss='chunked': expected liger=False, whose own loss is fused; choose one"
        )


def _allowances(given: bool | Mapping[str, int], world_size: int) -> tuple[tuple[str, int], ...]:
    """Return names and bytes; the buffers of NCCL are for several ranks."""
    if isinstance(given, Mapping):
        return tuple(given.items())
    if not given:
        return ()
    return tuple((n, b) for n, b in ALLOWANCES.items() if world_size > 1 or n != NCCL)


def _sample(model: nn.Module, tokens: int) -> str:
    """Size of one sample, by the input of the Hugging Face model inside."""
    nets = [net for _, net in hf_models(model)]
    if not nets and getattr(model, "example_input_array", None) is not None:
        return "its example input"
    if not any(getattr(net, "main_input_name", "") == "pixel_values" for net in nets):
        return f"{tokens} tokens"
    config = nets[0].config
    size = getattr(config, "image_size", None)
    side = size if isinstance(size, int) else "×".join(map(str, size or ()))
    return f"an image of {side} pixels" if side else "an image"


def _head(model: nn.Module) -> tuple[int, int] | None:
    """(hidden size, vocabulary) of the output head."""
    for name in sorted(head_names(model)):
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            return module.in_features, module.out_features
    return None


def _methods(
    method: Method | Sequence[Method] | str | None, saved: Sequence[str]
) -> tuple[Method, ...] | None:
    if method == "full":
        return None
    if isinstance(method, Method):
        return (method,)
    found = () if method is None else tuple(method)
    if any(not isinstance(m, Method) for m in found) or not (found or saved):
        raise ValueError(
            f"method: expected a method such as LoRA(r=16), a list of them, or 'full', got "
            f"{shown(method)}"
        )
    return tuple(m for m in found if isinstance(m, Method))


def _named(what: str, name: str, known: Any) -> str:
    if name not in known:
        raise ValueError(f"{what}: expected one of {sorted(known)}, got {shown(name)}")
    return name
