"""Weights that meet activations in PyTorch's composites and products, against the slow way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stnify import WeightDecay, stnify
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.products import Multiplication, bilinear, gated_axis, multiplication, product

BATCH = 6


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


def attend(model, inputs, *, time_first=False, other=False, **options):
    inputs = inputs.transpose(0, 1) if time_first else inputs
    key = inputs.tanh() if other else inputs
    found = model.inner[0](inputs, key, key, **options)[0]
    return found.transpose(0, 1) if time_first else found


def attend_apart(model, inputs):
    return model.inner[0](inputs, inputs[..., :5], inputs[..., :3], need_weights=False)[0]


def masked(model, inputs):
    padding = torch.arange(4) >= torch.arange(len(inputs))[:, None] % 3 + 2
    return model.inner[0](inputs, inputs, inputs, key_padding_mask=padding, need_weights=False)[0]


def run(model, inputs):
    return model.inner[0](inputs)[0]


def last_step(model, inputs):
    return model.inner[0](inputs.transpose(0, 1))[0][-1]


def packed(model, inputs):
    lengths = torch.tensor([2, 4, 3, 1, 4, 2])[: len(inputs)]
    found, _ = model.inner[0](
        pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    )
    return pad_packed_sequence(found, batch_first=True, total_length=4)[0]


def twice(model, inputs):
    return model.inner[0](model.inner[0](inputs).sigmoid())


def offsets(model, inputs):
    starts = torch.arange(0, inputs.numel(), inputs.shape[1])
    return model.inner[0](inputs.flatten(), starts)


def applied(model, inputs):
    return model.inner[0](inputs)


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(8, 2, **options)


def tokens() -> Tensor:
    return torch.randint(0, 9, (BATCH, 4))


def sequences() -> Tensor:
    return torch.randn(BATCH, 4, 8)


def vectors() -> Tensor:
    return torch.randn(BATCH, 8)


@dataclass(frozen=True)
class Case:
    """A model, its inputs, the weights that respond in it, and the layouts they have.

    Attributes:
        build: Function and parts of ``Calling``.
        inputs: Makes a batch.
        weights: Names of weights, as a plan prints them, to the first word of their layouts.
    """

    build: Callable[[], tuple[Any, tuple[nn.Module, ...], dict[str, Tensor]]]
    inputs: Callable[[], Tensor]
    weights: dict[str, str]


def case(function, inputs, weights, *modules, **shapes):
    def build():
        tensors = {name: torch.randn(*shape) for name, shape in shapes.items()}
        return function, tuple(make() for make in modules), tensors

    return Case(build, inputs, weights)


def of_recurrent(*names: str) -> dict[str, str]:
    return {f"inner.0.{name}": "batch" for name in names}


IN_OUT = {"inner.0.in_proj_weight": "second", "inner.0.out_proj": "second"}
APART = {f"inner.0.{side}_proj_weight": "second" for side in "qkv"}
BOTH = ("weight_ih_l0", "weight_hh_l0")
FOUR = (*BOTH, "weight_ih_l1", "weight_hh_l1")
CASES = {
    "attention": case(attend, sequences, IN_OUT, lambda: attention(batch_first=True)),
    "attention, time first": case(
        lambda m, x: attend(m, x, time_first=True), sequences, IN_OUT, attention
    ),
    "attention without weights": case(
        lambda m, x: attend(m, x, need_weights=False),
        sequences,
        IN_OUT,
        lambda: attention(batch_first=True, bias=False),
    ),
    "attention to others": case(
        lambda m, x: attend(m, x, other=True),
        sequences,
        IN_OUT,
        lambda: attention(batch_first=True, add_bias_kv=True, add_zero_attn=True),
    ),
    "attention of three widths": case(
        attend_apart,
        sequences,
        {**APART, "inner.0.out_proj": "second"},
        lambda: attention(batch_first=True, kdim=5, vdim=3),
    ),
    "padded attention": case(masked, sequences, IN_OUT, lambda: attention(batch_first=True)),
    "encoder layer": case(
        applied,
        sequences,
        {
            "inner.0.self_attn.in_proj_weight": "second",
            "inner.0.self_attn.out_proj": "second",
            "inner.0.linear1": "batch",
            "inner.0.linear2": "batch",
        },
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    ),
    "lstm": case(run, sequences, of_recurrent(*BOTH), lambda: nn.LSTM(8, 5, batch_first=True)),
    "lstm, both ways": case(
        run,
        sequences,
        of_recurrent(*FOUR, *(f"{name}_reverse" for name in FOUR)),
        lambda: nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True),
    ),
    "lstm, projected": case(
        run,
        sequences,
        of_recurrent(*BOTH, "weight_hr_l0"),
        lambda: nn.LSTM(8, 5, batch_first=True, proj_size=3),
    ),
    "lstm, time first": case(
        last_step, sequences, of_recurrent(*FOUR), lambda: nn.LSTM(8, 5, 2, bias=False)
    ),
    "lstm, packed": case(
        packed, sequences, of_recurrent(*BOTH), lambda: nn.LSTM(8, 5, batch_first=True)
    ),
    "gru": case(run, sequences, of_recurrent(*FOUR), lambda: nn.GRU(8, 5, 2, batch_first=True)),
    "rnn": case(run, sequences, of_recurrent(*BOTH), lambda: nn.RNN(8, 5, batch_first=True)),
    "relu rnn": case(
        run,
        sequences,
        of_recurrent(*BOTH),
        lambda: nn.RNN(8, 5, batch_first=True, nonlinearity="relu"),
    ),
    "lstm cell": case(
        run, vectors, of_recurrent("weight_ih", "weight_hh"), lambda: nn.LSTMCell(8, 5)
    ),
    "gru cell, twice": case(
        twice, vectors, of_recurrent("weight_ih", "weight_hh"), lambda: nn.GRUCell(8, 8)
    ),
    "rnn cell": case(
        applied, vectors, of_recurrent("weight_ih", "weight_hh"), lambda: nn.RNNCell(8, 5)
    ),
    "bilinear": case(
        lambda m, x: m.inner[0](x, x.tanh()),
        sequences,
        {"inner.0": "batch"},
        lambda: nn.Bilinear(8, 8, 3),
    ),
    "mean of a bag": case(applied, tokens, {"inner.0": "batch"}, lambda: nn.EmbeddingBag(9, 3)),
    "maximum of a bag": case(
        applied,
        tokens,
        {"inner.0": "batch"},
        lambda: nn.EmbeddingBag(9, 3, mode="max", padding_idx=0),
    ),
    "sum of bags at offsets": case(
        offsets, tokens, {"inner.0": "batch"}, lambda: nn.EmbeddingBag(9, 3, mode="sum")
    ),
    "matmul": case(lambda m, x: x @ m.matrix, sequences, {"matrix": "batch"}, matrix=(8, 5)),
    "matmul from the left": case(
        lambda m, x: torch.matmul(m.matrix, x), sequences, {"matrix": "batch"}, matrix=(5, 4)
    ),
    "matmul of heads": case(
        lambda m, x: x[:, None] @ m.matrix, sequences, {"matrix": "batch"}, matrix=(2, 8, 5)
    ),
    "transposed": case(lambda m, x: x @ m.matrix.T, sequences, {"matrix": "batch"}, matrix=(5, 8)),
    "many experts": case(
        lambda m, x: (x[:, :2].softmax(-1) @ m.matrix).sin(),
        vectors,
        {"matrix": "batch"},
        matrix=(2, 200),
    ),
    "einsum": case(
        lambda m, x: torch.einsum("bnd,dhe->bhne", x, m.matrix),
        sequences,
        {"matrix": "batch"},
        matrix=(8, 2, 5),
    ),
    "einsum with an ellipsis": case(
        lambda m, x: torch.einsum("...d,de", x, m.matrix),
        sequences,
        {"matrix": "batch"},
        matrix=(8, 5),
    ),
    "einsum of three": case(
        lambda m, x: torch.einsum("bi,oij,bj->bo", x, m.matrix, x.tanh()),
        vectors,
        {"matrix": "batch"},
        matrix=(5, 8, 8),
    ),
    "addmm": case(
        lambda m, x: torch.addmm(m.shift, x, m.matrix, beta=0.5, alpha=2.0),
        vectors,
        {"matrix": "batch"},
        matrix=(8, 5),
        shift=(5,),
    ),
    "embedding": case(
        lambda m, x: F.embedding(x, m.table), tokens, {"table": "batch"}, table=(9, 4)
    ),
    "tied by a transpose": case(
        lambda m, x: m.inner[0](x).tanh() @ m.inner[0].weight.t(),
        tokens,
        {"inner.0": "batch"},
        lambda: nn.Embedding(9, 4),
    ),
}


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def converted(name, kind, response="full"):
    case = CASES[name]
    function, modules, tensors = case.build()
    model = kind(function, *modules, **tensors).eval()
    inputs = case.inputs()
    stn = stnify(model, [WeightDecay()], example_inputs=inputs, response=response, seed=0)
    stn.model.eval()
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.normal_(0, 0.3)
    return case, model, inputs, stn


def predict(forward, stn, inputs, response_input):
    with torch.no_grad():
        return forward(stn.model._stnify.graph, (inputs,), {}, Perturbation(response_input, None))


def one_by_one(stn, model, inputs, response_input):
    """The original with each example's weights and biases in turn, of which its row is kept."""
    general = stn.model.general_parameters()
    rows = []
    for i, own in enumerate(response_input):
        weights = {
            name: general[name] + response.materialise(general[name], own)
            for name, response in stn.model.weight_responses().items()
        }
        for name, response in stn.model.bias_responses().items():
            weights[name] = general[name] + response(general[name], own[None])[0]
        with torch.no_grad():
            rows.append(functional_call(model, weights, (inputs,))[i])
    return torch.stack(rows)


# Where code is not traced, weights of modules are recognised, a transpose is another tensor.
PLACES = [
    pytest.param(name, kind, id=f"{name}, {kind.__name__.lower()}")
    for name, case in CASES.items()
    for kind in (Calling, Guarded)
    if kind is Calling or (name != "tied by a transpose" and case.build()[1])
]
everywhere = pytest.mark.parametrize(("name", "kind"), PLACES)


@everywhere
def test_weights_and_rows_are_found(name, kind):
    case, model, inputs, stn = converted(name, kind)
    assert {s.label: s.layout.split()[0] for s in stn.plan.weights} == case.weights
    with torch.no_grad():
        expected = model(inputs)
        assert torch.equal(stn.model(inputs), expected)
        assert torch.equal(stn.model._stnify.graph(inputs), expected)


@everywhere
@pytest.mark.parametrize("response", ["full", "gate"])
def test_each_example_meets_its_own_weights(name, response, kind):
    _, model, inputs, stn = converted(name, kind, response)
    drawn = torch.randn(BATCH, 1)
    found = predict(perturbed_forward, stn, inputs, drawn)
    expected = one_by_one(stn, model, inputs, drawn)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)  # another order of summation
    assert not torch.allclose(found, one_by_one(stn, model, inputs, drawn.roll(1, 0)), atol=1e-4)


@everywhere
def test_the_linearised_pass_is_the_derivative_of_the_perturbed_one(name, kind):
    _, model, inputs, stn = converted(name, kind)
    drawn, step = torch.randn(BATCH, 1), 1e-6
    with torch.no_grad():
        tangent = predict(linearized_forward, stn, inputs, drawn) - model(inputs)
    ahead = predict(perturbed_forward, stn, inputs, step * drawn)
    behind = predict(perturbed_forward, stn, inputs, -step * drawn)
    difference = (ahead - behind) / (2 * step)
    # Rounding of a difference over 2e-6.
    assert torch.allclose(tangent, difference, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(2 * tangent, difference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_see_the_perturbation_of_another(name):
    _, _, inputs, stn = converted(name, Calling)
    drawn = torch.randn(BATCH, 1)
    before = predict(perturbed_forward, stn, inputs, drawn)
    drawn[2] += 1
    changed = (predict(perturbed_forward, stn, inputs, drawn) - before).reshape(BATCH, -1)
    assert changed[2].any()
    assert not changed[[0, 1, 3, 4, 5]].any()


# The names of dimensions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "weight", "expected"),
    [
        ((3, 2), 1, ("Aij", "jk", "Aik")),
        ((2, 3), 0, ("Ajk", "ij", "Aik")),
        ((1, 2), 1, ("j", "jk", "k")),
        ((4, 3), 1, ("ABij", "Bjk", "ABik")),
        ((2, 3), 1, ("ij", "Ajk", "Aik")),
    ],
)
def test_dimensions_of_a_matmul(dims, weight, expected):
    found = product(Multiplication((None, None)), dims, weight)
    assert (found.inputs, found.weight, found.outputs) == expected
    shapes = [torch.randn([3] * count) for count in dims]
    operands = [shapes[1 - weight], shapes[weight]]
    named = torch.einsum(f"{found.inputs},{found.weight}->{found.outputs}", *operands)
    assert torch.allclose(found.function(*operands), named)
    if len(found.weight) == 2:
        transposed = found.transposed()
        assert torch.allclose(transposed.function(operands[0], operands[1].mT), named)
        assert transposed.weight == found.weight[::-1]


def test_dimensions_of_an_einsum_and_of_a_bilinear_map():
    found = product(Multiplication((0, 0), "...d,dh"), (3, 2), 1)
    assert (found.inputs, found.weight, found.outputs) == ("abd", "dh", "abh")
    named = bilinear(3)
    assert (named.inputs, named.weight, named.outputs) == ("ABi", "oij", "ABo")
    left, right, weight = torch.randn(2, 5, 3), torch.randn(2, 5, 4), torch.randn(6, 3, 4)
    assert torch.allclose(named.function(left, weight, right), F.bilinear(left, right, weight))


@pytest.mark.parametrize(
    ("equation", "shape", "axis"),
    [
        ("bi,io->bo", (8, 5), 1),  # as a linear layer: the outputs
        ("bi,oi->bo", (5, 8), 0),
        ("bi,io->bo", (2, 200), 0),  # experts: their mixture
        ("bhi,hio->bho", (2, 8, 5), 2),
        ("bhi,hi->bh", (2, 8), 0),  # nothing but what the inputs have
        ("bi,io->b", (8, 5), 0),  # outputs summed over
    ],
)
def test_the_gated_dimension(equation, shape, axis):
    dims = [len(term) for term in equation.partition("->")[0].split(",")]
    assert gated_axis(product(Multiplication((0, 0), equation), dims, 1), shape) == axis


def test_calls_that_cannot_be_read_are_left_alone():
    one = torch.ones(2, 2)
    assert multiplication(torch.einsum, (one, [0, 1], one, [1, 2]), {}) is None
    assert multiplication(torch.add, (one, one), {}) is None
    assert multiplication(torch.matmul, (one,), {}) is None
    assert multiplication(torch.addmm, (1, 2, 3), {"alpha": 4}).factors == (1, 4)
