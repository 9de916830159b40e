"""What is true of a hypergradient: by training on with other values, and by linear algebra.

Everything is in unconstrained units.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tasks import Data, Examples, Task
from stnify import STN, stnify
from stnify.streams import RandomStream
from stnify.tunable import evaluating

DAMPINGS = (1e-1, 1e-2, 1e-3)
"""What is added to the curvature."""

FLOWS = tuple(round(10 ** (i / 4)) for i in range(21))
"""Steps of gradient descent for the flow value: 1 to 100,000."""

RANK = 40
"""Dimensions of the Krylov space."""

CURVATURE_EXAMPLES = 2000
"""Training examples, one mask each, that the curvature is taken of."""


# Training -----------------------------------------------------------------------------------------


@dataclass
class Course:
    """A training run with hyperparameters held, every step of which can be taken again.

    Batches, masks and perturbations of a step depend on its number and the noise's seed alone.

    Attributes:
        task: What is trained.
        data: On what.
        stn: The model and what trains it.
        taken: Steps so far.
    """

    task: Task
    data: Data
    stn: STN
    taken: int = 0
    _orders: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def begin(cls, task: Task, data: Data, start: float, settings: Mapping[str, Any]) -> "Course":
        """Convert a fresh network, the same one whatever the settings."""
        torch.manual_seed(0)
        model = task.build()
        stn = stnify(
            model,
            task.declare(start),
            optimizer=task.optimizer(model.parameters()),
            criterion=task.criterion,
            train_loader=list(in_batches(data.train, task.batch)),
            valid_loader=list(in_batches(data.valid, 2 * task.batch)),
            total_steps=task.epochs * math.ceil(len(data.train[0]) / task.batch),
            seed=0,
            **settings,
        )
        return cls(task, data, stn)

    @property
    def length(self) -> int:
        """Steps of the whole run."""
        return self.task.epochs * self._epoch

    @property
    def _epoch(self) -> int:
        return math.ceil(len(self.data.train[0]) / self.task.batch)

    def batch(self, step: int, noise: int) -> Examples:
        """Return the batch of a step."""
        epoch, index = divmod(step, self._epoch)
        key = noise, epoch
        if key not in self._orders:
            generator = torch.Generator().manual_seed(mixed(noise, epoch))
            self._orders = {key: torch.randperm(len(self.data.train[0]), generator=generator)}
        rows = self._orders[key].split(self.task.batch)[index]
        return self.data.train[0][rows], self.data.train[1][rows]

    def advance(self, until: int, noise: int = 0) -> None:
        """Train on, hyperparameters and perturbation scale held, until that step."""
        for step in range(self.taken, until):
            reseed(self.stn, mixed(noise, step))
            with held(self.stn):
                self.stn.step(self.batch(step, noise))
        self.taken = until

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of everything, for ``go_back``."""
        return copy.deepcopy({"stn": self.stn.state_dict(), "taken": self.taken})

    def go_back(self, snapshot: dict[str, Any]) -> None:
        """Be where ``snapshot`` was taken."""
        self.stn.load_state_dict(copy.deepcopy(snapshot["stn"]))
        self.taken = snapshot["taken"]

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the loss of all validation examples, eval mode."""
        inputs, targets = self.data.valid
        with evaluating(self.stn.model):
            return float(self.task.criterion(self.stn.model(inputs), targets))

    def fingerprint(self) -> float:
        """Return a number that two runs share only if their general parameters are the same."""
        return sum(
            float(parameter.detach().double().abs().sum())
            for parameter in self.stn.model._stnify.general_parameters().values()
        )


def in_batches(examples: Examples, size: int) -> Iterator[Examples]:
    """Yield ``examples`` in order."""
    yield from zip(examples[0].split(size), examples[1].split(size), strict=True)


def mixed(noise: int, step: int) -> int:
    """Return the seed of one step."""
    return 1_000_003 * (noise + 1) + step


def reseed(stn: STN, seed: int) -> None:
    """Let everything that ``stn`` draws from here on depend on ``seed`` alone."""
    stream = stn._tuner.stream
    stream.load_state_dict(RandomStream(seed, stream.device).state_dict())


@contextmanager
def held(stn: STN) -> Iterator[None]:
    """Put lambda and sigma back, afterwards, to the bit."""
    space = stn.hyperparameters
    parameters = space.unconstrained, space.raw_scale
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                if not torch.equal(parameter, value):
                    parameter.copy_(value)


@torch.no_grad()
def move(stn: STN, offsets: Tensor) -> None:
    """Add ``offsets``, ``(h,)``, to lambda."""
    stn.hyperparameters.unconstrained.add_(offsets.to(stn.hyperparameters.unconstrained))


# Retraining ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branches:
    """Runs that trained on from one state with different values, under one noise.

    Attributes:
        effects: Change of the validation loss with each hyperparameter, ``(horizons, h)``.
        centres: Mean of the runs' general parameters, ``(horizons, p)``.
        changes: Change of the general parameters, ``(horizons, h, p)``.
    """

    effects: Tensor
    centres: Tensor
    changes: Tensor


def design(count: int) -> Tensor:
    """Return signs, ``(runs, count)``, with orthogonal columns, every row with its opposite."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < count:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    return torch.cat([hadamard, -hadamard])[:, :count]


def branches(
    course: Course, snapshot: dict[str, Any], horizons: Sequence[int], noise: int, offset: float
) -> Branches:
    """Train on from ``snapshot`` with all hyperparameters moved by ``offset``, as designed."""
    signs = design(len(course.stn.hyperparameters.columns))
    losses = torch.zeros(len(horizons), len(signs), dtype=torch.float64)
    centres, changes = [torch.zeros(())] * len(horizons), [torch.zeros(())] * len(horizons)
    for run, row in enumerate(signs):
        course.go_back(snapshot)
        move(course.stn, offset * row)
        for i, horizon in enumerate(horizons):
            course.advance(snapshot["taken"] + horizon, noise)
            losses[i, run] = course.validation_loss()
            weights = flat(parameters_of(course.stn))
            centres[i] = centres[i] + weights / len(signs)
            slopes = (row / offset / len(signs)).to(weights)
            changes[i] = changes[i] + slopes[:, None] * weights
    course.go_back(snapshot)
    effects = losses @ signs / offset / len(signs)
    return Branches(effects, torch.stack(centres), torch.stack(changes))


def drifts(course: Course, found: Sequence[Branches]) -> Tensor:
    """Return what the mean movement of the weights does to the loss, ``(seeds, horizons, h)``.

    It is the part of the effect that is not the weights' noise: the validation gradient, where the
    *other* seeds are on average, times the change of the weights. The general parameters are put
    back.
    """
    parameters = parameters_of(course.stn)
    before = flat(parameters).clone()
    drift: list[list[Tensor]] = []
    for i, one in enumerate(found):
        others = [other for j, other in enumerate(found) if j != i] or [one]
        drift.append([])
        for horizon, changes in enumerate(one.changes):
            write(parameters, torch.stack([other.centres[horizon] for other in others]).mean(0))
            drift[-1].append((changes @ validation_gradient(course)).double())
    write(parameters, before)
    return torch.stack([torch.stack(rows) for rows in drift])


@torch.no_grad()
def write(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Overwrite ``parameters`` with the numbers of ``vector``."""
    for parameter, value in zip(parameters, shaped(vector, parameters), strict=True):
        parameter.copy_(value)


# Implicit differentiation -------------------------------------------------------------------------

Product = Callable[[Tensor], Tensor]


def parameters_of(stn: STN) -> list[nn.Parameter]:
    """Return the general parameters."""
    return list(stn.model._stnify.general_parameters().values())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all numbers in one dimension."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def shaped(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of ``vector`` in the shapes of ``parameters``."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def decay_coefficients(stn: STN) -> Tensor:
    """Return the weight decay of every number in the general parameters, ``(p,)``."""
    values, names = stn.values(), list(stn.model._stnify.general_parameters())
    decays = dict.fromkeys(names, 0.0)
    for site in stn.plan.decays:
        for name in site.parameters:
            decays[name] += values[site.column]
    parameters = stn.model._stnify.general_parameters()
    return flat([torch.full_like(parameters[name], decays[name]) for name in names])


def training_gradient(course: Course, noise: int) -> Tensor:
    """Return the training loss's gradient over all examples at the current values, ``(p,)``."""
    stn, parameters = course.stn, parameters_of(course.stn)
    reseed(stn, mixed(noise, 0))
    stn.model.train()
    total = torch.zeros(sum(parameter.numel() for parameter in parameters))
    total = total.to(parameters[0])
    for batch in in_batches(course.data.train, 1000):
        loss = stn.criterion(stn.model(batch[0]), batch[1])
        share = len(batch[0]) / len(course.data.train[0])
        total += share * flat(torch.autograd.grad(loss, parameters))
    return total + decay_coefficients(stn) * flat(parameters)


def validation_gradient(course: Course) -> Tensor:
    """Return the gradient of the validation loss for the general parameters, ``(p,)``."""
    model, (inputs, targets) = course.stn.model, course.data.valid
    with evaluating(model):
        loss = course.task.criterion(model(inputs), targets)
        return flat(torch.autograd.grad(loss, parameters_of(course.stn)))


def mixed_derivative(course: Course, column: int, noise: int, offset: float) -> Tensor:
    """Return how the training gradient changes with one hyperparameter, ``(p,)``.

    A central difference under common masks: what a mask keeps has no derivative in its rate.
    """
    step = torch.zeros(len(course.stn.hyperparameters.columns))
    step[column] = offset
    gradients = []
    for sign in (1, -1):
        with held(course.stn):
            move(course.stn, sign * step)
            gradients.append(training_gradient(course, noise))
    return (gradients[0] - gradients[1]) / (2 * offset)


def curvature(course: Course, *, exact: bool) -> Product:
    """Return the product with the curvature of the training loss under fixed masks.

    Args:
        course: Where it is.
        exact: The Hessian rather than the Gauss-Newton matrix.
    """
    stn, parameters = course.stn, parameters_of(course.stn)
    inputs, targets = (part[:CURVATURE_EXAMPLES] for part in course.data.train)
    reseed(stn, mixed(0, 1))
    stn.model.train()
    prediction, decays = stn.model(inputs), decay_coefficients(stn)
    loss = stn.criterion(prediction, targets)
    if exact:
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)

        def hessian(vector: Tensor) -> Tensor:
            parts = shaped(vector, parameters)
            return flat(torch.autograd.grad(gradient, parameters, parts, retain_graph=True))

        return lambda vector: hessian(vector) + decays * vector
    (slope,) = torch.autograd.grad(loss, prediction, create_graph=True)
    weights = torch.zeros_like(prediction, requires_grad=True)
    pulled = torch.autograd.grad(prediction, parameters, weights, create_graph=True)

    def gauss_newton(vector: Tensor) -> Tensor:
        parts = shaped(vector, parameters)
        (pushed,) = torch.autograd.grad(pulled, weights, parts, retain_graph=True)
        (curved,) = torch.autograd.grad(slope, prediction, pushed, retain_graph=True)
        return flat(torch.autograd.grad(prediction, parameters, curved, retain_graph=True))

    return lambda vector: gauss_newton(vector) + decays * vector


def krylov(product: Product, start: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of the Krylov space, ``(rank, p)``, and the matrix in it.

    Lanczos with full orthogonalisation; stops where the space is exhausted.
    """
    basis = [start / start.norm()]
    images: list[Tensor] = []
    for _ in range(rank):
        image = product(basis[-1])
        images.append(image)
        rest = image
        for _ in range(2):
            known = torch.stack(basis)
            rest = rest - known.t() @ (known @ rest)
        if len(basis) == rank or rest.norm() < 1e-6 * image.norm():
            break
        basis.append(rest / rest.norm())
    found = torch.stack(basis)
    matrix = (found @ torch.stack(images).t()).double()
    return found, (matrix + matrix.t()) / 2


def filtered(
    space: tuple[Tensor, Tensor], start: Tensor, functions: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, Tensor]:
    """Return ``function(G) start`` for functions of eigenvalues, by name."""
    basis, matrix = space
    values, vectors = torch.linalg.eigh(matrix)
    first = start.norm().double() * vectors[0]
    return {
        name: basis.t() @ (vectors @ (function(values.clamp(min=1e-12)) * first)).to(basis)
        for name, function in functions.items()
    }


def responses(rate: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return by name what stands for the inverse of an eigenvalue."""
    damped = {f"damping {d:g}": lambda x, d=d: 1 / (x + d) for d in DAMPINGS}
    flows = {f"flow {k}": lambda x, k=k: -torch.expm1(-k * rate * x) / x for k in FLOWS}
    return {**damped, **flows}


def implicit(
    course: Course, *, rate: float, offset: float, masks: int, exact: bool
) -> dict[str, Tensor]:
    """Return the implicit and the flow values, ``(masks, h)`` each, by name.

    Args:
        course: Where it is.
        rate: What a step of gradient descent is worth.
        offset: Half the distance of the mixed derivative's central difference.
        masks: Seeds of masks for the mixed derivative.
        exact: The Hessian rather than the Gauss-Newton matrix.
    """
    gradient = validation_gradient(course)
    space = krylov(curvature(course, exact=exact), gradient, RANK)
    adjoints = filtered(space, gradient, responses(rate))
    stacked = torch.stack(list(adjoints.values()))
    columns = range(len(course.stn.hyperparameters.columns))
    found = torch.stack(
        [
            torch.stack(
                [-(stacked @ mixed_derivative(course, j, noise, offset)).double() for j in columns]
            )
            for noise in range(masks)
        ]
    )
    return dict(zip(adjoints, found.unbind(-1), strict=True))
