"""What ``stn.diagnose()`` says of hyperparameters that have no effect, and of one that has.

    python -m benchmarks.idle_directions

A perceptron on scikit-learn's digits, with a dropout behind its hidden layer and sixteen
hyperparameters whose penalty is nought, by the default settings. At thirds of a run it is asked how
many directions are sure: by errors of blocks, and by the first eight of the idle ones as controls
of the other eight.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.reports import RESULTS, circumstances, write
from benchmarks.tasks import adam, batches, digits, momentum
from stnify import Dropout, Hyperparameter, stnify
from stnify.diagnosis import SURE, Diagnosis

EPOCHS, ASKED = 60, 3
OPTIMIZERS = {"SGD": momentum(0.03), "Adam": adam(1e-3)}
STARTS = (0.05, 0.35, 0.7)
IDLE = tuple(f"idle.{i:02}" for i in range(16))
CONTROLS, JUDGED = IDLE[:8], IDLE[8:]


def _nothing(model: nn.Module, batch: Any, value: torch.Tensor) -> torch.Tensor:
    return 0 * value


def diagnoses(optimizer: str, start: float, seed: int) -> Iterator[tuple[Diagnosis, Diagnosis]]:
    """Yield what is said at each third of a run, by blocks and by controls."""
    torch.manual_seed(seed)
    data = digits(Path(), seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    idle = [Hyperparameter(name, 0.5, (0.0, 1.0), penalty=_nothing) for name in IDLE]
    stn = stnify(
        model,
        [Dropout(after="2", init=start, range=(0, 0.95)), *idle],
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        criterion=nn.CrossEntropyLoss(),
        train_loader=batches(data.train, 50),
        valid_loader=batches(data.valid, 100),
        epochs=EPOCHS,
        seed=seed,
    )
    model, steps, loader = stn
    for epoch in range(EPOCHS):
        for inputs, targets in loader:
            steps.zero_grad()
            stn.criterion(model(inputs), targets).backward()
            steps.step()
        if (epoch + 1) % (EPOCHS // ASKED) == 0:
            yield stn.diagnose(2), stn.diagnose(2, controls=CONTROLS)


def judged(optimizer: str, start: float, seeds: int) -> dict[str, Any]:
    """Return how many idle directions are called sure, and how sure the dropout's is."""
    said = [both for seed in range(seeds) for both in diagnoses(optimizer, start, seed)]
    found: dict[str, Any] = {"optimizer": optimizer, "start": start, "diagnoses": len(said)}
    for name, each in zip(("blocks", "controls"), zip(*said, strict=True), strict=True):
        idle = [diagnosis.certainty[i] for diagnosis in each for i in JUDGED]
        acting = [diagnosis.certainty["dropout"] for diagnosis in each]
        found[name] = {
            "idle called sure": round(sum(value > SURE for value in idle) / len(idle), 3),
            "surest idle": round(max(idle), 1),
            "dropout": round(median(acting), 1),
        }
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "idle_directions.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for optimizer, start in product(OPTIMIZERS, STARTS):
        results.append(judged(optimizer, start, options.seeds))
        print(results[-1], flush=True)
    report = {**circumstances(torch.device("cpu")), "results": results}
    for name in ("blocks", "controls"):
        shares = [result[name]["idle called sure"] for result in results]
        report[f"idle called sure by {name}"] = round(sum(shares) / len(shares), 3)
    write(options.out, report)


if __name__ == "__main__":
    main()
