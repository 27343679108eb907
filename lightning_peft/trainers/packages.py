"""`lightning.pytorch` and `pytorch_lightning`: which are loaded, and which one an object is from.

The two packages hold the same code as different classes. Code that serves both takes each class
from the package of the running Trainer, and imports neither at module level.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = [
    "OLDEST",
    "PACKAGES",
    "LightningPackage",
    "callbacks_of",
    "default_package",
    "is_fitting",
    "is_instance_of",
    "is_interrupted",
    "is_loaded",
    "is_supported",
    "is_trial",
    "loaded_packages",
    "package_of",
    "version_of",
]

#: Oldest version of either package whose Trainer the callback works with.
OLDEST = (2, 5, 3)
_ROOTS = ("lightning", "pytorch_lightning", "lightning_fabric")


@dataclass(frozen=True)
class LightningPackage:
    """A package with a Trainer, and the Fabric package it is built on.

    Attributes:
        name: Import name of the Trainer's package.
        fabric: Import name of its Fabric package.
    """

    name: str
    fabric: str

    def submodule(self, path: str) -> Any:
        """Import a submodule, for example ``"callbacks"``."""
        return importlib.import_module(f"{self.name}.{path}")

    def fabric_submodule(self, path: str) -> Any:
        """Import a submodule of the Fabric package."""
        return importlib.import_module(f"{self.fabric}.{path}")

    @property
    def version(self) -> str:
        """Version of the loaded package."""
        return version_of(self.name)


#: In order of preference where several are installed and none is loaded.
PACKAGES = (
    LightningPackage("lightning.pytorch", "lightning.fabric"),
    LightningPackage("pytorch_lightning", "lightning_fabric"),
)


def version_of(package: str) -> str:
    """Return the version of a loaded package, also of a part such as `lightning.fabric`."""
    return str(sys.modules[package.partition(".")[0]].__version__)


def is_supported(package: str) -> bool:
    """Return whether a loaded package is new enough; other libraries may pin an older one."""
    numbers = [int(part) for part in re.findall(r"\d+", version_of(package))]
    return numbers[: len(OLDEST)] >= list(OLDEST)


def is_loaded(module: str, attribute: str) -> bool:
    """Return whether a module is imported far enough to have `attribute`."""
    return hasattr(sys.modules.get(module), attribute)


def loaded_packages() -> list[LightningPackage]:
    """Return the packages that this process has imported."""
    return [p for p in PACKAGES if is_loaded(p.name, "Trainer")]


def default_package() -> LightningPackage:
    """Return the first loaded package; import the first installed one if none is loaded.

    Raises:
        ModuleNotFoundError: neither package is installed.
    """
    for package in loaded_packages():
        return package
    for package in PACKAGES:
        if importlib.util.find_spec(package.name.partition(".")[0]) is not None:
            importlib.import_module(package.name)
            return package
    raise ModuleNotFoundError(
        "lightning_peft: expected lightning or pytorch-lightning to be installed, found neither; "
        "pip install 'lightning-peft[lightning]' or 'lightning-peft[pytorch-lightning]'"
    )


def package_of(obj: object) -> LightningPackage | None:
    """Return the package that defines the class of `obj` or one of its bases."""
    modules = [cls.__module__ for cls in type(obj).__mro__]
    for package in PACKAGES:
        if any(m == package.name or m.startswith(f"{package.name}.") for m in modules):
            return package
    return None


def is_instance_of(obj: object, name: str) -> bool:
    """Return whether `obj` is an instance of either package's class of that name.

    The class need not exist in both packages, nor in every version of them.
    """
    return any(
        cls.__name__ == name and cls.__module__.partition(".")[0] in _ROOTS
        for cls in type(obj).__mro__
    )


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the Trainer's callbacks, which Lightning sets without declaring them."""
    found: list[pl.Callback] = vars(trainer)["callbacks"]
    return found


def is_fitting(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer runs `fit`."""
    return trainer.state.fn == "fit"


def is_interrupted(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer is handling an exception."""
    return trainer.state.status == "interrupted"


def is_trial(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer runs a few batches to see that they run: ``fast_dev_run``."""
    return bool(vars(trainer).get("fast_dev_run", False))
