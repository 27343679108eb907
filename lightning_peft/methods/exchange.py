"""A method's form in a Hugging Face peft directory: a table, and functions for the rest.

Three parts share the work, so that n methods and m layer kinds cost n + m entries:

1. The method's `pack` turns its tensors into peft's, still canonical ([r, in], [out, r], [out] …).
2. `axes` names the axes of each tensor, and the layer kind's layout gives the tensor peft's shape
   there (a convolution's ``down`` [r, in · Π kernel] becomes [r, in, *kernel]).
3. `tensors` (`lookup` on an embedding) gives the name after the module's path.

Reading takes the same steps in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_peft.core.site import Site

__all__ = [
    "HFEntry",
    "HFFormat",
    "LayerLayout",
    "config_keys",
    "refuse_all_but_features",
    "refuse_all_but_linear",
    "refuse_scaled_embedding",
    "refuse_uneven_conv2d",
]


class LayerLayout(Protocol):
    """Peft's layout of one module; `lightning_peft.hf.layouts` has one per layer kind."""

    @property
    def kind(self) -> str:
        """The layer kind in peft's words: ``"Linear"``, ``"Conv1D"``, ``"Embedding"`` …"""
        ...

    @property
    def geometry(self) -> Mapping[str, str]:
        """Options of the layer that not every type of peft follows → what peft does instead."""
        ...

    @property
    def adapts_all_weights(self) -> bool:
        """True if peft adapts all weights of the module at once, and warns of missing ones."""
        ...

    def nested_paths(self, adapted: Sequence[str]) -> dict[str, str]:
        """Map each weight to the path below the module that its tensors have in a file."""
        ...

    def swaps_factors(self, name: str, *, by_weight: bool = False) -> bool:
        """True if peft reads the weight as its transpose, so that ΔW = B A is (Bᵀ)(Aᵀ) there."""
        ...

    def config_rank(self, name: str, r: int) -> int:
        """The rank that peft's config states for a canonical rank r."""
        ...

    def to_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Convert a tensor from canonical axes to peft's shape."""
        ...

    def from_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Convert a tensor from peft's shape to canonical axes."""
        ...


def refuse_all_but_features(method: object, site: Site) -> str:
    """Return the reason if the weight is neither of a linear layer nor of GPT-2's `Conv1D`."""
    if site.batch_shape or not site.ops.features_last:
        return "peft adapts linear layers only"
    return ""


def refuse_all_but_linear(method: object, site: Site) -> str:
    """Return the reason if the weight is not of an `nn.Linear`."""
    if type(site.module).__name__.endswith("Conv1D") and hasattr(site.module, "nf"):
        return "peft adapts nn.Linear only, not GPT-2's Conv1D"
    return refuse_all_but_features(method, site)


def refuse_scaled_embedding(method: object, site: Site) -> str:
    """Return the reason if the embedding scales its output, as Gemma's does."""
    if site.is_embedding and float(getattr(site.module, "embed_scale", 1.0)) != 1.0:
        return "peft adds the adapter's part there without the embedding's scale"
    return ""


def refuse_uneven_conv2d(method: object, site: Site) -> str:
    """Return the reason if peft cannot form W' of this Conv2d.

    Some types of peft expect one group, a square kernel, and one stride and padding for both axes.
    """
    m = site.module
    if not isinstance(m, nn.Conv2d):
        return ""
    if m.groups > 1:
        return "peft adapts no convolution with groups here"
    if isinstance(m.padding, str):
        return f"peft adapts no convolution with padding={m.padding!r} here"
    for name in ("kernel_size", "stride", "padding"):
        first, second = getattr(m, name)
        if first != second:
            return (
                f"peft takes the {name} for the same on both axes, this layer has {first, second}"
            )
    return ""


@dataclass
class HFEntry:
    """One adapted weight on its way into or out of a file.

    Attributes:
        path: Name of the module in the exported model.
        site: The weight.
        layout: Peft's layout of the module.
        method: The method; None while reading, before it is known.
        tensors: By our names, in peft's content (after `pack`) and canonical axes.
        shapes: While reading: shapes in the file, by peft's names.
        own: While writing: our tensors, before `pack`.
        by_weight: If True, the config names the weight (``target_parameters``), not the module.
    """

    path: str
    site: Site
    layout: LayerLayout
    method: Any
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    by_weight: bool = False

    @property
    def target(self) -> str:
        """Name that the config's targets and patterns are matched with."""
        return f"{self.path}.{self.site.parameter}" if self.by_weight else self.path

    def config_rank(self, r: int) -> int:
        """The rank that peft's config states for a canonical rank r."""
        return self.layout.config_rank(self.site.parameter, r)

    def names_and_shapes(self) -> str:
        """The file's shapes, for messages."""
        return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(self.shapes.items()))


# A method's functions declare its own class and its kind of site, hence `Any` for both here.
#: (method, site, our tensors) → tensors in peft's content, by names that `HFFormat.tensors` lists.
Pack = Callable[[Any, Any, Mapping[str, Tensor]], Mapping[str, Tensor]]
#: (method, site, tensors from the file, config) → our tensors; ValueError with the reason.
Unpack = Callable[[Any, Any, Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]]
#: (method, site) → why this cannot be exchanged, "" where it can.
Refuse = Callable[[Any, Any], str]
#: (entries, config): change the config, and entries' tensors where both go together (padding).
ToConfig = Callable[[Sequence[HFEntry], dict[str, Any]], None]
#: (config, entries) → fields that do not carry over by name; ValueError with the reason.
FromConfig = Callable[[Mapping[str, Any], Sequence[HFEntry]], dict[str, Any]]
#: (entries, shared tensors by our names, config): change the config; tensors by their full keys.
PackShared = Callable[
    [Sequence[HFEntry], Mapping[str, Tensor], dict[str, Any]], Mapping[str, Tensor]
]


def config_keys(*same: str, **others: str) -> dict[str, str]:
    """Return `HFFormat.config`: fields that have the name of their key, and field → key."""
    return {**{name: name for name in same}, **others}


@dataclass(frozen=True)
class HFFormat:
    """How a method is written in a Hugging Face peft directory.

    Attributes:
        peft_type: Value of ``peft_type`` in adapter_config.json.
        tensors: Our tensor name → theirs, after the module's path
            (``"A": "lora_A.weight"``). Names that only `pack` makes are listed too; which of them a
            site has follows from what `pack` returns there.
        config: Our field → their config key, for fields that carry over unchanged. Types are
            checked against the field's default.
        fixed: Config keys with a value that never changes for this method (``{"use_dora": True}``).
            A file with another value that is not null, false or empty is refused, unless the key is
            in `ignored` or handled by `from_config` (list it in `defaults` then).
        defaults: Their default for a key that a file may leave out; a carried key missing from both
            raises.
        when: Config keys that tell methods of one ``peft_type`` apart; a key absent from a file
            counts as false.
        own_defaults: Whether peft's defaults of the keys in `config` are those of our fields. A
            file may leave out any of them; registering the method adds them to `defaults`.
        inert: Config keys that say nothing about the tensors or the forward, as `ignored`, with the
            value that is written.
        ignored: Config keys that say nothing about the tensors or the forward (initialisation).
        prefix: Tensors that occur once per model, our name → their full key
            (``"P": "prompt_embeddings"``).
            A key with ``{i}`` has one entry per row of the tensor.
        optional: Names in `prefix` and `tensors` that a file may leave out. Where all are, layers
            follow from the config's targets.
        unwritten: Our tensors that the file leaves out: they are made again from the config or the
            weight.
        dropped: Names of peft's tensors, behind the module's path, that act in training alone.
        integers: Names in `tensors` whose values are integers in the file.
        lookup: Names on an embedding where they differ (``"A": "lora_embedding_A"``).
        axes: Our tensor name → meaning of its axes, for the layer kind: ``"down"`` [r, in],
            ``"up"`` [out, r], ``"out"`` [out], ``"in"`` [channels], ``"vector"`` [out, 1] or [1,
            channels]. Absent: equal in every kind.
        saved_prefix: Prefix of a module's path in ``modules_to_save``.
        saves_modules: Whether peft's type has ``modules_to_save``.
        shares_by_target: Whether layers that one entry of ``target_modules`` matches share tensors
            in peft, so that a regular expression would share them all.
        pack: Our tensors → peft's content.
        unpack: The way back.
        pack_shared: Writes the tensors of `prefix`, where their keys alone do not say how.
        to_config: Sets the config entries that depend on the tensors.
        from_config: Fields that do not carry over by name.
        kinds: Layer kinds that peft's type adapts (`LayerLayout.kind`); None for all.
        unequal: Layer kinds that it adapts, but computes otherwise → how.
        follows: Options of a layer (`LayerLayout.geometry`) that its computation follows.
        uniform: Change entries and config to what servers take that know no patterns; None where
            there are none.
        refuse: (method, site) → why this cannot be exchanged, "" where it can.
    """

    peft_type: str
    tensors: Mapping[str, str]
    config: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    own_defaults: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)
    inert: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    prefix: Mapping[str, str] = field(default_factory=dict)
    optional: Sequence[str] = ()
    unwritten: Sequence[str] = ()
    dropped: Sequence[str] = ()
    integers: Sequence[str] = ()
    lookup: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    saved_prefix: str = "base_model.model."
    saves_modules: bool = True
    shares_by_target: bool = False
    pack: Pack | None = None
    unpack: Unpack | None = None
    pack_shared: PackShared | None = None
    to_config: ToConfig | None = None
    from_config: FromConfig | None = None
    kinds: Collection[str] | None = None
    unequal: Mapping[str, str] = field(default_factory=dict)
    follows: Collection[str] = ()
    uniform: ToConfig | None = None
    refuse: Refuse | None = None

    def refusal(self, layout: LayerLayout) -> str:
        """Return the reason why a layer of this kind cannot be exchanged, or ""."""
        kind = layout.kind
        if self.kinds is not None and kind not in self.kinds:
            return (
                f"peft's {self.peft_type} adapts {', '.join(sorted(self.kinds))} only, not {kind}"
            )
        ignored = [reason for name, reason in layout.geometry.items() if name not in self.follows]
        return self.unequal.get(kind, "") or next(iter(ignored), "")

    def oriented(self, entry: HFEntry) -> dict[str, Tensor]:
        """Return the entry's tensors with thin factors as peft has them; its own inverse.

        If peft reads the weight as its transpose, "down" and "up" change places, transposed. Axes
        stay canonical.
        """
        oriented = dict(entry.tensors)
        if not entry.layout.swaps_factors(entry.site.parameter, by_weight=entry.by_weight):
            return oriented
        thin = {self.axes.get(name, ""): name for name in oriented}
        down, up = thin.get("down"), thin.get("up")
        if down is not None and up is not None:
            oriented[down], oriented[up] = oriented[up].mT, oriented[down].mT
        return oriented

    def name(self, entry: HFEntry, tensor: str) -> str:
        """Their name of our tensor at this weight."""
        is_lookup = entry.site.is_embedding and not entry.by_weight
        return self.lookup.get(tensor, self.tensors[tensor]) if is_lookup else self.tensors[tensor]
