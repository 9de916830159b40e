"""DropConnect masks a weight and its response alike, wherever the weight is used."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stnify import STN, stnify
from stnify.declare import DropConnect
from stnify.errors import DeclarationError
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.regularizers import weight_factors
from stnify.step import response_step

BATCH = 6
RATE = 0.4
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
"""The same numbers in float64, summed in another order."""


class Tied(nn.Module):
    """Predicts words by the matrix that embeds them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4, 5)
        self.head = nn.Linear(5, 4, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.words(words).mean(1).tanh())


class Twice(nn.Module):
    """Has one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first
        self.head = nn.Linear(5, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs).tanh()))


class Untraced(nn.Module):
    """Looks at its data, so that its own code runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.head(hidden.tanh() if inputs.sum() > -1e9 else hidden)


class Functional(nn.Module):
    """Calls a function on its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs.tanh(), self.weight)


class Recurrent(nn.Module):
    """Classifies sequences by an LSTM of two layers."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.recurrence = kind(5, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.recurrence(inputs)[0][:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4))


def vectors(generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, 5, generator=generator)


def sequences(generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, 3, 5, generator=generator)


def images(generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, 2, 4, 4, generator=generator)


def words(generator: torch.Generator) -> Tensor:
    return torch.randint(4, (BATCH, 3), generator=generator)


@dataclass(frozen=True)
class Case:
    """A model and its inputs, and the weights DropConnect acts on."""

    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    at: Any
    masked: tuple[str, ...]


HIDDEN = ("recurrence.weight_hh_l0", "recurrence.weight_hh_l1")
CASES = {
    "linear": Case(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)),
        vectors,
        "**",
        ("0.weight", "2.weight"),
    ),
    "convolution": Case(convolutional, images, nn.Conv2d, ("0.weight",)),
    "lstm": Case(Recurrent, sequences, "recurrence.weight_hh*", HIDDEN),
    "gru": Case(lambda: Recurrent(nn.GRU), sequences, "recurrence.weight_hh*", HIDDEN),
    "function": Case(Functional, vectors, "weight", ("weight",)),
    "untraced": Case(Untraced, vectors, "first", ("first.weight",)),
    "tied": Case(Tied, words, "**", ("words.weight",)),
    "twice": Case(Twice, vectors, "first", ("first.weight",)),
    "root": Case(lambda: nn.Linear(5, 4), vectors, "**", ("weight",)),
}

every_case = pytest.mark.parametrize("name", CASES)


def batch(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = case.inputs(generator)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return inputs, torch.randint(4, (BATCH,), generator=generator)


def converted(case: Case, **options: Any) -> STN:
    """A converted model whose response has an effect."""
    torch.manual_seed(0)
    model = case.model().double()
    defaults: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": F.cross_entropy,
        "seed": 0,
        "verify": False,
    }
    stn = stnify(model, [DropConnect(at=case.at, init=RATE)], **{**defaults, **options})
    with torch.no_grad():
        for name, parameter in stn.model.response_parameters().items():
            if name.endswith("gate"):
                parameter.normal_(0, 0.5)
    return stn


def factors_of(stn: STN) -> dict[str, Tensor]:
    """Draw what the next pass draws first, by name of the weight."""
    noises, current = stn.model._stnify.weight_noises, stn.hyperparameters.current
    found = weight_factors(noises, stn.model.get_parameter, current)
    return {name: found[name] for noise in noises for name in noise.sharing}


# The general step ---------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("method", ["delta", "centered", "fixed"])
def test_the_general_step_is_that_of_a_masked_model(name, method):
    """Weights are multiplied by hand in a copy of the model."""
    case = CASES[name]
    stn = converted(case, method=method)
    plain = copy.deepcopy(stn.model._stnify.original)
    inputs, target = batch(case)
    without = F.cross_entropy(plain(inputs), target)
    with copy.deepcopy(stn.model._stnify.stream).active():
        factors = factors_of(stn)
    assert set(factors) == set(case.masked)
    weights = dict(plain.named_parameters())
    masked = {n: w * factors[n] if n in factors else w for n, w in weights.items()}
    expected = F.cross_entropy(functional_call(plain, masked, (inputs,)), target)
    expected.backward()
    found = F.cross_entropy(stn.model(inputs), target)
    found.backward()
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for key, weight in stn.model.general_parameters().items():
        torch.testing.assert_close(weight.grad, weights[key].grad, **TOLERANCE)
    for key, factor in factors.items():
        dropped = factor == 0
        assert dropped.any()
        assert not dropped.all()
        torch.testing.assert_close(
            factor[~dropped], torch.full_like(factor, 1 / (1 - RATE))[~dropped]
        )
        assert (stn.model.get_parameter(key).grad[dropped] == 0).all()
    assert not torch.allclose(found, without), "the mask must count"


@every_case
@pytest.mark.parametrize("method", ["delta", "centered", "stn", "fixed"])
def test_parameters_stay_the_users_own(name, method):
    case = CASES[name]
    stn = converted(case, method=method, valid_loader=[batch(case)], warmup_steps=0, train_steps=1)
    before = dict(stn.model.named_parameters(remove_duplicate=False))
    for _ in range(2):
        assert torch.tensor(stn.step(batch(case))).isfinite()
    after = dict(stn.model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    for module in stn.model.modules():
        if isinstance(module, nn.RNNBase):
            assert all(isinstance(weight, nn.Parameter) for weight in module._flat_weights)
    assert (stn.counters.skipped, stn.counters.skipped_responses) == (0, 0)


# The response pass --------------------------------------------------------------------------------


def drawn_for(stn: STN) -> Perturbation:
    """A perturbation for each example; all at one rate, as there is one mask."""
    epsilon = torch.linspace(-1, 1, BATCH, dtype=torch.float64)[:, None]
    return Perturbation(epsilon, stn.hyperparameters.current.expand(BATCH, -1))


def factors_of_response_pass(stn: STN, drawn: Perturbation) -> dict[str, Tensor]:
    noises = stn.model._stnify.weight_noises
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return weight_factors(noises, stn.model.get_parameter, drawn.constrained)


@every_case
@pytest.mark.parametrize("forward", [linearized_forward, perturbed_forward])
@pytest.mark.parametrize("response", ["full", "gate"])
def test_the_response_pass_is_that_of_a_model_masked_as_a_whole(name, forward, response):
    """Against a conversion without DropConnect whose weights and responses are masked by hand."""
    case = CASES[name]
    stn = converted(case, response=response)
    drawn, (inputs, _) = drawn_for(stn), batch(case)
    factors = factors_of_response_pass(stn, drawn)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = forward(stn.model._stnify.graph, (inputs,), {}, drawn)
    silent = drawn._replace(constrained=None)
    unmasked = forward(stn.model._stnify.graph, (inputs,), {}, silent)
    own = {id(p): p.detach().clone() for p in stn.model.parameters()}
    with torch.no_grad():
        scaled: set[int] = set()
        for key, factor in factors.items():
            parameter = stn.model.get_parameter(key)
            if id(parameter) not in scaled:
                scaled.add(id(parameter))
                parameter.mul_(factor)
        expected = forward(stn.model._stnify.graph, (inputs,), {}, silent)
        for parameter in stn.model.parameters():
            parameter.copy_(own[id(parameter)])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert not torch.allclose(found, unmasked), "the mask must count"
    responses = [key for key in factors if key.endswith("weight_response.response")]
    assert bool(responses) is (response == "full")


@every_case
@pytest.mark.parametrize("linearized", [True, False])
def test_gradients_of_the_response_step_are_masked(name, linearized, monkeypatch):
    """By central differences of the loss with the masks held."""
    case = CASES[name]
    stn = converted(case)
    drawn, data = drawn_for(stn), batch(case)
    monkeypatch.setattr("stnify.step.training_perturbation", lambda space, size: drawn)

    def result():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            objective = stn._tuner.objective
            return response_step(stn.model, [data], objective, linearized=linearized)

    gradients = result().gradients
    factors = factors_of_response_pass(stn, drawn)
    for key, parameter in stn.model.response_parameters().items():
        entries = parameter.data.view(-1)
        place = int(gradients[key].abs().argmax())
        before, losses = entries[place].clone(), []
        for side in (1e-5, -1e-5):
            entries[place] = before + side
            losses.append(result().loss)
        entries[place] = before
        difference = (losses[0] - losses[1]) / 2e-5
        # The error of a central difference is of the order of the step squared.
        torch.testing.assert_close(gradients[key].view(-1)[place], difference, rtol=1e-4, atol=1e-8)
        assert difference.abs() > 1e-6
        if key in factors:
            assert (gradients[key][factors[key] == 0] == 0).all()


# The rate -----------------------------------------------------------------------------------------


def test_the_share_of_weights_dropped_is_the_rate():
    model = nn.Linear(200, 100)
    stn = stnify(model, [DropConnect(init=RATE)], seed=0)
    dropped = sum(int((factors_of(stn)["weight"] == 0).sum()) for _ in range(5))
    count = 5 * 200 * 100
    deviation = (RATE * (1 - RATE) * count) ** 0.5
    assert abs(dropped - RATE * count) < 4 * deviation, "four standard deviations"
    assert abs(dropped - (1 - RATE) * count) > 4 * deviation


def test_masks_are_drawn_anew_in_every_pass_and_not_in_eval_mode():
    case = CASES["lstm"]
    stn = converted(case)
    inputs, _ = batch(case)
    assert not torch.equal(stn.model(inputs), stn.model(inputs))
    stn.model.eval()
    assert torch.equal(stn.model(inputs), stn.model._stnify.original.eval()(inputs))


def test_the_batch_takes_the_mean_of_its_rates():
    stn = stnify(nn.Linear(5, 4), [DropConnect(init=RATE)], seed=0)
    (noise,) = stn.model._stnify.weight_noises
    rates = torch.tensor([[0.2], [0.7]])
    factors = noise.factors(stn.model.get_parameter, rates)["weight"]
    assert torch.allclose(factors[factors != 0], torch.tensor(1 / 0.55))


# Declarations -------------------------------------------------------------------------------------


def test_examples_share_their_weights():
    with pytest.raises(DeclarationError, match="must have `per_example=False`"):
        DropConnect(per_example=True)


class Tokens(nn.Module):
    """Weights that meet activations, and tables that are added, stacked or looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.place = nn.Parameter(torch.randn(1, 4, 5))
        self.words = nn.Embedding(4, 5)
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True, add_bias_kv=True)
        self.recurrence = nn.GRU(5, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words) @ self.mixing
        hidden = torch.cat([self.token.expand(len(words), -1, -1), hidden], 1) + self.place
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.head(self.recurrence(hidden)[0][:, -1])


MULTIPLIED = {
    "mixing",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "recurrence.weight_ih_l0",
    "recurrence.weight_hh_l0",
    "head.weight",
}


def test_without_a_pattern_it_acts_on_weights_that_activations_are_multiplied_with():
    (site,) = stnify(Tokens(), [DropConnect()]).plan.weight_noises
    assert set(site.parameters) == MULTIPLIED
    tables = {name for name, p in Tokens().named_parameters() if p.ndim > 1} - MULTIPLIED
    assert {"token", "place", "words.weight", "attention.bias_k"} <= tables
    for name in tables:
        (site,) = stnify(Tokens(), [DropConnect(at=name)]).plan.weight_noises
        assert site.parameters == (name,)


def test_a_pattern_without_weights_is_refused():
    with pytest.raises(DeclarationError, match="`at` of 'drop_connect'"):
        stnify(nn.Linear(5, 4), [DropConnect(at="missing*")])


def test_a_weight_has_one_drop_connect():
    declared = [DropConnect(), DropConnect(name="again", at="0")]
    with pytest.raises(DeclarationError, match="a weight can have one tuned noise of a kind"):
        stnify(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)), declared)


def test_each_layer_has_its_own_rate_if_asked():
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 40))
    stn = stnify(model, [DropConnect(per_layer=True)], seed=0)
    stn.hyperparameters.set_values({"drop_connect.0": 0.1, "drop_connect.1": 0.8})
    shares = {}
    for noise in stn.model._stnify.weight_noises:
        factors = noise.factors(stn.model.get_parameter, stn.hyperparameters.current)
        shares.update({n: float((factors[n] == 0).double().mean()) for n in noise.sharing})
    # 2000 and 1600 weights: a standard deviation is at most 0.013.
    assert shares == pytest.approx({"0.weight": 0.1, "1.weight": 0.8}, abs=0.05)
