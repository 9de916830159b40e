"""Parameters that respond by themselves, against each example's own model built the slow way."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from zoo import images

from stnify import DeclarationError, Hyperparameter, UnsupportedModuleError, WeightDecay, stnify
from stnify.calls import WeightCalls
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.testing import (
    assert_compiles,
    assert_export_exact,
    assert_gradients_separated,
    assert_identity,
    assert_linear_in_perturbation,
    assert_rows_independent,
    assert_state_roundtrip,
    assert_tangent_matches_differences,
)

BATCH = 6
HPARAMS = [Hyperparameter(name, init=0.5) for name in ("first", "second")]


class Calling(nn.Module):
    """Calls a function on itself and the inputs; owns modules and parameters it may use."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module, **tensors: Tensor):
        super().__init__()
        self.function = function
        self.inner = nn.ModuleList(modules)
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


class Guarded(Calling):
    """The same, where the code cannot be traced."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.isfinite().all():
            raise ValueError("inputs must be finite")
        return self.function(self, inputs)


def applied(model, inputs):
    return model.inner[0](inputs)


def classified(model, inputs):
    token = model.token.expand(inputs.shape[0], -1, -1)
    return torch.cat([token, inputs], 1).cumsum(1)


def repeated(model, inputs):
    return torch.cat([model.token.repeat(inputs.shape[0], 1, 1), inputs], 1)


def like_another(model, inputs):
    return model.token.expand_as(inputs) * inputs


def time_first(model, inputs):
    return (inputs.transpose(0, 1) + model.table).transpose(0, 1)


def in_two_places(model, inputs):
    return (inputs * model.scale).tanh() * model.scale


def twice_at_once(model, inputs):
    return torch.addcmul(model.scale, inputs, model.scale, value=0.5)


def masked(model, inputs):
    return torch.where(inputs > 0, inputs, model.token)


def windows(model, inputs):
    halves = inputs.reshape(-1, 2, 8) * model.scale
    return halves.reshape(inputs.shape)


def norm_of_windows(model, inputs):
    return model.inner[0](inputs.reshape(-1, 8)).reshape(inputs.shape)


def larger_than_activations(model, inputs):
    return inputs.mean(1, keepdim=True) + model.table


def more_dimensions(model, inputs):
    return (inputs[:, 0] * model.table).transpose(0, 1)


def computed(model, inputs):
    return inputs * (model.scale * model.temperature)


def in_place(model, inputs):
    return inputs.clone().mul_(model.scale).add_(model.shift)


def operators(model, inputs):
    return (model.shift - inputs) / model.scale + model.scale / (inputs.square() + 1)


def powers(model, inputs):
    powered = (inputs.abs() + 1) ** model.scale
    found = torch.lerp(powered, inputs, model.shift)
    return found.maximum(model.scale) + torch.minimum(found, model.shift)


def copies(model, inputs):
    return inputs * model.scale.repeat(2)


def with_alpha(model, inputs):
    found = torch.add(inputs.tanh(), model.scale, alpha=2.0)
    return torch.sub(found, other=model.shift, alpha=0.5).add_(model.scale, alpha=3)


def tied(model, inputs):
    return model.inner[1](model.inner[0](inputs).tanh())


def called_twice(model, inputs):
    return model.inner[0](model.inner[0](inputs).tanh())


def of_a_channel(model, inputs):
    return inputs * model.scale.reshape(1, -1, 1, 1)


def rectified(model, inputs):
    return F.prelu(inputs, model.slope)


def by_einsum(model, inputs):
    return torch.einsum("bnd,d->bnd", inputs, model.scale)


def joined(model, inputs):
    return inputs * torch.cat([model.scale, model.shift])


def listed(model, inputs):
    return inputs * model.inner[0][0] + model.inner[0][1]


def channels_last(model, inputs):
    return model.inner[0](inputs.contiguous(memory_format=torch.channels_last))


def sequences() -> Tensor:
    return torch.randn(BATCH, 4, 8)


def pictures() -> Tensor:
    return torch.randn(BATCH, 4, 5, 5)


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the parameters that respond in it.

    Attributes:
        build: Function and parts of ``Calling``.
        inputs: Makes a batch.
        layouts: Names of parameters to the first word of their layouts.
    """

    build: Callable[[], tuple[Any, tuple[nn.Module, ...], dict[str, Tensor]]]
    inputs: Callable[[], Tensor]
    layouts: dict[str, str]


def case(function, inputs, layouts, *modules, **shapes):
    def build():
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        return function, tuple(make() for make in modules), tensors

    return Case(build, inputs, layouts)


def shared_scale():
    one, other = nn.LayerNorm(8), nn.LayerNorm(8)
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), other)


def partly_frozen():
    norm = nn.LayerNorm(8)
    norm.bias.requires_grad_(False)
    return norm


BOTH = {"inner.0.weight": "batch", "inner.0.bias": "batch"}
CASES = {
    "batch norm": case(applied, pictures, BOTH, lambda: nn.BatchNorm2d(4)),
    "batch norm without statistics": case(
        applied, pictures, BOTH, lambda: nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "batch norm of vectors": case(
        applied, lambda: torch.randn(BATCH, 4), BOTH, lambda: nn.BatchNorm1d(4)
    ),
    "batch norm, channels last": case(channels_last, pictures, BOTH, lambda: nn.BatchNorm2d(4)),
    "layer norm": case(applied, sequences, BOTH, lambda: nn.LayerNorm(8)),
    "layer norm of two dimensions": case(applied, sequences, BOTH, lambda: nn.LayerNorm((4, 8))),
    "layer norm without a shift": case(
        applied, sequences, {"inner.0.weight": "batch"}, lambda: nn.LayerNorm(8, bias=False)
    ),
    "layer norm with a frozen shift": case(
        applied, sequences, {"inner.0.weight": "batch"}, partly_frozen
    ),
    "layer norm of windows": case(norm_of_windows, sequences, BOTH, lambda: nn.LayerNorm(8)),
    "group norm": case(applied, pictures, BOTH, lambda: nn.GroupNorm(2, 4)),
    "instance norm": case(applied, pictures, BOTH, lambda: nn.InstanceNorm2d(4, affine=True)),
    "root mean square norm": case(
        applied, sequences, {"inner.0.weight": "batch"}, lambda: nn.RMSNorm(8)
    ),
    "norms that share a scale": case(
        applied,
        sequences,
        {"inner.0.0.weight": "batch", "inner.0.0.bias": "batch", "inner.0.2.bias": "batch"},
        shared_scale,
    ),
    "a norm called twice": case(called_twice, sequences, BOTH, lambda: nn.LayerNorm(8)),
    "layer scale": case(
        lambda m, x: x + m.scale * x.tanh(), sequences, {"scale": "batch"}, scale=(8,)
    ),
    "class token": case(classified, sequences, {"token": "batch"}, token=(1, 1, 8)),
    "class token, repeated": case(repeated, sequences, {"token": "batch"}, token=(1, 1, 8)),
    "class token like another": case(like_another, sequences, {"token": "batch"}, token=(8,)),
    "position table": case(
        lambda m, x: (x + m.table).cumsum(1), sequences, {"table": "batch"}, table=(1, 4, 8)
    ),
    "position table without a batch": case(
        lambda m, x: (x + m.table).cumsum(1), sequences, {"table": "batch"}, table=(4, 8)
    ),
    "position table, time first": case(time_first, sequences, {"table": "second"}, table=(4, 1, 8)),
    "number": case(
        lambda m, x: (x * m.temperature).tanh(), sequences, {"temperature": "batch"}, temperature=()
    ),
    "two places": case(in_two_places, sequences, {"scale": "batch"}, scale=(8,)),
    "twice at once": case(twice_at_once, sequences, {"scale": "batch"}, scale=(8,)),
    "masked": case(masked, sequences, {"token": "batch"}, token=(8,)),
    "windows": case(windows, sequences, {"scale": "batch"}, scale=(8,)),
    "larger than activations": case(
        larger_than_activations, sequences, {"table": "batch"}, table=(1, 4, 8)
    ),
    "more dimensions than activations": case(
        more_dimensions, sequences, {"table": "second"}, table=(3, 1, 8)
    ),
    "in place": case(
        in_place, sequences, {"scale": "batch", "shift": "batch"}, scale=(8,), shift=(8,)
    ),
    "operators": case(
        operators, sequences, {"scale": "batch", "shift": "batch"}, scale=(8,), shift=(8,)
    ),
    "multiples of parameters": case(
        with_alpha, sequences, {"scale": "batch", "shift": "batch"}, scale=(8,), shift=(8,)
    ),
    "powers": case(powers, sequences, {"scale": "batch", "shift": "batch"}, scale=(8,), shift=(8,)),
    "copies": case(copies, sequences, {"scale": "shared"}, scale=(4,)),
    "list": case(
        listed,
        sequences,
        {"inner.0.0": "batch", "inner.0.1": "batch"},
        lambda: nn.ParameterList([torch.randn(8), torch.randn(8)]),
    ),
    "computed": case(
        computed,
        sequences,
        {"scale": "shared", "temperature": "shared"},
        scale=(8,),
        temperature=(),
    ),
    "computed, as many as a probe has examples": case(
        computed,
        lambda: torch.randn(BATCH, 4, 5),
        {"scale": "shared", "temperature": "shared"},
        scale=(5,),
        temperature=(),
    ),
    "reshaped": case(of_a_channel, pictures, {"scale": "shared"}, scale=(4,)),
    "slope of a rectifier": case(rectified, pictures, {"slope": "shared"}, slope=(4,)),
    "einsum": case(by_einsum, sequences, {"scale": "shared"}, scale=(8,)),
    "joined": case(
        joined, sequences, {"scale": "shared", "shift": "shared"}, scale=(3,), shift=(5,)
    ),
}


@pytest.fixture
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


in_double = pytest.mark.usefixtures("double_precision")
everywhere = pytest.mark.parametrize("kind", [Calling, Guarded])


@torch.no_grad()
def opened(stn):
    for parameter in stn.model.response_parameters().values():
        parameter.normal_(0, 0.3)
    return stn


def converted(name, kind=Calling, **options):
    case = CASES[name]
    function, modules, tensors = case.build()
    model, inputs = kind(function, *modules, **tensors), case.inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    stn = stnify(model, HPARAMS, affine=True, example_inputs=inputs, seed=0, **options)
    return case, model, inputs, opened(stn)


def predict(forward, stn, inputs, response_input):
    return forward(stn.model._stnify.graph, (inputs,), {}, Perturbation(response_input, None))


def parameters_of(stn, delta, shared=()):
    """Each parameter with the gated change that [DeltaSTN] Eq. 3.14 gives it, for one example.

    Those in ``shared`` change by the mean over the batch.
    """
    found = dict(stn.model.general_parameters())
    found = {name: parameter.detach() for name, parameter in found.items()}
    mean = delta.mean(0)
    for name, response in stn.model.weight_responses().items():
        gate = response.gate @ (mean if name in shared else delta[0])
        along = [1] * found[name].ndim
        if along:
            along[response.axis] = -1
        matrix = found[name] if response.response is None else response.response
        found[name] = found[name] + gate.reshape(along) * matrix
    for name, response in stn.model.bias_responses().items():
        matrix = found[name] if response.response is None else response.response
        found[name] = found[name] + (response.gate @ delta[0]) * matrix
    return found


def one_by_one(stn, model, inputs, response_input, shared=()):
    """The original with each example's parameters in turn, of which its row is kept."""
    rows = []
    for i in range(len(inputs)):
        parameters = parameters_of(stn, response_input.roll(-i, 0), shared)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        rows.append(functional_call(model, {**parameters, **buffers}, (inputs,))[i])
    return torch.stack(rows)


def shared_in(case):
    return {name for name, layout in case.layouts.items() if layout == "shared"}


def gradients(stn, outputs):
    parameters = list(stn.model.response_parameters().values())
    return torch.autograd.grad(outputs.square().sum(), parameters, retain_graph=True)


def close(found, expected, **tolerance):
    return all(torch.allclose(a, b, **tolerance) for a, b in zip(found, expected, strict=True))


# Sums of a few dozen products in float64, in another order.
ROUNDING = {"rtol": 1e-9, "atol": 1e-10}

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


# Values and gradients -----------------------------------------------------------------------------


@in_double
@everywhere
@pytest.mark.parametrize("name", CASES)
def test_parameters_and_their_rows_are_found(name, kind):
    case, model, inputs, stn = converted(name, kind)
    assert {s.weight: s.layout.split()[0] for s in stn.plan.weights} == case.layouts
    assert {s.kind for s in stn.plan.weights} == {"Parameter"}
    assert {s.way for s in stn.plan.weights} <= {"function", "swap"}
    assert torch.equal(stn.model.eval()(inputs), model.eval()(inputs))


@in_double
@modes
@pytest.mark.parametrize(("kind", "response"), [(Calling, "full"), (Guarded, "gate")])
@pytest.mark.parametrize("name", CASES)
def test_each_example_meets_its_own_parameters(name, kind, response, training):
    case, model, inputs, stn = converted(name, kind, response=response)
    stn.model.train(training)
    drawn, shared = torch.randn(BATCH, 2), shared_in(case)
    found = predict(perturbed_forward, stn, inputs, drawn)
    expected = one_by_one(stn, model, inputs, drawn, shared)
    assert torch.allclose(found, expected, **ROUNDING)
    assert close(gradients(stn, found), gradients(stn, expected), **ROUNDING)
    turned = one_by_one(stn, model, inputs, drawn.roll(1, 0), shared)
    other = one_by_one(stn, model, inputs, 2 * drawn, shared)
    assert shared or not torch.allclose(found, turned, atol=1e-4)
    assert not torch.allclose(found, other, atol=1e-4)
    assert not close(gradients(stn, found), gradients(stn, other), atol=1e-4)


@in_double
@pytest.mark.parametrize(("kind", "training"), [(Calling, True), (Guarded, False)])
@pytest.mark.parametrize("name", CASES)
def test_the_linearised_pass_is_the_derivative(name, kind, training):
    case, model, inputs, stn = converted(name, kind)
    stn.model.train(training)
    drawn, shared, step = torch.randn(BATCH, 2), shared_in(case), 1e-4
    found = predict(linearized_forward, stn, inputs, drawn)
    plain, ahead, behind = (
        one_by_one(stn, model, inputs, side * drawn, shared) for side in (0.0, step, -step)
    )
    tangent = (ahead - behind) / (2 * step)
    # The third derivative of these functions times the step squared.
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(found, plain + tangent, **tolerance)
    assert not torch.allclose(found, plain, atol=1e-4)
    assert close(gradients(stn, found), gradients(stn, plain + tangent), **tolerance)


@in_double
@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_see_the_perturbation_of_another(name):
    case, _, inputs, stn = converted(name)
    stn.model.eval()
    drawn = torch.randn(BATCH, 2)
    before = predict(perturbed_forward, stn, inputs, drawn)
    drawn[2] += 1
    changed = (predict(perturbed_forward, stn, inputs, drawn) - before).reshape(BATCH, -1)
    assert changed[2].any()
    assert bool(changed[[0, 1, 3, 4, 5]].any()) == bool(shared_in(case))


def test_a_parameter_in_the_wrong_dimension_is_caught(monkeypatch, double_precision):
    right = WeightCalls.meet

    def wrong(self, parameter, activations, first):
        square = activations.shape[-1] == activations.shape[-2] == parameter.shape[-1]
        met = right(self, parameter, activations, first)
        return met.transpose(-1, -2) if square else met

    monkeypatch.setitem(CASES, "square", case(
        lambda m, x: (x + m.table).cumsum(1), lambda: torch.randn(BATCH, 4, 4),
        {"table": "batch"}, table=(4, 4),
    ))  # fmt: skip
    _, model, inputs, stn = converted("square")
    drawn = torch.randn(BATCH, 2)
    expected = one_by_one(stn, model, inputs, drawn)
    assert torch.allclose(predict(perturbed_forward, stn, inputs, drawn), expected, **ROUNDING)
    monkeypatch.setattr(WeightCalls, "meet", wrong)
    assert not torch.allclose(predict(perturbed_forward, stn, inputs, drawn), expected, atol=0.01)


@pytest.mark.parametrize("forward", [perturbed_forward, linearized_forward])
@pytest.mark.parametrize(
    "name", ["batch norm", "layer norm", "group norm", "class token", "number"]
)
def test_half_precision(name, forward):
    torch.manual_seed(0)
    case = CASES[name]
    function, modules, tensors = case.build()
    model, inputs = Calling(function, *modules, **tensors).bfloat16(), case.inputs().bfloat16()
    stn = opened(stnify(model, HPARAMS, affine=True, example_inputs=inputs, seed=0))
    drawn = torch.randn(BATCH, 2)
    found = predict(forward, stn, inputs, drawn)
    assert found.dtype is torch.bfloat16
    stn.model.double()
    exact = predict(forward, stn, inputs.double(), drawn.double())
    # Bfloat16 has 8 bits, and sums of four of its numbers are taken.
    assert torch.allclose(found.double(), exact, rtol=0.03, atol=0.04)
    turned = predict(forward, stn, inputs.double(), drawn.double().roll(1, 0))
    assert not torch.allclose(found.double(), turned, rtol=0.03, atol=0.04)


# What responds, and what is said of it ------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.BatchNorm1d(6), nn.Linear(6, 3)
    )


def sites(model, **options):
    plan = stnify(model, HPARAMS, verify=False, **{"affine": True, **options}).plan
    return {site.weight: site.kind for site in plan.weights}


def test_only_with_affine_do_other_parameters_respond():
    linear = {"0.weight": "Linear", "4.weight": "Linear"}
    assert sites(small(), affine=False) == linear
    norms = {f"{i}.{name}": "Parameter" for i in (1, 3) for name in ("weight", "bias")}
    assert sites(small()) == linear | norms


def test_frozen_and_excluded_parameters_do_not_respond():
    model = small()
    model[1].weight.requires_grad_(False)
    assert "1.weight" not in sites(model)
    assert "1.bias" in sites(model)
    assert {"3.weight", "4.weight"} <= sites(model, exclude="1").keys()
    assert not {"1.weight", "1.bias"} & sites(model, exclude="1").keys()
    assert not {"1.bias", "3.weight"} & sites(model, exclude=(nn.LayerNorm, "3")).keys()
    with pytest.raises(DeclarationError, match="`exclude`"):
        sites(model, exclude="7")


def test_excluded_layers_do_not_respond_as_bare_parameters():
    assert not {"0.weight", "0.bias"} & sites(small(), exclude="0").keys()


def test_layers_that_are_refused_stay_as_they_are():
    model = nn.Sequential(nn.Embedding(5, 8, sparse=True), nn.LayerNorm(8))
    assert sites(model) == {"1.weight": "Parameter", "1.bias": "Parameter"}


def test_norms_without_parameters_have_nothing_to_respond():
    with pytest.raises(UnsupportedModuleError, match="at least one trainable layer"):
        sites(nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.GELU()))


@pytest.mark.parametrize(("response", "added"), [("full", 4 * 6), ("gate", 0)])
def test_a_plan_counts_and_prints_what_parameters_add(response, added):
    model, inputs = small(), torch.randn(BATCH, 8)
    options = {"response": response, "example_inputs": inputs}
    plain = stnify(copy.deepcopy(model), HPARAMS, **options).plan
    plan = stnify(model, HPARAMS, affine=True, **options).plan
    gates = 4 * 6 * len(HPARAMS)
    assert plan.response_parameters == plain.response_parameters + added + gates
    for row in ("1 ", "1.bias"):
        line = next(line for line in str(plan).splitlines() if line.startswith(row))
        assert line.split()[1:4] == ["Parameter", "swap", "batch"]
    written = {site["weight"]: site for site in json.loads(plan.to_json())["weights"]}
    assert written["1.bias"]["kind"] == "Parameter"
    assert written["1.bias"]["parameters"] == 6
    assert written["1.bias"]["response_parameters"] == 6 * len(HPARAMS) + added // 4


def test_the_readme_says_what_a_resnet_adds():
    plans = [
        stnify(
            timm.create_model("resnet18", num_classes=10),
            [WeightDecay()],
            affine=affine,
            verify=False,
        ).plan
        for affine in (False, True)
    ]
    without, with_affine = (plan.response_parameters for plan in plans)
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"{with_affine - without:,} numbers, {with_affine / without - 1:.1%}" in readme


@in_double
def test_each_use_of_a_parameter_has_a_row_of_its_own_with_its_own_layout():
    model = Calling(lambda m, x: x * m.scale + m.scale.sigmoid(), scale=torch.randn(8))
    stn = stnify(model, HPARAMS, affine=True, example_inputs=sequences(), seed=0)
    assert [s.layout.split()[0] for s in stn.plan.weights] == ["batch", "shared"]


@in_double
@everywhere
def test_reading_the_size_of_a_parameter_is_no_use_of_it(kind):
    def split(model, inputs):
        width = model.scale.size(0) * model.scale.dim()
        return (inputs.reshape(-1, width) * model.scale).reshape(inputs.shape)

    stn = stnify(
        kind(split, scale=torch.randn(8)), HPARAMS, affine=True, example_inputs=sequences()
    )
    assert [(s.weight, s.layout) for s in stn.plan.weights] == [("scale", "batch x 4")]


# A run --------------------------------------------------------------------------------------------


def run(method, model=None, **options):
    torch.manual_seed(0)
    model = small() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = [(torch.randn(BATCH, 8), torch.randint(0, 3, (BATCH,))) for _ in range(4)]
    stn = stnify(
        model, [WeightDecay(init=0.01)], optimizer=optimizer, affine=True, seed=0,
        criterion=nn.CrossEntropyLoss(), train_loader=data, valid_loader=data, method=method,
        warmup_steps=1, train_steps=2, **options,
    )  # fmt: skip
    model, optimizer, loader = stn
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return stn, data[0][0]


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_responses_of_parameters_are_trained(method):
    stn, _ = run(method)
    for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
        assert stn.model.weight_responses()[name].gate.abs().sum() > 0
    assert "1.bias" not in run(method, exclude="1")[0].model.weight_responses()


def test_an_export_of_delta_is_exact():
    stn, inputs = run("delta")
    plain = stn.export().eval()
    assert type(plain) is nn.Sequential
    assert torch.equal(plain(inputs), stn.model.eval()(inputs))


def test_an_export_of_stn_folds_the_responses_of_parameters():
    stn, inputs = run("stn")
    plain, tuned = stn.export().eval(), stn.model.eval()
    unfolded = copy.deepcopy(stn.model._stnify.original).eval()
    # Rounding of float32 in another order; unfolded scales differ by more.
    assert torch.allclose(plain(inputs), tuned(inputs), rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain[1].weight, unfolded[1].weight)
    plain[1].load_state_dict(unfolded[1].state_dict())
    assert not torch.allclose(plain(inputs), tuned(inputs), rtol=1e-4, atol=1e-5)


@in_double
def test_the_decay_of_a_position_table_has_the_gradient_of_each_examples_own_table():
    model = Calling(lambda m, x: x + m.table, table=torch.randn(1, 4, 8))
    decay = WeightDecay(at="table", init=0.1)
    stn = stnify(
        model, [decay, *HPARAMS], affine=True, example_inputs=sequences(), seed=0,
        criterion=lambda outputs, targets: 0 * outputs.sum(),
    )  # fmt: skip
    opened(stn)
    drawn, coefficient = torch.randn(BATCH, 3), torch.rand(BATCH)
    response = stn.model.weight_responses()["table"]
    parameters = list(response.parameters())
    general = model.table.detach()

    def slowly(deltas):
        tables = [general + (response.gate @ d) * response.response for d in deltas]
        norms = torch.stack([table.square().sum() for table in tables])
        return torch.autograd.grad((0.5 * coefficient * norms).sum(), parameters)

    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    response.add_decay_gradient(general, drawn, coefficient)
    found = [parameter.grad for parameter in parameters]
    assert close(found, slowly(drawn), **ROUNDING)
    assert not close(found, slowly(drawn.roll(1, 0)), atol=1e-3)
    assert [site.parameters for site in stn.plan.decays] == [("table",)]


def test_a_copy_and_a_state_hold_the_responses_of_parameters():
    stn, inputs = run("delta")
    state = stn.state_dict()
    names = [name for name in stn.model.state_dict() if "layers" in name and "gate" in name]
    assert len(names) == 2 + 2 + 4  # weights, biases, scales and shifts
    other, _ = run("delta", model=small())
    assert not torch.equal(other.model(inputs), stn.model(inputs))
    other.load_state_dict(state)
    drawn = torch.randn(BATCH, 1)
    for forward in (perturbed_forward, linearized_forward):
        found = predict(forward, other, inputs, drawn)
        assert torch.equal(found, predict(forward, stn, inputs, drawn))


# Real models --------------------------------------------------------------------------------------


def timm_model(name, **options):
    model = timm.create_model(name, num_classes=5, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MODELS = {
    "resnet": lambda: timm_model("resnet10t", channels=(16, 16, 32, 32)),
    "vit": lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2),
    "vit with layer scale": lambda: timm_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, init_values=0.1, reg_tokens=2
    ),
    "convnext": lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
    "swin": lambda: timm_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        depths=(1, 1),
        embed_dim=24,
        num_heads=(2, 4),
    ),
}


def real(name):
    torch.manual_seed(0)
    return stnify(MODELS[name](), HPARAMS, affine=True, seed=0), images(4)


PROMISES = [
    assert_identity,
    assert_rows_independent,
    assert_linear_in_perturbation,
    assert_tangent_matches_differences,
    assert_gradients_separated,
    assert_export_exact,
]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_real_model_responds(name):
    model = real(name)[0].model
    found = {*model.weight_responses(), *model.bias_responses()}
    assert found == {n for n, p in model.general_parameters().items() if p.requires_grad}


@pytest.mark.parametrize("holds", PROMISES)
@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_keeps_every_promise(name, holds):
    holds(*real(name))


@pytest.mark.parametrize("name", ["resnet", "vit", "convnext"])
def test_the_state_of_a_real_model_comes_back(name):
    assert_state_roundtrip(*real(name))


@pytest.mark.parametrize("name", ["layer norm", "batch norm", "class token", "in place"])
def test_it_compiles(name):
    torch.manual_seed(0)
    case = CASES[name]
    function, modules, tensors = case.build()
    model, inputs = Calling(function, *modules, **tensors), case.inputs()
    stn = stnify(model, HPARAMS, affine=True, example_inputs=inputs, seed=0)
    assert_compiles(stn, inputs, backend="eager")


@in_double
def test_at_the_kink_of_a_rectifier_there_is_no_derivative():
    """Residual branches that start at nought leave rectified zeros to be rectified again."""

    def rectified_twice(model, inputs):
        return (inputs.relu() + model.inner[0](inputs)).relu()

    class Zero(nn.LayerNorm):
        def reset_parameters(self):
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    model, inputs, drawn = Calling(rectified_twice, Zero(8)), sequences(), torch.randn(BATCH, 2)
    stn = opened(stnify(model, HPARAMS, affine=True, example_inputs=inputs, seed=0))
    plain = predict(perturbed_forward, stn, inputs, 0 * drawn)
    tangent = predict(linearized_forward, stn, inputs, drawn) - plain
    ahead, behind = (
        (predict(perturbed_forward, stn, inputs, s * 1e-6 * drawn) - plain) / (s * 1e-6)
        for s in (1, -1)
    )
    kink = inputs <= 0
    # Differences of numbers of size one over a step of 1e-6.
    assert torch.allclose(tangent[~kink], ahead[~kink], atol=1e-6)
    assert not tangent[kink].any()
    assert torch.minimum(ahead, behind)[kink].max() == 0 or (ahead * behind)[kink].max() == 0
    assert (ahead - behind)[kink].abs().max() > 0.1
