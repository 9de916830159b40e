"""Hyperparameters the validation loss reads: the score function's gradient is the true one's mean.

The hyperparameter is rounded in use, so that the loss has no derivative in it; what is expected of
the loss has one, and is enumerated over all outcomes.
"""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from stnify import STN, Dropout, Hyperparameter, stnify
from stnify.errors import DeclarationError
from stnify.step import validation_step

LOSSES = (1.0, 2.0, 9.0, 10.0)
"""Loss of each outcome, 0 to 3."""

START, RANGE, SCALE = 2.0, (0.0, 3.0), 0.7
BATCH = (torch.linspace(-1, 2, 4, dtype=torch.float64)[:, None], torch.zeros(4, 1))

METHODS = pytest.mark.parametrize("method", ["delta", "stn"])


def converted(method: str = "delta", *, seed: int = 0, **options: Any) -> STN:
    """A model whose loss looks up the rounded hyperparameter, and nothing that moves by itself."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1).double()

    def looked_up(prediction: Tensor, target: Tensor) -> Tensor:
        value = stn.hyperparameters["outcome"]
        outcome = value.round().long() if value.ndim else value.round().long().expand(4)
        return (torch.tensor(LOSSES)[outcome] * (1 + prediction[:, 0].square())).mean()

    defaults: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "hyper_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        "entropy_weight": 0.0,
        "verify": False,
    }
    declared = [Hyperparameter("outcome", START, RANGE, scale=SCALE, at_validation=True)]
    stn = stnify(
        model,
        [*declared, Dropout(at="input", scale=0.5)],
        criterion=looked_up,
        method=method,
        seed=seed,
        **{**defaults, **options},
    )
    return stn


def open_gates(stn: STN) -> None:
    with torch.no_grad():
        for name, parameter in stn.model.response_parameters().items():
            if name.endswith("gate"):
                parameter[:, 0] = 0.8


def outcome_of(unconstrained: Tensor) -> Tensor:
    return (RANGE[1] * unconstrained.sigmoid()).round().long()


def enumerated_gradient(stn: STN) -> tuple[Tensor, Tensor]:
    """Differentiate the expected loss of a closed response in lambda and sigma's raw parameter."""
    prediction = stn.model._stnify.original(BATCH[0])[:, 0]
    factor = (1 + prediction.square()).mean().detach()
    centre = stn.hyperparameters.unconstrained.detach()[0].requires_grad_()
    raw = stn.hyperparameters.raw_scale.detach()[0].requires_grad_()
    normal = Normal(centre, nn.functional.softplus(raw))
    limits = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64) / RANGE[1]
    below = torch.cat([torch.zeros(1), normal.cdf(limits.logit()), torch.ones(1)])
    expected = (below.diff() * torch.tensor(LOSSES) * factor).sum()
    gradient = torch.autograd.grad(expected, [centre, raw])
    return gradient[0], gradient[1]


def integrated_gradient(stn: STN) -> tuple[Tensor, Tensor]:
    """The same for an open response, whose weights follow the draw: by its density."""
    space = stn.hyperparameters
    centre = space.unconstrained.detach()[0].requires_grad_()
    raw = space.raw_scale.detach()[0].requires_grad_()
    draws = torch.linspace(-10, 10, 40001, dtype=torch.float64)
    density = Normal(centre, nn.functional.softplus(raw)).log_prob(draws).exp()
    losses = losses_of_draws(stn, draws, draws - centre.detach())
    gradient = torch.autograd.grad((density * losses).sum() * (draws[1] - draws[0]), [centre, raw])
    return gradient[0], gradient[1]


@torch.no_grad()
def losses_of_draws(stn: STN, draws: Tensor, epsilon: Tensor) -> Tensor:
    """Return the loss at each draw and the weights that respond to it."""
    (layer,) = stn.model.hyper_layers.values()
    weight, bias = layer.weight_response, layer.bias_response
    slopes = stn.model.weight[0, 0] + epsilon * weight.gate[0, 0] * weight.response[0, 0]
    shifts = stn.model.bias[0] + epsilon * bias.gate[0, 0] * bias.response[0]
    predictions = slopes[:, None] * BATCH[0][:, 0] + shifts[:, None]
    return torch.tensor(LOSSES)[outcome_of(draws)] * (1 + predictions.square()).mean(1)


STEPS = 1000


def gradients(stn: STN, steps: int) -> Tensor:
    """Take validation steps that move nothing; return their gradients, ``(steps, 2)``."""
    found = [stn.validation_step(BATCH).gradients for _ in range(steps)]
    return torch.stack([torch.stack([g["unconstrained"][0], g["raw_scale"][0]]) for g in found])


def assert_mean(found: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """Four standard errors: one failure in 16,000."""
    error = found.std(0) / len(found) ** 0.5
    for one, other, tolerance in zip(found.mean(0), expected, error, strict=True):
        assert abs(one - other) < 4 * tolerance
        assert abs(other) > 5 * tolerance, "the gradient must be told from none"


@METHODS
def test_the_mean_gradient_is_that_of_the_enumerated_expectation(method):
    stn = converted(method)
    found = gradients(stn, STEPS + 20)[20:]  # the baseline has settled
    assert_mean(found, enumerated_gradient(stn))


def test_the_response_to_the_draw_counts_as_well():
    stn = converted()
    open_gates(stn)
    found = gradients(stn, STEPS + 20)[20:]
    expected = integrated_gradient(stn)
    assert_mean(found, expected)
    closed = enumerated_gradient(stn)
    assert not torch.allclose(torch.stack(closed), torch.stack(expected), rtol=0.2)


def test_the_integral_of_a_closed_response_is_the_enumeration():
    stn = converted()
    pairs = zip(integrated_gradient(stn), enumerated_gradient(stn), strict=True)
    # Steps of the loss between two of 40,001 points are misplaced by half their distance.
    assert all(torch.allclose(*pair, rtol=1e-3) for pair in pairs)


def test_the_baseline_leaves_the_mean_and_lowers_the_variance():
    found = {}
    for baseline in (0.0, sum(LOSSES) / 4):
        stn = converted()
        objective = stn._tuner.objective
        with stn._tuner.stream.active():
            steps = [
                validation_step(stn.model, BATCH, objective, baseline=baseline)
                for _ in range(STEPS)
            ]
        found[baseline] = torch.stack([s.gradients["unconstrained"][0] for s in steps])
    without, with_one = found.values()
    assert with_one.var() < 0.6 * without.var()
    error = ((with_one.var() + without.var()) / STEPS).sqrt()
    assert abs(with_one.mean() - without.mean()) < 4 * error


def test_the_first_step_is_its_own_baseline():
    stn = converted()
    first = stn.validation_step(BATCH).gradients["unconstrained"]
    assert first[0] == 0
    assert gradients(stn, 5).abs().sum() > 0


def test_a_baseline_subtracts_its_multiple_of_the_score():
    """The other hyperparameter, which the loss does not read, has the response's gradient alone."""
    found = {}
    for baseline in (0.0, 5.0, 7.0):
        stn = converted()
        open_gates(stn)
        with torch.no_grad():
            for parameter in stn.model.response_parameters().values():
                parameter += 0.1
        with stn._tuner.stream.active():
            step = validation_step(stn.model, BATCH, stn._tuner.objective, baseline=baseline)
        found[baseline] = step.gradients["unconstrained"]
    scores = [(found[0.0] - found[b])[0] / b for b in (5.0, 7.0)]
    assert torch.allclose(*scores)
    assert scores[0].abs() > 0.01
    assert found[0.0][1] == found[5.0][1] == found[7.0][1]
    assert found[0.0][1].abs() > 1e-4


def test_the_baseline_follows_the_validation_loss_and_is_kept_in_the_state():
    stn = converted()
    losses = [float(stn.validation_step(BATCH).loss) for _ in range(6)]
    followed = losses[0]
    for loss in losses:
        followed = 0.9 * followed + 0.1 * loss
    assert stn.state_dict()["tuner"]["baseline"] == pytest.approx(followed, rel=1e-12)
    file = io.BytesIO()
    torch.save(stn.state_dict(), file)
    file.seek(0)
    loaded, fresh = converted(seed=1), converted(seed=1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected = gradients(stn, 3)
    assert torch.equal(gradients(loaded, 3), expected)
    assert not torch.equal(gradients(fresh, 3), expected)


@METHODS
def test_one_draw_serves_the_batch_and_both_losses_read_it(method):
    seen: list[Tensor] = []

    def kept(prediction: Tensor, target: Tensor) -> Tensor:
        seen.append(stn.hyperparameters["outcome"].detach())
        return (prediction.square() * seen[-1].reshape(-1, 1)).mean()

    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    batch = tuple(part.float() for part in BATCH)
    stn = stnify(
        model,
        [Hyperparameter("outcome", START, RANGE, at_validation=True)],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        criterion=kept,
        valid_loader=[batch],
        warmup_steps=0,
        train_steps=1,
        method=method,
        verify=False,
        seed=0,
    )
    stn.step(batch)
    general, *others = seen
    if method == "delta":
        assert general == pytest.approx(START)
    perturbed = [value for value in others if value.shape == (4,)]
    assert perturbed
    for value in perturbed:
        assert torch.equal(value, value[:1].expand(4))
    assert len({float(value[0]) for value in perturbed}) == len(perturbed) - (method == "delta"), (
        "each pass must draw anew, but the first response step is rehearsed"
    )
    assert math.isfinite(stn.values()["outcome"])


def test_lambda_moves_to_outcomes_of_small_losses():
    stn = converted(hyper_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    for _ in range(150):
        stn.validation_step(BATCH)
    assert stn.values()["outcome"] < 1.0 < START


def test_a_penalty_is_no_part_of_the_validation_loss():
    with pytest.raises(DeclarationError, match="must be read by the criterion to act"):
        Hyperparameter("x", 0.5, (0, 1), penalty=lambda m, b, v: v, at_validation=True)
