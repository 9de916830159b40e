"""Weights that layers generate, and products in any order, against each example's own weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from stnify import Hyperparameter, stnify, testing
from stnify.layers import Product
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.rows import RowLayout

BATCH = 4


@pytest.fixture(autouse=True)
def _double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


USES = {
    "linear": ((3, 6), lambda x, w: F.linear(x, w)),
    "linear over time": ((3, 6), lambda x, w: F.linear(x[:, None].expand(-1, 5, -1), w)),
    "convolution": ((4, 2, 3), lambda x, w: F.conv1d(x.view(len(x), 2, 3), w, padding=1)),
    "transposed convolution": ((2, 4, 3), lambda x, w: F.conv_transpose1d(x.view(-1, 2, 3), w)),
    "embedding": ((10, 3), lambda x, w: F.embedding((10 * x.sigmoid()).long(), w)),
    "product": ((6, 3), lambda x, w: x @ w),
    "einsum": ((2, 6, 3), lambda x, w: torch.einsum("bi,kio->bko", x, w)),
}
"""Shape of a weight, and what is done with it."""


class Generated(nn.Module):
    """A layer generates the weight of a function from a parameter."""

    def __init__(self, shape, use):
        super().__init__()
        self.shape, self.use = shape, use
        self.code = nn.Parameter(torch.randn(1, 3))
        self.generator = nn.Linear(3, torch.Size(shape).numel())

    def weight(self):
        return self.generator(self.code).tanh().view(self.shape)

    def forward(self, x):
        return self.use(x, self.weight())


def opened(model, x, **options):
    hyperparameters = [Hyperparameter(name, init=0.5) for name in ("first", "second")]
    stn = stnify(model, hyperparameters, example_inputs=x, seed=0, **options)
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.normal_(0, 0.3)
    return stn


def predict(forward, stn, x, drawn):
    return forward(stn.model._stnify.graph, (x,), {}, Perturbation(drawn, None))


def one_by_one(stn, x, drawn, scale=1.0):
    """The model with each example's weights in turn; the generator has the mean perturbation."""
    model, drawn = stn.model._stnify.original, scale * drawn
    (own,) = [use.layer for use in stn.model._stnify.uses["generator.weight"] if use.computed]
    shared = {
        "weight": stn.model.weight_responses()["generator.weight"],
        "bias": stn.model.bias_responses()["generator.bias"],
    }
    mean = drawn.mean(0)
    general = dict(model.generator.named_parameters())
    parameters = {
        "weight": general["weight"] + shared["weight"].materialise(general["weight"], mean),
        "bias": general["bias"] + shared["bias"](general["bias"], mean[None])[0],
    }
    generated = functional_call(model.generator, parameters, (model.code,))
    weight = generated.tanh().view(model.shape)
    response = stn.model.hyper_layers[own].weight_response
    return torch.stack(
        [
            model.use(x[i : i + 1], weight + response.materialise(weight, row))[0]
            for i, row in enumerate(drawn)
        ]
    )


@pytest.mark.parametrize("response", ["full", "gate"])
@pytest.mark.parametrize("name", USES)
def test_a_generated_weight_responds_beside_what_generates_it(name, response):
    model, x = Generated(*USES[name]), torch.randn(BATCH, 6)
    stn = opened(model, x, response=response)
    drawn = torch.randn(BATCH, 2)
    expected = one_by_one(stn, x, drawn)
    torch.testing.assert_close(predict(perturbed_forward, stn, x, drawn), expected)
    assert not torch.allclose(predict(perturbed_forward, stn, x, drawn.roll(1, 0)), expected)
    # To first order, by central differences; their error is of order 1e-8.
    slope = (one_by_one(stn, x, drawn, 1e-4) - one_by_one(stn, x, drawn, -1e-4)) / 2e-4
    found = predict(linearized_forward, stn, x, drawn)
    torch.testing.assert_close(found, model(x) + slope, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, expected, rtol=1e-3)


def test_a_model_with_a_generated_weight_trains():
    torch.set_default_dtype(torch.float32)
    model = Generated(*USES["linear"])
    batch = torch.randn(BATCH, 6), torch.randn(BATCH, 3)
    stn = stnify(
        model,
        {"weight_decay": 1e-3},
        optimizer=torch.optim.SGD(model.parameters(), 0.05),
        criterion=F.mse_loss,
        valid_loader=[batch],
        train_steps=1,
        warmup_steps=0,
        response_every=1,
        seed=0,
    )
    for _ in range(3):
        stn.step(batch)
    assert all(parameter.any() for parameter in stn.model.response_parameters().values())


# The batch as the last dimension ------------------------------------------------------------------


class Columns(nn.Module):
    """Examples are columns where the weight meets them."""

    def __init__(self, outputs=5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, 6))

    def forward(self, x):
        return (self.weight @ x.T).T


@pytest.mark.parametrize("outputs", [6, 5, 4])
@pytest.mark.parametrize("batch", [3, 4, 5, 6])
def test_examples_that_are_columns_have_perturbations_of_their_own(batch, outputs):
    model, x = Columns(outputs), torch.randn(batch, 6)
    stn = opened(model, x)
    assert stn.plan.weights[0].layout.startswith("second")
    response = stn.model.weight_responses()["weight"]
    drawn = torch.randn(batch, 2)
    changes = torch.stack(
        [response.materialise(model.weight, row) @ x[i] for i, row in enumerate(drawn)]
    )
    for forward in (perturbed_forward, linearized_forward):  # the model is linear in its weight
        found = predict(forward, stn, x, drawn)
        torch.testing.assert_close(found, model(x) + changes)
        assert not torch.allclose(found, model(x) + changes.roll(1, 0), rtol=1e-2)
    testing.assert_rows_independent(model, x)
    testing.assert_tangent_matches_differences(model, x)


class Outer(nn.Module):
    """A number for each example meets a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return torch.einsum("b,oi->boi", x[:, 0], self.table)


def test_a_number_for_each_example_is_no_single_example():
    model, x = Outer(), torch.randn(BATCH, 6)
    stn = opened(model, x)
    response, drawn = stn.model.weight_responses()["table"], torch.randn(BATCH, 2)
    tables = torch.stack([model.table + response.materialise(model.table, row) for row in drawn])
    expected = x[:, 0, None, None] * tables
    torch.testing.assert_close(predict(perturbed_forward, stn, x, drawn), expected)
    assert not torch.allclose(predict(perturbed_forward, stn, x, drawn.roll(1, 0)), expected)


def test_a_vector_that_is_summed_over_is_a_single_example():
    model, x = Columns(), torch.randn(6)
    stn = opened(model, x[None])
    response, drawn = stn.model.weight_responses()["weight"], torch.randn(BATCH, 2)
    layer, product = stn.model.hyper_layers["root"], matrix_product()
    layer.layout = RowLayout.BATCH
    found = layer(x, model.weight, None, drawn, False, product=product, others=())
    mean = model.weight + response.materialise(model.weight, drawn.mean(0))
    torch.testing.assert_close(found, mean @ x)
    first = model.weight + response.materialise(model.weight, drawn[0])
    assert not torch.allclose(found, first @ x, rtol=1e-2)


def matrix_product():
    """A matrix times a vector."""
    return Product(lambda inputs, weight: weight @ inputs, "j", "ij", "i")
