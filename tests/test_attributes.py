"""Values that a graph holds as they were: a change is refused, and nothing else is."""

import argparse
import copy
import pickle
import types
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from cases import IDLE, convert
from torch import nn

from stnify import UsageError, stnify


@dataclass
class Settings:
    factor: float = 1.0
    names: list = field(default_factory=lambda: ["mean"])


class Read(nn.Module):
    """Reads a value from itself in its own way."""

    shared = 1.0

    def __init__(self, value, read):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self._value = value
        self.read = read
        self.unread = {"steps": 0}
        self._history = []

    def scaled(self, x):
        return x * self.read(self)

    def forward(self, x):
        y = self.layer(x) if self._value is None else self.scaled(self.layer(x))
        return y * self.factor

    @property
    def factor(self):
        return self._factor if hasattr(self, "_factor") else self.shared

    def log(self):
        self.unread["steps"] += 1
        self._history.append(self.unread)


class Inside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.inner(x))


def own(module):
    return module._value


def first(module):
    return module._value[0]


def entry(module):
    return module._value["a"]["t"]


def factor(module):
    return module._value.factor


def named(module):
    return {"mean": 1.0, "sum": 2.0}[module._value.names[0]]


def called(module):
    return module._value(2.0)


def one(value):
    return 1.0


def two(value):
    return 2.0


def set_to(value):
    def change(module):
        module._value = value

    return change


VALUES = {
    "private number": (1.0, own, set_to(5.0)),
    "kind of number": (1, own, set_to(1.0)),
    "None": (None, own, set_to(5.0)),
    "to None": (5.0, own, set_to(None)),
    "list": ([1.0], first, lambda m: m._value.__setitem__(0, 5.0)),
    "list that grows": ([1.0], first, lambda m: m._value.append(5.0)),
    "tuple": ((1.0, 2.0), first, set_to((5.0, 2.0))),
    "dictionaries": ({"a": {"t": 1.0}}, entry, lambda m: m._value["a"].update(t=5.0)),
    "SimpleNamespace": (
        types.SimpleNamespace(factor=1.0),
        factor,
        lambda m: setattr(m._value, "factor", 5.0),
    ),
    "Namespace": (
        argparse.Namespace(factor=1.0),
        factor,
        lambda m: setattr(m._value, "factor", 5.0),
    ),
    "dataclass": (Settings(), factor, lambda m: setattr(m._value, "factor", 5.0)),
    "list in a dataclass": (Settings(), named, lambda m: m._value.names.__setitem__(0, "sum")),
    "list of tensors": (
        [torch.ones(6)],
        first,
        lambda m: m._value.__setitem__(0, 2 * torch.ones(6)),
    ),
    "function": (one, called, set_to(two)),
    "of the class": (1.0, own, lambda m: setattr(m, "shared", 5.0)),
}


def converted(model):
    batch = torch.randn(4, 6), torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    stn = stnify(
        model,
        {"weight_decay": 1e-3},
        optimizer=optimizer,
        criterion=F.mse_loss,
        valid_loader=[batch],
        train_steps=1,
        warmup_steps=0,
        seed=0,
    )
    return stn, batch


@pytest.mark.parametrize("place", ["root", "inner"])
@pytest.mark.parametrize("kind", VALUES)
def test_a_value_that_is_read_must_stay_what_it_was(kind, place):
    value, read, change = VALUES[kind]
    module = Read(copy.deepcopy(value), read)
    stn, batch = converted(module if place == "root" else Inside(module))
    for _ in range(2):
        stn.step(batch)
        module.log()  # what no forward reads may change
    change(module)
    name = "shared" if kind == "of the class" else "_value"
    where = "the model" if place == "root" else "inner"
    with pytest.raises(UsageError, match=rf"attribute '{name}' of '{where}' must stay what it was"):
        stn.step(batch)


def test_the_same_value_in_another_object_is_no_change():
    module = Read({"a": {"t": 1.0}}, entry)
    stn, batch = converted(module)
    module._value = {"a": {"t": 1.0}}
    stn.step(batch)
    assert stn.counters.training_steps == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_values_they_were_copied_with(copied):
    stn, _ = converted(Read([torch.ones(6), {"a": Settings()}], first))
    twin = copied(stn.model)
    for model in (stn.model, twin):
        model._stnify.refuse_changed_attributes()
    twin._value[1]["a"].factor = 5.0
    stn.model._stnify.refuse_changed_attributes()
    with pytest.raises(UsageError, match=r"factor=5.0"):
        twin._stnify.refuse_changed_attributes()


def test_the_message_tells_both_values():
    module = Read({"a": {"t": 1.0}}, entry)
    stn, batch = converted(module)
    module._value["a"]["t"] = 5.0
    with pytest.raises(UsageError, match=r"\{'a': \{'t': 1.0\}\}, because .* is \{'a': \{'t': 5.0"):
        stn.step(batch)


class ReadsItsParts(nn.Module):
    """Uses numbers of modules that it never calls."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.0)

    def forward(self, inputs):
        norm, hidden = self.norm, self.first(inputs)
        hidden = F.dropout(hidden, self.drop.p, self.training)
        return F.layer_norm(hidden, (6,), norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize(("part", "name"), [("drop", "p"), ("norm", "eps")])
def test_numbers_of_modules_that_are_never_called_must_stay(part, name):
    model = ReadsItsParts()
    stn = convert(model, [IDLE], example_inputs=torch.randn(3, 6))
    batch = torch.randn(3, 6), torch.arange(3)
    stn.step(batch)
    setattr(model.get_submodule(part), name, 0.5)
    with pytest.raises(UsageError, match=rf"attribute '{name}' of '{part}' must stay"):
        stn.step(batch)


def test_numbers_of_a_module_that_is_called_are_live():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0))
    stn = convert(model, [IDLE], example_inputs=torch.randn(3, 6))
    model[1].p = 1.0
    assert not stn.model.train()(torch.randn(3, 6)).any()
    stn.step((torch.randn(3, 6), torch.arange(3)))
