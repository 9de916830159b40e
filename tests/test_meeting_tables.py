"""Tables of which an input's size chooses rows, and whose rows are multiplied with activations."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stnify import Hyperparameter, WeightDecay, stnify
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.testing import (
    assert_export_exact,
    assert_identity,
    assert_linear_in_perturbation,
    assert_tangent_matches_differences,
)

BATCH, LENGTH, WIDTH = 3, 4, 5


class Related(nn.Module):
    """Scores of tokens against each other; ``relate`` reads the table of relative positions."""

    def __init__(self, relate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.relate = relate
        self.table = nn.Parameter(torch.randn(2 * LENGTH - 1, WIDTH))
        self.register_buffer("chosen", torch.eye(LENGTH, 2 * LENGTH - 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.relate(self.query(inputs), self.table, self.chosen).tanh()


def distances(length: int) -> Tensor:
    return torch.arange(length)[:, None] - torch.arange(length)[None] + length - 1


def chosen_by_size(queries: Tensor, table: Tensor, _: Tensor) -> Tensor:
    return torch.einsum("bqc,qkc->bqk", queries, table[distances(queries.shape[1])])


def repeated_for_every_example(queries: Tensor, table: Tensor, _: Tensor) -> Tensor:
    rows = table[: queries.size(1)].expand(queries.size(0), -1, -1)
    return queries @ rows.transpose(-1, -2)


def resized(table: Tensor, length: int) -> Tensor:
    if len(table) != length:
        return F.interpolate(table.T[None], size=length, mode="linear")[0].T
    return table


def chosen_by_code_that_branches(queries: Tensor, table: Tensor, _: Tensor) -> Tensor:
    return queries @ resized(table, queries.shape[1]).mT


def scores(queries: Tensor, table: Tensor) -> Tensor:
    if queries.isnan().any():
        raise ValueError("queries must be numbers")
    return torch.einsum("bqc,qkc->bqk", queries, table[distances(queries.shape[1])])


def met_in_code_that_branches(queries: Tensor, table: Tensor, _: Tensor) -> Tensor:
    return scores(queries, table)


MET = {
    read.__name__: read
    for read in (
        chosen_by_size,
        repeated_for_every_example,
        chosen_by_code_that_branches,
        met_in_code_that_branches,
    )
}


def added(queries: Tensor, table: Tensor, _: Tensor) -> Tensor:
    return queries + table[: queries.shape[1]]


def chosen_by_a_constant(queries: Tensor, table: Tensor, chosen: Tensor) -> Tensor:
    return queries + chosen @ table


def resized_and_added(queries: Tensor, table: Tensor, _: Tensor) -> Tensor:
    return queries + resized(table, queries.shape[1])


NOT_MET = {read.__name__: read for read in (added, chosen_by_a_constant, resized_and_added)}


@pytest.fixture(autouse=True)
def _double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inputs(length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, WIDTH)


@torch.no_grad()
def converted(relate, **options):
    hyperparameters = [Hyperparameter(name, init=0.5) for name in ("first", "second")]
    stn = stnify(Related(relate), hyperparameters, example_inputs=inputs(), **options)
    for parameter in stn.model.response_parameters().values():
        parameter.normal_(0, 0.3)
    return stn


def predict(forward, stn, given, response_input):
    return forward(stn.model._stnify.graph, (given,), {}, Perturbation(response_input, None))


def one_by_one(stn, given, response_input, rows_of_the_table):
    """The original with each example's parameters in turn, of which its row is kept."""
    general, responses = stn.model.general_parameters(), stn.model.weight_responses()
    (bias,) = stn.model.bias_responses().values()
    found = []
    for i, own in enumerate(response_input):
        perturbed = {
            "query.weight": responses["query.weight"].materialise(general["query.weight"], own),
            "query.bias": bias(general["query.bias"], own[None])[0],
            "table": responses["table"].materialise(general["table"], rows_of_the_table[i]),
        }
        parameters = {name: general[name] + change for name, change in perturbed.items()}
        found.append(functional_call(stn.model._stnify.original, parameters, (given,))[i])
    return torch.stack(found)


meeting = pytest.mark.parametrize("relate", MET.values(), ids=MET)


@meeting
def test_a_table_that_meets_activations_responds_with_one_perturbation_for_the_batch(relate):
    stn = converted(relate)
    assert {s.weight: s.kind for s in stn.plan.weights} == {
        "query.weight": "Linear",
        "table": "Parameter",
    }
    assert stn.plan.refusals == ()
    assert {s.weight: s.layout.split()[0] for s in stn.plan.weights} == {
        "query.weight": "batch",
        "table": "shared",  # its rows are positions: the plan says that examples have no own
    }


@pytest.mark.parametrize("relate", NOT_MET.values(), ids=NOT_MET)
def test_a_table_that_meets_no_activations_is_a_parameter_like_any_other(relate):
    def responding(**options):
        return {site.weight for site in converted(relate, **options).plan.weights}

    assert responding() == {"query.weight"}
    assert responding(affine=True) == {"query.weight", "table"}


@meeting
@pytest.mark.parametrize("length", [LENGTH, 2])
def test_the_table_is_perturbed_by_the_mean_over_the_batch(relate, length):
    stn, given = converted(relate), inputs(length)
    drawn = torch.randn(BATCH, 2)
    mean = drawn.mean(0).expand_as(drawn)
    found = predict(perturbed_forward, stn, given, drawn)
    torch.testing.assert_close(found, one_by_one(stn, given, drawn, mean))  # float64
    assert not torch.allclose(found, one_by_one(stn, given, drawn, drawn))
    # To first order in the perturbation, by central differences; their error is of order 1e-8.
    found = predict(linearized_forward, stn, given, drawn)
    ahead, behind = (one_by_one(stn, given, t * drawn, t * mean) for t in (1e-4, -1e-4))
    slope = (ahead - behind) / 2e-4
    torch.testing.assert_close(
        found, stn.model._stnify.original(given) + slope, rtol=1e-6, atol=1e-6
    )
    assert not torch.allclose(found, stn.model._stnify.original(given), rtol=1e-2)


@meeting
def test_a_table_keeps_the_contract_of_every_layer(relate):
    stn = converted(relate)
    assert_identity(stn, inputs())
    assert_linear_in_perturbation(stn, inputs())
    assert_tangent_matches_differences(stn, inputs())
    assert_export_exact(stn, inputs())


@meeting
def test_a_frozen_table_stays_as_it_is(relate):
    model = Related(relate)
    model.table.requires_grad_(False)
    plan = stnify(model, [WeightDecay()], example_inputs=inputs()).plan
    assert {site.weight for site in plan.weights} == {"query.weight"}
    assert {r.name: r.reason for r in plan.refusals} == {
        "table": "is not the weight of a known layer, and is frozen"
    }
