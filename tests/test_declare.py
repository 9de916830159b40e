"""Declarations, their bijections, and the space that holds lambda and sigma."""

import dataclasses
import json
import math

import pytest
import torch
from cases import batches, convert, perceptron, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

from stnify import (
    CutoutHoles,
    CutoutLength,
    DeclarationError,
    DropConnect,
    Dropout,
    DropPath,
    Hyperparameter,
    HyperparameterSpace,
    L1Penalty,
    RandAugment,
    WeightDecay,
    stnify,
)
from stnify.declare import KINDS, declarations
from stnify.perturb import standard_normal, training_perturbation, validation_perturbation
from stnify.space import Column

CPU = torch.device("cpu")
RANGES = [
    (-math.inf, math.inf),
    (0.0, math.inf),
    (-math.inf, 2.0),
    (0.0, 1.0),
    (0.0, 0.95),
    (0.0, 45.0),
    (-3.0, 4.0),
]
ranges = st.sampled_from(RANGES)


def column(name="a", init=0.5, bounds=(0.0, 1.0), scale=1.0, per_example=True):
    return Column(name, init, bounds, scale, per_example, "Hyperparameter")


def space(*columns, dtype=torch.float64):
    return HyperparameterSpace(columns, dtype, CPU)


def inside(bounds, share):
    """Return a value inside ``bounds``: ``share`` of the way, by a logistic if an end is open."""
    low, high = bounds
    odds = math.log(share / (1 - share))
    if math.isinf(low) and math.isinf(high):
        return odds
    if math.isinf(high):
        return low + math.exp(odds)
    if math.isinf(low):
        return high - math.exp(odds)
    return low + share * (high - low)


# Bijections ---------------------------------------------------------------------------------------


@given(bounds=ranges, unconstrained=st.floats(-15.0, 15.0))
def test_unconstrained_values_come_back_from_inside_the_range(bounds, unconstrained):
    transform = column(bounds=bounds).transform
    before = torch.tensor(unconstrained, dtype=torch.float64)
    constrained = transform(before)
    assert bounds[0] < constrained < bounds[1]
    # 1 - sigmoid(15) is 3e-7, of which float64 keeps nine digits; 2 - exp(-15) likewise.
    torch.testing.assert_close(transform.inv(constrained), before, rtol=1e-6, atol=1e-8)


@given(bounds=ranges, share=st.floats(1e-6, 1 - 1e-6))
def test_constrained_values_come_back(bounds, share):
    value = inside(bounds, share)
    held = space(column(init=inside(bounds, 0.5), bounds=bounds))
    held.set_values({"a": value})
    # float64; the ends of the range cost some digits.
    assert held.values()["a"] == pytest.approx(value, rel=1e-9, abs=1e-9)


@given(bounds=ranges, left=st.floats(-10, 10), right=st.floats(-10, 10))
def test_the_map_is_monotone(bounds, left, right):
    low, high = sorted((left, right))
    transform = column(bounds=bounds).transform
    ends = [float(transform(torch.tensor(v, dtype=torch.float64))) for v in (low, high)]
    increasing = not (math.isinf(bounds[0]) and not math.isinf(bounds[1]))
    assert ends[0] <= ends[1] if increasing else ends[0] >= ends[1]


@pytest.mark.parametrize("bounds", RANGES)
def test_single_precision_stays_inside_far_out(bounds):
    held = space(column(init=inside(bounds, 0.5), bounds=bounds), dtype=torch.float32)
    for far in (-30.0, 30.0):
        with torch.no_grad():
            held.unconstrained.fill_(far)
        value = held.values()["a"]
        assert bounds[0] <= value <= bounds[1]
        assert math.isfinite(value)
    assert held.values() != space(column(init=inside(bounds, 0.5), bounds=bounds)).values()


def test_constrained_values_are_differentiable_in_lambda():
    columns = [column(f"c{i}", inside(b, 0.4), b) for i, b in enumerate(RANGES)]
    held = space(*columns)
    assert torch.autograd.gradcheck(held.constrain, (held.unconstrained,))
    assert torch.autograd.gradcheck(held.constrain, (torch.randn(3, 7).double().requires_grad_(),))
    (gradient,) = torch.autograd.grad(held.constrain(held.unconstrained).sum(), held.unconstrained)
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("shape", [(2,), (5, 2), (3, 5, 2)])
def test_columns_are_constrained_one_by_one(shape):
    held = space(column("rate", 0.3, (0.0, 0.9)), column("decay", 0.1, (0.0, math.inf)))
    unconstrained = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack(
        [0.9 * unconstrained[..., 0].sigmoid(), unconstrained[..., 1].exp()], dim=-1
    )
    # float64, the same functions in other words.
    torch.testing.assert_close(held.constrain(unconstrained), expected, rtol=1e-12, atol=0)


# The space ----------------------------------------------------------------------------------------


@given(scales=st.lists(st.floats(1e-3, 20.0), min_size=1, max_size=4))
def test_entropy_is_that_of_the_normal_distribution(scales):
    held = space(*(column(f"c{i}", scale=scale) for i, scale in enumerate(scales)))
    expected = Normal(0.0, torch.tensor(scales, dtype=torch.float64)).entropy().sum()
    # float64, after softplus and its inverse.
    torch.testing.assert_close(held.entropy(), expected, rtol=1e-9, atol=1e-9)
    assert held.scales() == pytest.approx({f"c{i}": s for i, s in enumerate(scales)}, rel=1e-9)
    (gradient,) = torch.autograd.grad(held.entropy(), held.raw_scale)
    assert bool((gradient > 0).all())


def test_an_example_has_its_own_perturbation_unless_declared_otherwise():
    held = space(column("own"), column("shared", per_example=False), column("other"))
    draws = standard_normal(held, 6)
    assert len(set(draws[:, 0].tolist())) == 6
    assert len(set(draws[:, 1].tolist())) == 1
    assert draws[0, 0] != draws[0, 1] != draws[0, 2]


def test_perturbations_have_the_declared_scale():
    torch.manual_seed(0)
    held = space(column("narrow", scale=0.1), column("wide", scale=3.0))
    epsilon = training_perturbation(held, 20_000).response_input
    # Standard error of a standard deviation over 20,000 draws: half a percent.
    torch.testing.assert_close(epsilon.std(0), held.scale.detach(), rtol=0.02, atol=0)
    # Five standard errors of the mean.
    assert bool((epsilon.mean(0).abs() < 5 * held.scale / math.sqrt(20_000)).all())


def test_perturbed_values_are_constrained_and_centred():
    held = space(column("rate", 0.3), column("decay", 0.1, (0.0, math.inf)))
    torch.manual_seed(0)
    centred = training_perturbation(held, 5)
    torch.manual_seed(0)
    uncentred = training_perturbation(held, 5, centred=False)
    expected = held.unconstrained.detach() + centred.response_input
    assert torch.equal(uncentred.response_input, expected)
    assert torch.equal(centred.constrained, held.constrain(expected))
    assert torch.equal(uncentred.constrained, centred.constrained)
    assert not torch.equal(uncentred.response_input, centred.response_input)


def test_validation_perturbations_are_differentiable_in_lambda_and_sigma():
    held = space(column("rate", 0.3), column("decay", 0.1, (0.0, math.inf)))
    torch.manual_seed(0)
    perturbation = validation_perturbation(held, 5)
    assert perturbation.constrained is None
    torch.manual_seed(0)
    assert torch.equal(perturbation.response_input, training_perturbation(held, 5).response_input)
    total = perturbation.response_input.sum()
    by_lambda, by_sigma = torch.autograd.grad(total, [held.unconstrained, held.raw_scale])
    assert torch.equal(by_lambda, torch.full((2,), 5.0, dtype=torch.float64))
    draws = perturbation.response_input.detach() / held.scale.detach()
    expected = draws.sum(0) * held.raw_scale.detach().sigmoid()
    # float64.
    torch.testing.assert_close(by_sigma, expected, rtol=1e-9, atol=1e-12)


def test_reading_by_name_follows_the_pass_that_runs():
    held = space(column("rate", 0.3), column("decay", 0.1, (0.0, math.inf)))
    assert held["decay"].shape == ()
    assert float(held["decay"]) == pytest.approx(0.1)
    assert not held["decay"].requires_grad
    held.active = torch.tensor([[0.1, 1.0], [0.2, 2.0]], dtype=torch.float64)
    assert held["decay"].tolist() == [1.0, 2.0]
    held.active = None
    assert held.read == {"decay"}


def test_a_value_that_was_read_does_not_change_later():
    held = space(column("rate", 0.3))
    before = held["rate"]
    held.set_values({"rate": 0.6})
    assert float(before) == pytest.approx(0.3)
    assert float(held["rate"]) == pytest.approx(0.6)
    assert held.values() == pytest.approx({"rate": 0.6})
    assert float(held.current[0]) == pytest.approx(0.6)


def test_unknown_names_name_the_nearest():
    held = space(column("dropout"), column("decay"))
    for call in (held.index, held.__getitem__, lambda name: held.set_values({name: 0.5})):
        with pytest.raises(DeclarationError, match=r"called 'dropuot'; nearest: 'dropout'"):
            call("dropuot")
    assert held.read == set()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, math.nan, math.inf])
def test_values_outside_are_refused_and_nothing_moves(value):
    held = space(column("a"), column("b"))
    before = held.values()
    with pytest.raises(DeclarationError, match=r"`low < value < high` .*'b', but got .*range=\(0"):
        held.set_values({"a": 0.7, "b": value})
    assert held.values() == before
    held.set_values({"a": 0.7})
    assert held.values() == pytest.approx({"a": 0.7, "b": 0.5})


@pytest.mark.parametrize(
    ("value", "bounds"), [(100.9999999, (100.0, 101.0)), (1e-60, (0.0, math.inf))]
)
def test_a_value_that_rounds_to_an_end_is_refused(value, bounds):
    with pytest.raises(DeclarationError, match=r"too close to an end .*float32\. Start further"):
        space(column(init=value, bounds=bounds), dtype=torch.float32)
    held = space(column(init=value, bounds=bounds), dtype=torch.float64)
    assert held.values()["a"] == pytest.approx(value, rel=1e-9)


def test_names_must_be_unique():
    with pytest.raises(DeclarationError, match=r"must be unique, but \['a'\]"):
        space(column("a"), column("a"))


# JSON ---------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    drawn=st.lists(
        st.tuples(ranges, st.floats(0.01, 0.99), st.floats(0.01, 9.0), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_json_brings_the_space_back(drawn):
    columns = [
        column(f"c{i}", inside(bounds, 0.5), bounds, scale, per_example)
        for i, (bounds, _, scale, per_example) in enumerate(drawn)
    ]
    held = space(*columns)
    held.set_values({f"c{i}": inside(bounds, share) for i, (bounds, share, *_) in enumerate(drawn)})
    again = HyperparameterSpace.from_json(held.to_json(), torch.float64)
    assert again.names == held.names
    # JSON keeps every digit; softplus and the bijections lose a few.
    assert again.values() == pytest.approx(held.values(), rel=1e-9, abs=1e-12)
    assert again.scales() == pytest.approx(held.scales(), rel=1e-9)
    for one, other in zip(again.columns, held.columns, strict=True):
        assert dataclasses.replace(one, scale=0.0) == dataclasses.replace(other, scale=0.0)


def test_json_keeps_that_sigma_follows_the_value():
    held = space(column("rate", 0.3, (0.0, 1.0), None), column("held", 0.3, (0.0, 1.0), 1.0))
    again = HyperparameterSpace.from_json(held.to_json(), torch.float64)
    for each in (held, again):
        each.set_values({"rate": 0.01, "held": 0.01})
    assert again.scales() == pytest.approx(held.scales(), rel=1e-9)
    assert again.scales() == pytest.approx({"rate": 2.0, "held": 1.0}, rel=1e-9)


def test_json_is_readable_by_others():
    text = space(column("free", 1.0, (0.0, math.inf))).to_json()
    (entry,) = json.loads(text, parse_constant=pytest.fail)["hyperparameters"]
    assert entry["name"] == "free"
    assert entry["range"] == [0.0, None]
    assert entry["value"] == pytest.approx(1.0)
    assert entry["per_example"] is True


# Declarations -------------------------------------------------------------------------------------


def test_the_shorthand_means_the_declaration():
    assert declarations({"dropout": 0.1, "weight_decay": 5e-4}) == (
        Dropout(init=0.1),
        WeightDecay(init=5e-4),
    )
    assert declarations(Dropout(init=0.1)) == (Dropout(init=0.1),)
    assert declarations(iter([WeightDecay()])) == (WeightDecay(),)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_kind_starts_inside_its_range(name):
    kind = KINDS[name]
    low, high = kind().range
    assert low < kind.default_init < high
    assert kind().name == name
    (declared,) = declarations({name: kind.default_init})
    assert type(declared) is kind
    assert declared.init == kind.default_init


POINTLESS = {
    "no hole": (lambda: CutoutHoles(range=(0, 0.4), init=0.2), "must reach beyond 0.5"),
    "no side": (lambda: CutoutLength(range=(0, 0.5), init=0.2), "must reach beyond 0.5"),
    "negative holes": (lambda: CutoutLength(holes=-1), "`holes` of .* whole number from 1 .* -1"),
    "half a hole": (lambda: CutoutLength(holes=1.5), "`holes` of .* whole number from 1 .* 1.5"),
    "negative side": (
        lambda: CutoutHoles(length=-1),
        "`length` of .* number from 1 on, but got -1",
    ),
    "no operation": (lambda: RandAugment(count=0), "`count` of .* whole number from 1 .* 0"),
    "fewer": (lambda: RandAugment(count=-1), "`count` of .* whole number from 1 .* -1"),
    "growth": (lambda: WeightDecay(range=(-1, 1)), "must not go below 0"),
    "sparse growth": (lambda: L1Penalty(range=(-1, math.inf)), "must not go below 0"),
    "no pair": (lambda: Dropout(range=None), r"pair of numbers, \(low, high\), but got None"),
    "three ends": (lambda: Dropout(range=(0, 0.5, 1)), "must be a pair of numbers"),
    "words": (lambda: WeightDecay(range=("0", "1")), "must be a pair of numbers"),
    "tied at all": (lambda: Dropout(tie=True), "`tie` of 'dropout' must be a dictionary"),
    "tied decays": (lambda: WeightDecay(tie="0"), "`tie` of 'weight_decay' must be a dictionary"),
    "tied masks": (lambda: DropConnect(tie=[]), "`tie` of 'drop_connect' must be a dictionary"),
    "depth by layer": (lambda: DropPath(by_depth=True, per_layer=True), "but got both"),
}


@pytest.mark.parametrize("case", POINTLESS)
def test_declarations_without_a_point_are_refused(case):
    declare, message = POINTLESS[case]
    with pytest.raises(DeclarationError, match=message):
        declare()


def test_declarations_close_to_those_without_a_point_are_not():
    assert CutoutHoles(range=(0, 0.6), init=0.55, length=1).settings()["most_holes"] == 1
    assert CutoutLength(range=(0, 1), init=0.2, holes=1).settings() == {"CutoutHoles": 1}
    assert RandAugment(count=1).settings() == {"count": 1}
    assert WeightDecay(range=(-math.inf, math.inf), init=-1.0).init == -1.0
    assert DropPath(by_depth=True).settings() == {"by_depth": True}


@pytest.mark.parametrize("name", ["ema_momentum", "head_lr"])
def test_a_name_that_sounds_like_the_optimization_can_be_changed(name):
    last = name.rpartition("_")[2]
    with pytest.raises(DeclarationError, match=f"`name=` that does not end in '{last}'"):
        stnify(perceptron(), [Hyperparameter(name, 0.1, (0.0, 1.0))])
    assert stnify(perceptron(), [Hyperparameter(f"{name}_in_loss", 0.1, (0.0, 1.0))])


def test_declarations_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'init'"):
        Dropout().init = 0.3


def test_numbers_of_any_library_can_be_a_start():
    numpy = pytest.importorskip("numpy")
    values = convert(perceptron(0.5), [Dropout(init=numpy.float32(0.25))]).values()
    assert values == pytest.approx({"dropout": 0.25}, rel=1e-6)  # float32


def test_a_start_is_declared_or_the_models_own_or_the_kinds_default():
    def start(model, **options):
        return stnify(model, [Dropout(**options)]).values()["dropout"]

    # float32.
    assert start(perceptron(0.4), init=0.1) == pytest.approx(0.1, rel=1e-6)
    assert start(perceptron(0.4)) == pytest.approx(0.4, rel=1e-6)
    assert start(perceptron(0.0)) == pytest.approx(Dropout.default_init, rel=1e-6)
    assert start(perceptron(), after="1") == pytest.approx(Dropout.default_init, rel=1e-6)


def test_a_scale_is_declared_or_the_calls():
    stn = stnify(perceptron(0.4), [Dropout(scale=0.3), WeightDecay()], scale=0.7)
    assert stn.scales() == pytest.approx({"dropout": 0.3, "weight_decay": 0.7}, rel=1e-6)


def test_one_hyperparameter_for_each_layer_if_asked():
    model = nn.Sequential(
        nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 3)
    )
    shared = stnify(model, [Dropout(), WeightDecay()])
    assert shared.values() == pytest.approx({"dropout": 0.2, "weight_decay": 5e-4}, rel=1e-6)
    apart = stnify(model, [Dropout(per_layer=True), WeightDecay(per_layer=True, exclude="2")])
    assert apart.values() == pytest.approx(
        {"dropout.1": 0.1, "dropout.3": 0.3, "weight_decay.0": 5e-4, "weight_decay.4": 5e-4},
        rel=1e-6,
    )


def test_one_perturbation_for_each_batch_reaches_the_penalty():
    seen = []

    def penalty(model, batch, value):
        seen.append(value.tolist())
        return 0.0 * value

    stn = convert(
        perceptron(),
        [
            Hyperparameter("own", 0.5, (0.0, 1.0), penalty=penalty),
            Hyperparameter("shared", 0.5, (0.0, 1.0), penalty=penalty, per_example=False),
        ],
        train_loader=batches(),
    )
    train(*stn, 1, criterion=stn.criterion)
    own, shared = seen[-2:]
    assert len(own) == len(shared) == 8
    assert len(set(own)) == 8
    assert len(set(shared)) == 1
    assert shared[0] != pytest.approx(0.5, abs=1e-6)
