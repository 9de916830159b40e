"""Code that does something else in training, or more than it returns: it runs, as it is."""

import pytest
import torch
import torch.nn.functional as F
from cases import IDLE, convert
from torch import nn

from stnify import TraceError


def layers(*sizes):
    return nn.ModuleList(nn.Linear(*pair) for pair in sizes)


class Module(nn.Module):
    """Two layers in a row and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = layers((6, 6), (6, 6), (6, 2))


class HeadOfTraining(Module):
    def forward(self, x):
        features = self.first(x).relu()
        return self.second(features) if self.training else self.head(features)


class OneMoreOutput(Module):
    def forward(self, x):
        features = self.first(x).relu()
        return (self.head(features), self.second(features)) if self.training else features


class OtherOrder(Module):
    def forward(self, x):
        pair = self.first(x), self.second(x)
        return pair if self.training else pair[::-1]


class OtherFactor(Module):
    def forward(self, x):
        return self.first(x) * (2.0 if self.training else 1.0)


class OneMoreLayer(Module):
    def forward(self, x):
        features = self.first(x)
        if self.training:
            features = self.second(features)
        return features


class Inside(nn.Module):
    """Another module around one of them."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.plain = inner, nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(self.plain(x))


def tensors(output):
    return list(output) if isinstance(output, tuple) else [output]


OF_THE_MODE = (HeadOfTraining, OneMoreOutput, OtherOrder, OtherFactor, OneMoreLayer)


@pytest.mark.parametrize("make", OF_THE_MODE)
@pytest.mark.parametrize("around", [lambda model: model, Inside], ids=["root", "inside"])
def test_what_depends_on_the_mode_is_itself_in_both(make, around):
    torch.manual_seed(0)
    model = around(make())
    x = torch.randn(4, 6)
    expected = {mode: tensors(model.train(mode)(x)) for mode in (True, False)}
    stn = convert(model, [IDLE], example_inputs=x)
    for mode, outputs in expected.items():
        found = tensors(stn.model.train(mode)(x))
        assert all(map(torch.equal, found, outputs))
    assert {site.way for site in stn.plan.weights} >= {"swap"}
    differs = expected[True][0].shape != expected[False][0].shape
    assert differs or not torch.equal(expected[True][0], expected[False][0])


def test_noise_that_is_off_in_eval_mode_keeps_its_module_traced():
    class Functional(Module):
        def forward(self, x):
            return F.dropout(self.first(x), 0.5, self.training)

    assert {site.way for site in convert(Functional(), [IDLE]).plan.weights} == {"module"}


def test_a_model_can_be_named_a_leaf():
    model = Inside(nn.Linear(6, 2))
    assert {site.way for site in convert(model, [IDLE], leaves=[""]).plan.weights} == {"swap"}
    assert {site.way for site in convert(model, [IDLE]).plan.weights} == {"module"}


class Auxiliary(Module):
    """Leaves a loss in a list, as mixtures of experts do."""

    def __init__(self, holder):
        super().__init__()
        self.holder = holder

    def forward(self, x):
        gates = self.first(x).softmax(-1)
        loss = gates.mean(0).square().sum()
        match self.holder:
            case list():
                self.holder.append(loss)
            case dict():
                self.holder["loss"] = loss
            case set():
                self.holder.add(loss)
        return self.head(gates)


@pytest.mark.parametrize("around", [lambda model: model, Inside], ids=["root", "inside"])
@pytest.mark.parametrize("kind", [list, dict, set])
def test_what_code_keeps_is_kept_in_training_too(kind, around):
    model = Auxiliary(kind())
    stn = convert(around(model), [IDLE])
    assert not model.holder
    stn.model(torch.randn(4, 6))
    (loss,) = model.holder.values() if kind is dict else model.holder
    assert loss.requires_grad


class Constrained(Module):
    """Keeps its weight's norm below one, as networks of EEG do."""

    def forward(self, x):
        self.first.weight.data = torch.renorm(self.first.weight.data, 2, 0, 0.1)
        return self.head(self.first(x))


@pytest.mark.parametrize("around", [lambda model: model, Inside], ids=["root", "inside"])
def test_what_code_sets_on_a_tensor_is_set_in_training_too(around):
    model = Constrained()
    stn = convert(around(model), [IDLE])
    before = model.first.weight.norm(dim=1)
    assert (before > 0.2).any()
    stn.model(torch.randn(4, 6))
    assert (model.first.weight.norm(dim=1) < 0.11).all()
