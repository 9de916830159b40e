"""What perturbed passes cannot take is refused, by the user's names and with a way out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from stnify import Hyperparameter, UnsupportedModuleError, stnify, testing
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation

BATCH = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Around(nn.Module):
    """A layer, and the module in question behind it."""

    def __init__(self, inner):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = inner

    def forward(self, x):
        return self.inner(self.first(x))


def train(model, x, **options):
    """Take three steps and return the STN."""
    stn = stnify(
        model,
        {"weight_decay": 1e-3},
        optimizer=torch.optim.SGD(model.parameters(), 0.05),
        forward_loss=lambda model, x: model(x).square().mean(),
        valid_loader=[x],
        train_steps=1,
        warmup_steps=0,
        response_every=1,
        seed=0,
        **options,
    )
    for _ in range(3):
        stn.step(x)
    return stn


def moved(stn):
    """Hyper layers that have learned a response."""
    gates = {n: layer.weight_response.gate for n, layer in stn.model.hyper_layers.items()}
    return {name for name, gate in gates.items() if gate.any()}


# Functions without a forward-mode derivative ------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class ForwardSquare(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x * tangent


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        return self.function.apply(self.layer(x))


def test_a_function_without_a_forward_mode_derivative_is_refused_by_name():
    x = torch.randn(BATCH, 6)
    rule = "every autograd.Function must have a forward-mode derivative, but 'Square' has none. "
    way = 'Give it a static method `jvp`, or use method="centered"'
    with pytest.raises(UnsupportedModuleError, match=f"{rule}It is called in 'inner'. {way}"):
        train(Around(Applied(Square)), x)
    with pytest.raises(UnsupportedModuleError, match="is called in the forward of the model"):
        train(Applied(Square), x)
    assert moved(train(Around(Applied(Square)), x, method="centered")) == {"first", "inner/layer"}


def test_a_function_with_a_forward_mode_derivative_is_exact():
    x = torch.randn(BATCH, 6)
    assert moved(train(Around(Applied(ForwardSquare)), x)) == {"first", "inner/layer"}
    testing.assert_tangent_matches_differences(Around(Applied(ForwardSquare)), x)
    testing.assert_rows_independent(Around(Applied(ForwardSquare)), x)


class Sorted(nn.Module):
    """Its operator has no forward-mode derivative, and its code looks at numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        if x.isnan().any():
            return x
        return torch.ops.aten._pdist_forward(self.layer(x), 2.0)


def test_an_operator_is_refused_by_the_name_of_the_users_module():
    x = torch.randn(BATCH, 6)
    with pytest.raises(UnsupportedModuleError, match=r"forward-mode .* is called in 'inner'\."):
        train(Around(Sorted()), x)
    with pytest.raises(UnsupportedModuleError, match="is called in the forward of the model"):
        train(Sorted(), x)


# torch.vmap ---------------------------------------------------------------------------------------


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return torch.vmap(lambda row: self.layer(row).tanh())(x)


@pytest.mark.parametrize("method", ["delta", "centered"])
@pytest.mark.parametrize("features", [(6,), (4, 6)])
def test_a_layer_under_vmap_is_refused(method, features):
    x = torch.randn(BATCH, *features)
    message = "torch.vmap hides dimensions of what '(inner.)?layer.weight' meets"
    for model in (Mapped(), Around(Mapped())):
        with pytest.raises(UnsupportedModuleError, match=message):
            train(model, x, method=method)
    assert moved(train(Around(Mapped()), x, method=method, exclude="inner.*")) == {"first"}


class NormalisedUnderVmap(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        if x.isnan().any():
            return x
        return torch.vmap(self.norm)(x)


def test_a_rule_of_forward_mode_under_vmap_is_refused():
    x = torch.randn(BATCH, 6)
    model = Around(NormalisedUnderVmap())
    with pytest.raises(UnsupportedModuleError, match=r"under torch.vmap, but is in 'inner.norm'"):
        train(model, x)
    assert moved(train(model, x, method="centered")) == {"first"}


class ScaledUnderVmap(nn.Module):
    def forward(self, x):
        return torch.vmap(lambda row: 2 * row / 3 - 1 + row)(x)


@pytest.mark.parametrize("leaves", [(), ("inner",)])
def test_sums_and_products_with_constants_may_be_under_vmap(leaves):
    x = torch.randn(BATCH, 6)
    stn = train(Around(ScaledUnderVmap()), x, leaves=leaves)
    assert moved(stn) == {"first"}
    testing.assert_tangent_matches_differences(stn, x)


# Derivatives inside a forward ---------------------------------------------------------------------


class Force(nn.Module):
    """The derivative of an energy."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.energy = nn.Linear(8, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            energy = self.energy(self.hidden(x).tanh()).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force


class TracedForce(Force):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.energy(self.hidden(x).tanh()).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force


def test_a_traced_forward_that_differentiates_is_refused():
    x = torch.randn(BATCH, 6)
    for model, name in ((TracedForce(), "TracedForce"), (Around(TracedForce()), "inner")):
        with pytest.raises(UnsupportedModuleError, match=rf"not differentiate, but '{name}' calls"):
            train(model, x)
    stn = train(Around(TracedForce()), x, leaves=["inner"], method="centered")
    assert {"inner/hidden", "inner/energy"} <= moved(stn)


def test_a_leaf_that_differentiates_is_refused_where_the_response_would_be_lost():
    x = torch.randn(BATCH, 6)
    with pytest.raises(UnsupportedModuleError, match=r"'inner' calls torch\.autograd\.grad"):
        train(Around(Force()), x, leaves=["inner"])
    stn = train(Around(Force()), x, leaves=["inner"], method="centered")
    assert moved(stn) == {"first", "inner/hidden", "inner/energy"}


def test_perturbed_weights_are_differentiated():
    model, x = Around(Force()).double(), torch.randn(BATCH, 6).double()
    stn = stnify(model, [Hyperparameter("h", init=0.5)], leaves=["inner"], method="centered")
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.normal_(0, 0.3)
    general, drawn = dict(model.named_parameters()), torch.randn(BATCH, 1).double()
    expected = []
    for i, row in enumerate(drawn):
        parameters = dict(general)
        for name, response in stn.model.weight_responses().items():
            parameters[name] = general[name] + response.materialise(general[name], row)
        for name, bias in stn.model.bias_responses().items():
            parameters[name] = general[name] + bias(general[name], row[None])[0]
        expected.append(functional_call(model, parameters, (x,))[i])
    found = perturbed_forward(stn.model._stnify.graph, (x,), {}, Perturbation(drawn, None))
    torch.testing.assert_close(found, torch.stack(expected))
    assert not torch.allclose(found, torch.stack(expected[::-1]))


class Slope(nn.Module):
    """Differentiates a function without weights, at the inputs themselves."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        with torch.enable_grad():
            at = torch.ones(6, requires_grad=True)
            (slope,) = torch.autograd.grad(at.pow(3).sum(), at)
        return self.layer(x * slope)


def test_a_derivative_of_what_does_not_respond_is_taken():
    model, x = Around(Slope()), torch.randn(BATCH, 6)
    stn = stnify(model, [Hyperparameter("h", init=0.5)], leaves=["inner"])
    drawn = torch.zeros(BATCH, 1)
    found = linearized_forward(stn.model._stnify.graph, (x,), {}, Perturbation(drawn, None))
    torch.testing.assert_close(found, model(x))
    assert not torch.allclose(found, model.inner.layer(model.first(x)), rtol=1e-2)


# Weights that never meet activations --------------------------------------------------------------


class Replaced(nn.Module):
    """Applies its layer with another weight than the layer's own."""

    def __init__(self, change):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.change = change

    def forward(self, x):
        if x.isnan().any():
            return x
        return functional_call(self.layer, {"weight": self.change(self.layer.weight)}, (x,))


CHANGES = {"scaled": lambda weight: 2 * weight, "by a function": Square.apply}


@pytest.mark.parametrize("method", ["delta", "centered"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_none_of_whose_weights_responds_is_refused(change, method):
    x = torch.randn(BATCH, 6)
    with pytest.raises(UnsupportedModuleError, match=r"activations .*, but none of 'layer' does"):
        train(ReplacedWithoutBias(change), x, method=method)
    assert "first" in moved(train(Around(Replaced(change)), x, method=method))


class ReplacedWithoutBias(Replaced):
    def __init__(self, change):
        super().__init__(change)
        self.layer = nn.Linear(6, 3, bias=False)


def test_outputs_that_are_constants_are_no_reason():
    """A pass whose prediction is cut off, of a model whose weights respond."""
    stn = stnify(Around(nn.Linear(6, 3)), [Hyperparameter("h", init=0.5)])
    for parameter in stn.model.response_parameters().values():
        parameter.requires_grad_(False)
    drawn = Perturbation(torch.zeros(BATCH, 1), None)
    found = perturbed_forward(stn.model._stnify.graph, (torch.randn(BATCH, 6),), {}, drawn)
    assert not found.requires_grad
    assert F.relu(found).shape == (BATCH, 3)


def test_every_kind_that_could_respond_is_named():
    with pytest.raises(UnsupportedModuleError, match="there is none to rewrite") as caught:
        stnify(nn.Sequential(nn.ReLU()), {"weight_decay": 1e-3})
    listed = str(caught.value).partition("(")[2].partition(")")[0].split(", ")
    assert {"Conv1d", "Bilinear", "EmbeddingBag", "MultiheadAttention", "LSTM"} <= set(listed)
    assert {"GRU", "RNN", "LSTMCell", "or a product of a parameter with activations"} < set(listed)
    assert not any(name.endswith("Base") or name.startswith("Non") for name in listed)


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))
        self.left = nn.Parameter(torch.randn(3, 2))
        self.right = nn.Parameter(torch.randn(2, 6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return F.linear(x, self.weight + self.left @ self.right)


def test_parts_of_a_computed_weight_are_told_from_what_does_not_respond():
    plan = stnify(Around(LowRank()), {"weight_decay": 1e-3}).plan
    part = "is part of the computed weight of inner, which responds"
    assert {refusal.name: refusal.reason for refusal in plan.refusals} == {
        "inner.left": part,
        "inner.right": f"{part}, and is frozen",
        "inner.unused": "is not the weight of a known layer",
    }
