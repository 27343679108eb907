"""The base class of callbacks that work under the Trainer of either package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.trainers.packages import default_package, loaded_packages

__all__ = ["TrainerCallback"]

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    class TrainerCallback(Callback):
        """A Callback of every Lightning package that is loaded."""

        @classmethod
        def complete(cls) -> None:
            """Take the Callback class of each loaded package as a base."""

        def __setstate__(self, state: dict[str, Any]) -> None:
            """Called when an instance is unpickled or copied: completes the bases."""

else:

    class _NoPackage:
        """The base before any package is loaded. `object` itself could not be exchanged."""

    class TrainerCallback(_NoPackage):
        """A Callback of every Lightning package that is loaded.

        The package of the Trainer is not known at import, and may be loaded later. The bases are
        therefore completed when an instance is created or unpickled. Earlier instances and
        subclasses follow, since they share the class.
        """

        def __init__(self) -> None:
            default_package()
            TrainerCallback.complete()
            super().__init__()

        def __setstate__(self, state: dict[str, Any]) -> None:
            """Called when an instance is unpickled or copied: completes the bases."""
            default_package()
            TrainerCallback.complete()
            vars(self).update(state)

        @classmethod
        def complete(cls) -> None:
            """Take the Callback class of each loaded package as a base."""
            bases = tuple(p.submodule("callbacks").Callback for p in loaded_packages())
            if bases and TrainerCallback.__bases__ != bases:
                TrainerCallback.__bases__ = bases
