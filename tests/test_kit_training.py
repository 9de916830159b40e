"""The property-test kit in train mode: whose rows, and the original's own numbers."""

import random

import pytest
import torch
from kit import ASSERTIONS, normal
from torch import Tensor, nn

from stnify import Cutout, DropConnect, stnify, testing
from stnify.rows import RowLayout
from stnify.testing import subject
from stnify.testing.modules import Residual
from stnify.verify import verify


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class TimeMajorInTraining(nn.Module):
    """Folds time into the batch: rows of an example are consecutive in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        batch, steps, _ = inputs.shape
        if not self.training:
            return self.layer(inputs.flatten(0, 1)).unflatten(0, (batch, steps))
        folded = self.layer(inputs.transpose(0, 1).flatten(0, 1))
        return folded.unflatten(0, (steps, batch)).transpose(0, 1)


def blocks_of_rows(model, *args, **kwargs):
    """Take all rows to be what they are in eval mode, as if nobody had looked in train mode."""
    words = verify(model, *args, **kwargs)
    for layer in model._stnify.hyper_layers.values():
        layer.layout = RowLayout.BATCH
    return dict.fromkeys(words, "batch")


@pytest.mark.parametrize("check", [testing.assert_rows_independent, testing.converts_or_refuses])
def test_rows_that_are_others_in_train_mode_are_caught(monkeypatch, check):
    monkeypatch.setattr(subject, "verify", blocks_of_rows)
    check(nn.Linear(4, 3), normal(3, 2, 4))
    with pytest.raises(AssertionError, match=r"in train mode.*row 0 only.*differ is module 'layer"):
        check(TimeMajorInTraining(), normal(3, 2, 4))


def test_rows_that_are_others_in_train_mode_use_one_perturbation():
    testing.assert_rows_independent(TimeMajorInTraining(), normal(3, 2, 4))
    with pytest.raises(AssertionError, match="but 'layer' use one perturbation"):
        testing.assert_rows_independent(TimeMajorInTraining(), normal(3, 2, 4), allow_shared=False)


# What train mode is not judged by -----------------------------------------------------------------


class CentredInTraining(nn.Module):
    """Subtracts the mean of the batch in train mode, as losses that contrast examples do."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(0) if self.training else inputs


class LossInTraining(nn.Module):
    """Returns a loss in train mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.square().mean() if self.training else inputs


class EvalOnly(nn.Module):
    """Cannot do in train mode what it does in eval mode, as detectors without targets."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            raise ValueError("in training mode, targets should be passed")
        return inputs


class Restless(nn.Module):
    """Adds noise that no seed of PyTorch's repeats."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + random.SystemRandom().random() if self.training else inputs


ODD = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "batch norm around": lambda: Residual(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))),
    "centred in training": CentredInTraining,
    "loss in training": LossInTraining,
    "only eval mode": EvalOnly,
    "restless": Restless,
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["identity", "rows_independent"])
def test_what_the_original_does_in_train_mode_is_no_mistake(name, odd):
    model = nn.Sequential(nn.Linear(4, 3), ODD[odd](), nn.Linear(3, 2))
    ASSERTIONS[name](model, normal(3, 4))


@pytest.mark.parametrize("name", ["identity", "rows_independent", "export_exact"])
@pytest.mark.parametrize("hparams", [[DropConnect()], [Cutout()]])
def test_tuned_noise_on_weights_and_inputs_is_no_mistake(name, hparams):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    ASSERTIONS[name](model, normal(3, 3, 8, 8), hparams)


# What train mode is judged by ---------------------------------------------------------------------


def test_noise_that_is_drawn_once_for_all_is_caught(monkeypatch):
    stn = stnify(nn.Sequential(nn.Linear(4, 3), Restless()), {"weight_decay": 1e-3})
    testing.assert_identity(stn, normal(3, 4))
    constant = stn.model.train()(normal(3, 4)).detach()
    monkeypatch.setattr(subject.Subject, "general", lambda _: constant)
    with pytest.raises(AssertionError, match="it repeats what the original draws anew"):
        testing.assert_identity(stn, normal(3, 4))


def test_the_noise_of_a_fixed_rate_is_the_originals(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    testing.assert_identity(model, normal(3, 4))

    def otherwise(self):
        return nn.functional.dropout(self.model._stnify.original[0](self.inputs[0][0]), 0.5)

    monkeypatch.setattr(subject.Subject, "general", otherwise)
    with pytest.raises(AssertionError, match="in train mode the graph must compute exactly what"):
        testing.assert_identity(model, normal(3, 4))
