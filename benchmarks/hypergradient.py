"""Does the validation step's gradient point where training on with other values would lead?

On tasks small enough to know, hyperparameters are held while the model trains. At several points
of training the mean of many validation steps (the estimate) is compared with

- ``retrained k``: how the validation loss changes if training goes on for k steps with other
  hyperparameters, from the same state, with the same batches and masks. All are moved at once, up
  or down, in a folded Hadamard design: every run counts for every hyperparameter,
  and no term of even order enters. Mean over seeds of batches and masks.
- ``drift k``: the part of it that the mean movement of the weights explains. The rest is noise in
  the weights, of which more regularisation makes more; neither a best response nor implicit
  differentiation knows of it.
- ``damping d``: the implicit value ``-g' (G + d)^-1 B``, with g the validation gradient, G the
  Gauss-Newton matrix (the Hessian for ridge) of the training loss under fixed masks and B its mixed
  derivative.
- ``flow k``: the same after k steps of gradient descent instead of all,
  ``-g' (1 - exp(-k rate G)) / G B``. The *horizon* of an estimate is the k whose flow value is as
  large. Both are taken in one Krylov space, the one of conjugate gradient.

An estimate's signal-to-noise ratio is over validation steps at one state. The noise that training
has left in the response is common to all of them, and not in it.

Everything is in unconstrained units. The general parameters of a run do not depend on what is
tuned how, so one truth serves all settings; what is in a results file is not done again.

    python -m benchmarks.hypergradient --task mnist_mlp --data DATA --threads 1
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from benchmarks.ingredients import SINGLE
from benchmarks.reports import RESULTS, circumstances, write
from benchmarks.tasks import Data, Task, fashion_mnist, image_mlp, mnist, momentum, three_dropouts
from benchmarks.truth import (
    FLOWS,
    Course,
    branches,
    drifts,
    held,
    implicit,
    in_batches,
    mixed,
    reseed,
)
from stnify import Declaration, Dropout, WeightDecay, presets

SETTINGS: dict[str, dict[str, Any]] = {
    "paper": presets.paper(),
    "default": {},
    "single perturbations": SINGLE,
    "gate": {"response": "gate"},
}
"""Name to what ``stnify`` is called with."""

HORIZONS = (10, 100, 1000)
"""Steps of retraining; the rest of the run comes as well."""

NO_SCALE = -20.0
"""Raw scale whose perturbations are too small to matter: sigma is 2e-9."""


# Tasks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A task with what the judge has to know about it.

    Attributes:
        task: Data, network and what is tuned.
        starts: Strengths at which the hyperparameters are held.
        offset: By how much hyperparameters are moved up and down. At the perturbation scale that
            settings start with, two points are a quadrature of the gradient they smooth.
        exact: Whether the curvature is the Hessian rather than the Gauss-Newton matrix.
        rate: Learning rate over ``1 - momentum``: what a step of gradient descent is worth.
        points: At which fractions of the run the hypergradient is judged.
        seeds: Seeds of batches and masks for retraining.
        draws: Validation steps of an estimate.
        masks: Seeds of masks for the mixed derivative.
    """

    task: Task
    starts: tuple[float, ...]
    rate: float
    offset: float = 1.0
    exact: bool = False
    points: tuple[float, ...] = (0.1, 0.5, 0.9)
    seeds: int = 4
    draws: int = 200
    masks: int = 4


class Groups(nn.Module):
    """Linear regression whose features come in groups, each with a weight of its own."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.weights = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in sizes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of the groups' predictions, ``(batch, 1)``."""
        parts = inputs.split(self.sizes, dim=1)
        predictions = [layer(x) for layer, x in zip(self.weights, parts, strict=True)]
        return torch.stack(predictions).sum(0)


def diabetes(folder: Path, seed: int) -> Data:
    """Return principal components of scikit-learn's 442 patients; ``folder`` is not read.

    They are those of the training part, so no weight's optimum depends on another's decay: a
    response, which has one direction for each unit, can be exact.
    """
    arrays = load_diabetes(return_X_y=True)
    inputs, targets = (torch.from_numpy(array).double() for array in arrays)
    inputs, targets = inputs / inputs.std(0), (targets - targets.mean())[:, None] / targets.std()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    train, valid, test = order.split([300, 100, 42])
    _, directions = torch.linalg.eigh(inputs[train].t() @ inputs[train])
    inputs = inputs @ directions
    return Data(*((inputs[part], targets[part]) for part in (train, valid, test)))


class HalfSquare(nn.Module):
    """Half the mean squared error."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ``()``."""
        return 0.5 * (prediction - target).square().sum(-1).mean()


def small_cnn() -> nn.Module:
    """Return a network of two convolutions for 28x28 images, with a hidden layer of 64."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def rates_and_decay(strength: float) -> list[Declaration]:
    """Declare dropout at the input, of channels and of hidden units, and weight decay."""
    return [
        Dropout("input_dropout", at="input", init=strength, range=(0, 0.95)),
        Dropout("channel_dropout", after="3", init=strength, range=(0, 0.95), channel_dims=2),
        Dropout("hidden_dropout", after="6", init=strength, range=(0, 0.95)),
        WeightDecay(init=1e-5 * 100**strength),
    ]


PROBLEMS: dict[str, Problem] = {
    "ridge": Problem(
        Task(
            diabetes,
            lambda: Groups((3, 3, 4)).double(),
            lambda strength: [WeightDecay(per_layer=True, init=strength)],
            momentum(0.01),
            HalfSquare(),
            epochs=400,
            batch=100,
        ),
        starts=(0.05, 0.7),
        rate=0.1,
        offset=0.1,
        exact=True,
        seeds=2,
    ),
    "mnist_mlp": Problem(
        Task(
            mnist,
            image_mlp,
            three_dropouts,
            momentum(0.03),
            nn.CrossEntropyLoss(),
            epochs=40,
        ),
        starts=(0.05, 0.7),
        rate=0.3,
    ),
    "fashion_cnn": Problem(
        Task(
            fashion_mnist,
            small_cnn,
            rates_and_decay,
            momentum(0.03),
            nn.CrossEntropyLoss(),
            epochs=20,
        ),
        starts=(0.05, 0.5),
        rate=0.3,
    ),
}
"""Name to problem."""


# The estimate -------------------------------------------------------------------------------------


def estimates(course: Course, draws: int) -> Tensor:
    """Return the gradient for lambda of many validation steps, ``(draws, h)``."""
    found: list[Tensor] = []
    while len(found) < draws:
        for batch in in_batches(course.data.valid, 2 * course.task.batch):
            reseed(course.stn, mixed(-1, len(found)))
            with held(course.stn):
                result = course.stn.validation_step(batch)
            found.append(result.gradients["unconstrained"].double().clone())
    return torch.stack(found[:draws])


# Comparing ----------------------------------------------------------------------------------------


def summary(samples: Tensor) -> dict[str, list[float]]:
    """Return mean and standard error over the first dimension, ``(samples, h)``."""
    count = len(samples)
    error = samples.std(0) / math.sqrt(count) if count > 1 else torch.zeros_like(samples[0])
    return {"mean": rounded(samples.mean(0)), "error": rounded(error)}


def rounded(values: Tensor) -> list[float]:
    """Return four digits of each."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors."""
    pair = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return round(float(torch.cosine_similarity(*pair, dim=0)), 3)


def signs(
    estimate: Sequence[float], truth: Mapping[str, Sequence[float]], seeds: int
) -> tuple[int, int]:
    """Return how many signs agree, of those that are known from so many seeds of retraining.

    That is where zero is outside of Student's 95 % interval.
    """
    limit = float(student.ppf(0.975, seeds - 1))
    known = [
        (value > 0) == (mean > 0)
        for value, mean, error in zip(estimate, truth["mean"], truth["error"], strict=True)
        if abs(mean) > limit * error
    ]
    return sum(known), len(known)


def horizon(estimate: Sequence[float], implicit: Mapping[str, Mapping[str, Any]]) -> float:
    """Return after how many steps of gradient descent the flow value is as large as ``estimate``.

    Interpolated between logarithms; 0 and infinity if that is outside ``FLOWS``.
    """
    size = math.hypot(*estimate)
    sizes = [math.hypot(*implicit[f"flow {k}"]["mean"]) for k in FLOWS]
    if size < sizes[0]:
        return 0.0
    for i, (small, large) in enumerate(pairwise(sizes)):
        if small <= size < large:
            part = math.log(size / small) / math.log(large / small)
            return float(f"{FLOWS[i] * (FLOWS[i + 1] / FLOWS[i]) ** part:.3g}")
    return math.inf


def compared(point: Mapping[str, Any], estimate: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Return how an estimate stands to every truth of a point."""
    mean, truths = estimate["mean"], point["retraining"]
    ratios = zip(mean, estimate["std"], strict=True)
    return {
        "cosine": {n: cosine(mean, t["mean"]) for n, t in (truths | point["implicit"]).items()},
        "signs": {name: signs(mean, truth, seeds) for name, truth in truths.items()},
        "signal_to_noise": [float(f"{abs(m) / max(s, 1e-30):.3g}") for m, s in ratios],
        "horizon": horizon(mean, point["implicit"]),
    }


# The record ---------------------------------------------------------------------------------------


def points(course: Course, problem: Problem) -> Iterator[int]:
    """Yield after how many steps ``course``, trained up to there meanwhile, is to be judged."""
    for fraction in problem.points:
        step = round(fraction * course.length)
        course.advance(step)
        yield step


def truths(course: Course, problem: Problem, known: list[dict[str, Any]]) -> Iterator[Any]:
    """Yield what is true at each point that is not ``known``."""
    for step in points(course, problem):
        if step in [point["step"] for point in known]:
            continue
        left = course.length - step
        horizons = [*(k for k in HORIZONS if k < left), left]
        snapshot = course.snapshot()
        found = [
            branches(course, snapshot, horizons, 1 + seed, problem.offset)
            for seed in range(problem.seeds)
        ]
        readings = {
            "retrained": torch.stack([one.effects for one in found]),
            "drift": drifts(course, found),
        }
        values = implicit(
            course,
            rate=problem.rate,
            offset=problem.offset,
            masks=problem.masks,
            exact=problem.exact,
        )
        yield {
            "step": step,
            "fingerprint": course.fingerprint(),
            "validation_loss": round(course.validation_loss(), 5),
            "retraining": {
                f"{reading} {k}": summary(samples[:, i])
                for i, k in enumerate(horizons)
                for reading, samples in readings.items()
            },
            "implicit": {name: summary(value) for name, value in values.items()},
        }


def judged(course: Course, problem: Problem) -> Iterator[dict[str, Any]]:
    """Yield the estimate at each point, perturbed and at the centre."""
    space = course.stn.hyperparameters
    for step in points(course, problem):
        snapshot = course.snapshot()
        found = estimates(course, problem.draws)
        with held(course.stn), torch.no_grad():
            space.raw_scale.fill_(NO_SCALE)
            centre = estimates(course, math.ceil(len(course.data.valid[0]) / course.task.batch / 2))
        fingerprint = course.fingerprint()
        course.go_back(snapshot)
        yield {
            "step": step,
            "fingerprint": fingerprint,
            "mean": rounded(found.mean(0)),
            "std": rounded(found.std(0)),
            "draws": len(found),
            "centre": rounded(centre.mean(0)),
        }


def show(problem: str, start: str, record: Mapping[str, Any]) -> None:
    """Print the table of one start."""
    wanted = ["damping 0.01", "flow 1", "flow 10", "flow 100", "flow 1000"]
    for i, point in enumerate(record["points"]):
        print(f"\n{problem} from {start}, step {point['step']}, loss {point['validation_loss']}")
        print(f"{'':18}", *(f"{name[-20:]:>20}" for name in record["names"]))
        rows = point["retraining"]
        for name, row in (rows | {name: point["implicit"][name] for name in wanted}).items():
            values = zip(row["mean"], row["error"], strict=True)
            print(f"{name:18}", *(f"{f'{mean:+.3g} ± {error:.1g}':>20}" for mean, error in values))
        for name, found in record["estimates"].items():
            estimate, verdict = found["points"][i], found["points"][i]["compared"]
            values = zip(estimate["mean"], verdict["signal_to_noise"], strict=True)
            cells = (f"{f'{mean:+.3g} (snr {ratio:.2g})':>20}" for mean, ratio in values)
            print(f"{name:18}", *cells, f" horizon {verdict['horizon']:.3g}")
            angles = (f"{n}: {verdict['cosine'][n]:+.2f}" for n in (*rows, *wanted[:1]))
            agreeing = (f"{k}: {a}/{b}" for k, (a, b) in verdict["signs"].items())
            print(f"{'':18} cosine", ", ".join(angles), "| signs", ", ".join(agreeing))


def judge_start(
    problem: Problem,
    start: float,
    data: Data,
    record: dict[str, Any],
    settings: Sequence[str],
    save: Callable[[], None],
) -> None:
    """Add to ``record`` what is not there yet; ``save`` after each part.

    Raises:
        RuntimeError: General parameters depend on the settings, so that the truth is of others.
    """
    origin = circumstances(torch.device("cpu"))
    course = Course.begin(problem.task, data, start, {"method": "fixed"})
    record.setdefault("names", list(course.stn.hyperparameters.names))
    record.setdefault("points", [])
    record.setdefault("estimates", {})
    for point in truths(course, problem, record["points"]):
        record["points"].append({**point, "circumstances": origin})
        save()
    for name in settings:
        if name in record["estimates"]:
            continue
        course = Course.begin(problem.task, data, start, SETTINGS[name])
        found = list(judged(course, problem))
        for point, estimate in zip(record["points"], found, strict=True):
            if point["fingerprint"] != estimate["fingerprint"]:
                raise RuntimeError(
                    f"general parameters must not depend on the settings, but those of {name!r} "
                    f"differ at step {point['step']}: the truth on file is of others. Take it "
                    f"again with --afresh, unless the method changes how weights are trained."
                )
            estimate["compared"] = compared(point, estimate, problem.seeds)
        record["estimates"][name] = {"circumstances": origin, "points": found}
        save()


def main(arguments: list[str] | None = None) -> None:
    """Judge, print and write the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--starts", nargs="+", type=float, help="only these; ordinarily all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--again", action="store_true", help="estimate anew; truth is kept")
    parser.add_argument("--afresh", action="store_true", help="forget what is in the results file")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST and so on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.task:
        problem, path = PROBLEMS[name], options.out / f"hypergradient_{name}.json"
        known = path.exists() and not options.afresh
        report: dict[str, Any] = json.loads(path.read_text()) if known else {"task": name}
        data = problem.task.load(options.data, 0)

        def save(path: Path = path, report: dict[str, Any] = report) -> None:
            write(path, report)

        for start in options.starts or problem.starts:
            record = report.setdefault("starts", {}).setdefault(f"{start:g}", {})
            if options.again:
                for setting in options.settings:
                    record.get("estimates", {}).pop(setting, None)
            judge_start(problem, start, data, record, options.settings, save)
            show(name, f"{start:g}", record)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
