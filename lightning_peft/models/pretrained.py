"""New layers next to a pretrained model, by a table of the libraries that models come from.

A layer that lies in no pretrained model starts at random: freezing it would waste the run. The same
holds for the head of a pretrained model, which its library names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_peft.core.class_swap import Swapped
from lightning_peft.core.modules import base_modules, base_parameters
from lightning_peft.core.names import in_adapter, join
from lightning_peft.models.modules import fresh_head_names

__all__ = [
    "NewLayers",
    "PretrainedLibrary",
    "find_new_layers",
    "pretrained_models",
    "register_pretrained",
]


@dataclass(frozen=True)
class PretrainedLibrary:
    """A library whose models come with trained weights.

    Attributes:
        package: Package of its model classes; classes of modules below it count too.
        heads: Names of modules inside the model that are a fresh head.
        head_getter: Method that returns the head, or several; "" for none.
    """

    package: str
    heads: tuple[str, ...] = ()
    head_getter: str = ""

    def owns(self, module: nn.Module) -> bool:
        """Whether the module runs a forward of this library, its own or an inherited one.

        A user's class that derives from an abstract base (`PreTrainedModel`) has its own forward.
        """
        cls = next(c for c in type(module).__mro__ if _is_model_forward(c))
        return f"{cls.__module__}.".startswith(f"{self.package}.")

    def head_names(self, name: str, module: nn.Module) -> list[str]:
        """Names of the heads of a model of this library."""
        getter: Any = getattr(module, self.head_getter, None) if self.head_getter else None
        found = getter() if callable(getter) else ()
        fresh = {id(head) for head in (found if isinstance(found, tuple | list) else [found])}
        inner = [(n, m) for n, m in base_modules(module).items() if n]
        heads = [n for n, m in inner if n in self.heads or id(m) in fresh]
        return [join(name, head) for head in heads]


def _is_model_forward(cls: type) -> bool:
    """Whether a class defines forward; our mixins, which run the one underneath, do not count."""
    return ("forward" in vars(cls) and not issubclass(cls, Swapped)) or cls is nn.Module


_TORCHVISION_HEADS = (
    *("fc", "classifier", "heads", "head", "aux_classifier"),
    *("roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor"),
)
_LIBRARIES = [
    PretrainedLibrary("transformers"),  # its heads: `fresh_head_names`
    PretrainedLibrary("transformers_modules"),  # code that came with a checkpoint
    PretrainedLibrary("timm", head_getter="get_classifier"),
    PretrainedLibrary("torchvision.models", _TORCHVISION_HEADS),
    PretrainedLibrary("torchaudio.models"),
    PretrainedLibrary("sentence_transformers"),
    PretrainedLibrary("open_clip"),
    PretrainedLibrary("diffusers"),
    PretrainedLibrary("segmentation_models_pytorch.encoders"),
    PretrainedLibrary("litgpt"),
]


def register_pretrained(package: str, *, heads: Sequence[str] = (), head_getter: str = "") -> None:
    """Count the models of a package as pretrained; an entry of that package is replaced.

    Args:
        package: Package of the model classes, for instance ``"my_company.encoders"``.
        heads: Names of modules in the models that start fresh and are trained fully.
        head_getter: Method of the models that returns the head, or several heads.
    """
    _LIBRARIES[:] = [library for library in _LIBRARIES if library.package != package]
    _LIBRARIES.insert(0, PretrainedLibrary(package, tuple(heads), head_getter))


@dataclass
class NewLayers:
    """The parts of a model that are not pretrained.

    Attributes:
        trained: Module to train fully → why.
        frozen: Parts outside every pretrained model that the user froze.
        loose: New parameters that are trained in place: of a module with pretrained parts, or of
            a layer under `torch.nn.utils.parametrize`.
    """

    trained: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)


def find_new_layers(
    model: nn.Module,
    *,
    requires_grad: Callable[[str, nn.Parameter], bool],
    targeted: Callable[[str], bool],
) -> NewLayers:
    """Find the layers to train fully; empty for a model without any pretrained part.

    Args:
        model: The model.
        requires_grad: Whether the user had a parameter trained, by its name.
        targeted: Whether a method's `target_modules` names a module.
    """
    parts = dict(_pretrained_parts(model))
    found = NewLayers()
    if not parts:
        return found
    pretrained = {
        id(p) for name in parts for p in base_parameters(model.get_submodule(name)).values()
    }
    search = _Search(parts, pretrained, requires_grad, targeted, found)
    search.visit("", model)
    for head, owner in _heads(model, parts).items():
        if search.trains(head, model.get_submodule(head)):
            found.trained[head] = f"head of the pretrained {owner or type(model).__name__}"
    return found


def pretrained_models(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules whose classes are a library's models."""
    return [name for name, _ in _pretrained_parts(model)]


def _pretrained_parts(model: nn.Module) -> Iterator[tuple[str, PretrainedLibrary]]:
    """Yield the outermost modules of the libraries."""
    taken: list[str] = []
    for name, module in base_modules(model).items():
        if in_adapter(name) or any(name.startswith(f"{t}.") or not t for t in taken):
            continue
        library = next((lib for lib in _LIBRARIES if lib.owns(module)), None)
        if library is not None and next(module.parameters(), None) is not None:
            taken.append(name)
            yield name, library


def _heads(model: nn.Module, parts: dict[str, PretrainedLibrary]) -> dict[str, str]:
    """Fresh heads inside the pretrained models → name of the model."""
    heads = {
        head: name
        for name, library in parts.items()
        for head in library.head_names(name, model.get_submodule(name))
    }
    for head in fresh_head_names(model):
        heads.setdefault(head, head.rpartition(".")[0])
    return heads


@dataclass
class _Search:
    """Walks over the modules outside every pretrained model."""

    parts: dict[str, PretrainedLibrary]
    pretrained: set[int]
    requires_grad: Callable[[str, nn.Parameter], bool]
    targeted: Callable[[str], bool]
    found: NewLayers

    def visit(self, name: str, module: nn.Module) -> None:
        """Classify the module, or its children if they differ."""
        if name in self.parts or in_adapter(name):
            return
        holds = not name or any(part.startswith(f"{name}.") for part in self.parts)
        own = self._parameters(name, module)
        if not holds and own:
            if self.trains(name, module):
                if any(is_parametrized(inner) for inner in module.modules()):  # has no copy
                    self.found.loose += own
                    return
                self.found.trained[name] = f"new layer next to the pretrained {self._neighbour()}"
                return
            if not any(self.requires_grad(key, p) for key, p in own.items()):
                self.found.frozen.append(name)
                return
        if holds:
            direct = module._parameters.items()
            flags = {join(name, k): p for k, p in direct if p is not None}
            self.found.loose += [k for k, p in flags.items() if self.requires_grad(k, p)]
        for child, inner in module.named_children():
            self.visit(join(name, child), inner)

    def trains(self, name: str, module: nn.Module) -> bool:
        """Whether every parameter is trained and no method targets a layer of the module."""
        own = self._parameters(name, module, heads=True)
        inside = [join(name, inner) for inner in base_modules(module)]
        return (
            bool(own)
            and all(self.requires_grad(key, p) for key, p in own.items())
            and not any(self.targeted(each) for each in inside)
        )

    def _parameters(
        self, name: str, module: nn.Module, *, heads: bool = False
    ) -> dict[str, nn.Parameter]:
        """Parameters by full name; without those that a pretrained model shares."""
        return {
            join(name, key): p
            for key, p in base_parameters(module).items()
            if heads or id(p) not in self.pretrained
        }

    def _neighbour(self) -> str:
        return ", ".join(part.rpartition(".")[2] for part in self.parts if part) or "model"
