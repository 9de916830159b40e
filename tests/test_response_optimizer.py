"""The response's own optimizer: Adam unless told otherwise, moved by the user's schedule."""

import copy
import math

import pytest
import torch
from cases import batches, convert, perceptron, train
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from stnify import Dropout, UsageError, presets, stnify
from stnify.response_optimizer import adam

DROPOUT = Dropout(after="1", init=0.3)


def converted(model=None, lr=0.1, **options):
    """Convert by the defaults of ``stnify``."""
    model = perceptron() if model is None else model
    return stnify(
        model,
        [DROPOUT],
        optimizer=SGD(model.parameters(), lr=lr, momentum=0.9),
        criterion=torch.nn.functional.cross_entropy,
        train_loader=batches(),
        valid_loader=batches(seed=1, shuffle=True),
        warmup_steps=0,
        seed=0,
        **options,
    )


def response_rate(stn):
    (group,) = [g for g in stn.optimizer.param_groups if g["role"] == "response"]
    return group["lr"]


def test_it_is_adam_whatever_the_users_is():
    stn = converted()
    assert type(stn.optimizer.base) is SGD
    assert type(stn.optimizer.response) is Adam
    train(*stn, 1)
    assert response_rate(stn) == 3e-3
    twin = converted(response_lr=2.0)
    assert type(twin.optimizer.response) is SGD
    assert response_rate(twin) == 0.2
    joint = converted(method="stn")
    assert type(joint.optimizer.response) is SGD


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("meta", False)])
def test_it_is_one_kernel_where_pytorch_has_one(device, fused):
    parameter = torch.nn.Parameter(torch.zeros(2, device=device))
    assert adam([{"params": [parameter]}]).defaults["fused"] is fused
    assert converted().optimizer.response.defaults["fused"]


SMALL_AND_LARGE = (1e-4, 1e-3, 1e-2, 1.0, 30.0)
"""Of gradients; the squares of the first two are nought in half precision, as shares of a mean."""


@pytest.mark.parametrize("size", SMALL_AND_LARGE)
def test_in_half_precision_it_is_adam_in_single_precision(size):
    generator = torch.Generator().manual_seed(0)
    wide = torch.nn.Parameter(torch.zeros(50))
    half = torch.nn.Parameter(torch.zeros(50).half())
    optimizers = Adam([wide], lr=3e-3, betas=(0.9, 0.99), eps=1e-7), adam([{"params": [half]}])
    for _ in range(100):
        gradient = size * (0.5 + torch.randn(50, generator=generator)).half()
        wide.grad, half.grad = gradient.float(), gradient
        for optimizer in optimizers:
            optimizer.step()
    # Half precision holds 3 digits; 100 steps of 3e-3 are rounded to what a sum of 0.2 holds, 1e-4.
    torch.testing.assert_close(half.float(), wide.data, rtol=0.02, atol=2e-3)
    assert wide.abs().median() > 0.05, "the test must see a parameter that stays"


def test_in_half_precision_its_state_survives_loading():
    half, twin = (torch.nn.Parameter(torch.zeros(20).half()) for _ in range(2))
    one, other = adam([{"params": [half]}]), adam([{"params": [twin]}])
    gradients = [1e-4 * torch.randn(20).half() for _ in range(20)]
    for i, gradient in enumerate(gradients):
        if i == 10:
            other.load_state_dict(copy.deepcopy(one.state_dict()))
            twin.data.copy_(half)
        if i >= 10:
            twin.grad = gradient
            other.step()
        half.grad = gradient
        one.step(lambda: None)
    assert torch.equal(half, twin)
    assert half.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_trains_by_the_defaults(dtype):
    torch.manual_seed(0)
    model, loader = perceptron().to(dtype), [(x.to(dtype), y) for x, y in batches()]
    stn = stnify(
        model,
        [DROPOUT],
        optimizer=SGD(model.parameters(), lr=0.1, momentum=0.9),
        criterion=torch.nn.functional.cross_entropy,
        train_loader=loader,
        valid_loader=loader,
        warmup_steps=0,
        seed=0,
    )
    train(*stn, 120)
    assert stn.counters.validation_steps > 20
    assert stn.counters.skipped == stn.counters.skipped_responses == 0
    responses = stn.model.response_parameters()
    assert all(parameter.abs().max() < 5 for parameter in responses.values())
    assert stn.values()["dropout"] != DROPOUT.init


@pytest.mark.parametrize("moved", ["parameter", "gradient", "state"])
def test_one_kernel_is_right_in_every_memory_format(moved):
    """PyTorch's kernel by itself pairs numbers by their place in memory."""
    aside = torch.nn.Parameter(torch.randn(4, 3, 5, 5))
    ends = []
    for make in (adam, lambda p: Adam(p, lr=3e-3), lambda p: Adam(p, lr=3e-3, fused=True)):
        parameter = torch.nn.Parameter(aside.detach().clone())
        optimizer = make([{"params": [parameter]}])
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            parameter.grad = torch.randn(4, 3, 5, 5, generator=generator)
            if moved == "gradient":
                parameter.grad = parameter.grad.to(memory_format=torch.channels_last)
            optimizer.step()
            if moved == "parameter" and step == 0:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
            if moved == "state":
                average = optimizer.state[parameter]["exp_avg"]
                average.data = average.to(memory_format=torch.channels_last)
        ends.append(parameter.detach())
    ours, reference, unaligned = ends
    assert torch.allclose(ours, reference, rtol=0, atol=1e-7)  # float32, three steps of 3e-3
    assert not torch.allclose(unaligned, reference, rtol=0, atol=1e-4)


def test_it_follows_the_general_rate_relative_to_the_highest():
    """It is its own at the highest general rate so far, also one above the first."""
    stn = converted()
    factors = [0.25, 1.0, 2.0, 1.0, 0.2, 0.2]
    scheduler = LambdaLR(stn.optimizer.base, lambda step: factors[step])
    found = []
    for _ in range(5):
        train(*stn, 1, scheduler=scheduler)
        found.append(response_rate(stn) / 3e-3)
    assert found == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.1])


def test_weights_that_may_not_move_have_no_response():
    """A rate of nought is followed too, until it is no longer nought."""
    model = perceptron()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    stn = convert(model, [DROPOUT], SGD(groups, 0.1), response_optimizer=adam)
    train(*stn, 3)
    gates = {name: response.gate for name, response in stn.model.weight_responses().items()}
    assert not gates["0.weight"].any()
    assert gates["2.weight"].any()
    stn.optimizer.base.param_groups[0]["lr"] = 0.1
    train(*stn, 3)
    assert gates["0.weight"].any()


@pytest.mark.parametrize("wrapped", [False, True])
def test_schedulers_may_be_built_on_either_optimizer(wrapped):
    stn = converted()
    scheduler = StepLR(stn.optimizer if wrapped else stn.optimizer.base, 2, gamma=0.1)
    train(*stn, 5, scheduler=scheduler)
    assert response_rate(stn) == pytest.approx(3e-5)


def test_one_cycle_ends_near_nothing():
    stn = converted()
    scheduler = OneCycleLR(stn.optimizer, max_lr=[0.2, 0.2], total_steps=11)
    train(*stn, 10, scheduler=scheduler)
    assert 0 < response_rate(stn) < 3e-5


def test_a_learning_rate_of_zero_is_no_reason_to_divide_by_it():
    stn = converted(lr=0.0)
    train(*stn, 2)
    assert response_rate(stn) == 0.0


def test_any_optimizer_can_be_given():
    stn = converted(response_optimizer=lambda groups: SGD(groups, lr=0.5, nesterov=False))
    train(*stn, 1)
    assert response_rate(stn) == 0.5
    assert [group["role"] for group in stn.optimizer.param_groups] == ["general", "response"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"response_optimizer": Adam, "response_lr": 1.0},
            "give either `response_optimizer` or `response_lr`, but got both",
        ),
        ({"response_optimizer": "adam"}, "must be a function from param groups .* but got str"),
        ({"response_optimizer": lambda groups: None}, "must return a torch.optim.Optimizer"),
        (
            {"response_optimizer": lambda groups: Adam(groups[0]["params"][:1], lr=1e-3)},
            "must keep the parameters of the groups it is given",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        converted(**options)


def test_a_response_step_follows_every_third_general_step():
    stn = converted()
    changed = []
    for _ in range(7):
        before = copy.deepcopy(stn.model.response_parameters())
        train(*stn, 1)
        after = stn.model.response_parameters()
        changed.append(any(not torch.equal(before[name], p) for name, p in after.items()))
    assert changed == [True, False, False, True, False, False, True]


def test_an_interrupted_run_continues_to_the_same_bits():
    torch.manual_seed(0)
    model = perceptron()
    whole = converted(copy.deepcopy(model))
    train(*whole, 10, scheduler=StepLR(whole.optimizer, 4, gamma=0.5))
    first = converted(copy.deepcopy(model))
    scheduler = StepLR(first.optimizer, 4, gamma=0.5)
    train(*first, 5, scheduler=scheduler)
    second = converted(copy.deepcopy(model))
    second.load_state_dict(first.state_dict())
    again = StepLR(second.optimizer, 4, gamma=0.5)
    again.load_state_dict(scheduler.state_dict())
    train(*second, 5, scheduler=again)
    states = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert response_rate(whole) == response_rate(second)
    assert second.history.to_dict() == whole.history.to_dict()


def test_paper_settings_are_those_of_the_papers():
    stn = converted(**presets.paper())
    train(*stn, 2)
    assert type(stn.optimizer.response) is SGD
    assert response_rate(stn) == 0.1
    (group,) = stn._tuner.hyper_optimizer.param_groups
    assert (group["lr"], group["alpha"]) == (0.01, 0.99)
    assert math.isclose(next(iter(stn.scales().values())), 1.0, rel_tol=1e-6)


def test_sigma_follows_the_value_unless_it_is_given():
    stn = converted()
    name = next(iter(stn.values()))
    low, high = stn.hyperparameters.columns[0].range

    def expected():
        share = (stn.values()[name] - low) / (high - low)
        return min(max(0.2 / (share * (1 - share)), 0.5), 2.0)

    assert stn.scales()[name] == pytest.approx(expected(), rel=1e-5)
    train(*stn, 10)
    assert stn.scales()[name] == pytest.approx(expected(), rel=1e-5)
    for value in (0.01, 0.5 * (low + high)):
        stn.hyperparameters.set_values({name: value})
        assert stn.scales()[name] == pytest.approx(expected(), rel=1e-5)
    assert converted(scale=0.7).scales()[name] == pytest.approx(0.7)
