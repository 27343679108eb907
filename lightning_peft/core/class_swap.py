"""Changing a module's class in place, and changing it back.

A mixin is combined with the class a module has, once per pair (`class AdaptedLinear(Adapted,
nn.Linear)`), and the module's `__class__` is set to it. Parameters, keys, hooks and identity stay;
`isinstance` stays true; nothing is wrapped. The combined class keeps the base's
`__name__` and `__module__`, because other code decides by them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex
from weakref import WeakValueDictionary

# Imported at run time: transformers resolves the annotations of every combined class.
from lightning_peft_kernels.dispatch import Backend
from torch import Tensor, nn

from lightning_peft.core.outside_reads import ParameterAccess, reading_held

__all__ = ["PackedForward", "Swapped", "base_class", "rebind_forward", "swap_in", "swap_out"]


#: Parameters that other modules are known to read.
_READ_OUTSIDE = ("weight", "bias")

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class Swapped(_Module):
    """Base of all mixins that `swap_in` combines with a module's class.

    A mixin is a module only when combined; type checkers always see it as one.
    """

    _swap_base: type[nn.Module]
    _swap_mixin: type[Swapped]
    _swap_prefix: str = ""
    #: Parameters that code outside finds through `_read_parameter`.
    _swap_names: tuple[str, ...] = ()
    #: Backend that the module requests for its kernels in a run; see `kernel_backend`.
    _kernel_backend: Backend | None = None

    def _get_name(self) -> str:
        mixins = (vars(cls).get("_swap_mixin") for cls in type(self).__mro__)
        prefix = "".join(mixin._swap_prefix for mixin in mixins if mixin is not None)
        return f"{prefix}{type(self).__name__}"

    def extra_repr(self) -> str:
        """Return what the class underneath prints between its parentheses."""
        base = base_class(self)
        if base.__repr__ is nn.Module.__repr__:
            return super().extra_repr()
        return base.__repr__(self).partition("(")[2].rpartition(")")[0]

    def __repr__(self) -> str:
        """What `nn.Module` prints: GPT-2's Conv1D would leave out adapters and storage."""
        return nn.Module.__repr__(self)

    def _read_parameter(self, name: str, held: nn.Parameter) -> Any:
        """Return what code that reads ``module.weight`` or ``module.bias`` finds."""
        return held

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Called by `state_dict`: a class with its own way of saving reads what is held, not W'."""
        with reading_held(self):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Called by `load_state_dict`: a class with its own way of loading writes what is held."""
        with reading_held(self):
            super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the attributes. A class's own `__copy__` would drop adapters and storage."""
        made: Any = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self._state(), memo))
        return made

    def _state(self) -> dict[str, Any]:
        getstate = getattr(self, "__getstate__", None)  # an LSTM leaves its weak references out
        state: dict[str, Any] = self.__dict__ if getstate is None else getstate()
        return state

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Rebuild the made class on unpickling: `type()` classes cannot be found by name."""
        cls: Any = type(self)
        mixins: list[tuple[type[Swapped], tuple[str, ...]]] = []
        while "_swap_base" in vars(cls):
            mixins.append((cls._swap_mixin, cls._swap_names))
            cls = cls._swap_base
        if not mixins:  # another library put its class on top of ours, and is responsible for it
            return super().__reduce_ex__(protocol)
        return _rebuild, (tuple(reversed(mixins)), cls), self._state()


class PackedForward(Swapped):
    """Base of mixins whose forward computes from weights that a storage holds."""

    def _read_parameter(self, name: str, held: nn.Parameter) -> Any:
        """Return the dequantised weight for a packed one."""
        read = self._packed_reader(name)
        return held if read is None else read(held)

    def _packed_reader(self, name: str) -> Callable[[nn.Parameter], Tensor] | None:
        """Return how code outside reads a packed parameter; None if it is not packed."""
        return None


def _rebuild(
    mixins: tuple[type[Swapped] | tuple[type[Swapped], tuple[str, ...]], ...], base: type[nn.Module]
) -> Any:
    cls: type[nn.Module] = base
    for each in mixins:  # earlier versions pickled the mixin alone
        mixin, names = each if isinstance(each, tuple) else (each, ())
        cls = _mixed(mixin, cls, names)
    return cls.__new__(cls)


# A cache of the classes that are in use; a class without instances is collected.
_MADE: WeakValueDictionary[tuple[type, type, tuple[str, ...]], type[nn.Module]] = (
    WeakValueDictionary()
)


def _mixed(mixin: type[Swapped], base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return one class per key, so that two adapted Linears have the same type."""
    key = (mixin, base, names)
    made = _MADE.get(key)
    return _MADE.setdefault(key, _make(mixin, base, names)) if made is None else made


def _make(mixin: type[Swapped], base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    return type(
        base.__name__,
        (mixin, base),
        {
            "_swap_base": base,
            "_swap_mixin": mixin,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_swap_names": names,
            **{name: ParameterAccess(name) for name in names},
        },
    )


def swap_in(module: nn.Module, mixin: type[Swapped]) -> None:
    """Put `mixin` on top of the module's class.

    Raises:
        TypeError: the class has a layout that Python cannot change (``__slots__``).
    """
    # Parameters of a subclass of nn.Parameter belong to a library that reads them by its own rules.
    names = [n for n in _READ_OUTSIDE if type(module._parameters.get(n)) is nn.Parameter]
    module.__class__ = _mixed(mixin, type(module), tuple(names))


def swap_out(module: nn.Module, mixin: type[Swapped]) -> None:
    """Take `mixin` off again.

    Raises:
        RuntimeError: another library changed the class on top of ours.
    """
    cls: Any = type(module)
    if vars(cls).get("_swap_mixin") is not mixin:
        raise RuntimeError(
            f"{cls.__name__}: expected the class made by lightning_peft on top, got "
            f"{cls.__mro__[:3]}; undo what was stacked on it (FSDP, parametrize) before detaching"
        )
    module.__class__ = cls._swap_base


def rebind_forward(module: nn.Module) -> None:
    """Point the forward that accelerate's hooks replaced on an instance at the module's class."""
    if "_old_forward" in vars(module):
        cls: Any = type(module)
        vars(module)["_old_forward"] = cls.forward.__get__(module)


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class without any of our mixins."""
    # Also under FSDP2, whose made class inherits from ours.
    for cls in type(module).__mro__:
        if issubclass(cls, nn.Module) and not issubclass(cls, Swapped):
            return cls
    raise TypeError(f"{type(module).__name__}: expected an nn.Module; pass a module")
