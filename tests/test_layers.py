"""Hyper layers against the original layer with each example's weights built the slow way."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import stnify
from stnify import Hyperparameter
from stnify.layers import (
    HYPER_MODULES,
    HYPER_OPERATORS,
    BiasResponse,
    HyperLayer,
    WeightResponse,
    fan_in_bound,
)
from stnify.linearize import perturbed_forward
from stnify.perturb import Perturbation
from stnify.rows import RowLayout

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths:UserWarning"  # PyTorch's own cost
)

HYPERPARAMETERS = 3

KINDS = [kind for kind in HYPER_MODULES if kind.__name__ in HYPER_OPERATORS]
"""Modules whose operator, called directly, has a layer of its own."""


@dataclass
class Case:
    """A layer with all its options, and how it is called.

    Attributes:
        module: The original.
        inputs: ``(batch, ...)``.
        kind: ``"full"`` or ``"gate"``.
        weight_responds: Whether the weight has a response.
        bias_responds: Whether the bias, if there is one, has a response.
        function: Build the hyper layer of the function, not of the module.
        arguments: Of the call.
    """

    module: nn.Module
    inputs: Tensor
    kind: str
    weight_responds: bool = True
    bias_responds: bool = True
    function: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def responses(self, gates: float) -> tuple[WeightResponse | None, BiasResponse | None]:
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        axis = int("Transpose" in type(self.module).__name__ or type(self.module) is nn.Embedding)
        units = weight.shape[axis]
        if "Transpose" in type(self.module).__name__:
            units *= self.module.groups
        of_weight = WeightResponse(weight, HYPERPARAMETERS, axis, self.kind, units)
        of_bias = None
        if bias is not None and self.bias_responds:
            of_bias = BiasResponse(bias, HYPERPARAMETERS, fan_in_bound(weight), self.kind)
        for response in filter(None, (of_weight, of_bias)):
            response.gate.data.normal_(0, 1).mul_(gates)
        return of_weight if self.weight_responds or of_bias is None else None, of_bias

    def layer(self, gates: float = 1.0) -> HyperLayer:
        kind = type(self.module)
        if not self.function:
            return HYPER_MODULES[kind](self.module, self.responses(gates))
        return HYPER_OPERATORS[kind.__name__](*self.responses(gates))

    def geometry(self) -> dict[str, Any]:
        """What the call brings: everything, if the layer is that of the function."""
        if not self.function:
            return self.arguments
        if type(self.module) is nn.Embedding:
            return {"padding_idx": self.module.padding_idx}
        names = (
            () if type(self.module) is nn.Linear else ("stride", "padding", "dilation", "groups")
        )
        if "Transpose" in type(self.module).__name__:
            names += ("output_padding",)
        return {name: getattr(self.module, name) for name in names}

    def original(self, inputs: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        return functional_call(self.module, weights or {}, (inputs,), self.arguments).detach()

    def draw(self) -> Tensor:
        return torch.randn(len(self.inputs), HYPERPARAMETERS, dtype=torch.float64)


def run(
    case: Case, layer: HyperLayer, response_input=None, inputs=None, linearized=False
) -> Tensor:
    inputs = case.inputs if inputs is None else inputs
    weight, bias = case.module.weight, getattr(case.module, "bias", None)
    return layer(inputs, weight, bias, response_input, linearized, **case.geometry())


# The slow way -------------------------------------------------------------------------------------


def entries_of_unit(module: nn.Module, unit: int) -> tuple[Any, ...]:
    """Index the entries of the weight that lead to one output unit."""
    if isinstance(module, nn.Embedding):
        return (slice(None), unit)
    if "Transpose" not in type(module).__name__:
        return (unit,)
    group, column = divmod(unit, module.weight.shape[1])
    size = module.in_channels // module.groups
    return (slice(group * size, (group + 1) * size), column)


def perturbed_weight(module: nn.Module, response: WeightResponse, response_input: Tensor) -> Tensor:
    """Build the weight of one example, unit by unit: Eqs. 3.14 and E.1."""
    weight = module.weight.clone()
    matrix = module.weight if response.response is None else response.response
    for unit, gate in enumerate(response.gate @ response_input):
        entries = entries_of_unit(module, unit)
        weight[entries] = weight[entries] + gate * matrix[entries]
    return weight


def slowly(case: Case, layer: HyperLayer, response_input: Tensor, inputs: Tensor) -> Tensor:
    """Call the original on one example after another, each with its own weights."""
    outputs = []
    for example, own in zip(inputs, response_input, strict=True):
        weights = {}
        if layer.weight_response is not None:
            weights["weight"] = perturbed_weight(case.module, layer.weight_response, own)
        if layer.bias_response is not None:
            response, bias = layer.bias_response, case.module.bias
            matrix = bias if response.response is None else response.response
            weights["bias"] = bias + (response.gate @ own) * matrix
        outputs.append(case.original(example[None], weights))
    return torch.cat(outputs)


# Cases --------------------------------------------------------------------------------------------


def sizes(low: int, high: int, dims: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * dims)


@st.composite
def linear(draw, kind):
    inner, outer = draw(sizes(1, 4, 2))
    module = nn.Linear(inner, outer, bias=draw(st.booleans()), dtype=torch.float64)
    between = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    return module, (*between, inner), {}


@st.composite
def convolution(draw, kind):
    dims = int(kind.__name__[-2])
    groups = draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), sizes(0, 2, dims)))
    module = kind(
        *channels,
        draw(sizes(1, 3, dims)),
        stride=1 if padding == "same" else draw(sizes(1, 2, dims)),
        padding=padding,
        dilation=draw(sizes(1, 2, dims)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    return module, (channels[0], *draw(sizes(5, 6, dims))), {}


@st.composite
def transposed_convolution(draw, kind):
    dims = int(kind.__name__[-2])
    groups = draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    stride, dilation = draw(sizes(1, 3, dims)), draw(sizes(1, 2, dims))
    asked = draw(st.booleans())  # in the call; then less than the stride
    limits = stride if asked else map(max, stride, dilation)
    extra = tuple(draw(st.integers(0, limit - 1)) for limit in limits)
    module = kind(
        *channels,
        draw(sizes(1, 3, dims)),
        stride=stride,
        padding=draw(sizes(0, 1, dims)),
        output_padding=extra,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        dtype=torch.float64,
    )
    shape = (channels[0], *draw(sizes(3, 4, dims)))
    if not asked:
        return module, shape, {}
    wanted = module(torch.zeros(1, *shape, dtype=torch.float64)).shape[2:]
    module.output_padding = (0,) * dims
    return module, shape, {"output_size": list(wanted)}


@st.composite
def embedding(draw, kind):
    entries, width = draw(sizes(2, 5, 2))
    module = nn.Embedding(
        entries,
        width,
        padding_idx=draw(st.sampled_from([None, 0])),
        dtype=torch.float64,
    )
    return module, draw(st.sampled_from([(), (1,), (3,), (2, 3)])), {}


STRATEGIES = {
    nn.Linear: linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: transposed_convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.ConvTranspose3d: transposed_convolution,
    nn.Embedding: embedding,
}
"""How to draw every kind of layer: the module, the shape of an example, arguments of the call."""


@st.composite
def cases(draw, kind):
    torch.manual_seed(draw(st.integers(0, 1000)))
    module, shape, arguments = draw(STRATEGIES[kind](kind))
    batch = draw(st.integers(1, 4))
    if kind is nn.Embedding:
        inputs = torch.randint(0, module.num_embeddings, (batch, *shape))
        inputs.view(-1)[0] = 1  # not the padding, which never changes
    else:
        inputs = torch.randn(batch, *shape, dtype=torch.float64)
    direct = kind in KINDS and not arguments
    direct = direct and getattr(module, "padding_mode", "zeros") == "zeros"
    return Case(
        module,
        inputs,
        kind=draw(st.sampled_from(["full", "gate"])),
        weight_responds=draw(st.booleans()),
        bias_responds=draw(st.booleans()),
        function=direct and draw(st.booleans()),
        arguments=arguments,
    )


every_kind = pytest.mark.parametrize("kind", HYPER_MODULES, ids=lambda kind: kind.__name__)
some_cases = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def close(found: Tensor, expected: Tensor) -> bool:
    """Sums of a few dozen products in float64, in another order."""
    return torch.allclose(found.detach(), expected.detach(), rtol=1e-10, atol=1e-11)


def test_every_row_of_the_tables_is_drawn():
    assert STRATEGIES.keys() == HYPER_MODULES.keys()
    assert {kind.__name__ for kind in KINDS} == HYPER_OPERATORS.keys() - {"Product", "Parameter"}


# Properties of every layer ------------------------------------------------------------------------


@every_kind
@some_cases
@given(data=st.data())
def test_without_a_response_it_is_the_original_bit_for_bit(kind, data):
    case = data.draw(cases(kind))
    expected = case.original(case.inputs)
    assert torch.equal(run(case, case.layer()), expected)
    assert torch.equal(run(case, case.layer(gates=0.0), case.draw()), expected)
    assert not torch.equal(run(case, case.layer(gates=1.0), case.draw()), expected)


@every_kind
@some_cases
@given(data=st.data())
def test_each_example_meets_its_own_weights(kind, data):
    case = data.draw(cases(kind))
    layer, response_input = case.layer(), case.draw()
    found = run(case, layer, response_input)
    assert close(found, slowly(case, layer, response_input, case.inputs))
    assert not close(found, slowly(case, layer, response_input + 1, case.inputs))


@every_kind
@some_cases
@given(data=st.data())
def test_the_tangent_is_the_derivative_along_inputs_and_response(kind, data):
    """The layer is bilinear, so that a central difference has no error for any step, here one."""
    case = data.draw(cases(kind))
    layer, response_input = case.layer(), case.draw()
    direction = None
    if case.inputs.is_floating_point() and data.draw(st.booleans()):
        direction = torch.randn_like(case.inputs)
    with forward_ad.dual_level():
        inputs = case.inputs if direction is None else forward_ad.make_dual(case.inputs, direction)
        dual = run(case, layer, response_input, inputs, linearized=True)
        primal, tangent = forward_ad.unpack_dual(dual)
        primal, tangent = primal.detach(), tangent.detach()
    step = 0 if direction is None else direction
    ahead = slowly(case, layer, response_input, case.inputs + step)
    behind = slowly(case, layer, -response_input, case.inputs - step)
    assert torch.equal(primal, case.original(case.inputs))
    assert close(tangent, (ahead - behind) / 2)
    assert not close(tangent, ahead - behind)


@every_kind
@some_cases
@given(data=st.data())
def test_the_squared_norm_is_that_of_each_examples_weight_with_its_gradient(kind, data):
    case = data.draw(cases(kind))
    case.weight_responds = True
    response, weight = case.responses(1.0)[0], case.module.weight.detach()
    response_input = case.draw()
    found = weight.square().sum() + response.squared_norm_change(weight, response_input)
    slow = [perturbed_weight(case.module, response, own) for own in response_input]
    expected = torch.stack([each.square().sum() for each in slow])
    assert close(found, expected)
    assert not close(found, weight.square().sum().expand(len(found)))
    built = torch.stack([response.materialise(weight, own) for own in response_input])
    assert close(weight + built, torch.stack(slow))
    wanted = torch.autograd.grad(expected.sum(), response.parameters())
    assert all(map(close, torch.autograd.grad(found.sum(), response.parameters()), wanted))


@every_kind
@some_cases
@given(data=st.data())
def test_gradients_are_those_of_the_slow_way(kind, data):
    case = data.draw(cases(kind))
    if kind is nn.Embedding:
        case.module.padding_idx = None  # a padding vector is given no gradient, on purpose
    layer, response_input = case.layer(), case.draw().requires_grad_()
    case.module.requires_grad_(False)
    leaves = [response_input, *layer.parameters()]
    outputs = run(case, layer, response_input)
    weights = torch.randn_like(outputs)
    found = torch.autograd.grad((outputs * weights).sum(), leaves)
    step, shift = 1e-6, [torch.randn_like(leaf) for leaf in leaves]
    ends = []
    with torch.no_grad():
        for side in (step, -2 * step):
            for leaf, direction in zip(leaves, shift, strict=True):
                leaf.add_(side * direction)
            ends.append((slowly(case, layer, response_input, case.inputs) * weights).sum())
    expected = (ends[0] - ends[1]) / (2 * step)
    along = sum((g * v).sum() for g, v in zip(found, shift, strict=True))
    # Rounding of 1e-16 / 1e-6 and the square of the step, for sums of up to a thousand terms.
    assert torch.allclose(along, expected, rtol=1e-6, atol=1e-6)
    assert along.abs() > 1e-4 or len(weights) == 1


# Rows ---------------------------------------------------------------------------------------------

SINGLE = {
    "linear": (nn.Linear(4, 3, dtype=torch.float64), (4,)),
    "convolution": (nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64), (4, 5, 5)),
    "transposed": (nn.ConvTranspose1d(4, 6, 3, groups=2, dtype=torch.float64), (4, 5)),
}


@pytest.mark.parametrize("response", ["full", "gate"])
@pytest.mark.parametrize("name", SINGLE)
def test_an_example_without_a_batch_meets_the_mean_perturbation(name, response):
    torch.manual_seed(0)
    module, shape = SINGLE[name]
    inputs = torch.randn(1, *shape, dtype=torch.float64)
    case = Case(module, inputs, response)
    layer, response_input = case.layer(), torch.randn(5, HYPERPARAMETERS, dtype=torch.float64)
    found = run(case, layer, response_input, inputs[0])
    assert found.shape == module(inputs[0]).shape
    assert close(found, slowly(case, layer, response_input.mean(0, keepdim=True), inputs)[0])
    assert not close(found, slowly(case, layer, response_input[:1], inputs)[0])


@pytest.mark.parametrize("response", ["full", "gate"])
@pytest.mark.parametrize("name", SINGLE)
def test_blocks_of_rows_meet_their_examples_perturbation(name, response):
    torch.manual_seed(0)
    module, shape = SINGLE[name]
    inputs = torch.randn(6, *shape, dtype=torch.float64)
    case = Case(module, inputs, response)
    layer, response_input = case.layer(), torch.randn(2, HYPERPARAMETERS, dtype=torch.float64)
    blocks = slowly(case, layer, response_input[[0, 0, 0, 1, 1, 1]], inputs)
    mean = slowly(case, layer, response_input.mean(0).expand(6, -1), inputs)
    assert close(run(case, layer, response_input), blocks)
    layer.layout = RowLayout.SHARED
    assert close(run(case, layer, response_input), mean)
    assert not close(mean, blocks)


def test_padding_vectors_never_change():
    torch.manual_seed(0)
    module = nn.Embedding(4, 3, padding_idx=0, dtype=torch.float64)
    case = Case(module, torch.tensor([[0, 1], [2, 0]]), "full")
    found = run(case, case.layer(), case.draw())
    assert torch.equal(found[[0, 1], [0, 1]], torch.zeros(2, 3, dtype=torch.float64))
    assert found[[0, 1], [1, 0]].all()


@pytest.mark.parametrize("response", ["full", "gate"])
def test_autocast_keeps_the_type_of_the_operator(response):
    torch.manual_seed(0)
    module, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    case = Case(module, inputs, response)
    layer, response_input = case.layer(), torch.randn(5, HYPERPARAMETERS)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, layer, response_input)
    expected = run(case, layer, response_input)
    assert found.dtype is torch.bfloat16
    assert expected.dtype is torch.float32
    # Three roundings to eight bits.
    assert torch.allclose(found.float(), expected, rtol=0.05, atol=0.05)


# Tied weights -------------------------------------------------------------------------------------


class Words(nn.Module):
    """Scores every word by the vectors it embeds with; ``late`` uses the scores first."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, dtype=torch.float64)
        self.score = nn.Linear(4, 6, dtype=torch.float64)
        self.score.weight = self.embed.weight
        self.late = late
        self.register_buffer("probe", torch.randn(4, dtype=torch.float64))

    def forward(self, words: Tensor) -> Tensor:
        if self.late:
            scores = self.score(self.probe + words[:, :1].double())
            return scores[:, :4] * self.embed(words).sum(1)
        return self.score(self.embed(words).tanh().sum(1))


@pytest.mark.parametrize("response", ["full", "gate"])
@pytest.mark.parametrize("late", [False, True], ids=["embedding first", "linear first"])
def test_tied_weights_are_perturbed_alike_wherever_they_are_used(late, response):
    torch.manual_seed(0)
    model, words = Words(late), torch.randint(0, 6, (5, 3))
    idle = [Hyperparameter(name, 0.5) for name in "abc"]
    stn = stnify.stnify(model, idle, response=response, example_inputs=words, seed=0)
    for parameter in stn.model.response_parameters().values():
        parameter.data.normal_()
    response_input = torch.randn(5, HYPERPARAMETERS, dtype=torch.float64)
    found = perturbed_forward(
        stn.model._stnify.graph, (words,), {}, Perturbation(response_input, None)
    )
    ((name, of_weight),) = stn.model.weight_responses().items()
    assert of_weight.axis == (0 if late else 1)
    ((_, of_bias),) = stn.model.bias_responses().items()
    for i, own in enumerate(response_input):
        weight, bias = model.embed.weight, model.score.bias
        changed = {
            name: weight + of_weight.materialise(weight, own),
            "score.bias": bias + of_bias(bias, own[None])[0],
        }
        alone = functional_call(model, changed, (words[i : i + 1],))[0]
        assert close(found[i], alone)
        assert not close(found[i], model(words[i : i + 1])[0])


@pytest.mark.parametrize("kind", ["full", "gate"])
@pytest.mark.parametrize(
    ("shape", "axis", "units"),
    [((4, 3), 0, 4), ((4, 3, 2, 2), 0, 4), ((7, 3), 1, 3), ((4, 3, 2), 1, 6)],  # the last: 2 groups
)
def test_the_gradient_of_the_decay_is_the_one_autograd_finds(kind, shape, axis, units):
    torch.manual_seed(0)
    general = torch.randn(shape, dtype=torch.float64)
    response = WeightResponse(general, 2, axis, kind, units).double()
    parameters = list(response.parameters())
    for parameter in parameters:
        parameter.data.normal_()
        parameter.grad = torch.ones_like(parameter)  # it is added to what is there
    response_input = torch.randn(5, 2, dtype=torch.float64)
    coefficient = torch.rand(5, dtype=torch.float64)
    penalty = 0.5 * coefficient @ response.squared_norm_change(general, response_input)
    expected = torch.autograd.grad(penalty, parameters)
    response.add_decay_gradient(general, response_input, coefficient)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, 1 + gradient)  # float64, default tolerance
        assert gradient.any()
