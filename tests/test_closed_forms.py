"""Fixed points and hypergradients that can be computed by hand: ridge regression and relatives."""

import math

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import stnify
from stnify import Hyperparameter, WeightDecay, presets
from stnify.space import Column, HyperparameterSpace

LINEAR = (-math.inf, math.inf)
"""Range in which constrained and unconstrained hyperparameters are the same number."""

EXPONENTIAL = (0.0, math.inf)
"""Range whose unconstrained hyperparameter is the logarithm of the constrained one."""


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["paper", "antithetic"])
def settings(request) -> dict[str, bool | float]:
    """Settings of the response step: the papers', and the same with opposite perturbations.

    Its learning rate is left to the tests: theirs converge whatever the perturbation scale.
    """
    paper = presets.paper()
    chosen = {k: paper[k] for k in ("antithetic", "response_fraction", "response_every")}
    return chosen if request.param == "paper" else {**chosen, "antithetic": True}


@pytest.fixture(scope="module")
def diabetes() -> tuple[Tensor, Tensor]:
    """Ten standardised features and the standardised target of 442 patients."""
    inputs, target = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
    return standardise(inputs), standardise(target[:, None])


def standardise(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / values.std(0, correction=0)


def repeated(batch: tuple[Tensor, Tensor], times: int) -> tuple[Tensor, Tensor]:
    return batch[0].repeat(times, 1), batch[1].repeat(times, 1)


def half_mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (prediction - target).square().sum(-1).mean()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected).norm() / expected.norm())


def train(stn: stnify.STN, batch: tuple[Tensor, Tensor], steps: int, *, anneal=False) -> None:
    """Run an ordinary loop on one full batch, the hyperparameters frozen."""
    stn.freeze()
    model, optimizer, _ = stn
    scheduler = CosineAnnealingLR(optimizer, steps) if anneal else None
    for _ in range(steps):
        optimizer.zero_grad()
        stn.observe(batch)
        stn.criterion(model(batch[0]), batch[1]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def jacobian(stn: stnify.STN, weight: str = "weight") -> Tensor:
    """Return U W_response of a layer with one output, ``(in, h)``."""
    response = stn.model.weight_responses()[weight]
    return response.response.detach().t() @ response.gate.detach()


# Exact expectations -------------------------------------------------------------------------------


def factorial_draws(space: HyperparameterSpace, batch: int) -> Tensor:
    """Draw every combination of signs equally often, in ``2 ** h`` equal blocks of the batch.

    Products of up to three draws have exactly the mean they have under the normal distribution, so
    that the mean over data repeated once for each block *is* the expectation of a loss of third
    degree in epsilon, such as Eq. G.2.
    """
    count = len(space.columns)
    assert batch % 2**count == 0, "the batch must hold the data 2 ** h times"
    block = torch.arange(batch) // (batch // 2**count)
    return 1.0 - 2.0 * (block[:, None] >> torch.arange(count) & 1)


@pytest.fixture
def exact_expectations(monkeypatch) -> None:
    monkeypatch.setattr("stnify.perturb.standard_normal", factorial_draws)


def test_factorial_draws_have_the_moments_of_the_normal_distribution():
    columns = [Column(name, 0.0, LINEAR, 1.0, True, "Hyperparameter") for name in "abc"]
    space = HyperparameterSpace(columns, torch.float64, torch.device("cpu"))
    draws = factorial_draws(space, 16)
    assert torch.equal(draws.mean(0), torch.zeros(3))
    assert torch.equal(draws.t() @ draws / 16, torch.eye(3))
    assert torch.equal(torch.einsum("bi,bj,bk->ijk", draws, draws, draws), torch.zeros(3, 3, 3))
    fourth = draws.pow(4).mean(0)
    assert torch.equal(fourth, torch.ones(3)), "three under the normal: no use beyond degree three"


# Ridge regression ---------------------------------------------------------------------------------


def hessian(inputs: Tensor, coefficient: Tensor | float) -> Tensor:
    return inputs.t() @ inputs / len(inputs) + coefficient * torch.eye(inputs.shape[1])


def ridge(inputs: Tensor, target: Tensor, coefficient: Tensor | float) -> Tensor:
    """Minimise ``||Xw - t||^2 / 2n + coefficient ||w||^2 / 2``.

    Eq. G.9 divided by n: the coefficient is the lambda / n of Eq. G.1.
    """
    return torch.linalg.solve(hessian(inputs, coefficient), inputs.t() @ target / len(inputs))


def ridge_jacobian(inputs: Tensor, target: Tensor, coefficient: float) -> Tensor:
    """Differentiate ``ridge`` in the coefficient: Eq. G.8."""
    optimum = ridge(inputs, target, coefficient)
    return -torch.linalg.solve(hessian(inputs, coefficient), optimum)


def biased_ridge(inputs: Tensor, target: Tensor, coefficient: float, scale: float):
    """Return where Eqs. G.7 and G.8 hold at once: the weight, then its Jacobian.

    With A for the Hessian, ``A w + sigma^2 Theta = X't`` and ``A Theta = -w``.
    """
    curvature = hessian(inputs, coefficient)
    biased = curvature - scale**2 * torch.linalg.inv(curvature)
    optimum = torch.linalg.solve(biased, inputs.t() @ target / len(inputs))
    return optimum, -torch.linalg.solve(curvature, optimum)


DECAY = 0.5
WIDE = 0.35
"""A perturbation scale at which G.7 differs by several per cent, yet its objective is convex:
sigma must be below the smallest eigenvalue of the Hessian."""


NARROW = 0.002
"""A perturbation scale for noisy draws, which leave an error of its order.

One draw serves the whole batch then, and the weight starts at its optimum: away from it the noise
of the gradient is of the order of the residual over the scale."""


def tuned_ridge(
    method: str, decay: WeightDecay, *, learning_rate: float, momentum: float, **settings: float
) -> stnify.STN:
    model = nn.Linear(10, 1, bias=False)
    return stnify.stnify(
        model,
        [decay],
        optimizer=torch.optim.SGD(model.parameters(), learning_rate, momentum),
        criterion=half_mean_square,
        method=method,
        seed=0,
        **settings,
    )


@pytest.mark.usefixtures("exact_expectations")
def test_delta_reaches_the_ridge_weight_and_its_jacobian(diabetes, settings):
    decay = WeightDecay(init=DECAY, range=LINEAR, scale=WIDE)
    stn = tuned_ridge(
        "delta", decay, learning_rate=0.4, momentum=0.5, response_lr=1 / WIDE**2, **settings
    )
    train(stn, repeated(diabetes, 2), 500)
    expected = ridge(*diabetes, DECAY), ridge_jacobian(*diabetes, DECAY)
    # Deterministic gradients converge to rounding error; 500 steps leave about 1e-10.
    assert relative_error(stn.model.weight.t(), expected[0]) < 1e-9
    assert relative_error(jacobian(stn), expected[1]) < 1e-9
    biased = biased_ridge(*diabetes, DECAY, WIDE)
    assert relative_error(stn.model.weight.t(), biased[0]) > 0.02
    assert relative_error(jacobian(stn), biased[1]) > 0.02


@pytest.mark.usefixtures("exact_expectations")
def test_stn_reaches_the_biased_weight_and_jacobian(diabetes):
    decay = WeightDecay(init=DECAY, range=LINEAR, scale=WIDE)
    balance = 1 / (DECAY**2 + WIDE**2)  # uncentred: the layer receives lambda + epsilon
    stn = tuned_ridge("stn", decay, learning_rate=0.1, momentum=0.9, response_lr=balance)
    train(stn, repeated(diabetes, 2), 1500)
    found = stn.export().weight.detach().t()
    assert torch.equal(found, stn.model.weight.detach().t() + DECAY * jacobian(stn))
    biased = biased_ridge(*diabetes, DECAY, WIDE)
    # Deterministic, but badly conditioned: about 1e-4 is left after these steps.
    assert relative_error(found, biased[0]) < 1e-3
    assert relative_error(jacobian(stn), biased[1]) < 1e-3
    assert relative_error(found, ridge(*diabetes, DECAY)) > 0.02
    assert relative_error(jacobian(stn), ridge_jacobian(*diabetes, DECAY)) > 0.02


@pytest.mark.parametrize(
    ("interval", "inner"), [(LINEAR, 1.0), (EXPONENTIAL, DECAY)], ids=["linear", "exponential"]
)
def test_delta_reaches_the_jacobian_with_its_own_draws(diabetes, interval, inner, settings):
    """``inner`` is the derivative of the constrained value: one, or exp(lambda)."""
    decay = WeightDecay(init=DECAY, range=interval, scale=NARROW, per_example=False)
    stn = tuned_ridge(
        "delta", decay, learning_rate=0.1, momentum=0.9, response_lr=1 / NARROW**2, **settings
    )
    optimum, expected = ridge(*diabetes, DECAY), inner * ridge_jacobian(*diabetes, DECAY)
    stn.model.weight.data.copy_(optimum.t())
    train(stn, diabetes, 900, anneal=True)
    assert torch.allclose(stn.model.weight.t(), optimum, atol=1e-12)
    # Draws leave noise of the order of the scale; the exponential's curvature shifts the fixed
    # point by the order of the scale squared.
    assert relative_error(jacobian(stn), expected) < 1e-3
    assert relative_error(jacobian(stn), expected * DECAY) > 0.1


def test_delta_reaches_the_jacobian_by_default_settings(diabetes):
    """Adam and opposite perturbations, now and then, on half of a batch that repeats itself."""
    decay = WeightDecay(init=DECAY, range=LINEAR, scale=NARROW, per_example=False)
    stn = tuned_ridge("delta", decay, learning_rate=0.1, momentum=0.9)
    optimum, expected = ridge(*diabetes, DECAY), ridge_jacobian(*diabetes, DECAY)
    stn.model.weight.data.copy_(optimum.t())
    train(stn, repeated(diabetes, 2), 3000, anneal=True)
    assert torch.allclose(stn.model.weight.t(), optimum, atol=1e-12)
    # Steps of Adam anneal to nothing; draws leave noise of the order of the scale.
    assert relative_error(jacobian(stn), expected) < 1e-3
    assert relative_error(jacobian(stn), expected * DECAY) > 0.1


# A dense response ---------------------------------------------------------------------------------


def test_a_dense_response_reaches_the_jacobian_of_any_quadratic_loss(settings):
    """Theorem 3, Eq. C.9: the best-response Jacobian is ``-A^-1 B``.

    A linear layer with one input has one gate for each weight, so that its response
    ``diag(W_response) U`` is any matrix; fed with ones, it returns its own perturbed weights.
    """
    weights, count = 6, 3
    factor = torch.randn(weights, weights)
    curvature = factor @ factor.t() / weights + torch.eye(weights)
    mixed, slope = torch.randn(weights, count), torch.randn(weights)
    names = [f"hyperparameter{i}" for i in range(count)]

    def quadratic(prediction: Tensor, target: Tensor) -> Tensor:
        values = torch.stack([stn.hyperparameters[name] for name in names], dim=-1)
        pull = values @ mixed.t() + slope
        return (prediction * (0.5 * prediction @ curvature + pull)).sum(-1).mean()

    model = nn.Linear(1, weights, bias=False)
    start = [0.3, -1.2, 2.0]
    stn = stnify.stnify(
        model,
        [Hyperparameter(name, value, LINEAR) for name, value in zip(names, start, strict=True)],
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        criterion=quadratic,
        response_lr=1.0,
        seed=0,
        **settings,
    )
    train(stn, (torch.ones(64, 1), torch.zeros(64, 1)), 600)
    response = stn.model.weight_responses()["weight"]
    found = response.response.detach() * response.gate.detach()
    optimum = -torch.linalg.solve(curvature, mixed @ torch.tensor(start) + slope)
    # Once the weight is optimal the gradient vanishes at the fixed point for every draw.
    assert relative_error(model.weight[:, 0], optimum) < 1e-8
    assert relative_error(found, -torch.linalg.solve(curvature, mixed)) < 1e-8
    assert relative_error(found, -mixed) > 0.1


# A gate that is the exact best response -----------------------------------------------------------


def jacobian_norm(model: nn.Module, batch: tuple[Tensor, Tensor], value: Tensor) -> Tensor:
    inputs = batch[0].detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return 0.5 * value * slope.square().sum(-1)


@pytest.mark.usefixtures("exact_expectations")
def test_gates_reach_the_derivative_of_the_best_response_of_a_linear_network(diabetes, settings):
    """[STN] Theorem 2: gates of the principal components, ``d / (d + exp(lambda))``.

    ``d`` is the variance of a component. Relative to the weights at lambda_0, which "gate" gates,
    their derivative in lambda is ``-exp(lambda) / (d + exp(lambda))``.
    """
    inputs = diabetes[0]
    variances, components = torch.linalg.eigh(hessian(inputs, 0.0))
    gates = variances / (variances + DECAY)
    slopes = (1 / gates)[:, None]  # of the unregularised solution; excites all components alike
    target = inputs @ components @ slopes
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 1, bias=False))
    model[0].weight.data = gates[:, None] * components.t()
    model[1].weight.data = slopes.t()
    model[1].requires_grad_(False)
    start, slow = model[0].weight.detach().clone(), 1e-5  # steep slopes, and already at its optimum
    stn = stnify.stnify(
        model,
        [Hyperparameter("smoothness", DECAY, EXPONENTIAL, scale=NARROW, penalty=jacobian_norm)],
        optimizer=torch.optim.SGD([model[0].weight], slow, momentum=0.8),
        criterion=half_mean_square,
        response="gate",
        response_lr=0.1 / (slow * NARROW**2),
        **settings,
    )
    train(stn, repeated((inputs, target), 2), 400)
    found = stn.model.weight_responses()["0.weight"].gate.detach()[:, 0]
    expected = -DECAY / (variances + DECAY)
    assert torch.allclose(model[0].weight, start, atol=1e-9), "the best response at lambda_0 moved"
    # The curvature of the exponential shifts the fixed point by the order of the scale squared.
    assert relative_error(found, expected) < 1e-3
    assert relative_error(found, expected * gates) > 0.1, "relative to the ungated components"


# Hypergradient ------------------------------------------------------------------------------------


class Tasks(nn.Module):
    """Predicts several targets from the same inputs, by one linear layer each."""

    def __init__(self, inputs: int, targets: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(inputs, 1, bias=False) for _ in range(targets))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([head(inputs) for head in self.heads], dim=-1)


TASKS = 3
DECAYS = (0.5, 1.0, 2.0)


def split_tasks(diabetes: tuple[Tensor, Tensor]):
    """Predict the target, body mass and blood pressure from the other eight features."""
    targets = torch.cat([diabetes[1], diabetes[0][:, 2:4]], dim=1)
    inputs = torch.cat([diabetes[0][:, :2], diabetes[0][:, 4:]], dim=1)
    return (inputs[:300], targets[:300]), (inputs[300:], targets[300:])


def implicit_hypergradient(training, validation, interval) -> Tensor:
    """Differentiate the validation loss of the closed-form optimum: Eqs. 2.3 and 2.4."""

    def validation_loss(hyperparameters: Tensor) -> Tensor:
        values = hyperparameters.exp() if interval == EXPONENTIAL else hyperparameters
        columns = [
            ridge(training[0], target[:, None], value)
            for target, value in zip(training[1].t(), values, strict=True)
        ]
        return half_mean_square(validation[0] @ torch.cat(columns, dim=1), validation[1])

    values = torch.tensor(DECAYS)
    return torch.func.grad(validation_loss)(values.log() if interval == EXPONENTIAL else values)


def tuned_tasks(
    decay: WeightDecay, *, scale: float, learning_rate: float, momentum: float, **settings: float
) -> stnify.STN:
    """Convert for decays of ``DECAYS`` and a hyperparameter optimizer that moves nothing."""
    model = Tasks(8, TASKS)
    stn = stnify.stnify(
        model,
        [decay],
        optimizer=torch.optim.SGD(model.parameters(), learning_rate, momentum),
        criterion=half_mean_square,
        hyper_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.0),
        scale=scale,
        response_lr=1 / scale**2,
        seed=0,
        **settings,
    )
    stn.hyperparameters.set_values(dict(zip(stn.values(), DECAYS, strict=True)))
    return stn


def hypergradient(stn: stnify.STN, batch: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """Average the gradient of validation steps that move nothing."""
    found = [stn.validation_step(batch).gradients["unconstrained"] for _ in range(steps)]
    return torch.stack(found).mean(0)


@pytest.mark.usefixtures("exact_expectations")
def test_the_hypergradient_is_the_implicit_one(diabetes, settings):
    training, validation = (repeated(batch, 2**TASKS) for batch in split_tasks(diabetes))
    decay = WeightDecay(init=1.0, range=LINEAR, per_layer=True)
    stn = tuned_tasks(decay, scale=WIDE, learning_rate=0.2, momentum=0.8, **settings)
    assert torch.equal(hypergradient(stn, validation, 1), torch.zeros(TASKS)), "a fresh response"
    train(stn, training, 500)
    found = hypergradient(stn, validation, 1)
    expected = implicit_hypergradient(training, validation, LINEAR)
    # Deterministic gradients: 500 steps leave about 1e-10.
    assert relative_error(found, expected) < 1e-7
    assert relative_error(found, expected.flip(0)) > 0.1


def test_the_hypergradient_is_the_implicit_one_with_its_own_draws(diabetes, settings):
    training, validation = split_tasks(diabetes)
    decay = WeightDecay(init=1.0, range=EXPONENTIAL, per_layer=True, per_example=False)
    stn = tuned_tasks(decay, scale=NARROW, learning_rate=0.1, momentum=0.9, **settings)
    for head, target, value in zip(stn.model.heads, training[1].t(), DECAYS, strict=True):
        head.weight.data.copy_(ridge(training[0], target[:, None], value).t())
    train(stn, training, 600, anneal=True)
    found = hypergradient(stn, validation, 20)
    expected = implicit_hypergradient(training, validation, EXPONENTIAL)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9999
    # Noise of the order of the scale, from the draws of the response and the validation steps.
    assert relative_error(found, expected) < 0.01
    assert torch.cosine_similarity(found, expected.flip(0), dim=0) < 0.99


@pytest.mark.parametrize("preset", [presets.paper, dict], ids=["paper", "default"])
def test_the_hypergradient_points_the_implicit_way_by_the_settings_as_they_are(diabetes, preset):
    """Nothing is narrowed: sigma is one, a factor of e in each decay."""
    training, validation = split_tasks(diabetes)
    model = Tasks(8, TASKS)
    stn = stnify.stnify(
        model,
        [WeightDecay(init=1.0, per_layer=True)],
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        criterion=half_mean_square,
        seed=0,
        **{**preset(), "hyper_optimizer": lambda parameters: torch.optim.SGD(parameters, 0.0)},
    )
    stn.hyperparameters.set_values(dict(zip(stn.values(), DECAYS, strict=True)))
    assert set(stn.scales().values()) == {1.0}
    train(stn, training, 600, anneal=True)
    found = hypergradient(stn, validation, 50)
    expected = implicit_hypergradient(training, validation, EXPONENTIAL)
    # The response is a secant over a factor of e, so the gradient is of a smoothed loss.
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98
    assert 0.6 < float(found.norm() / expected.norm()) < 1.0
    assert torch.cosine_similarity(found, expected.flip(0), dim=0) < 0.9
