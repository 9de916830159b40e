"""The user's loop: what it did before it does still, and each step moves only what it should."""

import copy
import itertools
import math
import pickle

import pytest
import timm.optim
import timm.scheduler
import torch
import torch.nn.functional as F
from cases import (
    CLASSES,
    FEATURES,
    IDLE,
    BranchingNetwork,
    batches,
    convert,
    convolutional_network,
    examples,
    perceptron,
    train,
)
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, RAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from stnify import Dropout, Hyperparameter, ShapeError, UsageError, WeightDecay, stnify
from stnify.objective import Objective
from stnify.step import first_rows, response_step

STEPS = 20


def sgd(model, **options):
    return SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def adamw(model, **options):
    return AdamW(model.parameters(), lr=0.01, **options)


def holding_still(parameters):
    """Validation steps run, but lambda and sigma stay."""
    return SGD(parameters, lr=0.0)


def train_one(stn):
    train(*stn, 1, criterion=stn.criterion)


def general(stn):
    return {name: p.detach().clone() for name, p in stn.model.general_parameters().items()}


def response(stn):
    return {name: p.detach().clone() for name, p in stn.model.response_parameters().items()}


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


# Parity with the plain loop (C2, C6) --------------------------------------------------------------


@pytest.fixture(params=[perceptron, convolutional_network, BranchingNetwork])
def models(request):
    """Return the same model twice."""
    torch.manual_seed(0)
    model = request.param()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("scheduled", ["before the conversion", "after the conversion"])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_general_parameters_and_random_state_follow_the_plain_loop(models, make, scheduled):
    plain, converted = models
    torch.manual_seed(1)
    optimizer = make(plain)
    train(plain, optimizer, batches(shuffle=True), STEPS, scheduler=StepLR(optimizer, 3, gamma=0.5))
    random_state, learning_rate = torch.get_rng_state(), optimizer.param_groups[0]["lr"]

    torch.manual_seed(1)
    optimizer = make(converted)
    scheduler = StepLR(optimizer, 3, gamma=0.5)
    stn = convert(
        converted,
        [IDLE],
        optimizer,
        train_loader=batches(shuffle=True),
        hyper_optimizer=holding_still,
    )
    if scheduled == "after the conversion":
        scheduler = StepLR(stn.optimizer, 3, gamma=0.5)
    start = response(stn)
    train(*stn, STEPS, criterion=stn.criterion, scheduler=scheduler)

    assert same(general(stn), dict(plain.named_parameters()))
    assert same(dict(converted.named_parameters()), dict(plain.named_parameters()))
    assert same(dict(converted.named_buffers()), dict(plain.named_buffers()))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert stn.optimizer.param_groups[0]["lr"] == learning_rate
    assert learning_rate < make(plain).param_groups[0]["lr"]
    assert not same(response(stn), start)
    assert stn.counters.validation_steps == STEPS


def test_parity_is_broken_by_another_value_of_the_hyperparameter(models):
    plain, converted = models
    train(plain, sgd(plain), batches(), STEPS)
    stn = convert(converted, [WeightDecay(init=0.01)], sgd(converted))
    stn.freeze()
    train(*stn, STEPS)
    assert not same(general(stn), dict(plain.named_parameters()))


@pytest.mark.parametrize("at", ["**", "2", "0.weight"])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_held_weight_decay_is_that_of_torch(kind, at):
    """Of the weights it covers; all others keep the one they have."""
    torch.manual_seed(0)
    plain = perceptron()
    converted, other = copy.deepcopy(plain), copy.deepcopy(plain)
    optimizer = kind(converted.parameters(), lr=0.01, weight_decay=0.3)
    stn = convert(converted, [WeightDecay(init=0.02, at=at)], optimizer)
    stn.freeze()
    covered = set(stn.plan.decays[0].parameters)
    held = [p for name, p in plain.named_parameters() if name in covered]
    others = [p for name, p in plain.named_parameters() if name not in covered]
    groups = [
        {"params": held, "weight_decay": stn.values()["weight_decay"]},
        {"params": others, "weight_decay": 0.3},
    ]
    train(plain, kind(groups, lr=0.01), batches(), STEPS)
    train(*stn, STEPS)
    assert same(general(stn), dict(plain.named_parameters()))
    train(other, kind(other.parameters(), lr=0.01, weight_decay=0.3), batches(), STEPS)
    assert not same(general(stn), dict(other.named_parameters()))


def decayed_in_two_groups(model, **options):
    """AdamW with a decoupled decay, a scheduler of each group's own and what both are built on."""
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
    optimizer = AdamW(groups, lr=0.01, weight_decay=0.3, **options)
    return optimizer, LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 0.8**step])


def test_weights_without_a_tuned_decay_keep_their_own_under_a_scheduler_built_before():
    """Decoupled decay stays so; groups are never more than the scheduler knows."""
    torch.manual_seed(0)
    plain = perceptron()
    converted = copy.deepcopy(plain)
    optimizer, scheduler = decayed_in_two_groups(converted)
    stn = convert(converted, [WeightDecay(init=1e-9, at="2.weight")], optimizer)
    stn.freeze()
    groups = [
        {"params": plain[0].parameters()},
        {"params": [plain[2].bias], "lr": 0.02},
        {"params": [plain[2].weight], "lr": 0.02, "weight_decay": 0.0},
    ]
    expected = AdamW(groups, lr=0.01, weight_decay=0.3)
    rates = [lambda step: 0.9**step, lambda step: 0.8**step, lambda step: 0.8**step]
    train(plain, expected, batches(), STEPS, scheduler=LambdaLR(expected, rates))
    train(*stn, STEPS, scheduler=scheduler)
    # A decay of 1e-9 shifts Adam's step by less than a rounding of single precision is multiplied.
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(general(stn)[name], parameter.data, rtol=1e-4, atol=1e-6)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]


def nought(prediction, target):
    return 0.0 * prediction.sum()


def test_a_decay_that_comes_back_acts_on_what_is_not_tuned_alone():
    """By a state of before the conversion, or by a schedule of the decay."""
    model = perceptron()
    groups = [
        {"params": [model[0].weight, model[2].weight]},
        {"params": [model[0].bias, model[2].bias]},
    ]
    optimizer = SGD(groups, lr=0.1, weight_decay=0.3)
    state = copy.deepcopy(optimizer.state_dict())
    stn = convert(model, [WeightDecay(init=0.02)], optimizer, criterion=nought)
    stn.freeze()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["weight_decay"] *= 0.5
    before = general(stn)
    train(*stn, STEPS, criterion=nought)
    for name, parameter in general(stn).items():
        left = (1 - 0.1 * (0.02 if name.endswith("weight") else 0.15)) ** STEPS
        torch.testing.assert_close(parameter, left * before[name])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.15, 0.15]


def test_groups_are_the_users_again_after_a_step_that_fails():
    model = perceptron()
    optimizer = sgd(model, weight_decay=0.3)
    stn = convert(model, [WeightDecay()], optimizer)
    members = optimizer.param_groups[0]["params"]
    train_one(stn)

    def fail(*_):
        raise ValueError("no step")

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(ValueError, match="no step"):
        train_one(stn)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["params"] is members
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_weight_decay_leaves_gradients_as_the_loop_made_them():
    stn = convert(perceptron(), [WeightDecay(init=0.5)])
    inputs, target = next(iter(stn.train_loader))
    F.cross_entropy(stn.model(inputs), target).backward()
    before = {name: p.grad.clone() for name, p in stn.model.general_parameters().items()}
    stn.optimizer.step()
    after = {name: p.grad for name, p in stn.model.general_parameters().items()}
    assert same(before, after)
    assert any(gradient.any() for gradient in before.values())


def test_the_users_model_stays_as_it_was(models):
    model, untouched = models
    dropout = Dropout() if isinstance(model, BranchingNetwork) else Dropout(at="input")
    model.note = "mine"
    attributes = set(vars(model))
    random_state = torch.get_rng_state()
    stn = convert(model, [dropout])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(vars(model)) == attributes
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert same(model.state_dict(), untouched.state_dict())
    assert repr(model) == repr(untouched)
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in untouched.named_modules()
    ]
    assert all(a is b for a, b in zip(model.parameters(), general_objects(stn), strict=True))
    assert set(model.state_dict()) < set(stn.model.state_dict())


def general_objects(stn):
    return stn.model.general_parameters().values()


NORMALISED = [
    (convolutional_network, "2", Dropout(after="3")),
    (BranchingNetwork, "norm", Dropout(init=0.2)),
]


@pytest.mark.parametrize(("make", "norm", "dropout"), NORMALISED)
def test_modes_of_submodules_stay_as_the_user_set_them(make, norm, dropout):
    model = make()
    model.get_submodule(norm).eval()
    stn = convert(model, [dropout, IDLE])
    assert model.training
    assert not model.get_submodule(norm).training
    train(*stn, 2, criterion=stn.criterion)
    assert stn.model.training
    assert not stn.model.get_submodule(norm).training
    assert stn.model.get_submodule(norm).num_batches_tracked == 0


@pytest.mark.parametrize(("make", "norm", "dropout"), NORMALISED)
def test_buffers_are_updated_once_an_iteration(make, norm, dropout):
    stn = convert(make(), [dropout], valid_steps=2)
    train(*stn, 7)
    assert stn.model.get_submodule(norm).num_batches_tracked == 7
    assert stn.counters.validation_steps == 14


# Schedulers ---------------------------------------------------------------------------------------


def test_a_scheduler_moves_both_groups_and_leaves_lambda_alone():
    stn = convert(perceptron(), [IDLE], response_lr=3.0)
    scheduler = StepLR(stn.optimizer, 2, gamma=0.1)
    hyper_rate = stn._tuner.hyper_optimizer.param_groups[0]["lr"]
    train(*stn, 5, criterion=stn.criterion, scheduler=scheduler)
    rates = {group["role"]: group["lr"] for group in stn.optimizer.param_groups}
    # Two cuts by ten before the last step; the rates are products of the same few floats.
    assert rates == pytest.approx({"general": 1e-3, "response": 3e-3}, rel=1e-12)
    assert stn._tuner.hyper_optimizer.param_groups[0]["lr"] == hyper_rate


def test_the_scheduled_rate_is_what_the_response_step_uses():
    stn = convert(perceptron(), [IDLE], response_lr=2.0)
    scheduler = StepLR(stn.optimizer, 1, gamma=0.0)
    train(*stn, 1, criterion=stn.criterion, scheduler=scheduler)
    before, weights = response(stn), general(stn)
    train(*stn, 1, criterion=stn.criterion, scheduler=scheduler)
    assert same(response(stn), before)
    assert same(general(stn), weights)


def test_one_cycle_moves_momentum_and_rate():
    stn = convert(perceptron(), [IDLE])
    scheduler = OneCycleLR(stn.optimizer, max_lr=0.2, total_steps=10)
    train(*stn, 4, criterion=stn.criterion, scheduler=scheduler)
    first, second = stn.optimizer.param_groups
    assert first["lr"] != 0.1
    assert second["momentum"] != 0.9
    assert math.isfinite(stn.step((torch.randn(4, FEATURES), torch.zeros(4, dtype=torch.long))))
    assert (first["lr"], first["momentum"]) == (second["lr"], second["momentum"])


# Batches ------------------------------------------------------------------------------------------


def first_batches(count, size=8):
    return list(itertools.islice(batches(batch_size=size), count))


def test_accumulated_batches_count_by_their_size():
    # With a tiny sigma all perturbations are nearly 0, so the loss is that of the batch as a whole.
    stn = convert(perceptron(), [IDLE], scale=1e-6)
    inputs, target = (torch.cat(parts) for parts in zip(*first_batches(2), strict=True))
    parts = [(inputs[:4], target[:4]), (inputs[4:], target[4:])]
    objective = Objective(F.cross_entropy)
    whole = response_step(stn.model, [(inputs, target)], objective)
    pieces = response_step(stn.model, parts, objective)
    unequal = sum(response_step(stn.model, [part], objective).loss for part in parts) / 2
    # Single precision, and a perturbation of 1e-6.
    torch.testing.assert_close(whole.loss, pieces.loss, rtol=1e-5, atol=0)
    assert abs(unequal - whole.loss) > 1e-3 * whole.loss


def test_accumulated_gradients_are_those_of_one_big_batch(monkeypatch):
    def the_same_for_all(space, batch):
        return torch.full((batch, len(space.columns)), 0.7, dtype=torch.float64)

    monkeypatch.setattr("stnify.perturb.standard_normal", the_same_for_all)
    stn = convert(perceptron().double(), [WeightDecay(init=0.1)])
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    inputs, target = (torch.cat(parts) for parts in zip(*first_batches(2), strict=True))
    inputs = inputs.double()
    objective = Objective(F.cross_entropy, decays=stn.plan.decays)

    def gradients(*sizes):
        split = list(zip(inputs.split(sizes), target.split(sizes), strict=True))
        return response_step(stn.model, split, objective).gradients

    whole, pieces = gradients(16), gradients(4, 12)
    gradients_of_first = response_step(stn.model, [(inputs[:4], target[:4])], objective).gradients
    assert len(whole) == 8
    for name, gradient in whole.items():
        # Double precision sums in another order.
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-9, atol=1e-12)
        assert (gradients_of_first[name] - gradient).abs().max() > 1e-3


def test_gradient_accumulation_uses_every_batch_since_the_last_step(monkeypatch):
    used = []

    def spy(model, seen, objective, **options):
        used.append([len(batch[0]) for batch in seen])
        return response_step(model, seen, objective, **options)

    monkeypatch.setattr("stnify.tuner.response_step", spy)
    stn = convert(perceptron(), [IDLE], train_loader=batches(count=20))
    train_one(stn)
    used.clear()
    model, optimizer, loader = stn
    for i, (inputs, target) in enumerate(loader):
        (stn.criterion(model(inputs), target) / 2).backward()
        if i % 2 == 1 or i == len(loader) - 1:
            optimizer.step()
            optimizer.zero_grad()
    assert used == [[8, 8], [4]]


def test_batches_seen_in_eval_mode_or_without_gradients_are_not_training_batches():
    stn = convert(perceptron(), [IDLE])
    stn.model.eval()
    next(iter(stn.train_loader))
    stn.model.train()
    with torch.no_grad():
        next(iter(stn.train_loader))
        stn.model(torch.zeros(2, FEATURES))
    assert stn._tuner.observed == []
    next(iter(stn.train_loader))
    stn.model(torch.zeros(2, FEATURES))
    assert len(stn._tuner.observed) == 1


def test_a_batch_counts_once_the_model_is_called_with_it(monkeypatch):
    """Whatever the mode was when it was fetched, and however many were fetched and left."""
    used = []

    def counting(self, batches):
        used.append([len(batch[0]) for batch in batches])
        return type(self)._response(self, batches)

    torch.manual_seed(0)
    stn = convert(perceptron(), [WeightDecay()])
    monkeypatch.setattr(stn._tuner, "_response", counting.__get__(stn._tuner))
    for _ in stn.train_loader:  # for statistics
        pass
    for i, (inputs, target) in enumerate(stn.train_loader):
        stn.model.train()
        stn.optimizer.zero_grad()
        if i == 1:
            continue
        F.cross_entropy(stn.model(inputs), target).backward()
        stn.optimizer.step()
        stn.model.eval()
        stn.model(inputs)
    assert used == [[8]] * 5  # the first one is rehearsed


@pytest.mark.parametrize(("fraction", "size"), [(1.0, 8), (0.5, 4), (0.3, 2), (0.01, 2)])
def test_response_fraction_uses_the_first_part_of_a_batch(monkeypatch, fraction, size):
    seen = []

    def criterion(prediction, target):
        seen.append(target)
        return F.cross_entropy(prediction, target)

    stn = convert(perceptron(), [WeightDecay()], criterion=criterion, response_fraction=fraction)
    stn.freeze()
    train(*stn, 1)
    seen.clear()
    inputs, target = next(iter(stn.train_loader))
    F.cross_entropy(stn.model(inputs), target).backward()
    stn.optimizer.step()
    assert len(seen) == 1
    assert torch.equal(seen[0], target[:size])


def test_the_loader_passes_everything_else_through():
    dataset = examples(20)
    sampler = RandomSampler(dataset)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    loader.mine = "kept"
    wrapped = convert(perceptron(), [IDLE], train_loader=loader).train_loader
    assert len(wrapped) == 3
    assert wrapped.dataset is dataset
    assert wrapped.sampler is sampler
    assert wrapped.batch_size == 8
    assert wrapped.mine == "kept"
    with pytest.raises(AttributeError, match="absent"):
        _ = wrapped.absent


def test_a_last_partial_batch_trains():
    stn = convert(convolutional_network(), [Dropout(after="3")], train_loader=batches(count=19))
    before = general(stn)
    train(*stn, 6)
    assert stn.counters.training_steps == 6
    assert not same(general(stn), before)


def test_one_step_call_does_what_the_loop_does():
    torch.manual_seed(0)
    model = perceptron(0.2)
    by_loop = convert(copy.deepcopy(model), [Dropout(), IDLE])
    by_call = convert(copy.deepcopy(model), [Dropout(), IDLE])
    train(*by_loop, 5, criterion=by_loop.criterion)
    for batch in first_batches(5):
        by_call.step(batch)
    assert same(by_loop.model.state_dict(), by_call.model.state_dict())
    by_call.step(batch)
    assert not same(by_loop.model.state_dict(), by_call.model.state_dict())


# When each step happens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "every", "many", "expected"),
    [
        (0, 1, 1, list(range(1, 13))),
        (0, 5, 1, [5, 10]),
        (0, 5, 2, [5, 5, 10, 10]),
        (5, 5, 1, [10]),
        (6, 3, 1, [9, 12]),
        (12, 1, 1, []),
    ],
)
def test_validation_steps_come_when_they_are_due(warmup, every, many, expected):
    stn = convert(perceptron(), [IDLE], warmup_steps=warmup, train_steps=every, valid_steps=many)
    train(*stn, 12, criterion=stn.criterion)
    assert [record.step for record in stn.history.records] == [0, *expected]
    assert stn.counters.validation_steps == len(expected)
    assert stn.counters.training_steps == 12


def test_warmup_trains_the_response_but_not_the_hyperparameters():
    stn = convert(perceptron(0.3), [Dropout()], warmup_steps=4)
    values, scales, theta = stn.values(), stn.scales(), response(stn)
    train(*stn, 4)
    assert (stn.values(), stn.scales()) == (values, scales)
    assert not same(response(stn), theta)
    train(*stn, 1)
    assert stn.values() != values
    assert stn.scales() != scales


def test_frozen_hyperparameters_stay_until_they_are_released():
    stn = convert(perceptron(0.3), [Dropout()])
    values = stn.values()
    stn.freeze()
    train(*stn, 3)
    assert stn.values() == values
    stn.unfreeze()
    train(*stn, 1)
    assert stn.values() != values


def test_tune_scale_false_leaves_sigma():
    stn = convert(perceptron(0.3), [Dropout()], tune_scale=False)
    values, scales = stn.values(), stn.scales()
    train(*stn, 5)
    assert stn.scales() == scales
    assert stn.values() != values


@pytest.mark.parametrize(("make", "norm", "dropout"), NORMALISED)
@pytest.mark.parametrize("method", ["delta", "centered", "stn", "fixed"])
def test_every_method_trains(method, make, norm, dropout):
    torch.manual_seed(0)
    # Uncentred layers receive lambda itself, so start with one of the size of 1.
    stn = convert(make(), [dropout, WeightDecay(init=0.1)], method=method)
    values, before = stn.values(), general(stn)
    inputs, target = examples(40).tensors
    start = F.cross_entropy(stn.model.eval()(inputs), target)
    stn.model.train()
    train(*stn, 30)
    assert not same(general(stn), before)
    assert (stn.values() == values) == (method == "fixed")
    assert F.cross_entropy(stn.model.eval()(inputs), target) < start


class Straight(BranchingNetwork):
    """The branching network on one of its branches."""

    def forward(self, inputs):
        return self.last(self.drop(self.norm(self.first(inputs))).tanh())


class Untraceable(Straight):
    """The same, behind a question about the data whose answer is always yes."""

    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() < math.inf else inputs


@pytest.mark.parametrize("method", ["delta", "centered", "stn", "fixed"])
def test_an_untraceable_model_trains_as_its_traceable_twin(method):
    torch.manual_seed(0)
    traced, swapped = Straight(), Untraceable()
    swapped.load_state_dict(traced.state_dict())
    hparams = [Dropout(init=0.2), WeightDecay(init=0.1)]
    one, other = (convert(model, hparams, method=method) for model in (traced, swapped))
    assert not one.model._stnify.swapped
    assert other.model._stnify.swapped
    train(*one, 8)
    train(*other, 8)
    assert same(general(one), general(other))
    assert same(
        {name.rpartition(".layers.")[2]: value for name, value in response(one).items()},
        {name.rpartition(".layers.")[2]: value for name, value in response(other).items()},
    )
    assert one.values() == other.values()
    train(*one, 1)
    assert not same(general(one), general(other))


def test_a_validation_step_by_hand_is_the_one_of_the_loader():
    torch.manual_seed(0)
    model = perceptron(0.3)
    by_loader = convert(
        copy.deepcopy(model), [Dropout()], valid_loader=batches(count=8, seed=1), train_steps=3
    )
    by_hand = convert(copy.deepcopy(model), [Dropout()], valid_loader=None)
    train(*by_loader, 3)
    train(*by_hand, 3)
    assert by_hand.values() != by_loader.values()
    by_hand.validation_step(next(iter(batches(count=8, seed=1))))
    assert by_hand.values() == by_loader.values()
    assert by_hand.scales() == by_loader.scales()


# Who moves what -----------------------------------------------------------------------------------


def parts(stn):
    space = stn.hyperparameters
    return {
        "general": general(stn),
        "response": response(stn),
        "lambda": {"": space.unconstrained.detach().clone()},
        "sigma": {"": space.raw_scale.detach().clone()},
    }


def moved(before, after):
    return {part for part in before if not same(before[part], after[part])}


@pytest.mark.parametrize("kind", ["full", "gate"])
@pytest.mark.parametrize("method", ["delta", "centered"])
def test_each_step_moves_its_own_parameters_only(monkeypatch, method, kind):
    stn = convert(perceptron(0.3), [Dropout(), WeightDecay()], method=method, response=kind)
    train(*stn, 3)  # so that the response is not zero and every gradient could flow
    seen = [parts(stn)]
    tuner, optimizer = stn._tuner, stn.optimizer
    respond, validate = tuner._respond, tuner.validate

    def recorded(step):
        def run(*arguments):
            seen.append(parts(stn))
            result = step(*arguments)
            seen.append(parts(stn))
            return result

        return run

    monkeypatch.setattr(tuner, "_respond", recorded(respond))
    monkeypatch.setattr(tuner, "validate", recorded(validate))
    inputs, target = next(iter(stn.train_loader))
    optimizer.zero_grad()
    F.cross_entropy(stn.model(inputs), target).backward()
    gradients = [p.grad for p in stn.model.response_parameters().values()]
    assert all(gradient is None for gradient in gradients)
    assert stn.hyperparameters.unconstrained.grad is None
    optimizer.step()
    start, after_general, after_response, before_validation, end = seen
    assert moved(start, after_general) == {"general"}
    assert moved(after_general, after_response) == {"response"}
    assert moved(after_response, before_validation) == set()
    assert moved(before_validation, end) == {"lambda", "sigma"}


def test_the_joint_update_moves_general_and_response_parameters():
    stn = convert(perceptron(0.3), [Dropout()], method="stn", warmup_steps=10)
    train(*stn, 2)  # gates start at zero, and so do the gradients of what they multiply
    before = parts(stn)
    train(*stn, 1)
    assert moved(before, parts(stn)) == {"general", "response"}
    before = parts(stn)
    stn.validation_step(first_batches(1)[0])
    assert moved(before, parts(stn)) == {"lambda", "sigma"}


def test_fixed_moves_general_parameters_only():
    stn = convert(perceptron(0.3), [Dropout()], method="fixed")
    before = parts(stn)
    train(*stn, 3)
    assert moved(before, parts(stn)) == {"general"}
    assert response(stn) == {}


def test_frozen_parameters_stay_and_get_no_response():
    model = perceptron()
    model[0].requires_grad_(False)
    stn = convert(model, [Dropout(after="1")])
    before = general(stn)
    train(*stn, 3)
    after = general(stn)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"2.weight", "2.bias"}
    assert list(stn.model.hyper_layers) == ["2"]


# Values that are not finite -----------------------------------------------------------------------


def test_a_validation_loss_that_is_not_finite_is_skipped_counted_and_warned_of_once():
    stn = convert(perceptron(0.3), [Dropout()], valid_loader=None)
    train(*stn, 2)
    stn.validation_step(first_batches(1)[0])
    inputs, target = first_batches(1)[0]
    bad = (torch.full_like(inputs, math.nan), target)
    before = parts(stn)
    optimizer_state = copy.deepcopy(stn._tuner.hyper_optimizer.state_dict())
    with pytest.warns(UserWarning, match=r"validation step 2 was skipped: its loss \(nan\)"):
        stn.validation_step(bad)
    stn.validation_step(bad)  # a second warning would be an error here
    assert stn.counters.skipped == 2
    assert stn.counters.validation_steps == 3
    assert moved(before, parts(stn)) == set()
    after = stn._tuner.hyper_optimizer.state_dict()
    assert after["state"].keys() == optimizer_state["state"].keys()
    assert len(after["state"]) == 2
    for key, entry in optimizer_state["state"].items():
        assert same(
            {name: torch.as_tensor(value) for name, value in entry.items()},
            {name: torch.as_tensor(value) for name, value in after["state"][key].items()},
        )
    stn.validation_step((inputs, target))
    assert moved(before, parts(stn)) == {"lambda", "sigma"}
    assert all(math.isfinite(value) for value in [*stn.values().values(), *stn.scales().values()])
    assert stn.counters.skipped == 2


def test_a_hypergradient_that_is_not_finite_is_skipped():
    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            return values.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf

    def criterion(prediction, target):
        return F.cross_entropy(Spoiled.apply(prediction), target)

    stn = convert(perceptron(), [WeightDecay()], method="centered", criterion=criterion)
    stn._tuner.frozen = True
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.fill_(0.1)
    before = parts(stn)
    with pytest.warns(UserWarning, match="or gradient is not finite"):
        result = stn.validation_step(first_batches(1)[0])
    assert torch.isfinite(result.loss)
    assert moved(before, parts(stn)) == set()


# Loops with more in them --------------------------------------------------------------------------


def test_gradient_clipping_leaves_the_steps_of_stnify_alone():
    torch.manual_seed(0)
    model = perceptron()
    plain, stn = copy.deepcopy(model), convert(copy.deepcopy(model), [IDLE])
    stn.freeze()
    theta = response(stn)
    optimizer = sgd(plain)
    for batch in first_batches(4):
        for network, chosen, criterion in (
            (plain, optimizer, F.cross_entropy),
            (stn.model, stn.optimizer, stn.criterion),
        ):
            stn._tuner.observed = [batch]
            chosen.zero_grad()
            criterion(network(batch[0]), batch[1]).backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 0.05)
            assert norm > 0.05
            chosen.step()
    assert same(general(stn), dict(plain.named_parameters()))
    assert not same(response(stn), theta)


def test_a_gradient_scaler_skips_a_step_without_harm():
    torch.manual_seed(0)
    model = perceptron()
    plain, stn = copy.deepcopy(model), convert(copy.deepcopy(model), [IDLE])

    def loop(network, optimizer, criterion, loader):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i, (inputs, target) in enumerate(itertools.islice(loader, 4)):
            optimizer.zero_grad()
            loss = criterion(network(inputs), target) * (math.inf if i == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    loop(plain, sgd(plain), F.cross_entropy, batches())
    loop(stn.model, stn.optimizer, stn.criterion, stn.train_loader)
    assert stn.counters.training_steps == 3
    assert stn.counters.validation_steps == 3
    assert same(general(stn), dict(plain.named_parameters()))
    assert all(math.isfinite(value) for value in stn.scales().values())


@pytest.mark.parametrize("method", ["delta", "stn"])
def test_a_loss_scaled_by_a_power_of_two_changes_no_bit(method):
    torch.manual_seed(0)
    model = perceptron(0.3)

    def run(scaler):
        stn = convert(copy.deepcopy(model), [Dropout(), WeightDecay()], method=method)
        for inputs, target in itertools.islice(stn.train_loader, 4):
            stn.optimizer.zero_grad()
            scaler.scale(F.cross_entropy(stn.model(inputs), target)).backward()
            scaler.step(stn.optimizer)
            scaler.update()
        return {name: value.clone() for name, value in stn.model.state_dict().items()}

    plain = run(torch.amp.GradScaler("cpu", enabled=False))
    assert same(run(torch.amp.GradScaler("cpu", init_scale=256.0)), plain)
    # Not a power of two: the gradients round otherwise.
    assert not same(run(torch.amp.GradScaler("cpu", init_scale=250.7)), plain)


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_bfloat16_autocast_runs_and_parameters_stay_in_single_precision(method):
    dtypes = set()

    def criterion(prediction, target):
        dtypes.add(prediction.dtype)
        return F.cross_entropy(prediction.float(), target)

    stn = convert(
        convolutional_network(),
        [Dropout(after="3"), WeightDecay()],
        method=method,
        amp_dtype=torch.bfloat16,
        criterion=criterion,
    )
    model, optimizer, loader = stn
    before = parts(stn)
    for inputs, target in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
    assert dtypes == {torch.bfloat16}
    assert moved(before, parts(stn)) == {"general", "response", "lambda", "sigma"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert stn.counters.skipped == 0


def test_a_closure_is_evaluated_once():
    stn = convert(perceptron(), [WeightDecay()])
    calls = []
    inputs, target = next(iter(stn.train_loader))

    def closure():
        calls.append(1)
        stn.optimizer.zero_grad()
        loss = F.cross_entropy(stn.model(inputs), target)
        loss.backward()
        return loss

    before = general(stn)
    loss = stn.optimizer.step(closure)
    assert len(calls) == 1
    assert loss.requires_grad
    assert not same(general(stn), before)


# Models with shared parts -------------------------------------------------------------------------


class TiedWords(nn.Module):
    """Predicts words by the table that embeds them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 5)
        self.mix = nn.Linear(5, 5)
        self.out = nn.Linear(5, 11)
        self.out.weight = self.table.weight

    def forward(self, words):
        return self.out(torch.tanh(self.mix(self.mix(self.table(words).mean(1)))))


def words(count):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 11, (count, 4), generator=generator)
    return [(drawn[i : i + 8], drawn[i : i + 8, 0]) for i in range(0, count, 8)]


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_tied_weights_and_modules_called_twice_train(method):
    torch.manual_seed(0)
    model = TiedWords()
    stn = convert(
        model,
        [Dropout(after="mix"), WeightDecay(init=1e-3)],
        method=method,
        train_loader=words(40),
        valid_loader=words(16),
    )
    before = parts(stn)
    train(*stn, 12)
    assert model.out.weight is model.table.weight
    assert moved(before, parts(stn)) == set(before)
    shared = {id(layer.weight_response) for layer in stn.model._stnify.users()["table.weight"]}
    assert len(shared) == 1
    assert all(p.isfinite().all() for p in stn.model.parameters())
    names = {n for n, p in before["response"].items() if not torch.equal(p, response(stn)[n])}
    assert names == set(before["response"])


def test_tied_weights_follow_the_plain_loop():
    torch.manual_seed(0)
    plain = TiedWords()
    stn = convert(copy.deepcopy(plain), [IDLE], train_loader=words(40), valid_loader=words(16))
    train(plain, sgd(plain), words(40), STEPS)
    train(*stn, STEPS, criterion=stn.criterion)
    assert same(general(stn), dict(plain.named_parameters()))


# Other people's optimizers ------------------------------------------------------------------------


class Particular(nn.Sequential):
    """A model with the hints timm's optimizer factory reads."""

    num_classes = CLASSES

    def no_weight_decay(self):
        return {"0.weight"}

    def group_matcher(self, coarse=False):
        return {"stem": r"^0", "blocks": [(r"^2", None)]}


def test_hints_for_optimizers_are_proxied():
    model = Particular(*perceptron())
    stn = convert(model, [IDLE])
    assert stn.model.no_weight_decay() == {"0.weight"}
    assert stn.model.group_matcher() == model.group_matcher()
    assert stn.model.num_classes == CLASSES
    with pytest.raises(AttributeError, match="absent"):
        _ = stn.model.absent


def test_tuned_weight_decay_respects_no_weight_decay():
    stn = convert(Particular(*perceptron()), [WeightDecay()])
    assert [site.parameters for site in stn.plan.decays] == [("2.weight",)]


class Keyed(nn.Module):
    """Lists by globs and by parts of names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.table = nn.Parameter(torch.zeros(1, 8))
        self.last = nn.Linear(8, CLASSES)

    def forward(self, inputs):
        return self.last(self.first(inputs) + self.table)

    def no_weight_decay(self):
        return {"fir*"}

    def no_weight_decay_keywords(self):
        return {"abl"}


def test_tuned_weight_decay_respects_no_weight_decay_of_modules_inside():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=5
    )
    model = nn.Sequential(vit, nn.Linear(5, 4))
    (site,) = convert(model, [WeightDecay()]).plan.decays
    listed = {f"0.{name}" for name in vit.no_weight_decay()}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert set(site.parameters) == matrices - listed
    assert "1.weight" in site.parameters
    assert len(matrices & listed) > 1
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), Keyed())
    (site,) = convert(model, [WeightDecay()]).plan.decays
    assert site.parameters == ("0.weight", "1.last.weight")


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "nadamw", "lion", "adafactor"])
def test_optimizers_of_timm_follow_the_plain_loop(name):
    torch.manual_seed(0)
    model = Particular(*perceptron())
    plain, converted = copy.deepcopy(model), copy.deepcopy(model)

    def make(network):
        return timm.optim.create_optimizer_v2(network, opt=name, lr=0.01, weight_decay=0.05)

    train(plain, make(plain), batches(), 5)
    stn = convert(converted, [IDLE], make(converted))
    theta = response(stn)
    assert len(stn.optimizer.base.param_groups) == 2
    train(*stn, 5, criterion=stn.criterion)
    assert same(general(stn), dict(plain.named_parameters()))
    assert not same(response(stn), theta)


TORCH_OPTIMIZERS = {
    "sgd fused": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    "adamw foreach": lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
    "adam with decay": lambda parameters: Adam(parameters, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.01, momentum=0.9),
    "adagrad": lambda parameters: Adagrad(parameters, lr=0.01),
    "radam": lambda parameters: RAdam(parameters, lr=0.01),
    "adafactor": lambda parameters: Adafactor(parameters, lr=0.01),
}


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_optimizers_of_torch_follow_the_plain_loop(name):
    torch.manual_seed(0)
    plain, converted = perceptron(), perceptron()
    converted.load_state_dict(plain.state_dict())
    make = TORCH_OPTIMIZERS[name]
    train(plain, make(plain.parameters()), batches(), 6)
    stn = convert(converted, [IDLE], make(converted.parameters()))
    theta = response(stn)
    train(*stn, 6, criterion=stn.criterion)
    assert same(general(stn), dict(plain.named_parameters()))
    assert not same(response(stn), theta)


def test_responses_step_with_the_group_of_their_weight():
    model = perceptron()
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": model[2].parameters(), "lr": 0.1, "weight_decay": 0.3},
    ]
    stn = convert(model, [IDLE], SGD(groups, momentum=0.9), response_lr=2.0)
    rates = [(g["role"], g["lr"], g["weight_decay"]) for g in stn.optimizer.param_groups]
    assert rates == [
        ("general", 0.0, 0),
        ("general", 0.1, 0.3),
        ("response", 0.0, 0.0),
        ("response", 0.2, 0.0),
    ]
    before = response(stn)
    train(*stn, 3, criterion=stn.criterion)
    changed = {n for n, p in response(stn).items() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if name.startswith("_stnify.layers.2.")}
    assert changed


def test_every_trainable_parameter_is_in_one_group():
    stn = convert(convolutional_network(), [Dropout(after="3"), WeightDecay()])
    held = [id(p) for group in stn.optimizer.param_groups for p in group["params"]]
    both = [*stn.model.general_parameters().values(), *stn.model.response_parameters().values()]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in both}
    space = {id(p) for p in stn.hyperparameters.parameters()}
    assert {id(p) for p in stn.model.parameters()} - set(held) == space


def test_a_plateau_scheduler_moves_both_groups():
    stn = convert(perceptron(), [IDLE], response_lr=2.0)
    scheduler = ReduceLROnPlateau(stn.optimizer, patience=0)
    for loss in (1.0, 2.0):
        train_one(stn)
        scheduler.step(loss)
    train_one(stn)
    rates = [group["lr"] for group in stn.optimizer.param_groups]
    assert rates == pytest.approx([0.01, 0.02], rel=1e-12)  # one cut by ten


def test_a_scheduler_of_timm_moves_both_groups():
    stn = convert(perceptron(), [IDLE])
    scheduler = timm.scheduler.CosineLRScheduler(stn.optimizer, t_initial=4, t_in_epochs=False)
    rates = []
    for step in range(1, 4):
        train(*stn, 1, criterion=stn.criterion)
        rates.append([group["lr"] for group in stn.optimizer.param_groups])
        scheduler.step_update(step)
    assert all(pair[0] == pair[1] for pair in rates)
    assert rates[0][0] > rates[1][0] > rates[2][0]


def test_named_parameters_and_later_groups_are_kept():
    model = perceptron()
    late = nn.Parameter(torch.ones(2))
    stn = convert(model, [IDLE], SGD(model.named_parameters(), lr=0.1))
    assert stn.optimizer.param_groups[0]["param_names"] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    stn.optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones(2)
    train_one(stn)
    assert [group["role"] for group in stn.optimizer.param_groups] == [
        "general",
        "general",
        "response",
    ]
    late.grad = torch.ones(2)
    inputs, target = next(iter(stn.train_loader))
    stn.criterion(stn.model(inputs), target).backward()
    stn.optimizer.step()
    assert torch.equal(late.detach(), torch.full((2,), 0.9))


# Copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "norm", "dropout"), NORMALISED)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_live_their_own_life(copied, make, norm, dropout):
    torch.manual_seed(0)
    stn = convert(make(), [dropout, WeightDecay()])
    train(*stn, 3)
    twin = copied(stn.model)
    inputs = first_batches(1)[0][0]
    assert torch.equal(twin(inputs), stn.model(inputs))  # the same masks: the stream is copied too
    twin.eval()
    assert stn.model.training
    assert torch.equal(twin(inputs), stn.model.eval()(inputs))
    assert same(twin.state_dict(), stn.model.state_dict())
    stn.model.train()
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    train(*stn, 3)
    assert same(twin.state_dict(), before)
    assert not torch.equal(twin(inputs), stn.model.eval()(inputs))
    with torch.no_grad():
        next(iter(twin.parameters())).add_(1.0)
    assert not torch.equal(twin.train()(inputs), stn.model.train()(inputs))


def test_an_averaged_model_averages_the_users_weights():
    stn = convert(perceptron(0.2), [Dropout()])
    average, seen = AveragedModel(stn.model), []
    for _ in range(3):
        train(*stn, 1)
        average.update_parameters(stn.model)
        seen.append(general(stn))
    mean = {name: torch.stack([w[name] for w in seen]).mean(0) for name in seen[0]}
    found = average.module.general_parameters()
    for name, expected in mean.items():
        # Single precision, averaged in another order.
        torch.testing.assert_close(found[name].detach(), expected, rtol=1e-5, atol=1e-7)
    assert not same(mean, seen[-1])


def test_a_model_converted_in_eval_mode_stays_in_it_and_trains_later():
    stn = convert(convolutional_network().eval(), [Dropout(after="3")])
    assert not any(module.training for module in stn.model.modules())
    stn.model.train()
    assert all(module.training for module in stn.model.modules())
    values = stn.values()
    train(*stn, 2)
    assert stn.values() != values


# Hyperparameters in the loss ----------------------------------------------------------------------


def test_a_penalty_enters_the_loss_of_the_loop_at_the_current_value():
    def penalty(model, batch, value):
        return value * model(batch[0]).square().mean(-1)

    stn = convert(perceptron(), [Hyperparameter("logits", 0.25, (0.0, 1.0), penalty=penalty)])
    inputs, target = next(iter(stn.train_loader))
    prediction = stn.model(inputs)
    plain = F.cross_entropy(prediction, target)
    expected = plain + 0.25 * prediction.square().mean()
    loss = stn.criterion(prediction, target)
    # Single precision.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert loss > plain
    values = stn.values()
    train(*stn, 5, criterion=stn.criterion)
    assert stn.values() != values


def test_a_penalty_gets_one_value_for_each_example_in_the_response_step():
    shapes = []

    def penalty(model, batch, value):
        shapes.append((tuple(value.shape), len(batch[0])))
        return value * model(batch[0]).square().mean(-1)

    stn = convert(perceptron(), [Hyperparameter("logits", 0.25, (0.0, 1.0), penalty=penalty)])
    train_one(stn)
    shapes.clear()
    train_one(stn)
    assert shapes == [((), 8), ((8,), 8)]


def test_forward_loss_reads_the_value_of_the_pass_that_runs():
    seen = []
    box = {}

    def forward_loss(model, batch):
        log_probabilities = model(batch[0]).log_softmax(-1)
        hard = F.nll_loss(log_probabilities, batch[1], reduction="none")
        if not model.training:
            seen.append("validation")
            return hard.mean()
        value = box["stn"].hyperparameters["smoothing"]
        seen.append(tuple(value.shape))
        return ((1 - value) * hard - value * log_probabilities.mean(-1)).mean()

    box["stn"] = stn = convert(
        perceptron(),
        [Hyperparameter("smoothing", 0.1, (0.0, 1.0))],
        criterion=None,
        forward_loss=forward_loss,
    )
    values = stn.values()
    for batch in first_batches(3):
        seen.clear()
        assert stn.step(batch) > 0
    assert seen == [(), (8,), "validation"]  # general, response, validation
    assert stn.values() != values
    assert stn.values()["smoothing"] == pytest.approx(float(stn.hyperparameters["smoothing"]))


def test_a_validation_loss_that_reads_a_hyperparameter_is_warned_of_once():
    box = {}

    def criterion(prediction, target):
        return F.cross_entropy(prediction, target, label_smoothing=0.0) + 0.0 * (
            box["stn"].hyperparameters["smoothing"].mean()
        )

    hparams = [Hyperparameter("smoothing", 0.1, (0.0, 1.0))]
    box["stn"] = stn = convert(perceptron(), hparams, criterion=criterion)
    with pytest.warns(UserWarning, match=r"validation loss reads \['smoothing'\]"):
        stn.step(first_batches(1)[0])
    stn.step(first_batches(1)[0])  # a second warning would be an error


def test_a_batch_that_is_not_finite_spares_the_response_parameters():
    stn = convert(perceptron(), [WeightDecay()], warmup_steps=100)
    inputs, target = first_batches(1)[0]
    stn.step((inputs, target))
    before = {n: p.detach().clone() for n, p in stn.model.response_parameters().items()}
    stn.observe((torch.full_like(inputs, float("nan")), target))
    stn.optimizer.zero_grad()
    with pytest.warns(UserWarning, match="response step 2 was skipped: its loss"):
        stn.optimizer.step()
    after = stn.model.response_parameters()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert stn.counters.skipped_responses == 1
    stn.step((inputs, target))
    assert not all(torch.equal(after[name], value) for name, value in before.items())


def test_what_the_model_saw_must_be_what_was_observed():
    stn = convert(perceptron(), [WeightDecay()])
    inputs, target = first_batches(1)[0]
    stn.observe((inputs, target))
    F.cross_entropy(stn.model(inputs * 1000), target).backward()
    with pytest.raises(UsageError, match=r"inputs differ from the batch's.*stn\.observe"):
        stn.optimizer.step()


def test_every_call_of_the_model_needs_the_batch_it_is_perturbed_for():
    def two_views(model, batch):
        inputs, target = batch
        return F.cross_entropy(model(torch.cat([inputs, inputs])), target.repeat(2))

    stn = convert(perceptron(), [WeightDecay()], criterion=None, forward_loss=two_views)
    with pytest.raises(ShapeError, match=r"with the 8 examples of the batch.*called with 16"):
        stn.step(first_batches(1)[0])


def test_the_users_own_train_method_decides_about_modes():
    class HalfFrozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    layers = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
    stn = convert(HalfFrozen(*layers), [WeightDecay()])
    stn.model.eval()
    stn.model.train()
    assert [module.training for module in layers] == [True, False, True]
    stn.step(first_batches(1)[0])
    assert layers[1].num_batches_tracked == 0


def test_the_optimizer_steps_under_no_grad():
    stn = convert(perceptron(0.2), [Dropout(), WeightDecay()])
    inputs, target = first_batches(1)[0]
    stn.observe((inputs, target))
    F.cross_entropy(stn.model(inputs), target).backward()
    with torch.no_grad():
        stn.optimizer.step()
    assert stn.counters.validation_steps == 1


def test_a_loader_without_a_length_is_a_loader():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples(24))

    loader = DataLoader(Stream(), batch_size=8)
    stn = convert(perceptron(), [WeightDecay()], train_loader=loader, valid_loader=loader)
    train(*stn, 6)
    assert stn.counters.validation_steps == 6


def test_a_weight_decay_starts_at_the_optimizers_own():
    model = perceptron()
    stn = convert(model, [WeightDecay()], sgd(model, weight_decay=0.03))
    assert stn.values() == pytest.approx({"weight_decay": 0.03})
    model = perceptron()
    stn = convert(model, [WeightDecay(init=0.2)], sgd(model, weight_decay=0.03))
    assert stn.values() == pytest.approx({"weight_decay": 0.2})


def test_dictionary_batches_go_through_forward_loss():
    def forward_loss(model, batch):
        return F.cross_entropy(model(batch["inputs"]), batch["target"])

    loader = [dict(zip(("inputs", "target"), batch, strict=True)) for batch in first_batches(4)]
    stn = convert(
        perceptron(0.2),
        [Dropout()],
        criterion=None,
        forward_loss=forward_loss,
        train_loader=loader,
        valid_loader=loader,
    )
    before = parts(stn)
    for batch in stn.train_loader:
        stn.optimizer.zero_grad()
        forward_loss(stn.model, batch).backward()
        stn.optimizer.step()
    assert moved(before, parts(stn)) == set(before)


@pytest.mark.parametrize(
    ("total_steps", "settings"),
    [
        (None, (0.01, 0.99)),  # the papers'
        (1_000_000, (0.01, 0.99)),
        (2_000, (12 / 380, 1 - 10 / 380)),  # 1900 steps after warm-up, every fifth validates
        (100, (0.1, 0.9)),
    ],
)
def test_the_step_size_of_lambda_follows_the_length_of_the_run(total_steps, settings):
    model = perceptron()
    stn = convert(model, [WeightDecay()], warmup_steps=None, train_steps=5, total_steps=total_steps)
    (group,) = stn._tuner.hyper_optimizer.param_groups
    assert (group["lr"], group["alpha"]) == pytest.approx(settings)
    assert stn._tuner.cadence.warmup_steps == (100 if total_steps is None else total_steps // 20)


@pytest.mark.parametrize(
    ("length", "rule"),
    [
        ({"total_steps": 4}, r"its own \(4\) there is none: they follow every 5"),
        ({"total_steps": 100, "train_steps": 200}, r"every 200 training steps"),
        ({"total_steps": 14, "warmup_steps": 11}, r"warm-up \(warmup_steps=11\)"),
    ],
)
def test_a_run_without_validation_steps_is_refused(length, rule):
    given = {"train_steps": 5, "warmup_steps": None, **length}
    with pytest.raises(UsageError, match=rule):
        convert(perceptron(), [WeightDecay()], **given)
    convert(perceptron(), [WeightDecay()], **{**given, "total_steps": 200})
    convert(perceptron(), [WeightDecay()], **given, method="fixed")
    convert(perceptron(), [WeightDecay()], **given, valid_loader=None)


class Stream(IterableDataset):
    """Examples of which nobody knows how many there are."""

    def __iter__(self):
        return iter(examples(8))


def test_epochs_say_the_length_of_the_run_by_the_loader():
    """``batches`` has 40 examples in batches of 8."""
    known, told = (
        convert(perceptron(), [WeightDecay()], warmup_steps=None, train_steps=5, **length)
        for length in ({"total_steps": 2_000}, {"epochs": 400})
    )
    assert told._tuner.cadence == known._tuner.cadence
    found, expected = (stn._tuner.hyper_optimizer.param_groups[0]["lr"] for stn in (told, known))
    assert found == expected != 0.01
    stream = DataLoader(Stream(), batch_size=8)
    with pytest.raises(UsageError, match="`epochs` needs a `train_loader` whose length is known"):
        convert(perceptron(), [WeightDecay()], train_loader=stream, epochs=3)


def test_lists_of_pictures_are_cut_to_the_first_ones():
    pictures = [torch.randn(3, size, 8) for size in (8, 9, 10)]
    boxes = [{"boxes": torch.randn(3, 4)} for _ in pictures]
    kept, targets = first_rows((pictures, boxes), 2)
    assert [picture.shape for picture in kept] == [(3, 8, 8), (3, 9, 8)]
    assert targets == boxes[:2]
    inputs, mask = first_rows((torch.arange(6).reshape(3, 2), torch.ones(4)), 2)
    assert inputs.tolist() == [[0, 1], [2, 3]]
    assert len(mask) == 4


def test_half_a_batch_has_half_of_a_flattened_target():
    """Language models are often trained on predictions and targets of (batch * time) rows."""

    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(5, 6), torch.nn.Linear(6, 5)

        def forward(self, words):
            return self.head(self.embedding(words)).flatten(0, 1)

    words = torch.randint(5, (8, 3))
    inputs, target = first_rows((words, words.flatten()), 4)
    assert torch.equal(inputs.flatten(), target)
    table = first_rows({"words": words, "table": torch.ones(24)}, 4)["table"]
    assert len(table) == 24, "only a target has rows of examples"
    model, loader = Words(), [(words, words.flatten())]
    stn = stnify(
        model,
        [WeightDecay()],
        optimizer=SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.functional.cross_entropy,
        train_loader=loader,
        valid_loader=loader,
        warmup_steps=0,
    )
    train(*stn, 6)
    assert stn.counters.skipped_responses == 0
    assert stn.counters.validation_steps == 1
