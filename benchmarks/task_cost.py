"""What tuning costs on the tasks of the short runs: a whole iteration over one with values held.

    python -m benchmarks.task_cost --data PATH

The loops are those of ``benchmarks/tasks.py``, data loader included. Rounds of both alternate in
one process, and ratios are formed round by round.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.reports import RESULTS, circumstances, write
from benchmarks.step_cost import PERIOD, seconds, spread
from benchmarks.tasks import TASKS, Data, Task, batches
from stnify import stnify

LIMIT = 2.2
"""Of a whole iteration by the default settings."""

STRENGTH = 0.35
"""At which all hyperparameters start."""

METHODS: dict[str, dict[str, Any]] = {"fixed": {"method": "fixed"}, "default": {}}
"""What is compared: name to what ``stnify`` is called with."""


def iterations(task: Task, data: Data, settings: dict[str, Any]) -> Iterator[None]:
    """Train for ever; each item is one iteration."""
    torch.manual_seed(0)
    model = task.build()
    stn = stnify(
        model,
        task.declare(STRENGTH),
        optimizer=task.optimizer(model.parameters()),
        criterion=task.criterion,
        train_loader=batches(data.train, task.batch),
        valid_loader=batches(data.valid, 2 * task.batch),
        warmup_steps=0,
        seed=0,
        **settings,
    )
    model, optimizer, loader = stn
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            task.criterion(model(inputs), targets).backward()
            optimizer.step()
            yield


def measure(task: Task, data: Data, rounds: int) -> dict[str, Any]:
    """Return seconds of an iteration, and the ratio of tuned to fixed, over rounds."""
    device = torch.device("cpu")
    loops = {name: iterations(task, data, settings) for name, settings in METHODS.items()}

    def period(name: str) -> Callable[[], None]:
        def take() -> None:
            for _ in range(PERIOD):
                next(loops[name])

        return take

    times: dict[str, list[float]] = {name: [] for name in loops}
    for warm_up in (True, *[False] * rounds):
        for name in loops:
            took = seconds(period(name), device) / PERIOD
            if not warm_up:
                times[name].append(took)
    pairs = zip(times["default"], times["fixed"], strict=True)
    return {
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratio": spread([tuned / fixed for tuned, fixed in pairs]),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for name in options.tasks:
        task = TASKS[name]
        result = {"task": name, **measure(task, task.load(options.data, 0), options.rounds)}
        result["met"] = result["ratio"]["median"] <= LIMIT
        results.append(result)
        print(f"{name:15}", "{median:.2f} [{q1:.2f}, {q3:.2f}]".format(**result["ratio"]))
    report = {"limit": LIMIT, **circumstances(torch.device("cpu")), "results": results}
    path = options.out / "task_cost_cpu.json"
    write(path, report)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
