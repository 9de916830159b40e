"""The judge of hypergradients against closed forms, and against what must make it say no."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import hypergradient, tasks, truth
from benchmarks.tasks import Data, Task
from stnify import Dropout, WeightDecay

DECAY = 0.3
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
"""Which coefficient decays each weight."""

SMALL = 0.01
"""A perturbation scale, and an offset: central differences err by its square over six."""

RATE = 0.3
"""Of gradient descent; the largest eigenvalue is about 4."""

ENOUGH = 150
"""Steps that leave of any error exp(-ENOUGH * RATE * DECAY), about 1e-6."""


def two_parts(folder, seed) -> Data:
    inputs, target = (torch.from_numpy(part) for part in load_diabetes(return_X_y=True))
    inputs, target = inputs / inputs.std(0), ((target - target.mean()) / target.std())[:, None]
    return Data(*((inputs[i::3], target[i::3]) for i in range(3)))


def ridge(epochs=ENOUGH) -> Task:
    """Full batches, so that training is deterministic but for perturbations."""
    return Task(
        load=two_parts,
        build=lambda: hypergradient.Groups(GROUP.bincount().tolist()).double(),
        declare=lambda start: [WeightDecay(per_layer=True, init=start)],
        optimizer=lambda parameters: SGD(parameters, RATE),
        criterion=hypergradient.HalfSquare(),
        epochs=epochs,
        batch=148,
    )


def begun(task: Task, **settings) -> truth.Course:
    return truth.Course.begin(task, task.load(None, 0), DECAY, settings)


class ClosedForm:
    """Ridge regression with a coefficient for each group, [DeltaSTN] G.1, by linear algebra."""

    def __init__(self, data: Data) -> None:
        (self.inputs, self.target), (self.valid, self.valid_target) = data.train, data.valid
        gram = self.inputs.t() @ self.inputs / len(self.inputs)
        self.curvature = gram + DECAY * torch.eye(10, dtype=torch.float64)

    def weight(self, offsets=(0.0, 0.0, 0.0)) -> Tensor:
        """Return the optimum at coefficients ``DECAY * exp(offset)``, ``(10, 1)``."""
        coefficients = DECAY * torch.tensor(offsets, dtype=torch.float64).exp()
        decays = coefficients[GROUP].diag()
        gram = self.inputs.t() @ self.inputs / len(self.inputs)
        return torch.linalg.solve(gram + decays, self.inputs.t() @ self.target / len(self.inputs))

    def hypergradient(self) -> Tensor:
        """Return ``-g' A^-1 B``: B's columns are each group's part of ``DECAY * w``."""
        residual = self.valid @ self.weight() - self.valid_target
        gradient = self.valid.t() @ residual / len(self.valid)
        parts = DECAY * self.weight() * (GROUP[:, None] == torch.arange(3))
        return -(parts.t() @ torch.linalg.solve(self.curvature, gradient))[:, 0]


@pytest.fixture(scope="module")
def converged() -> truth.Course:
    course = begun(ridge(), method="fixed")
    course.advance(ENOUGH)
    return course


@pytest.fixture(scope="module")
def expected(converged) -> Tensor:
    return ClosedForm(converged.data).hypergradient()


def relative_error(found, expected) -> float:
    difference = torch.as_tensor(found).double() - torch.as_tensor(expected).double()
    return float(difference.norm() / torch.as_tensor(expected).double().norm())


# The two truths -----------------------------------------------------------------------------------


def test_the_closed_form_is_the_slope_of_the_validation_loss_of_optima(converged):
    """The judge of the judge: central differences of solved problems."""
    closed = ClosedForm(converged.data)

    def loss(offsets) -> Tensor:
        prediction = closed.valid @ closed.weight(offsets)
        return 0.5 * (prediction - closed.valid_target).square().mean()

    steps = 1e-4 * torch.eye(3, dtype=torch.float64)
    slopes = [(loss(step.tolist()) - loss((-step).tolist())) / 2e-4 for step in steps]
    assert relative_error(closed.hypergradient(), torch.stack(slopes)) < 1e-6


def implicit_value(course: truth.Course) -> dict[str, Tensor]:
    return truth.implicit(course, rate=RATE, offset=SMALL, masks=1, exact=True)


def test_the_implicit_value_of_ridge_is_the_closed_form(converged, expected):
    found = implicit_value(converged)
    # Differences err by 2e-5, what is left of training by 1e-6.
    assert relative_error(found["flow 100000"][0], expected) < 1e-4
    assert relative_error(found["flow 10"][0], expected) > 0.05
    assert relative_error(found["damping 0.1"][0], expected) > 0.01


def test_gauss_newton_and_hessian_agree_for_a_linear_model(converged):
    vector = torch.randn(10, dtype=torch.float64)
    products = [truth.curvature(converged, exact=exact)(vector) for exact in (True, False)]
    assert relative_error(*products) < 1e-12
    matrix = ClosedForm(converged.data).curvature
    assert relative_error(products[0], matrix @ vector) < 1e-12


def retrained(course: truth.Course, steps: int, noise: int = 1) -> truth.Branches:
    return truth.branches(course, course.snapshot(), [steps], noise, SMALL)


def test_retraining_ridge_to_the_end_gives_the_closed_form_and_the_implicit_value(
    converged, expected
):
    found = retrained(converged, ENOUGH).effects[0]
    assert relative_error(found, expected) < 1e-4  # differences of an offset of 0.01: 2e-5
    assert relative_error(found, implicit_value(converged)["flow 100000"][0]) < 1e-4
    assert relative_error(-found, expected) > 1


def test_retraining_for_few_steps_gives_the_flow_value(converged, expected):
    found = retrained(converged, 3).effects[0]
    # Steps are not quite the flow: (1 - RATE x)^3 instead of exp(-3 RATE x), x up to 4.
    assert relative_error(found, implicit_value(converged)["flow 3"][0]) < 0.3
    assert relative_error(found, expected) > 0.3


def test_without_noise_the_weights_movement_explains_all(converged):
    found = retrained(converged, 50)
    drift = truth.drifts(converged, [found])[0]
    assert relative_error(drift, found.effects) < 1e-4


def test_the_noise_of_the_weights_is_no_part_of_the_drift(converged):
    """A weight that is thrown about the optimum by ``1 + offset`` costs loss, and has no drift."""
    before = truth.flat(truth.parameters_of(converged.stn)).clone()
    slope = truth.validation_gradient(converged)
    pushed = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pushed -= slope * (slope @ pushed) / (slope @ slope)
    seeds = [
        truth.Branches(torch.zeros(1, 3), (before + sign * pushed)[None], sign * pushed[None, None])
        for sign in (1.0, -1.0)
    ]
    drift = truth.drifts(converged, seeds).mean(0)
    alone = torch.cat([truth.drifts(converged, [seed]) for seed in seeds]).mean(0)
    assert alone.item() > 0.1, "each seed by itself takes the noise for a movement"
    assert drift.item() < 0, "the other seed's centre has it with the opposite sign"
    assert torch.equal(truth.flat(truth.parameters_of(converged.stn)), before)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_design_tells_every_hyperparameter_from_all_others(count):
    signs = truth.design(count)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert torch.equal(signs.t() @ signs, len(signs) * torch.eye(count, dtype=torch.float64))
    slope, matrix = torch.randn(count).double(), torch.randn(count, count).double()
    values = signs @ slope + ((signs @ matrix) * signs).sum(1)
    torch.testing.assert_close(signs.t() @ values / len(signs), slope)
    if count > 2:
        half = signs[: len(signs) // 2]  # not folded: products of two are taken for a third
        assert relative_error(half.t() @ values[: len(half)] / len(half), slope) > 1e-3


# Curvature and masks ------------------------------------------------------------------------------


def noisy_network() -> Task:
    """A network that drops units, on few examples."""

    def load(folder, seed) -> Data:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(40, 5, generator=generator, dtype=torch.float64)
        parts = [(part, (part.sum(1) > 0).long()) for part in inputs.split(20)]
        return Data(*parts, test=parts[1])

    return Task(
        load=load,
        build=lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
        declare=lambda start: [Dropout(after="1", init=start)],
        optimizer=lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        epochs=10,
        batch=6,
    )


def explicit_matrices(course: truth.Course) -> tuple[Tensor, Tensor]:
    """Return Gauss-Newton matrix and Hessian, each entry by itself, under the judge's masks."""
    stn, parameters = course.stn, truth.parameters_of(course.stn)
    truth.reseed(stn, truth.mixed(0, 1))
    inputs, targets = course.data.train
    prediction = stn.model(inputs)
    rows = [
        truth.flat(torch.autograd.grad(entry, parameters, retain_graph=True))
        for entry in prediction.reshape(-1)
    ]
    jacobian = torch.stack(rows)
    of_outputs = torch.autograd.functional.hessian(
        lambda outputs: course.task.criterion(outputs.view_as(prediction), targets),
        prediction.detach().reshape(-1),
    )
    loss = course.task.criterion(prediction, targets)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    entries = torch.cat([slope.reshape(-1) for slope in slopes])
    hessian = [
        truth.flat(torch.autograd.grad(entry, parameters, retain_graph=True)) for entry in entries
    ]
    return jacobian.t() @ of_outputs @ jacobian, torch.stack(hessian)


def test_products_are_those_of_the_explicit_matrices():
    course = begun(noisy_network(), method="fixed")
    course.advance(20)
    explicit = explicit_matrices(course)
    vector = torch.randn(len(explicit[0]), dtype=torch.float64)
    for exact, matrix, other in ((False, *explicit), (True, *explicit[::-1])):
        found = truth.curvature(course, exact=exact)(vector)
        assert relative_error(found, matrix @ vector) < 1e-10
        assert relative_error(found, other @ vector) > 1e-3


def test_functions_of_a_matrix_are_exact_in_a_full_krylov_space():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, start = root @ root.t(), torch.randn(6, generator=generator, dtype=torch.float64)
    functions = {"inverse": lambda x: 1 / (x + 0.5)}
    expected = torch.linalg.solve(matrix + 0.5 * torch.eye(6), start)
    for rank, low, high in ((6, 0.0, 1e-8), (2, 1e-3, 1.0)):
        space = truth.krylov(lambda vector: matrix @ vector, start, rank)
        error = relative_error(truth.filtered(space, start, functions)["inverse"], expected)
        assert low <= error <= high


def test_the_krylov_space_ends_where_it_is_exhausted():
    start = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert len(truth.krylov(lambda vector: matrix @ vector, start, 3)[0]) == 2


def test_images_are_read_from_gzipped_idx(tmp_path):
    values = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (2, 3, 4))
    (tmp_path / "some.gz").write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))
    assert torch.equal(tasks.idx(tmp_path / "some.gz"), values)


# A course -----------------------------------------------------------------------------------------


def test_steps_can_be_taken_again_to_the_bit_and_otherwise_under_other_noise():
    course = begun(noisy_network(), method="fixed")
    course.advance(5)
    snapshot, found = course.snapshot(), []
    for noise in (1, 1, 2):
        course.go_back(snapshot)
        course.advance(15, noise)
        found.append(truth.flat(truth.parameters_of(course.stn)).clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_epoch_has_every_example_once_in_an_order_of_its_noise():
    course = begun(noisy_network(), method="fixed")
    epochs = [
        torch.cat([course.batch(step, noise)[0] for step in steps])
        for noise, steps in ((1, range(4)), (1, range(4, 8)), (2, range(4)))
    ]
    whole = course.data.train[0]
    for epoch in epochs:
        assert torch.equal(epoch.sort(0).values, whole.sort(0).values)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_general_parameters_are_the_same_whatever_tunes_and_hyperparameters_stay():
    courses = [
        begun(noisy_network(), **settings)
        for settings in ({"method": "fixed"}, {"warmup_steps": 0}, {"response": "gate"})
    ]
    for course in courses:
        course.advance(30)
        assert course.stn.values() == {"dropout": pytest.approx(DECAY)}
    assert courses[1].stn.counters.validation_steps > 0
    fingerprints = [course.fingerprint() for course in courses]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]
    with truth.held(courses[0].stn):
        truth.move(courses[0].stn, torch.ones(1))
        assert courses[0].stn.values()["dropout"] > 1.5 * DECAY
        courses[0].advance(40)
    courses[1].advance(40)
    assert courses[0].fingerprint() != courses[1].fingerprint()


# The estimate and the verdict ---------------------------------------------------------------------


def test_the_estimate_at_the_best_response_is_the_closed_form():
    """One coefficient: a response has one direction for each unit, and this network has one unit.

    That a response learns to be the best one is tested with the closed forms.
    """
    task = replace(ridge(), declare=lambda start: [WeightDecay(init=DECAY, scale=SMALL)])
    course = begun(task)
    closed = ClosedForm(course.data)
    truth.write(truth.parameters_of(course.stn), closed.weight()[:, 0])
    change = -torch.linalg.solve(closed.curvature, DECAY * closed.weight())[:, 0]
    expected = closed.hypergradient().sum(0, keepdim=True)
    for sign in (1.0, -1.0):
        responses = course.stn.model.weight_responses().values()
        for response, part in zip(responses, change.split(GROUP.bincount().tolist()), strict=True):
            response.gate.data.fill_(sign)
            response.response.data.copy_(part)
        found = hypergradient.estimates(course, 20)
        assert found.shape == (20, 1)
        assert bool((found.std(0) > 0).all()), "draws differ in their perturbations"
        # Perturbations of 0.01 throw the slope about by as much, averaged over 20 x 147 examples.
        assert relative_error(sign * found.mean(0), expected) < 0.01


def point_of(expected: Tensor) -> dict:
    certain = {"mean": expected.tolist(), "error": [1e-9] * 3}
    doubtful = {"mean": expected.tolist(), "error": [1e9] * 3}
    flows = {f"flow {k}": {"mean": (k * expected).tolist()} for k in truth.FLOWS}
    return {"retraining": {"retrained 10": certain, "drift 10": doubtful}, "implicit": flows}


def test_the_verdict_tells_a_right_estimate_from_one_of_the_wrong_sign(expected):
    def verdict(sign: float) -> dict:
        estimate = {"mean": (sign * expected).tolist(), "std": expected.abs().tolist()}
        return hypergradient.compared(point_of(expected), estimate, seeds=4)

    right, wrong = verdict(1.0), verdict(-1.0)
    assert right["cosine"]["retrained 10"] == 1.0
    assert right["signs"]["retrained 10"] == (3, 3)
    assert wrong["cosine"]["retrained 10"] == -1.0
    assert wrong["signs"]["retrained 10"] == (0, 3)
    assert right["signs"]["drift 10"] == (0, 0), "no sign of the truth is known"
    assert right["signal_to_noise"] == wrong["signal_to_noise"] == [1.0, 1.0, 1.0]


def test_a_sign_from_few_seeds_is_known_only_far_from_zero():
    """Student's interval from four seeds reaches 3.18 standard errors, from two 12.7."""
    truth = {"mean": [3.1, 3.3, 12.8], "error": [1.0, 1.0, 1.0]}
    estimate = [1.0, 1.0, 1.0]
    assert hypergradient.signs(estimate, truth, seeds=4) == (2, 2)
    assert hypergradient.signs(estimate, truth, seeds=2) == (1, 1)


@pytest.mark.parametrize(
    ("size", "steps"), [(0.5, 0.0), (3.0, 3.0), (250.0, 250.0), (1e6, float("inf"))]
)
def test_the_horizon_is_where_the_flow_is_as_large(expected, size, steps):
    flows = point_of(expected)["implicit"]
    found = hypergradient.horizon((size * expected).tolist(), flows)
    assert found == pytest.approx(steps, rel=0.01)


# The whole ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch) -> None:
    problem = hypergradient.Problem(
        ridge(epochs=20), (DECAY,), RATE, SMALL, True, points=(0.5,), seeds=2, draws=4, masks=1
    )
    monkeypatch.setattr(hypergradient, "PROBLEMS", {"tiny": problem})


def rebuilt(path, *arguments) -> dict:
    hypergradient.main(["--task", "tiny", "--out", str(path), *arguments])
    return json.loads((path / "hypergradient_tiny.json").read_text())


@pytest.mark.usefixtures("tiny")
def test_a_report_says_all_and_is_not_made_twice(tmp_path, monkeypatch, capsys):
    report = rebuilt(tmp_path, "--settings", "paper")
    record = report["starts"]["0.3"]
    assert record["names"] == ["weight_decay.weights.0", *record["names"][1:]]
    (point,) = record["points"]
    assert {"retrained 10", "drift 10"} == point["retraining"].keys()
    assert {"commit", "torch"} <= point["circumstances"].keys()
    (estimate,) = record["estimates"]["paper"]["points"]
    assert estimate["fingerprint"] == point["fingerprint"]
    assert "horizon" in capsys.readouterr().out

    def fail(*arguments, **keywords):
        raise AssertionError("the truth was there")

    monkeypatch.setattr(hypergradient, "branches", fail)
    more = rebuilt(tmp_path, "--settings", "paper", "gate")["starts"]["0.3"]
    assert more["estimates"].keys() == {"paper", "gate"}
    assert more["estimates"]["paper"] == record["estimates"]["paper"]
    with pytest.raises(AssertionError, match="the truth was there"):
        rebuilt(tmp_path, "--settings", "paper", "--afresh")


@pytest.mark.usefixtures("tiny")
def test_a_truth_of_other_general_parameters_is_refused(tmp_path, monkeypatch):
    rebuilt(tmp_path, "--settings", "paper")
    slower = replace(
        hypergradient.PROBLEMS["tiny"].task, optimizer=lambda parameters: SGD(parameters, lr=0.05)
    )
    problem = replace(hypergradient.PROBLEMS["tiny"], task=slower)
    monkeypatch.setattr(hypergradient, "PROBLEMS", {"tiny": problem})
    with pytest.raises(RuntimeError, match="must not depend on the settings"):
        rebuilt(tmp_path, "--settings", "gate")
