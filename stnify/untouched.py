"""Code that is run to learn something leaves nothing behind in the model."""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stnify.kept import (
    REGISTRIES,
    content,
    contents,
    kept_values,
    put_back,
    same_content,
    tensors_of,
)


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Put every module's attributes back afterwards; yield what was added to the root.

    What ``holders`` finds among the attributes gets back what it held, tensors too; those that are
    registered are the caller's concern.
    """
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    registries = [entry for _, attributes in before for entry in _registries(attributes)]
    values = [value for module, _ in before for value in kept_values(module).values()]
    held = contents(values)
    tensors = [
        (tensor, tensor._version, tensor.detach().clone())
        for tensor in _not_registered(model, tensors_of(values, [holder for holder, _ in held]))
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
            if not same_content(holder, content):
                put_back(holder, content)
        with torch.no_grad():
            for tensor, version, value in tensors:
                if tensor._version != version:
                    tensor.copy_(value)


@contextmanager
def state_restored(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Put attributes, generators and the grad mode back; yield what was added to the root."""
    numpy, differentiable = sys.modules.get("numpy"), torch.is_grad_enabled()
    states = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    try:
        with attributes_restored(model) as added:
            yield added
    finally:
        torch.set_grad_enabled(differentiable)
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
