"""How a method is written in a Hugging Face peft directory: a table, and functions beside it.

Three layers share the work, so that n methods and m kinds of layer cost n + m entries:

1. the method's `pack` turns its tensors into peft's, still canonical ([r, in], [out, r], [out] …);
2. `layouts` names the axes of each tensor, and the layer kind's `hf_pack` gives them peft's shape
   there (a convolution's ``down`` [r, in · Π kernel] becomes [r, in, *kernel]);
3. `tensors` (`lookup` on an embedding) gives the name behind the module's path.

Reading goes the same way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_peft.core.site import Site

__all__ = ["HFEntry", "HFFormat"]


@dataclass
class HFEntry:
    """One adapted weight, on its way out or in.

    Attributes:
        path: Name of the module in the exported model.
        site: The weight.
        method: The method; None while reading, before it is known.
        tensors: By our names, in peft's content (after `pack`) and canonical axes.
        shapes: While reading: shapes as they are in the file, by our names.
        own: While writing: our tensors, before `pack`.
        by_weight: Whether the config names the weight (``target_parameters``), not the module.
    """

    path: str
    site: Site
    method: Any
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    by_weight: bool = False

    @property
    def target(self) -> str:
        """What the config's targets and patterns are matched with."""
        return f"{self.path}.{self.site.parameter}" if self.by_weight else self.path

    def names_and_shapes(self) -> str:
        """The file's shapes, for messages."""
        return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(self.shapes.items()))


#: (method, site, our tensors) → tensors in peft's content, by names that `HFFormat.tensors` lists.
Pack = Callable[[Any, Site, Mapping[str, Tensor]], Mapping[str, Tensor]]
#: (method, site, tensors from the file, config) → our tensors; ValueError with the reason.
Unpack = Callable[[Any, Site, Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]]
#: (entries, config): change the config, and entries' tensors where both go together (padding).
ToConfig = Callable[[Sequence[HFEntry], dict[str, Any]], None]
#: (config, entries) → fields that do not carry over by name; ValueError with the reason.
FromConfig = Callable[[Mapping[str, Any], Sequence[HFEntry]], dict[str, Any]]


@dataclass(frozen=True)
class HFFormat:
    """How a method is written in a Hugging Face peft directory.

    Attributes:
        peft_type: Value of ``peft_type`` in adapter_config.json.
        tensors: Our tensor name → theirs, as it stands after the module's path
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
        ignored: Config keys that say nothing about the tensors or the forward (initialisation).
        prefix: Tensors that stand once for the whole model, our name → their full key
            (``"P": "prompt_embeddings"``).
        optional: Names in `prefix` that a file may leave out.
        lookup: Names on an embedding where they differ (``"A": "lora_embedding_A"``).
        layouts: Our tensor name → what its axes are, for the layer kind: ``"down"`` [r, in],
            ``"up"`` [out, r], ``"out"`` [out], ``"in"`` [channels]; absent: alike in every kind.
        saved_prefix: What precedes the path of a module in ``modules_to_save``.
        pack: Our tensors → peft's content.
        unpack: The way back.
        to_config: What of the config depends on the tensors.
        from_config: Fields that do not carry over by name.
        uniform: Change entries and config to what servers take that know no patterns; None where
            there are none.
        refuse: (method, site) → why this cannot be exchanged, "" where it can.
    """

    peft_type: str
    tensors: Mapping[str, str]
    config: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    when: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    prefix: Mapping[str, str] = field(default_factory=dict)
    optional: Sequence[str] = ()
    lookup: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    saved_prefix: str = "base_model.model."
    pack: Pack | None = None
    unpack: Unpack | None = None
    to_config: ToConfig | None = None
    from_config: FromConfig | None = None
    uniform: ToConfig | None = None
    refuse: Callable[[Any, Site], str] | None = None

    def oriented(self, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Thin factors as peft has them at this site, canonical axes; its own inverse.

        Where peft takes a weight for its transpose, "down" and "up" change places, transposed.
        """
        oriented = dict(tensors)
        if site.ops.hf_swaps(site.module, site.parameter):
            thin = {self.layouts.get(name, ""): name for name in tensors}
            down, up = thin.get("down"), thin.get("up")
            if down is not None and up is not None:
                oriented[down], oriented[up] = tensors[up].mT, tensors[down].mT
        return oriented

    def name(self, site: Site, tensor: str) -> str:
        """Their name of our tensor at this site."""
        return (
            self.lookup.get(tensor, self.tensors[tensor])
            if site.is_embedding
            else self.tensors[tensor]
        )
