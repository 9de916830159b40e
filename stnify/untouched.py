"""Code that is run to learn something leaves nothing behind in the model."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Put every module's attributes back afterwards; yield what was added to the root.

    Dictionaries, lists and sets among the attributes get back what they held; values of buffers
    are the caller's concern.
    """
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    held = [
        (value, list(value.items()) if isinstance(value, dict) else list(value))
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, dict | list | set)
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
        for value, content in held:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


@contextmanager
def state_restored(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Put attributes and the generators back; yield what was added to the root."""
    generators = torch.get_rng_state(), random.getstate()
    try:
        with attributes_restored(model) as added:
            yield added
    finally:
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
