"""Code that is run to learn something leaves nothing behind in the model."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 3
"""Levels of containers and objects, one inside the other, that are looked into."""


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Put every module's attributes back afterwards; yield what was added to the root.

    What ``holders`` finds among the attributes gets back what it held, tensors too; those that are
    registered are the caller's concern.
    """
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    registries = [entry for _, attributes in before for entry in _registries(attributes)]
    values = [value for _, attributes in before for value in own_values(attributes)]
    held = contents(values)
    tensors = [
        (tensor, tensor._version, tensor.detach().clone())
        for tensor in _not_registered(model, _tensors(values, [holder for holder, _ in held]))
        if tensor.grad_fn is None and not tensor.is_inference()
    ]
    added: dict[str, Any] = {}
    known = set(model.__dict__) | set(model._buffers)
    try:
        yield added
    finally:
        now = {**model.__dict__, **model._buffers}
        added.update({name: value for name, value in now.items() if name not in known})
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for registry, entries in registries:
            if registry or entries:
                put_back(registry, entries)
        for holder, content in held:
            put_back(holder, content)
        with torch.no_grad():
            for tensor, version, value in tensors:
                if tensor._version != version:
                    tensor.copy_(value)


@contextmanager
def state_restored(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Put attributes and the generators back; yield what was added to the root."""
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    try:
        with attributes_restored(model) as added:
            yield added
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])


def _registries(attributes: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each registry of a module and a copy of what it holds."""
    for name in REGISTRIES:
        registry = attributes.get(name)
        if isinstance(registry, dict | set):
            yield registry, content(registry) if registry else ()


def _not_registered(model: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that are neither parameters nor buffers."""
    if not tensors:
        return []
    registered = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return [tensor for tensor in tensors if id(tensor) not in registered]


# What attributes hold -----------------------------------------------------------------------------


def holders(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what code can change without setting an attribute of a module.

    These are dictionaries, lists, sets, generators and objects of the user's own types, inside each
    other down to ``DEPTH``; each once. Modules and tensors are not looked into.
    """
    known: set[int] = set()
    level = list(values)
    for _ in range(DEPTH):
        found = [value for value in level if _holds(value)]
        level = []
        for holder in found:
            if id(holder) not in known:
                known.add(id(holder))
                yield holder
                level += _entries(holder)


def kept_tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among ``values`` and in what ``holders`` finds there."""
    given = list(values)
    return _tensors(given, holders(given))


def own_values(attributes: Mapping[str, Any]) -> list[Any]:
    """Return what a module's attributes hold, but for the registries every module has."""
    return [value for name, value in attributes.items() if name not in REGISTRIES]


REGISTRIES = set(nn.Module().__dict__)
"""Attributes of every module: of its parameters, buffers, modules and hooks, and its mode."""


def contents(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return all ``holders`` and what each holds, for ``put_back``."""
    return [(holder, content(holder)) for holder in holders(values)]


def content(holder: Any) -> Any:
    """Return a copy of what a holder holds; of a generator its state."""
    if isinstance(holder, dict):
        return dict(holder)
    if isinstance(holder, list | set):
        return list(holder)
    generator = _generator(holder)
    return dict(vars(holder)) if generator is None else generator[0]()


def put_back(holder: Any, content: Any) -> None:
    """Let a holder hold what ``content`` said it did."""
    contained = isinstance(holder, dict | list | set)
    generator = None if contained else _generator(holder)
    if generator is not None:
        generator[1](content)
        return
    target = holder if contained else vars(holder)
    target.clear()
    target.extend(content) if isinstance(target, list) else target.update(content)


def same_content(holder: Any, before: Any) -> bool:
    """Whether a holder still holds the very same objects; a generator, the same state."""
    now = content(holder)
    if isinstance(holder, dict) or _plain(holder):
        same = list(map(id, now)) == list(map(id, before))
        return same and list(map(id, now.values())) == list(map(id, before.values()))
    if isinstance(holder, list | set):
        return list(map(id, now)) == list(map(id, before))
    return repr(_numbers(now)) == repr(_numbers(before))


def _tensors(values: Iterable[Any], holders: Iterable[Any]) -> list[Tensor]:
    inside = [entry for holder in holders for entry in _entries(holder)]
    return [value for value in [*values, *inside] if isinstance(value, Tensor)]


def _holds(value: Any) -> bool:
    if type(value) in PASSIVE:
        return False
    return isinstance(value, dict | list | set) or bool(_generator(value)) or _plain(value)


PASSIVE = {bool, int, float, complex, str, bytes, tuple, type(None), nn.Parameter, Tensor}
"""Frequent types that hold nothing code could change, but for the numbers of tensors."""


def _entries(holder: Any) -> list[Any]:
    if isinstance(holder, dict):
        return list(holder.values())
    if isinstance(holder, list | set):
        return list(holder)
    return list(vars(holder).values()) if _plain(holder) else []


def _plain(value: Any) -> bool:
    """Whether a value is an object of the user's, with attributes of its own."""
    if isinstance(value, nn.Module | Tensor | type | ModuleType | random.Random) or callable(value):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


Generator = tuple[Callable[[], Any], Callable[[Any], Any]]


def _generator(value: Any) -> Generator | None:
    """Return what reads and what sets the state of a generator of random numbers."""
    match value:
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
