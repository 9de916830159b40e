"""What a diagnosis says, against runs where it is known, and that it changes nothing."""

import copy
import math
import random
from dataclasses import replace

import numpy
import pytest
import torch
from cases import batches, convert, convolutional_network, perceptron, train
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RMSprop

from stnify import Dropout, Hyperparameter, UsageError, WeightDecay, stnify
from stnify.diagnosis import SURE
from stnify.step_sizes import step_sizes

DROPOUT = Dropout(after="1", init=0.3)


def test_training_goes_on_as_if_nothing_had_been_asked():
    torch.manual_seed(0)
    model = convolutional_network()
    runs = []
    for asked in (False, True):
        torch.manual_seed(1)
        hparams = [Dropout(after="3", init=0.3), WeightDecay()]
        stn = convert(copy.deepcopy(model), hparams, train_loader=batches(shuffle=True))
        train(*stn, 10, criterion=stn.criterion)
        if asked:
            assert stn.diagnose().steps == 10
            assert stn.model.training
        train(*stn, 5, criterion=stn.criterion)
        runs.append((stn.model.state_dict(), stn.history.to_dict()))
    (left, left_history), (right, right_history) = runs
    assert left_history == right_history
    assert all(torch.equal(left[name], right[name]) for name in left)


class Keeping(nn.Module):
    """Counts its training passes, keeps what it saw, and draws by other generators."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.passes = 0
        self.seen: list[torch.Tensor] = []

    def forward(self, inputs):
        hidden = self.hidden(inputs).relu()
        if self.training:
            self.passes += 1
            self.seen.append(hidden.detach().mean())
            hidden = hidden * (1 + 0.1 * random.random() + 0.1 * numpy.random.rand())
        return self.head(hidden) + 0.01 * self.passes + 0.1 * sum(self.seen)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Keeping, {}),
        (perceptron, {"method": "stn"}),
        (convolutional_network, {"method": "stn"}),
        (perceptron, {"method": "centered"}),
    ],
)
def test_whatever_passes_keep_is_left_as_it_was(make, options):
    runs = []
    for asked in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        stn = convert(make(), [WeightDecay(init=1e-2)], **options)
        train(*stn, 9, criterion=stn.criterion)
        if asked:
            stn.diagnose()
        train(*stn, 3, criterion=stn.criterion)
        runs.append((stn.model.state_dict(), stn.history.to_dict()))
    (left, left_history), (right, right_history) = runs
    assert left_history == right_history
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", ["delta", "stn"])
def test_a_batch_that_is_fetched_and_skipped_is_not_observed_for_a_diagnosis(method):
    stn = convert(perceptron(), [DROPOUT], method=method)
    model, optimizer, loader = stn
    train(*stn, 9, criterion=stn.criterion)
    fetched = iter(loader)
    next(fetched)
    stn.diagnose(draws=2)
    inputs, targets = next(fetched)
    optimizer.zero_grad()
    stn.criterion(model(inputs), targets).backward()
    assert len(stn._tuner.observed) == 1
    assert torch.equal(stn._tuner.observed[0][0], inputs)


def test_gradients_are_the_mean_over_recent_validation_steps():
    stn = convert(perceptron(), [DROPOUT, WeightDecay()])
    train(*stn, 9, criterion=stn.criterion)
    valid = next(iter(batches(seed=2)))
    start = stn._tuner.recent.copy()
    more = [stn.validation_step(valid).gradients["unconstrained"] for _ in range(3)]
    gradients = torch.stack([*start, *more])
    found = stn.diagnose()
    assert found.steps == 12
    assert torch.tensor(list(found.gradients.values())).allclose(gradients.mean(0))
    noise = gradients.mean(0).abs() / gradients.std(0)
    assert torch.tensor(list(found.signal_to_noise.values())).allclose(noise)
    assert list(found.gradients) == list(stn.values())


def test_a_state_keeps_what_a_diagnosis_looks_at():
    stn = convert(perceptron(), [DROPOUT])
    train(*stn, 9, criterion=stn.criterion)
    fresh = convert(perceptron(), [DROPOUT])
    fresh.load_state_dict(stn.state_dict())
    with pytest.raises(UsageError, match="a loaded run has none before its first step"):
        fresh.diagnose()
    train(*fresh, 1, criterion=fresh.criterion)
    assert fresh.diagnose().steps == 10


def straight(prediction, target):
    return (prediction * target).sum(-1).mean()


class Shifted(nn.Module):
    """Predicts one weight, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, inputs):
        return self.layer(inputs)


def pull(model, batch, value):
    """A penalty whose gradient in the weight is the hyperparameter itself."""
    return (value * model(batch[0])[:, 0]).mean()


def noisy_pull(model, batch, value):
    """The same on average, and as much noise."""
    return (1 + torch.randn(())) * pull(model, batch, value)


LINE = torch.ones(8, 1), torch.ones(8, 1)


def learned_for(steps, penalty):
    """Return a run whose response is what ``steps`` steps of 0.1 along ``penalty`` would make it.

    The general gradient is ``lambda``, so one step with rate ``a`` moves the weight by
    ``-a lambda``.
    """
    torch.manual_seed(0)
    rate, model = 0.1, Shifted()
    stn = stnify(
        model,
        [Hyperparameter("pull", 0.0, scale=0.1, penalty=penalty)],
        optimizer=SGD(model.parameters(), rate),
        criterion=straight,
        hyper_optimizer=lambda parameters: SGD(parameters, 0.0),
        response_optimizer=lambda groups: SGD(groups, 0.0),
        seed=0,
    )
    stn.step(LINE)
    response = stn.model.weight_responses()["layer.weight"]
    response.response.data.fill_(1.0)
    response.gate.data.fill_(-rate * steps)
    for _ in range(8):
        stn.validation_step(LINE)
    return stn


@pytest.mark.parametrize("steps", [4, 12])
def test_the_horizon_is_the_number_of_steps_the_response_was_learned_for(steps):
    """A flat loss, so that each step adds the same to the response: its age is its horizon."""
    stn = learned_for(steps, pull)
    found = stn.diagnose()
    assert found.horizon == pytest.approx(steps, rel=1e-4)  # float32
    assert found.horizon_error < 1e-3 * steps
    assert found.unsure == []
    stn.model.weight_responses()["layer.weight"].gate.data.mul_(-1)
    for _ in range(64):
        stn.validation_step(LINE)
    assert stn.diagnose().horizon == pytest.approx(-steps, rel=1e-4), "the wrong way"


def test_noise_in_the_effect_of_a_step_does_not_shorten_the_horizon():
    """Regressing the prediction on effects of which half the variance is noise would halve it."""
    found = learned_for(10, noisy_pull).diagnose(draws=400)
    assert 0.3 < found.horizon_error < 0.7, "a twentieth of ten"
    assert found.horizon == pytest.approx(10, abs=3 * found.horizon_error)


def test_noise_is_not_taken_for_a_direction():
    """Without any effect of the hyperparameter, the gradient's sign is chance."""
    idle = Hyperparameter("idle", 0.5, (0.0, 1.0), penalty=lambda model, batch, value: 0.0 * value)
    certainties = []
    for seed in range(6):
        torch.manual_seed(seed)
        found = convert(perceptron(), [idle], hyper_optimizer=lambda p: SGD(p, 0.0), train_steps=2)
        train(*found, 128, criterion=found.criterion)
        certainties.append(found.diagnose(draws=2).certainty["idle"])
    assert sum(certainty > SURE for certainty in certainties) < 3, "mostly none or one"
    assert max(certainties) > 2, "which would be too few"


def test_the_table_says_which_directions_are_not_known():
    stn = convert(perceptron(), [DROPOUT, WeightDecay()])
    train(*stn, 12, criterion=stn.criterion)
    found = stn.diagnose(draws=2)
    text = str(found)
    assert all(name in text for name in stn.values())
    assert text.count("direction not known") == len(found.unsure)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: SGD(p, 0.1), 0.1),
        (lambda p: SGD(p, 0.1, momentum=0.9), 1.0),
        (lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.9), 0.1),
        (lambda p: Adam(p, 0.1, eps=0.0), 0.1 / 2.0),
        (lambda p: Adam(p, 0.1, eps=0.0, amsgrad=True), 0.1 / 2.0),
        (lambda p: AdamW(p, 0.1, eps=0.0), 0.1 / 2.0),
        (lambda p: NAdam(p, 0.1, eps=0.0), 0.1 / 2.0),
        (lambda p: Adamax(p, 0.1, eps=0.0), 0.1 / 2.0),
        (lambda p: RMSprop(p, 0.1, eps=0.0), 0.1 / (2.0 * math.sqrt(1 - 0.99**200))),
        (lambda p: RMSprop(p, 0.1, eps=0.0, alpha=0.5, momentum=0.9), 1.0 / 2.0),
        (lambda p: Adagrad(p, 0.1, eps=0.0), 0.1 / (2.0 * math.sqrt(200))),
    ],
)
def test_step_sizes_are_what_a_small_constant_change_of_gradient_moves(make, expected):
    """Of a weight whose gradient has been 2 for long, the normaliser held."""
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = make([parameter])
    for _ in range(200):
        parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()
    assert float(step_sizes(optimizer, parameter)) == pytest.approx(expected, rel=1e-6)


def test_a_step_of_adadelta_and_of_centered_rmsprop_is_as_long_as_the_gradient_it_divides():
    """A gradient of alternating sign has no mean, so both step by a known multiple of it."""
    sizes, moved = [], []
    for kind, options in ((Adadelta, {}), (RMSprop, {"centered": True, "eps": 0.0})):
        parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = kind([parameter], 0.1, **options)
        for step in range(2000):
            parameter.grad = torch.full_like(parameter, 2.0 * (-1) ** step)
            before = parameter.detach().clone()
            optimizer.step()
        sizes.append(float(step_sizes(optimizer, parameter)))
        moved.append(float((parameter.detach() - before).abs()) / 2.0)
    # A mean with a memory of 100 steps is a two-hundredth of an alternating gradient; Adadelta's
    # other mean moves within the step by the hundredth part of its memory of ten.
    assert sizes == pytest.approx(moved, rel=0.06)


def test_a_parameter_the_optimizer_does_not_move_has_no_step():
    moved, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    assert step_sizes(SGD([moved], 0.1), other) == 0.0
    assert step_sizes(Adam([moved], 0.1), moved) == 0.0, "before its first step"


@pytest.mark.parametrize("name", ["lamb", "adan", "adafactor", "lion"])
def test_of_other_optimizers_the_horizon_is_not_known(name):
    model = perceptron()
    stn = convert(model, [DROPOUT], create_optimizer_v2(model, name, lr=1e-3))
    train(*stn, 9, criterion=stn.criterion)
    found = stn.diagnose(draws=2)
    assert math.isnan(found.horizon)
    assert math.isfinite(found.certainty["dropout"])
    assert "how far ahead the response looks is not known" in str(found)


def test_it_can_be_asked_for_wherever_the_run_stands():
    model = perceptron()
    stn = convert(model, [DROPOUT])
    train(*stn, 9, criterion=stn.criterion)
    with torch.inference_mode():
        assert math.isfinite(stn.diagnose(draws=2).horizon)
    model.requires_grad_(False)
    assert stn.diagnose(draws=2).horizon == math.inf
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="skipped: its loss"):
        stn.step((torch.full((8, 6), math.nan), torch.zeros(8, dtype=torch.long)))
    assert math.isnan(stn.diagnose(draws=2).horizon)


def test_a_diagnosis_needs_steps_to_look_back_on():
    stn = convert(perceptron(), [DROPOUT])
    train(*stn, 3, criterion=stn.criterion)
    with pytest.raises(UsageError, match="needs 8 validation steps, but there were 3"):
        stn.diagnose()
    for draws in (1, 2.5, "8"):
        with pytest.raises(UsageError, match=f"`draws` must be an integer .* but got {draws!r}"):
            stn.diagnose(draws=draws)
    fixed = convert(perceptron(), [DROPOUT], method="fixed")
    train(*fixed, 9, criterion=fixed.criterion)
    with pytest.raises(UsageError, match="does not tune: there is no hypergradient to diagnose"):
        fixed.diagnose()


def test_a_diagnosis_in_eval_mode_leaves_every_module_there():
    model = perceptron()
    stn = convert(model, [DROPOUT])
    train(*stn, 9, criterion=stn.criterion)
    stn.model.eval()
    stn.diagnose(draws=2)
    assert not any(module.training for module in [*model.modules(), *stn.model.modules()])


IDLE = [
    Hyperparameter(f"idle.{i}", 0.5, (0.0, 1.0), penalty=lambda model, batch, value: 0 * value)
    for i in range(6)
]


def test_controls_measure_directions_by_those_of_no_effect():
    """The error is the root mean square of their gradients, for all others alike."""
    torch.manual_seed(0)
    stn = convert(perceptron(), [WeightDecay(init=1e-2), *IDLE], train_steps=1)
    train(*stn, 40, criterion=stn.criterion)
    found, plain = stn.diagnose(draws=2, controls="idle.*"), stn.diagnose(draws=2)
    assert found.controls == tuple(control.name for control in IDLE)
    assert found.gradients == plain.gradients
    error = math.sqrt(sum(found.gradients[c] ** 2 for c in found.controls) / len(IDLE))
    assert found.certainty == {
        name: pytest.approx(abs(gradient) / error) for name, gradient in found.gradients.items()
    }
    assert plain.certainty["weight_decay"] != pytest.approx(
        found.certainty["weight_decay"], rel=0.1
    )
    assert set(found.unsure) <= {"weight_decay"}
    assert str(found).count("  control") == len(IDLE)
    assert "control" not in str(plain)


@pytest.mark.parametrize("controls", ["idle.[012]", "other*", ["idle.0", "idle.1"]])
def test_too_few_controls_are_refused(controls):
    stn = convert(perceptron(), [WeightDecay(), *IDLE])
    train(*stn, 9, criterion=stn.criterion)
    with pytest.raises(UsageError, match="must match at least 4 hyperparameters, all of them"):
        stn.diagnose(controls=controls)


def test_a_horizon_is_told_where_it_is_known():
    stn = convert(perceptron(), [DROPOUT])
    train(*stn, 9, criterion=stn.criterion)
    found = stn.diagnose(draws=2)
    unknown = "how far ahead the response looks is not known"
    told = "looks about 12 training steps ahead, at the learning rate of now (standard error 3)"
    assert told in str(replace(found, horizon=12.0, horizon_error=3.0))
    for value, error in ((12.0, 12.0), (-38.0, 250.0), (math.inf, math.inf), (math.nan, 1.0)):
        assert unknown in str(replace(found, horizon=value, horizon_error=error))


def test_of_a_batch_that_is_overwritten_the_horizon_is_not_known():
    """A loader may reuse its memory once the step is over."""
    buffer, target = torch.randn(8, 6), torch.zeros(8, dtype=torch.long)
    stn = convert(perceptron(), [DROPOUT])
    train(*stn, 9, criterion=stn.criterion)
    stn.step((buffer, target))
    assert math.isfinite(stn.diagnose(draws=2).horizon)
    buffer.copy_(torch.randn(8, 6))
    assert math.isnan(stn.diagnose(draws=2).horizon)
