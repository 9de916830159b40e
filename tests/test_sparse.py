"""Graph networks that multiply by a sparse matrix of neighbours: as with a dense one."""

import pytest
import torch
from torch import nn

from stnify import Dropout, Hyperparameter, UnsupportedModuleError, WeightDecay, stnify
from stnify.linearize import linearized_forward
from stnify.perturb import Perturbation

NODES, H = 7, 2
HPARAMS = [Hyperparameter(name, 0.5, (0.0, 1.0)) for name in ("one", "other")]


def generator():
    return torch.Generator().manual_seed(0)


NEIGHBOURS = torch.rand(NODES, NODES, generator=generator(), dtype=torch.float64).round()
FEATURES = torch.randn(NODES, 5, generator=generator(), dtype=torch.float64)

PRODUCTS = {
    "sparse.mm": torch.sparse.mm,
    "@": lambda left, right: left @ right,
    "matmul": torch.matmul,
    "mm": torch.mm,
    "spmm": torch.spmm,
    "Tensor.mm": lambda left, right: left.mm(right),
    "Tensor.matmul": lambda left, right: left.matmul(right),
    "dense @ sparse": lambda left, right: (right.t() @ left.t()).t(),
}
LAYOUTS = {"coo": torch.Tensor.to_sparse_coo, "csr": torch.Tensor.to_sparse_csr}


class GraphNetwork(nn.Module):
    """Two layers, behind each the sum over neighbours."""

    def __init__(self, multiply=torch.matmul, neighbours=None):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.2)
        self.multiply = multiply
        if neighbours is not None:
            self.register_buffer("neighbours", neighbours)

    def forward(self, features, neighbours=None):
        neighbours = self.neighbours if neighbours is None else neighbours
        hidden = self.multiply(neighbours, self.first(features)).tanh()
        return self.multiply(neighbours, self.second(self.dropout(hidden)))


def tangent(neighbours, multiply, place):
    """Value, tangent and gradients of the response pass with these neighbours."""
    torch.manual_seed(0)
    network = GraphNetwork(multiply, neighbours if place == "buffer" else None).double().eval()
    inputs = (FEATURES, neighbours)[: 1 if place == "buffer" else 2]
    stn = stnify(network, HPARAMS, example_inputs=inputs, seed=0)
    parameters = list(stn.model.response_parameters().values())
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator()))
    drawn = torch.randn(NODES, H, generator=generator(), dtype=torch.float64)
    perturbation = Perturbation(drawn, torch.full_like(drawn, 0.5))
    found = linearized_forward(stn.model._stnify.graph, inputs, {}, perturbation)
    return found, *torch.autograd.grad(found.square().sum(), parameters)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("place", ["input", "buffer"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_response_pass_is_that_with_dense_neighbours(name, layout, place):
    multiply = PRODUCTS[name]
    sparse = LAYOUTS[layout](NEIGHBOURS)
    if name == "dense @ sparse" and layout == "csr":
        sparse = NEIGHBOURS.to_sparse_csc()  # whose transpose is of rows again
    found = tangent(sparse, multiply, place)
    expected = tangent(NEIGHBOURS, torch.matmul, place)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    other = tangent(NEIGHBOURS.t().contiguous(), torch.matmul, place)  # negative control
    assert not torch.allclose(found[0], other[0], atol=1e-3)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("place", ["input", "buffer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_steps_tune_what_is_declared(layout, place):
    torch.manual_seed(0)
    sparse = LAYOUTS[layout](NEIGHBOURS.float())
    network = GraphNetwork(neighbours=sparse if place == "buffer" else None)
    inputs = {"features": FEATURES.float()} | ({"neighbours": sparse} if place == "input" else {})
    batch = (inputs, torch.arange(NODES) % 3)
    stn = stnify(
        network,
        [Dropout(init=0.3), WeightDecay(init=1e-3)],
        optimizer=torch.optim.SGD(network.parameters(), 0.05),
        forward_loss=lambda model, batch: nn.functional.cross_entropy(model(**batch[0]), batch[1]),
        valid_loader=[batch],
        example_inputs=inputs,
        warmup_steps=0,
        train_steps=1,
        seed=0,
    )
    before = stn.values()
    for _ in range(4):
        stn.step(batch)
    assert stn.counters.skipped == stn.counters.skipped_responses == 0
    assert all(value != before[name] for name, value in stn.values().items())


class SparseAttention(nn.Module):
    """Its sparse matrix is computed from weights, which forward mode cannot follow."""

    def __init__(self):
        super().__init__()
        self.score, self.value = nn.Linear(5, 1), nn.Linear(5, 3)

    def forward(self, features):
        nodes = torch.arange(len(features))
        places = torch.stack([nodes, nodes.flip(0)])
        scores = torch.sparse_coo_tensor(places, self.score(features)[:, 0])
        return torch.sparse.mm(scores, self.value(features))


def test_a_sparse_matrix_that_would_respond_itself_is_refused():
    with pytest.raises(UnsupportedModuleError, match=r"'_sparse_coo_tensor_\w+' has none"):
        stnify(SparseAttention(), HPARAMS, example_inputs=FEATURES.float())


def test_a_sparse_parameter_is_refused():
    network = GraphNetwork()
    network.first.weight = nn.Parameter(network.first.weight.detach().to_sparse_coo())
    with pytest.raises(UnsupportedModuleError, match=r"'first\.weight' has layout .*to_dense"):
        stnify(network, HPARAMS)
