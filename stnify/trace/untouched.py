"""Tracing leaves nothing behind in the model."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def state_restored(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Put every module's attributes and the generators back; yield what was added to the root."""
    generators = torch.get_rng_state(), random.getstate()
    registries = ("_parameters", "_buffers", "_modules")
    before = [
        (module, dict(module.__dict__), {name: dict(module.__dict__[name]) for name in registries})
        for module in model.modules()
    ]
    added: dict[str, Any] = {}
    known = set(model.__dict__) | set(model._buffers)
    try:
        yield added
    finally:
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        now = {**model.__dict__, **model._buffers}
        added.update({name: value for name, value in now.items() if name not in known})
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name in registries:
                module.__dict__[name].clear()
                module.__dict__[name].update(contents[name])
