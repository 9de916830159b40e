"""Attributes whose values a graph holds as they were when it was made.

Tracing runs a module's code once, so whatever the code computes with that is no input, parameter,
buffer or tensor attribute stays what it was then.
"""

import argparse
import functools
import inspect
import reprlib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, slice)
"""Types of values that are compared as they are."""

LONG = 1000
"""Entries from which a container is compared by its length alone."""

DEEP = 8
"""Levels of nesting that are looked into."""

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 100

_OWN = frozenset(vars(nn.Module()))
_MISSING = object()


@dataclass(frozen=True)
class Attributes:
    """Attributes that must keep their values.

    Attributes:
        path: Qualified name of the module.
        module: The module.
        values: What each attribute was: a value to compare with, and how it reads.
    """

    path: str
    module: nn.Module
    values: Mapping[str, tuple[Any, str]]

    def changed(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, former and present value, as text, of each attribute that has changed."""
        for name, (before, text) in self.values.items():
            now = _read(self.module, name)
            if fingerprint(now) != before:
                yield name, text, "gone" if now is _MISSING else _SHORT.repr(now)


def attributes(modules: Mapping[str, nn.Module]) -> list[Attributes]:
    """Return what the code of these modules reads from them, but tensors, which it reads anew.

    What code reads is told from the names in it, in the methods and functions it calls, and in the
    strings it holds. An object that is no number, text, container, namespace or dataclass counts as
    changed only if another one takes its place.

    Args:
        modules: Modules that were traced through, by qualified name.
    """
    names = _names_read(modules.values())
    found = []
    for path, module in modules.items():
        read = {name: _read(module, name) for name in names if not _internal(module, name)}
        values = {
            name: (fingerprint(value), _SHORT.repr(value))
            for name, value in read.items()
            if value is not _MISSING and not isinstance(value, Tensor)
        }
        if values:
            found.append(Attributes(path, module, values))
    return found


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another one of the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def fingerprint(value: Any, depth: int = 0) -> Any:
    """Return something equal for the same nested plain values and the same other objects."""
    if isinstance(value, PLAIN):
        return type(value), value
    if depth >= DEEP:
        return _Same(value)
    match value:
        case dict() | list() | tuple() | set() | frozenset() if len(value) > LONG:
            return type(value), len(value)
        case set() | frozenset():
            return type(value), frozenset(value)
        case list() | tuple():
            return type(value), [fingerprint(entry, depth + 1) for entry in value]
        case dict():
            pairs = [list(pair) for pair in value.items()]
            return type(value), fingerprint(pairs, depth)
        case types.SimpleNamespace() | argparse.Namespace():
            return type(value), fingerprint(vars(value), depth + 1)
        case _ if is_dataclass(value) and not isinstance(value, type):
            own = {field.name: getattr(value, field.name, None) for field in fields(value)}
            return type(value), fingerprint(own, depth + 1)
    return _Same(value)


def _internal(module: nn.Module, name: str) -> bool:
    """Whether a name is PyTorch's own business."""
    if name in _OWN:
        return True
    kinds = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module)]
    layer = any(kind.__module__.startswith("torch.") and kind is not nn.Module for kind in kinds)
    return layer and name.startswith("_")


def _read(module: nn.Module, name: str) -> Any:
    """Return the value of an attribute, or of its class's if that is data."""
    if name in vars(module):
        return vars(module)[name]
    value = inspect.getattr_static(type(module), name, _MISSING)
    return _MISSING if hasattr(value, "__get__") or isinstance(value, type) else value


def _names_read(modules: Iterable[nn.Module]) -> set[str]:
    """Return every name in the code of these modules' forwards and of what that code calls."""
    modules = list(modules)
    methods: dict[str, list[Any]] = {}
    for kind in {base for module in modules for base in type(module).__mro__}:
        for name, value in vars(kind).items():
            methods.setdefault(name, []).append(_function(value))
    pending: list[Any] = [_function(module.forward) for module in modules]
    names: set[str] = set()
    seen: set[types.CodeType] = set()
    while pending:
        function = pending.pop()
        if not isinstance(function, types.FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        own = set(_names_in(function.__code__))
        pending += [_function(_content(cell)) for cell in function.__closure__ or ()]
        pending += [method for name in own - names for method in methods.get(name, ())]
        called = [function.__globals__.get(name) for name in own]
        pending += [one for one in called if not _of_torch(one)]
        names |= own
    return names


def _function(value: Any) -> Any:
    """Return the function behind a method, a property or the like, or the value itself."""
    match value:
        case types.MethodType() | staticmethod() | classmethod():
            return value.__func__
        case property():
            return value.fget
        case functools.cached_property():
            return value.func
    return value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _of_torch(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names_in(constant)
