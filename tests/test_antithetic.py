"""Opposite perturbations under the same noise: the same expectation, and less that drowns it."""

import pytest
import torch
from cases import IDLE, batches, convert, convolutional_network, perceptron, train
from torch import nn

from stnify import Dropout, L1Penalty, WeightDecay, stnify
from stnify.perturb import opposite, training_perturbation
from stnify.step import response_step


def response_gradients(stn, batch, *, antithetic, **options):
    with stn.model._stnify.stream.active():
        return response_step(
            stn.model, [batch], stn._tuner.objective, antithetic=antithetic, **options
        ).gradients


def test_the_opposite_perturbation_mirrors_lambda():
    space = convert(perceptron(), [IDLE, Dropout(after="0", init=0.3)]).hyperparameters
    drawn = training_perturbation(space, 4)
    mirrored = opposite(drawn, space)
    assert torch.equal(mirrored.response_input, -drawn.response_input)
    back = space.columns[1].transform.inv
    ends = [back(perturbation.constrained[:, 1]) for perturbation in (drawn, mirrored)]
    centre = space.unconstrained[1].detach().expand(4)
    assert torch.allclose((ends[0] + ends[1]) / 2, centre, atol=1e-5)  # float32 logits
    assert not torch.allclose(ends[0], centre, atol=1e-2)


def test_the_gradient_is_the_mean_of_two_passes_under_the_same_noise():
    torch.manual_seed(0)
    stn = convert(perceptron(), [Dropout(after="1", init=0.4), WeightDecay()])
    train(*stn, 5, criterion=stn.criterion)
    batch, stream, space = next(iter(batches())), stn.model._stnify.stream, stn.hyperparameters
    start = stream.state_dict()
    found = response_gradients(stn, batch, antithetic=True)
    after = stream.state_dict()

    def one(perturbation, monkeypatch):
        monkeypatch.setattr("stnify.step.training_perturbation", lambda *_: perturbation)
        return response_gradients(stn, batch, antithetic=False)

    stream.load_state_dict(start)
    with stream.active():
        drawn = training_perturbation(space, 8)
    noise = stream.state_dict()
    passes = []
    for perturbation in (drawn, opposite(drawn, space)):
        stream.load_state_dict(noise)
        with pytest.MonkeyPatch.context() as monkeypatch:
            passes.append(one(perturbation, monkeypatch))
    for name, gradient in found.items():
        mean = (passes[0][name] + passes[1][name]) / 2
        assert torch.allclose(gradient, mean, rtol=1e-4, atol=1e-7)  # sums in another order
        assert not torch.allclose(gradient, passes[0][name], rtol=1e-2, atol=1e-7)
    assert all(torch.equal(after[device], state) for device, state in stream.state_dict().items())


@pytest.mark.parametrize("make", [perceptron, convolutional_network])
def test_what_does_not_depend_on_the_perturbation_cancels(make):
    """A hyperparameter that does nothing moves no response, whatever else draws noise."""
    torch.manual_seed(0)
    model = make()
    stn = convert(model, [IDLE], response_lr=1.0)
    batch = next(iter(batches()))
    pair = response_gradients(stn, batch, antithetic=True)
    single = response_gradients(stn, batch, antithetic=False)
    # Gates start at zero, so both passes have the same gradient: opposite numbers, to rounding.
    noise = max(float(g.abs().max()) for g in single.values())
    assert max(float(g.abs().max()) for g in pair.values()) < 1e-5 * noise
    assert noise > 0


@pytest.mark.parametrize(
    ("hparams", "options", "expected"),
    [
        ([WeightDecay()], {}, (True, 0.5)),
        ([Dropout(after="0"), L1Penalty()], {}, (True, 0.5)),
        ([Dropout(after="0")], {}, (False, 1.0)),
        ([WeightDecay()], {"forward_loss": lambda model, batch: model(batch).mean()}, (True, 1.0)),
        ([WeightDecay()], {"antithetic": False}, (False, 1.0)),
        ([Dropout(after="0")], {"antithetic": True}, (True, 0.5)),
        ([WeightDecay()], {"response_fraction": 1.0}, (True, 1.0)),
    ],
)
def test_perturbations_are_opposite_by_default_where_a_decay_is_tuned(hparams, options, expected):
    model = nn.Sequential(nn.Linear(4, 3))
    loss = {} if "forward_loss" in options else {"criterion": nn.functional.cross_entropy}
    cadence = stnify(model, hparams, **loss, **options)._tuner.cadence
    assert (cadence.antithetic, cadence.response_fraction) == expected


def test_two_examples_are_enough_for_batch_norm():
    stn = convert(convolutional_network(), [IDLE], response_fraction=1e-6)
    assert train(*stn, 2, criterion=stn.criterion) is None
    assert stn.counters.skipped_responses == 0
