"""The property-test kit: it passes what is right, and each mistake is caught where it should be."""

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from awkward import DataDependent
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from kit import ASSERTIONS, every_assertion, normal
from torch import Tensor, nn
from zoo import ZOO, images

from benchmarks import random_modules
from stnify import STN, Dropout, Hyperparameter, UsageError, WeightDecay, stnify, swap, testing
from stnify.layers import HYPER_MODULES, HyperLinear
from stnify.regularizers import TunedDropout
from stnify.rows import RowLayout
from stnify.testing import strategies
from stnify.testing.modules import NAMES, Branching, Folded, Mean, Residual, Twice, shaken

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


class Tagger(nn.Module):
    """Embeds tokens, mixes them, and takes a mask by keyword; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.score = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.mix(self.embed(tokens)).tanh() * mask[..., None])
        return {"scores": self.score(hidden), "pooled": hidden.mean(1)}


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        Residual(nn.Linear(6, 6)),
        nn.Linear(6, 3),
    )


def inside() -> nn.Module:
    """Two layers in a module that cannot be traced through."""
    return nn.Sequential(nn.Linear(4, 5), Branching(nn.Sequential(nn.Tanh(), nn.Linear(5, 3))))


class Normalised(nn.Module):
    """Computes a weight from its parameters, and never calls one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.idle = nn.Linear(5, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs).tanh())


TOKENS = torch.arange(10).reshape(2, 5) % 7

GOOD = {
    "perceptron": (perceptron, normal(5, 4), None),
    "tuned": (perceptron, normal(5, 4), [Dropout(), WeightDecay()]),
    "one example": (perceptron, normal(1, 4), {"dropout": 0.2}),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.GELU(), nn.ConvTranspose2d(4, 2, 2)),
        (normal(3, 2, 5, 4),),
        [Hyperparameter("penalty", 0.5, penalty=lambda model, batch, value: 0 * value)],
    ),
    "tokens": (Tagger, {"tokens": TOKENS, "mask": torch.ones(2, 5)}, None),
    "folded": (lambda: Folded(nn.Linear(4, 3)), normal(2, 5, 4), None),
    "swapped": (inside, normal(3, 4), [Dropout(at="input"), WeightDecay()]),
    "normalised": (Normalised, normal(3, 4), None),
    "twice": (lambda: Twice(nn.Linear(4, 4)), normal(3, 4), None),
}
"""Models, inputs and hyperparameters that are converted exactly."""


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def opened(build=perceptron, hparams=None) -> STN:
    """Convert, with open gates."""
    hparams = [Hyperparameter("first", 0.5), Hyperparameter("second", 0.5), *(hparams or [])]
    stn = stnify(build(), hparams, seed=0)
    for name, parameter in stn.model.response_parameters().items():
        if name.endswith("gate"):
            parameter.data.normal_(0, 0.3)
    return stn


# What is right passes -----------------------------------------------------------------------------


@every_assertion
@pytest.mark.parametrize("model", GOOD)
def test_good_models_pass(name, model):
    build, inputs, hparams = GOOD[model]
    ASSERTIONS[name](build(), inputs, hparams)


@pytest.mark.parametrize("model", ["functional", "timm vit_tiny", "timm convnext_atto"])
@pytest.mark.parametrize("name", ["identity", "rows_independent", "gradients_separated"])
def test_networks_pass(name, model):
    ASSERTIONS[name](ZOO[model](), images(2))


@every_assertion
@pytest.mark.parametrize("method", ["delta", "stn"])
def test_an_stn_passes_as_it_is(name, method):
    stn = stnify(inside(), [Dropout(at="input"), WeightDecay()], method=method, seed=0)
    ASSERTIONS[name](stn, normal(3, 4))


@pytest.mark.parametrize("hparams", [None, [Dropout(), WeightDecay()]])
def test_a_good_model_compiles(hparams):
    testing.assert_compiles(perceptron(), normal(5, 4), hparams, backend="eager")


@every_assertion
def test_the_callers_model_and_generators_stay_as_they_are(name):
    model, inputs = perceptron(), normal(5, 4)
    model[4].eval()
    model(inputs).sum().backward()
    before = copy.deepcopy(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    kept = inputs.clone()
    states = torch.get_rng_state(), random.getstate()
    ASSERTIONS[name](model, inputs, [Dropout(), WeightDecay()])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(inputs, kept)
    for one, other in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


@every_assertion
def test_an_stn_stays_as_it_is_also_after_a_failure(name):
    stn = opened(hparams=[Dropout()])
    break_layer(stn, "0", StaleWeight)
    state = {key: value.clone() for key, value in stn.model.state_dict().items()}
    values = stn.values()
    try:
        ASSERTIONS[name](stn, normal(5, 4))
    except AssertionError:
        failed = True
    else:
        failed = False
    assert failed is (name in CAUGHT["stale weight"])
    assert stn.values() == values
    assert stn.model.state_dict().keys() == state.keys()
    for key, value in stn.model.state_dict().items():
        assert torch.equal(value, state[key])


def test_an_stn_has_its_own_hyperparameters():
    with pytest.raises(UsageError, match="an STN has its own hyperparameters"):
        testing.assert_identity(opened(), normal(5, 4), {"weight_decay": 1e-3})


# Each mistake is caught by the assertion meant for it ---------------------------------------------


class MeanBroadcast(HyperLinear):
    """Every row meets the batch's mean gate."""

    def rows(self, values: Tensor, inputs: Tensor) -> Tensor:
        return super().rows(values, inputs).mean(0, keepdim=True)


class RolledBroadcast(HyperLinear):
    """Every row meets its neighbour's gate."""

    def rows(self, values: Tensor, inputs: Tensor) -> Tensor:
        return super().rows(values, inputs).roll(1, 0)


class AddedTwice(HyperLinear):
    """The linearised pass adds the response a second time."""

    def forward(self, inputs, weight, bias, response_input, linearized, **arguments):
        outputs = super().forward(inputs, weight, bias, response_input, linearized, **arguments)
        if response_input is None or not linearized:
            return outputs
        primal, tangent = forward_ad.unpack_dual(outputs)
        given = forward_ad.unpack_dual(inputs).primal
        change = self.change(given, weight, bias, response_input, primal, **arguments)
        return forward_ad.make_dual(primal, tangent + change)


class Doubled(HyperLinear):
    """Every pass responds twice as much as the weights say."""

    def change(self, inputs, weight, bias, response_input, outputs, **arguments):
        return 2 * super().change(inputs, weight, bias, response_input, outputs, **arguments)


class Quadratic(HyperLinear):
    """The linearised response grows faster than the perturbation."""

    def change(self, inputs, weight, bias, response_input, outputs, **arguments):
        change = super().change(inputs, weight, bias, response_input, outputs, **arguments)
        return change * (1 + change.square())


class MaskDrawnTwice(TunedDropout):
    """Primal and tangent each draw a mask."""

    def forward(self, inputs: Tensor, constrained: Tensor | None) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(inputs)
        if tangent is None:
            return super().forward(primal, constrained)
        dropped = super().forward(primal, constrained), super().forward(tangent, constrained)
        return forward_ad.make_dual(*dropped)


class LeakingWeight(HyperLinear):
    """Uses the user's own parameter, not the weight it is given."""

    def operate(self, inputs, weight, bias, **arguments):
        weight = self.own[0] if weight.shape == self.own[0].shape else weight
        return F.linear(inputs, weight, bias)


class StaleWeight(HyperLinear):
    """Keeps the first weight it is given."""

    def operate(self, inputs, weight, bias, **arguments):
        kept = self.__dict__.setdefault("kept", {})
        return F.linear(inputs, kept.setdefault(bias is None, weight.detach().clone()), bias)


class OtherKernel(HyperLinear):
    """Computes something else than the original."""

    def operate(self, inputs, weight, bias, **arguments):
        return F.linear(inputs, weight, bias) + 1e-3


class RolledInTraining(HyperLinear):
    """Every row meets its neighbour's gate in train mode."""

    def rows(self, values: Tensor, inputs: Tensor) -> Tensor:
        rows = super().rows(values, inputs)
        return rows.roll(1, 0) if self.training else rows


class OtherInTraining(HyperLinear):
    """Computes something else than the original in train mode."""

    def operate(self, inputs, weight, bias, **arguments):
        outputs = F.linear(inputs, weight, bias)
        return outputs + 1e-3 if self.training else outputs


class CountingTwice(HyperLinear):
    """Lets a norm count every batch of the general pass a second time."""

    def forward(self, inputs, weight, bias, response_input, linearized, **arguments):
        if self.training and response_input is None:
            self.norm[0].num_batches_tracked.add_(1)
        return super().forward(inputs, weight, bias, response_input, linearized, **arguments)


class RestlessZero(HyperLinear):
    """Responds to a perturbation of zero."""

    def change(self, inputs, weight, bias, response_input, outputs, **arguments):
        change = super().change(inputs, weight, bias, response_input, outputs, **arguments)
        return change + 1e-3


class BreakingGraph(HyperLinear):
    """Looks at its data, which ends a compiled graph."""

    def operate(self, inputs, weight, bias, **arguments):
        if float(inputs.sum()) > 1e9:
            inputs = inputs + 1
        return F.linear(inputs, weight, bias)


def halve(module, destination, prefix, metadata):
    """Save other numbers than there are."""
    destination[f"{prefix}gate"] = destination[f"{prefix}gate"] / 2


class BatchMean(nn.Module):
    """Subtracts the mean of the batch, which mixes examples in any mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(0)


def break_layer(stn: STN, name: str, kind: type[nn.Module]) -> None:
    stn.model.hyper_layers[name].__class__ = kind


def leak(stn: STN) -> None:
    break_layer(stn, "0", LeakingWeight)
    stn.model.hyper_layers["0"].own = (stn.model.general_parameters()["0.weight"],)


def stale_buffer(stn: STN) -> None:
    """The graph calls a BatchNorm with statistics of its own."""
    norm = stn.model._modules["1"]
    stale = stn.model._modules["1"] = copy.deepcopy(norm)
    stale.weight, stale.bias = norm.weight, norm.bias


def count_twice(stn: STN) -> None:
    break_layer(stn, "0", CountingTwice)
    stn.model.hyper_layers["0"].norm = (stn.model._modules["1"],)


def save_others(stn: STN) -> None:
    stn.model.hyper_layers["0"].weight_response.register_state_dict_post_hook(halve)


def draw_twice(stn: STN) -> None:
    next(iter(stn.model._stnify.noises.values())).__class__ = MaskDrawnTwice


MISTAKES = {
    "mean broadcast": lambda stn: break_layer(stn, "0", MeanBroadcast),
    "rolled broadcast": lambda stn: break_layer(stn, "0", RolledBroadcast),
    "rolled in training": lambda stn: break_layer(stn, "0", RolledInTraining),
    "response added twice": lambda stn: break_layer(stn, "0", AddedTwice),
    "response doubled": lambda stn: break_layer(stn, "0", Doubled),
    "quadratic response": lambda stn: break_layer(stn, "0", Quadratic),
    "restless zero": lambda stn: break_layer(stn, "0", RestlessZero),
    "mask drawn twice": draw_twice,
    "leak into w0": leak,
    "stale weight": lambda stn: break_layer(stn, "0", StaleWeight),
    "stale buffer": stale_buffer,
    "other kernel": lambda stn: break_layer(stn, "0", OtherKernel),
    "other kernel in training": lambda stn: break_layer(stn, "0", OtherInTraining),
    "batches counted twice": count_twice,
    "other state": save_others,
}

CAUGHT = {
    "mean broadcast": {"rows_independent": r"row 0 only.*first to differ is module '0'"},
    "rolled broadcast": {"rows_independent": r"row 0 only.*first to differ is module '0'"},
    "rolled in training": {
        "rows_independent": r"in train mode.*row 0 only.*first to differ is module '0'"
    },
    "response added twice": {
        "tangent_matches_differences": r"must be the derivative.*first to differ is module '0'"
    },
    "response doubled": {
        "perturbation_exact": r"with the perturbed weights.*first to differ is module '0'"
    },
    "quadratic response": {
        "perturbation_exact": r"with the perturbed weights.*first to differ is module '0'",
        "linear_in_perturbation": r"a linear map.*first to differ is module '0'",
        "tangent_matches_differences": r"must be the derivative.*first to differ is module '0'",
    },
    "restless zero": {
        "perturbation_exact": r"with the perturbed weights.*first to differ is module '0'",
        "identity": r"zeros must change nothing.*first to differ is module '0'",
        "tangent_matches_differences": r"must be the derivative.*first to differ is module '0'",
    },
    "mask drawn twice": {
        "tangent_matches_differences": r"must be the derivative.*first to differ is module '3'"
    },
    "leak into w0": {
        "gradients_separated": r"response step.*leaks into '0.weight'.*differ is module '0'"
    },
    "stale weight": {
        "identity": r"after its weights and buffers moved.*differ is \S+linear in module '0'"
    },
    "stale buffer": {
        "identity": r"exactly what Sequential.*differ is \S+batch_norm in module '1', by",
        "export_exact": r"what its graph predicts.*differ is \S+batch_norm in module '1', by",
    },
    "other kernel": {"identity": r"exactly what Sequential.*differ is module '0'.*by 0.001"},
    "other kernel in training": {
        "identity": r"in train mode.*exactly what Sequential.*differ is module '0'.*by 0.001",
        "export_exact": r"a general step must move '0.weight' of Sequential exactly",
    },
    "batches counted twice": {
        "identity": r"in train mode the graph must change '1.num_batches_tracked' of Sequential",
        "export_exact": r"a general step must move '1.num_batches_tracked' of Sequential exactly",
    },
    "other state": {
        "state_roundtrip": r"weight_response.gate' .* must come back from a state_dict"
    },
}
"""What each mistake is caught by, and what the message says. Every other assertion must pass."""

WITHOUT_NOISE = {"other kernel in training", "batches counted twice"}
"""Mistakes that can be seen only where no noise is tuned."""

OF_THE_PLAIN_GRAPH = {"stale buffer", "other kernel", "other kernel in training"}
"""Mistakes after which stnify itself refuses the model in every other assertion."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_caught_by_the_assertion_meant_for_it_and_no_other(mistake):
    stn = opened(hparams=[] if mistake in WITHOUT_NOISE else [Dropout()])
    for check in ASSERTIONS.values():
        check(stn, normal(5, 4))
    MISTAKES[mistake](stn)
    for name, check in ASSERTIONS.items():
        if name in CAUGHT[mistake]:
            with pytest.raises(AssertionError, match=CAUGHT[mistake][name]):
                check(stn, normal(5, 4))
        elif mistake not in OF_THE_PLAIN_GRAPH:
            check(stn, normal(5, 4))


def test_a_stale_buffer_shows_in_the_first_step_too():
    stn = opened()
    stale_buffer(stn)
    with pytest.raises(AssertionError, match=r"must move '1.running_mean' of Sequential exactly"):
        testing.assert_export_exact(stn, normal(5, 4))


def test_a_mistake_inside_a_module_that_is_not_traced_is_named_too():
    stn = opened(inside)
    name = next(name for name in stn.model.hyper_layers if name.startswith("1"))
    break_layer(stn, name, RolledBroadcast)
    with pytest.raises(AssertionError, match=r"The first to differ is module '1\.inner\.1"):
        testing.assert_rows_independent(stn, normal(3, 4))


@pytest.mark.parametrize("computed", [True, False])
def test_a_response_that_no_pass_asks_for_is_named(computed, monkeypatch):
    """As where code that is not traced hides the tensor of a weight from who watches for it."""
    model = nn.Sequential(nn.Linear(4, 4), DataDependent(nn.Linear(4, 2)))
    if computed:
        nn.utils.parametrizations.weight_norm(model[1].inner)
    testing.assert_perturbation_exact(model, normal(5, 4))
    monkeypatch.setattr(swap, "_known", lambda run: [])
    monkeypatch.setattr(swap, "_when_computed", lambda *_: lambda: None)
    with pytest.raises(AssertionError, match=r"no pass asks for that of '1\.inner\.\w"):
        testing.assert_perturbation_exact(model, normal(5, 4))


def test_a_pass_that_does_not_compile_is_named():
    stn = opened()
    testing.assert_compiles(stn, normal(5, 4), backend="eager")
    break_layer(stn, "5", BreakingGraph)
    with pytest.raises(AssertionError, match="the general pass of Sequential must compile as one"):
        testing.assert_compiles(stn, normal(5, 4), backend="eager")


def test_compiled_numbers_are_compared():
    stn = opened()
    with pytest.raises(AssertionError, match=r"the compiled \w+ pass of Sequential must agree"):
        testing.assert_compiles(stn, normal(5, 4), backend="eager", tolerance=-1.0)


def test_a_model_that_mixes_examples_is_named():
    model = nn.Sequential(nn.Linear(4, 3), BatchMean(), nn.Linear(3, 2))
    with pytest.raises(AssertionError, match=r"row 0 only.*first to differ is (node|module '1')"):
        testing.assert_rows_independent(model, normal(5, 4))


class TimeMajor(nn.Module):
    """Returns time first, and a state with layers first, as recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.GRU(4, 3, num_layers=3)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(inputs.transpose(0, 1))


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_examples_are_found_in_any_dimension_of_a_prediction(batch):
    testing.assert_rows_independent(TimeMajor(), normal(batch, 3, 4))


class Total(nn.Linear):
    """Returns one number for the batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).sum()


@pytest.mark.parametrize(
    "name",
    [name for name in ASSERTIONS if name not in {"identity", "rows_independent"}],
)
def test_a_prediction_of_integers_cannot_be_differentiated(name):
    with pytest.raises(UsageError, match=r"must hold real numbers to be differentiated.*argmax"):
        ASSERTIONS[name](nn.Sequential(nn.Linear(4, 3), Choice()), normal(5, 4))


class Choice(nn.Module):
    """Returns indices."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.argmax(-1)


def test_a_prediction_without_examples_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), Total(3, 1))
    with pytest.raises(AssertionError, match="must have a dimension that counts the 5 examples"):
        testing.assert_rows_independent(model, normal(5, 4))


class Table(nn.Module):
    """Adds a row computed from no input, as position tables are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", normal(2, 4))
        self.table = nn.Linear(4, 3)
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + self.table(self.positions)[0]


def test_layers_whose_rows_belong_to_no_example_pass_or_fail_as_asked():
    testing.assert_rows_independent(Table(), normal(5, 4))
    with pytest.raises(AssertionError, match="but 'table' use one perturbation"):
        testing.assert_rows_independent(Table(), normal(5, 4), allow_shared=False)


# Alone --------------------------------------------------------------------------------------------


def test_the_kit_works_without_hypothesis():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import stnify, torch\n"
        "assert 'stnify.testing' not in sys.modules\n"
        "from stnify import testing\n"
        "testing.assert_identity(torch.nn.Linear(2, 3), torch.randn(4, 2))\n"
        "try:\n"
        "    from stnify.testing import strategies\n"
        "except ImportError as error:\n"
        "    print('hypothesis' in str(error))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "True", found.stderr


def test_every_public_name_of_the_kit_is_documented():
    names = [name for name in vars(testing) if name.startswith(("assert_", "Hyper", "converts"))]
    assert len(names) == len(ASSERTIONS) + 3
    assert all(getattr(testing, name).__doc__ for name in names)


# The contract of hyper layers ---------------------------------------------------------------------


class TableContract(testing.HyperLayerContract):
    """The contract of a layer that is built by its row of the table."""

    def build(self, original, weight, bias):
        return HYPER_MODULES[type(original)](original, (weight, bias))


class TestLinear(TableContract):
    def original(self):
        return nn.Linear(3, 5)

    def inputs(self, batch):
        return torch.randn(batch, 2, 3)


class TestGroupedConvolution(TableContract):
    def original(self):
        return nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, padding_mode="circular")

    def inputs(self, batch):
        return torch.randn(batch, 4, 5, 4)


class TestTransposedConvolution(TableContract):
    axis = 1
    units = 6

    def original(self):
        return nn.ConvTranspose1d(4, 6, 2, groups=2, bias=False)

    def inputs(self, batch):
        return torch.randn(batch, 4, 3)


class TestEmbedding(TableContract):
    axis = 1

    def original(self):
        return nn.Embedding(5, 3)

    def inputs(self, batch):
        return torch.arange(batch * 2).reshape(batch, 2) % 5


class AlwaysTwice(HyperLinear):
    """Adds the response twice in every pass, which no assertion about a model can see."""

    def change(self, inputs, weight, bias, response_input, outputs, **arguments):
        return 2 * super().change(inputs, weight, bias, response_input, outputs, **arguments)


class RowsFirst(HyperLinear):
    """Takes rows to be the first dimension, also where they are the second."""

    def broadcast(self, units, outputs):
        return units.reshape(len(units), *[1] * (outputs.ndim - 2), units.shape[1])


class ConsecutiveRows(HyperLinear):
    """Takes the rows of an example to be consecutive, also where they are interleaved."""

    def rows(self, values, inputs):
        if self.layout is not RowLayout.INTERLEAVED:
            return super().rows(values, inputs)
        return values.repeat_interleave(inputs.shape[0] // len(values), 0)


class ConsecutiveTangents(ConsecutiveRows):
    """Does so in the linearised pass only."""

    def forward(self, inputs, weight, bias, response_input, linearized, **arguments):
        self.kind = ConsecutiveRows if linearized else HyperLinear
        return super().forward(inputs, weight, bias, response_input, linearized, **arguments)

    def rows(self, values, inputs):
        return self.kind.rows(self, values, inputs)


BROKEN_LAYERS = {
    RowsFirst: "RowsFirst with a full response must take rows laid out as second",
    ConsecutiveRows: "a row laid out as interleaved of ConsecutiveRows",
    ConsecutiveTangents: "the tangent of a row laid out as interleaved of ConsecutiveTangents",
    MeanBroadcast: "a row of MeanBroadcast with a full response differs",
    RolledBroadcast: "a row of RolledBroadcast",
    AlwaysTwice: "a row of AlwaysTwice",
    AddedTwice: "the tangent of AddedTwice",
    Doubled: "a row of Doubled",
    Quadratic: "a row of Quadratic",
    RestlessZero: "the layer at zero of RestlessZero",
    StaleWeight: "the plain layer of StaleWeight",
    OtherKernel: "the plain layer of OtherKernel",
    LeakingWeight: "a gradient leaks",
}


@pytest.mark.parametrize("kind", BROKEN_LAYERS)
def test_the_contract_catches_a_broken_layer(kind):
    class Contract(TestLinear):
        def build(self, original, weight, bias):
            layer = kind(weight, bias)
            layer.own = (original.weight,)
            return layer

    contract, messages = Contract(), []
    for name in (name for name in dir(contract) if name.startswith("test_")):
        try:
            getattr(contract, name)()
        except AssertionError as error:
            messages.append(str(error))
    assert any(BROKEN_LAYERS[kind] in message for message in messages), messages


class FirstDimensionOnly(RowsFirst):
    """Says that rows are never the second dimension."""

    row_dims = (0,)


def test_a_layer_without_rows_in_the_second_dimension_is_not_tried_there():
    class Contract(TestLinear):
        def build(self, original, weight, bias):
            return FirstDimensionOnly(weight, bias)

        def time_major(self, batch):
            raise NotImplementedError

    contract = Contract()
    contract.test_rows_in_the_second_dimension_meet_the_weights_of_their_example()
    contract.test_interleaved_rows_meet_the_weights_of_their_example()


def test_a_layer_that_cannot_take_the_rows_it_says_is_told_how_to_say_so():
    class Contract(TestGroupedConvolution):
        def build(self, original, weight, bias):
            layer = super().build(original, weight, bias)
            layer.row_dims = (0, 1)
            return layer

    with pytest.raises(AssertionError, match="`row_dims` say which dimensions may count rows"):
        Contract().test_rows_in_the_second_dimension_meet_the_weights_of_their_example()


class Incomplete(testing.HyperLayerContract):
    """Lacks what the contract asks for."""


def test_a_contract_without_its_three_methods_says_so():
    with pytest.raises(TypeError, match=r"build.*inputs.*original"):
        Incomplete()


# Random modules -----------------------------------------------------------------------------------

SHARDS = 10
IN_A_SHARD = 200

REFUSALS = (
    "UnsupportedModuleError: Sequential must hold at least one trainable layer that can respond",
    'DeclarationError: `at="input"` needs a model whose forward takes an input and can be traced',
)
"""How a random module may be refused: with a reason that begins like this."""

quickly = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_modules_are_exact_or_refused_with_a_reason(shard):
    """Two thousand in all; every sixty-fourth also against differences in float64."""
    outcomes: list[str | None] = []

    @seed(shard)
    @settings(quickly, max_examples=IN_A_SHARD)
    @given(module=strategies.random_modules(), data=st.data())
    def convert(module, data):
        hparams = data.draw(strategies.hyperparameter_sets(floating=module.entries is None))
        thorough = len(outcomes) % 64 == 0
        refused = testing.converts_or_refuses(*module.build(), hparams, thorough=thorough)
        assert refused is None or refused.startswith(REFUSALS), refused
        outcomes.append(refused)

    convert()
    assert len(outcomes) == IN_A_SHARD
    assert outcomes.count(None) > IN_A_SHARD / 2


@pytest.mark.parametrize(
    "built",
    [
        lambda: (torch.manual_seed(131072), nn.Sequential(
            nn.TransformerEncoderLayer(1, 1, 4, dropout=0.0, batch_first=True), nn.GroupNorm(2, 4)
        ), torch.randn((2, 4, 1))),
        lambda: (torch.manual_seed(4828), nn.Sequential(
            nn.Embedding(5, 1), Mean(1), nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        ), torch.zeros((2, 1), dtype=torch.long)),
    ],
)  # fmt: skip
def test_norms_of_next_to_nothing_are_no_fault(built):
    """Rounding and curvature are magnified by the root of 1 / eps, and again by each norm."""
    with torch.random.fork_rng():
        _, model, inputs = built()
        assert testing.converts_or_refuses(shaken(model), inputs) is None


@settings(quickly, max_examples=100, derandomize=True)
@given(strategies.random_modules())
def test_a_random_module_prints_as_the_python_that_rebuilds_it(drawn):
    state = torch.get_rng_state()
    model, inputs = drawn.build()
    assert torch.equal(torch.get_rng_state(), state)
    twin, again = eval(repr(drawn), dict(NAMES))
    assert torch.equal(inputs, again)
    assert repr(twin) == repr(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    for one, other in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert len(model.eval()(inputs)) == len(inputs)


KINDS = (
    "Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose", "Embedding", "EmbeddingBag",
    "Bilinear", "MultiheadAttention", "TransformerEncoderLayer", "LSTM", "GRU", "RNN", "LSTMCell",
    "LayerNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "MaxPool", "AvgPool", "Dropout", "GELU",
    "Attention", "Functional", "Residual", "Parallel", "Twice", "Tied", "Frozen", "Folded",
    "Branching",
)  # fmt: skip


def test_every_kind_of_layer_is_drawn():
    """Among three thousand modules at most: draws depend on what the process has imported."""
    missing = set(KINDS)

    @settings(quickly, max_examples=3000, derandomize=True)
    @given(strategies.random_modules())
    def draw(drawn):
        if missing:
            names = {type(module).__name__ for module in drawn.build()[0].modules()}
            missing.difference_update(names, {re.sub(r"\dd$", "", name) for name in names})

    draw()
    assert not missing


@settings(quickly, max_examples=30, derandomize=True)
@given(
    hparams=strategies.hyperparameter_sets(),
    batch=strategies.batches((4,)),
    tokens=strategies.batches((3,), entries=5),
)
def test_drawn_hyperparameters_and_batches_can_be_used(hparams, batch, tokens):
    stn = stnify(perceptron(), hparams, seed=0)
    assert set(stn.values()) >= {h.name for h in hparams if not getattr(h, "per_layer", False)}
    assert batch.shape[1:] == (4,)
    assert 1 <= len(batch) <= 4
    assert tokens.dtype is torch.int64
    assert int(tokens.max()) < 5


def test_a_refusal_is_returned_and_a_mistake_raised():
    assert testing.converts_or_refuses(perceptron(), normal(5, 4)) is None
    reason = testing.converts_or_refuses(nn.Sequential(nn.Tanh()), normal(5, 4))
    assert reason.startswith(REFUSALS)
    lazy = testing.converts_or_refuses(nn.LazyLinear(3), normal(5, 4))
    assert "'weight' is lazy" in lazy
    with pytest.raises(AssertionError, match="row 0 only"):
        testing.converts_or_refuses(nn.Sequential(nn.Linear(4, 3), BatchMean()), normal(5, 4))


# The benchmark ------------------------------------------------------------------------------------


def test_the_benchmark_counts_every_module_and_keeps_failures(monkeypatch, tmp_path):
    report = random_modules.continued(tmp_path / "report.json", seed=7)
    block = random_modules.examine(7, 12)
    assert block["count"] == 12 == block["exact"] + sum(block["refused"].values())
    assert block == random_modules.examine(7, 12)
    random_modules.add(report, block)

    def refuse_or_fail(model, inputs, hparams):
        assert len(inputs) < 3, "three"
        return "UnsupportedModuleError: there is a rule, but got something"

    monkeypatch.setattr(random_modules, "converts_or_refuses", refuse_or_fail)
    block = random_modules.examine(7, 12)
    assert 0 < len(block["failed"]) < 12
    assert {failure["error"].splitlines()[0] for failure in block["failed"]} == {
        "AssertionError: three"
    }
    assert len(eval(block["failed"][0]["module"], dict(NAMES))[1]) == 3
    assert block["refused"] == {
        "UnsupportedModuleError: there is a rule": 12 - len(block["failed"])
    }
    random_modules.add(report, block)
    assert (report["count"], report["blocks"]) == (24, 2)
    assert report["exact"] + sum(report["refused"].values()) + len(report["failed"]) == 24
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert random_modules.continued(tmp_path / "report.json", seed=7) == report
    assert random_modules.continued(tmp_path / "report.json", seed=8)["count"] == 0


def test_the_readme_says_what_the_longest_run_found():
    report = json.loads(random_modules.FILE.read_text())
    readme = " ".join((Path(__file__).parent.parent / "README.md").read_text().split())
    refused = sum(report["refused"].values())
    assert report["count"] == report["exact"] + refused + len(report["failed"])
    assert f"{report['exact']:,} of {report['count']:,} exact, {refused:,} refused" in readme
    assert f"{report['exact'] + 1:,} of {report['count']:,} exact" not in readme
    assert report["failed"] == []
