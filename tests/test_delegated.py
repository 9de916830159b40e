"""Methods of the user's model, called on the converted one, predict as that does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stnify import Dropout, WeightDecay, stnify

X, Y = torch.randn(8, 6), torch.arange(8) % 3


class Model(nn.Module):
    """As people write them: the loss is a method, and so is a step of training."""

    def __init__(self, traced=True):
        super().__init__()
        self.first, self.dropout, self.head = nn.Linear(6, 32), nn.Dropout(0.0), nn.Linear(32, 3)
        self.traced, self.steps = traced, 0

    def forward(self, x):
        if not self.traced and x.sum() > 1e9:
            return x
        return self.head(self.dropout(self.first(x).tanh()))

    def loss(self, x, y):
        self.steps += 1
        return F.cross_entropy(self(x), y)

    def by_forward(self, x, y):
        return F.cross_entropy(self.forward(x), y)

    def of_loss(self, x, y):
        return self.loss(x, y)

    def fails(self, x, y):
        self(x)
        raise KeyError("mine")

    @property
    def width(self):
        return self.first.out_features

    @staticmethod
    def twice(x):
        return 2 * x


class Heir(Model):
    def loss(self, x, y):
        return super().loss(x, y)


def converted(model, rate=0.5):
    return stnify(model, [Dropout(init=rate)], example_inputs=X, seed=0)


def losses(stn, name, rate):
    """Two losses by a method in train mode; they differ where noise acts."""
    stn.hyperparameters.set_values({"dropout": rate})
    stn.model.train()
    return [getattr(stn.model, name)(X, Y) for _ in range(2)]


@pytest.mark.parametrize("name", ["loss", "by_forward", "of_loss"])
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("kind", [Model, Heir])
def test_a_method_predicts_with_tuned_noise(kind, traced, name):
    stn = converted(kind(traced))
    one, other = losses(stn, name, 0.5)
    assert one != other
    one, other = losses(stn, name, 1e-6)  # negative control
    assert one == other
    one.backward()
    assert stn.model.first.weight.grad.any()


def test_in_eval_mode_it_is_the_original():
    model = Model()
    stn = converted(model)
    expected = model.eval().loss(X, Y)
    assert stn.model.eval().loss(X, Y) == expected
    assert "forward" not in vars(model)


def test_what_a_method_keeps_is_kept_and_an_error_leaves_nothing():
    model = Model()
    stn = converted(model)
    stn.model.train()
    stn.model.loss(X, Y)
    assert model.steps == stn.model.steps == 1
    with pytest.raises(KeyError, match="mine"):
        stn.model.fails(X, Y)
    assert "forward" not in vars(model)
    assert stn.model.width == 32
    assert stn.model.twice(2) == 4


def test_a_forward_of_an_instance_stays():
    model = Model()
    own = model.forward = lambda x: Model.forward(model, x)
    stn = stnify(model, [WeightDecay()], example_inputs=X, seed=0)
    assert stn.model.train().loss(X, Y) == F.cross_entropy(own(X), Y)
    assert model.forward is own


def test_a_loop_over_a_method_tunes_what_is_declared():
    torch.manual_seed(0)
    model = Model()
    stn = stnify(
        model,
        [Dropout(init=0.3)],
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        forward_loss=lambda model, batch: model.loss(*batch),
        train_loader=[(X, Y)],
        valid_loader=[(X, Y)],
        warmup_steps=0,
        train_steps=1,
        seed=0,
    )
    before = stn.values()
    wrapped, optimizer, loader = stn
    for _ in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            wrapped.loss(x, y).backward()
            optimizer.step()
    assert stn.values() != before
    assert stn.counters.skipped == stn.counters.skipped_responses == 0
