"""Finds the layers of another program's file in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import join
from lightning_peft.hf.import_names import COMPONENTS, Layer
from lightning_peft.hf.legacy_names import namings
from lightning_peft.hf.targets import model_root
from lightning_peft.layers import adaptable

__all__ = ["places_of"]


def places_of(
    model: nn.Module, root: str | None, layers: Sequence[Layer], source: str
) -> dict[int, str]:
    """Map each layer (by id) to its name in the caller's model.

    Raises:
        ValueError: a layer without a certain place.
    """
    components = sorted({e.component for e in layers})
    places: dict[int, str] = {}
    for component in components:
        mine = [e for e in layers if e.component == component]
        heads = _heads(model, root, component, alone=len(components) == 1, source=source)
        flat = component.startswith("lora_") or component == "lycoris"
        tried: list[dict[int, str]] = []
        for head in heads:
            top = model.get_submodule(head) if head else model
            for table in _tables(top, flat):
                tried.append({id(e): table[e.name] for e in mine if e.name in table})
                if len(tried[-1]) == len(mine):
                    break
            if len(tried[-1]) == len(mine):
                places |= {k: join(head, v) for k, v in tried[-1].items()}
                break
        else:
            best = max(tried, key=len)
            missing = [e.label for e in mine if id(e) not in best]
            raise ValueError(
                f"{source}: expected layers of {base_class(model).__name__}, got {len(missing)} of "
                f"{len(mine)} without a certain place, as {missing[:3]}; is this the base it was "
                "made for? Nothing was loaded"
            )
    return places


def _heads(
    model: nn.Module, root: str | None, component: str, *, alone: bool, source: str
) -> list[str]:
    if root is not None:
        head, _ = model_root(model, root)
        if not alone:
            raise ValueError(
                f"{source}: root: expected a file for one module, got one for several "
                f"({component!r} among them)"
            )
        return [head]
    wanted = COMPONENTS.get(component, ())
    named = [n for n in base_modules(model) if n.rpartition(".")[2] in wanted]
    outer = [n for n in named if not any(n.startswith(f"{o}.") for o in named)]
    if len(outer) == 1:
        return outer
    if not alone or len(outer) > 1:
        raise ValueError(
            f"{source}: expected a module named {' or '.join(wanted)} for the part {component!r} "
            f"of the file, found {outer or 'none'}; load into a module that holds every part"
        )
    return list(dict.fromkeys(["", model_root(model)[0]]))


def _tables(top: nn.Module, flat: bool) -> Iterator[dict[str, str]]:
    """Yield maps from the file's names to names in `top`, those of the present release first."""
    current = {n: n for n, m in base_modules(top).items() if n and adaptable(m)} or {"": ""}
    for naming in (current, *namings(top)):
        table: dict[str, list[str]] = {}
        for name in current:
            if name in naming:
                old = naming[name]
                table.setdefault(old.replace(".", "_") if flat else old, []).append(name)
        # Two layers of one flat name, or one layer that became two: no certain place.
        yield {old: names[0] for old, names in table.items() if len(names) == 1}
