"""What modules hold in attributes and globals that code can change, and how it is put back."""

import dis
import operator
import random
import sys
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass
from functools import partial
from types import (
    BuiltinFunctionType,
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

DEPTH = 3
"""Levels of containers and objects, one inside the other, that are looked into."""


def holders(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what code can change without setting an attribute of a module.

    These are dictionaries, lists, sets, queues, arrays, generators and objects of the user's own
    types, inside each other down to ``DEPTH``; each once. Modules and tensors are not looked into.
    """
    known: set[int] = set()
    level = list(values)
    for _ in range(DEPTH):
        found = [value for value in _unpacked(level) if _holds(value)]
        level = []
        for holder in found:
            if id(holder) not in known:
                known.add(id(holder))
                yield holder
                level += _entries(holder)


def _unpacked(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values; of a tuple what is in it, and of a generator's method the generator."""
    for value in values:
        if type(value) in PASSIVE:
            yield value
        elif isinstance(value, tuple):
            yield from _unpacked(value)
        elif isinstance(value, METHODS) and _generator(value.__self__):
            yield value.__self__
        else:
            yield value


METHODS = (MethodType, BuiltinMethodType)
"""Of objects written in Python or in C."""


def kept_tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among ``values`` and in what ``holders`` finds there."""
    given = list(values)
    return tensors_of(given, holders(given))


def kept_values(module: nn.Module) -> dict[str, Any]:
    """Return what a module's attributes hold, and what its code can change beside them.

    That is what its class has and the globals its methods name, if they are containers, arrays,
    tensors or generators; and as ``Name``, numbers and words of the class, and the globals that its
    methods set. Left out are the registries that every module has.
    """
    found = {name: value for name, value in vars(module).items() if name not in REGISTRIES}
    for scope, name in _other_globals(type(module)):
        value = scope.get(name)
        if _changes_inside(value):
            found[f"global {name}"] = value
    for where, owner, name in _shared_names(type(module)):
        value = owner.get(name)
        found[f"{where} {name}"] = value if _changes_inside(value) else Name(owner, name)
    return found


def _changes_inside(value: Any) -> bool:
    """Whether a value that several modules share is one that code fills or draws from."""
    if isinstance(value, (dict, *SEQUENCES, Tensor)) or _is_array(value):
        return True
    return _generator(value) is not None


@dataclass(frozen=True)
class Name:
    """A name that code can give another value, in a class or among the globals of a file.

    Attributes:
        scope: Where it is.
        name: What it is called.
    """

    scope: "Scope"
    name: str

    def value(self) -> Any:
        """Return what it is at the moment."""
        return self.scope.get(self.name)


@dataclass(frozen=True)
class Scope:
    """A class, or the globals of a file."""

    owner: type | dict[str, Any]

    def get(self, name: str) -> Any:
        """Return what a name is, or None."""
        names = vars(self.owner) if isinstance(self.owner, type) else self.owner
        return names.get(name)

    def set(self, name: str, value: Any) -> None:
        """Give a name a value."""
        if isinstance(self.owner, type):
            setattr(self.owner, name, value)
        else:
            self.owner[name] = value


def named_globals(kind: type) -> Sequence[tuple[dict[str, Any], str]]:
    """Return the globals that the methods of a user's class name, and where they are."""
    if kind not in _GLOBALS:
        functions = [f for k in _own_classes(kind) for f in _functions(k)]
        _GLOBALS[kind] = [(f.__globals__, name) for f in functions for name in _names(f.__code__)]
    return _GLOBALS[kind]


def _other_globals(kind: type) -> Sequence[tuple[dict[str, Any], str]]:
    """Return the globals of ``named_globals`` that there are, without functions, classes, files."""
    if kind not in _OTHERS:
        there = [(scope, name) for scope, name in named_globals(kind) if name in scope]
        _OTHERS[kind] = [entry for entry in there if not isinstance(entry[0][entry[1]], FIXED)]
    return _OTHERS[kind]


def _shared_names(kind: type) -> Sequence[tuple[str, Scope, str]]:
    """Return what a class has that is no method, and the globals that its methods set."""
    if kind not in _SHARED:
        _SHARED[kind] = [
            *(("class", Scope(k), name) for k in _own_classes(kind) for name in _attributes(k)),
            *(
                ("global", Scope(function.__globals__), name)
                for k in _own_classes(kind)
                for function in _functions(k)
                for name in _stored(function.__code__)
            ),
        ]
    return _SHARED[kind]


def _own_classes(kind: type) -> list[type]:
    """Return a class and those it inherits from, without those of Python, PyTorch and numpy."""
    return [k for k in kind.__mro__ if k.__module__.split(".")[0] not in STANDARD]


def _functions(kind: type) -> list[FunctionType]:
    return [value for value in vars(kind).values() if isinstance(value, FunctionType)]


def _attributes(kind: type) -> list[str]:
    """Return the names of a class's own numbers, words and containers."""
    return [
        name
        for name, value in vars(kind).items()
        if not name.startswith("__") and (isinstance(value, WORDS) or _changes_inside(value))
    ]


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _stored(code: CodeType) -> set[str]:
    """Return the globals that code sets."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    found: set[str] = set()
    if dis.opmap["STORE_GLOBAL"] in code.co_code[::2]:
        steps = dis.get_instructions(code)
        found = {str(step.argval) for step in steps if step.opname == "STORE_GLOBAL"}
    return found.union(*map(_stored, inner))


WORDS = (bool, int, float, complex, str, bytes, type(None))

_GLOBALS: MutableMapping[type, Sequence[tuple[dict[str, Any], str]]] = WeakKeyDictionary()
_OTHERS: MutableMapping[type, Sequence[tuple[dict[str, Any], str]]] = WeakKeyDictionary()
_SHARED: MutableMapping[type, Sequence[tuple[str, Scope, str]]] = WeakKeyDictionary()


REGISTRIES = set(nn.Module().__dict__)
"""Attributes of every module: of its parameters, buffers, modules and hooks, and its mode."""


def contents(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return all ``holders`` and what each holds, for ``put_back``."""
    return [(holder, content(holder)) for holder in holders(values)]


def content(holder: Any) -> Any:
    """Return a copy of what a holder holds; of a generator its state."""
    if isinstance(holder, dict):
        return dict(dict.items(holder))  # some types make their values when they are read
    if isinstance(holder, SEQUENCES):
        return list(holder)
    if isinstance(holder, Name):
        return holder.value()
    if _is_array(holder):
        return holder.copy()
    generator = _generator(holder)
    return _fields(holder) if generator is None else generator[0]()


def put_back(holder: Any, content: Any) -> None:
    """Let a holder hold what ``content`` said it did."""
    if isinstance(holder, dict | set):
        holder.clear()
        holder.update(content)
    elif isinstance(holder, list | deque):
        holder.clear()
        holder.extend(content)
    elif isinstance(holder, Name):
        holder.scope.set(holder.name, content)
    elif _is_array(holder):
        holder[...] = content
    elif (generator := _generator(holder)) is not None:
        generator[1](content)
    else:
        _set_fields(holder, content)


def same_content(holder: Any, before: Any) -> bool:
    """Whether a holder still holds the very same objects; a generator, the same state."""
    now = content(holder)
    if isinstance(holder, SEQUENCES):
        return _same(now, before)
    if isinstance(holder, Name):
        return now is before
    if _is_array(holder):
        return bool(now.tobytes() == before.tobytes())
    if isinstance(holder, dict) or _plain(holder):
        return _same(now, before) and _same(now.values(), before.values())
    return repr(_numbers(now)) == repr(_numbers(before))


def _same(now: Collection[Any], before: Collection[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def tensors_of(values: Iterable[Any], holders: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among ``values`` and in ``holders``."""
    inside = [entry for holder in holders for entry in _entries(holder)]
    return [value for value in _unpacked([*values, *inside]) if isinstance(value, Tensor)]


def _holds(value: Any) -> bool:
    if type(value) in PASSIVE:
        return False
    contained = isinstance(value, (dict, *SEQUENCES)) or _is_array(value)
    return contained or bool(_generator(value)) or _plain(value)


SEQUENCES = (list, set, deque)

PASSIVE = {bool, int, float, complex, str, bytes, type(None), nn.Parameter, Tensor, FunctionType}
"""Frequent types that hold nothing code could change, but for the numbers of tensors."""


LARGE = 1000
"""Entries of a container, as of a vocabulary, beyond which they are not looked into one by one."""


def _entries(holder: Any) -> list[Any]:
    if isinstance(holder, (dict, *SEQUENCES)) and len(holder) > LARGE:
        return []
    if isinstance(holder, dict):
        return list(dict.values(holder))
    if isinstance(holder, SEQUENCES):
        return list(holder)
    if isinstance(holder, Name):
        return []
    return list(_fields(holder).values()) if _plain(holder) else []


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _plain(value: Any) -> bool:
    """Whether a value is an object of the user's, with attributes of its own."""
    if isinstance(value, CODE) or _is_array(value) or _generator(value) is not None:
        return False
    return isinstance(getattr(value, "__dict__", None), dict) or bool(_slots(type(value)))


FIXED = (type, ModuleType, FunctionType, BuiltinFunctionType)
"""Globals of these types are not filled."""

CODE = (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, partial)
"""What has attributes, and is not looked into."""


def _slots(kind: type) -> tuple[str, ...]:
    """Return the attributes that instances of a user's class have in slots."""
    several = [vars(owner).get("__slots__", ()) for owner in _own_classes(kind)]
    names = [name for slots in several for name in ([slots] if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in {"__dict__", "__weakref__"})


STANDARD = {*sys.stdlib_module_names, "builtins", "torch", "numpy"}


def _fields(value: Any) -> dict[str, Any]:
    """Return an object's attributes, those in slots too."""
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **slots}


def _set_fields(value: Any, fields: Mapping[str, Any]) -> None:
    slots = _slots(type(value))
    if hasattr(value, "__dict__"):
        vars(value).clear()
        vars(value).update({name: field for name, field in fields.items() if name not in slots})
    for name in slots:
        if name in fields:
            object.__setattr__(value, name, fields[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)


Generator = tuple[Callable[[], Any], Callable[[Any], Any]]


def _generator(value: Any) -> Generator | None:
    """Return what reads and what sets the state of a generator of random numbers."""
    match value:
        case random.SystemRandom():  # has no state
            return None
        case random.Random():
            return value.getstate, value.setstate
        case torch.Generator():
            return value.get_state, value.set_state
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state, value.set_state
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def _numbers(state: Any) -> Any:
    """Return a generator's state in numbers that print in full."""
    match state:
        case dict():
            return {key: _numbers(value) for key, value in state.items()}
        case tuple() | list():
            return [_numbers(value) for value in state]
        case _:
            return state.tolist() if hasattr(state, "tolist") else state
