"""Short runs: do tuned runs end as good as the best fixed values, from good and from bad starts?

    python -m benchmarks.short_budget --data PATH --jobs 2
    python -m benchmarks.short_budget --data PATH --tasks mnist_mlp --methods grid default

Every run is one row of the results, written as soon as it is there (a search, when it ends; a
tuned run by the defaults, with its replay); rows that are there already are not run again, so it
goes on where it was interrupted. Tasks are those of ``benchmarks/tasks.py``.

``grid`` holds five strengths, the same for every hyperparameter. What ``SETTINGS`` names is tuned
from a low, a middle and a high start; ``replay`` trains a plain model by the schedule that
``default`` found. ``random`` and ``tpe`` are searches of as many runs as fit in the time of a tuned
one, which is taken just before, and in five times that time; TPE draws its first four at random, so
that in the time of one run both are the same.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import optuna
import torch

from benchmarks.ingredients import INGREDIENTS
from benchmarks.reports import RESULTS, circumstances, write
from benchmarks.tasks import TASKS, Data, Run, Task, run
from stnify import History, presets
from stnify.schedule import Record

FILE = RESULTS / "short_budget.json"
STARTS = {"low": 0.05, "middle": 0.35, "high": 0.7}
GRID = (0.05, 0.2, 0.35, 0.5, 0.7)
SEARCHED = (0.02, 0.9)
"""Strengths that searches choose from, for each hyperparameter by itself."""

BUDGETS = (1, 5)
"""Of searches, in multiples of the time of one tuned run."""

BARS = {"validation": 1.02, "test": 1.04, "worst seed": 1.03}
"""At most these multiples: medians, of the grid's best and of its test loss; and in the worst seed,
of the start held fixed."""

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": presets.paper(),
    **INGREDIENTS,
}
"""Name to what ``stnify`` is called with."""

Row = dict[str, Any]


def row(method: str, start: str, found: Run, **more: Any) -> Row:
    """Return one result."""
    values = {name: float(f"{value:.4g}") for name, value in found.values.items()}
    losses = {"validation": round(found.validation, 5), "test": round(found.test, 5)}
    times = {"seconds": round(found.seconds, 2)}
    return {"method": method, "start": start, **losses, **times, "values": values, **more}


def grid(task: Task, data: Data, seed: int, start: str) -> Iterator[Row]:
    """Hold one strength of the grid."""
    yield row("grid", start, run(task, data, seed, float(start), {"method": "fixed"}))


def tuned(task: Task, data: Data, seed: int, start: str, method: str) -> Iterator[Row]:
    """Tune from a start by the settings of that name; replay what the defaults found."""
    found = run(task, data, seed, STARTS[start], SETTINGS[method])
    yield row(method, start, found)
    if method == "default":
        replayed = {"method": "fixed", "schedule": found.history}
        yield row("replay", start, run(task, data, seed, STARTS[start], replayed))


def random(task: Task, data: Data, seed: int, _: str) -> Iterator[Row]:
    """Search at random, for every budget."""
    sampler = optuna.samplers.RandomSampler(seed=seed)
    yield from _searched(task, data, seed, "random", sampler)


def tpe(task: Task, data: Data, seed: int, _: str) -> Iterator[Row]:
    """Search by TPE, for every budget."""
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    yield from _searched(task, data, seed, "tpe", sampler)


def _searched(
    task: Task, data: Data, seed: int, method: str, sampler: optuna.samplers.BaseSampler
) -> Iterator[Row]:
    """Try values until the budget is spent; give the best at each budget."""
    self_tuned = run(task, data, seed, STARTS["middle"], SETTINGS["default"])
    study = optuna.create_study(sampler=sampler)
    best: Run | None = None
    spent = 0.0
    for budget in BUDGETS:
        while spent < budget * self_tuned.seconds:
            trial = study.ask()
            strengths = {n: trial.suggest_float(n, *SEARCHED) for n in self_tuned.values}
            schedule = History([Record(0, _values(task, strengths), {}, float("nan"))])
            settings = {"method": "fixed", "schedule": schedule}
            found = run(task, data, seed, GRID[2], settings)
            study.tell(trial, found.validation)
            spent += found.seconds
            if best is None or found.validation < best.validation:
                best = found
        assert best is not None
        yield row(method, f"{budget}x", best, trials=len(study.trials), spent=round(spent, 1))


def _values(task: Task, strengths: Mapping[str, float]) -> dict[str, float]:
    """Return what each hyperparameter starts at if it is declared with its strength."""
    found = {}
    for name, strength in strengths.items():
        owners = [d for d in task.declare(strength) if name == d.name or name.startswith(d.name)]
        init = max(owners, key=lambda d: len(d.name)).init
        assert init is not None
        found[name] = init
    return found


class Method(NamedTuple):
    """One way to find values.

    Attributes:
        rows: ``(task, data, seed, start) -> rows``.
        starts: What it is run from; of a search, the last row of the only run.
    """

    rows: Callable[[Task, Data, int, str], Iterator[Row]]
    starts: Sequence[str]


METHODS: dict[str, Method] = {
    "grid": Method(grid, tuple(map(str, GRID))),
    **{name: Method(partial(tuned, method=name), tuple(STARTS)) for name in SETTINGS},
    "random": Method(random, (f"{BUDGETS[-1]}x",)),
    "tpe": Method(tpe, (f"{BUDGETS[-1]}x",)),
}
"""Name to method; ``default`` makes the rows of ``replay`` too."""

USUAL = ("grid", "default")
"""What the main table needs, in some three hours on two cores; others are asked for by name."""


def one(folder: Path, name: str, method: str, seed: int, start: str) -> list[Row]:
    """Return the rows of one method with one seed from one start."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = TASKS[name]
    found = METHODS[method].rows(task, task.load(folder, seed), seed, start)
    commit = circumstances(torch.device("cpu"))["commit"]
    return [{"task": name, "seed": seed, **r, "commit": commit} for r in found]


def chosen(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Return the rows with these entries."""
    return [r for r in rows if all(r[key] == value for key, value in wanted.items())]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return medians over seeds of each task, method and start, beside the grid's best.

    The grid's best is the strength that is best for that seed, by validation loss.
    """
    found = []
    keys = sorted({(r["task"], r["method"], r["start"]) for r in rows if r["method"] != "grid"})
    for task, method, start in keys:
        ratios: dict[str, list[float]] = {
            "validation": [],
            "test": [],
            "fixed start": [],
            "time": [],
        }
        for r in chosen(rows, task=task, method=method, start=start):
            fixed = chosen(rows, task=task, method="grid", seed=r["seed"])
            if not fixed:
                continue
            best = min(fixed, key=lambda f: f["validation"])
            ratios["validation"].append(r["validation"] / best["validation"])
            ratios["test"].append(r["test"] / best["test"])
            ratios["time"].append(
                r.get("spent", r["seconds"]) / median(f["seconds"] for f in fixed)
            )
            if start in STARTS:
                same = chosen(fixed, start=str(STARTS[start]))[0]
                ratios["fixed start"].append(r["validation"] / same["validation"])
        medians = {key: round(median(v), 3) for key, v in ratios.items() if v}
        worst = (
            {"worst seed": round(max(ratios["fixed start"]), 3)} if ratios["fixed start"] else {}
        )
        count = len(ratios["validation"])
        found.append(
            {"task": task, "method": method, "start": start, "seeds": count, **medians, **worst}
        )
    return found


def judge(table: Sequence[Row], method: str = "default") -> list[Row]:
    """Hold the medians of ``method`` against the bars."""
    return [
        {"task": r["task"], "start": r["start"], "bar": bar, "limit": limit, "measured": r[bar]}
        | {"met": r[bar] <= limit}
        for r in table
        if r["method"] == method
        for bar, limit in BARS.items()
        if bar in r
    ]


def better(table: Sequence[Row], method: str = "default") -> list[str]:
    """Return the tasks on which ``method``, by its median start, is better than the grid's best."""
    ratios: dict[str, list[float]] = {}
    for r in chosen(table, method=method):
        if "validation" in r:  # there is a grid to compare with
            ratios.setdefault(r["task"], []).append(r["validation"])
    return sorted(task for task, found in ratios.items() if median(found) < 1)


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Return rows, summary and verdicts."""
    table = summary(rows)
    return {
        **circumstances(torch.device("cpu")),
        "summary": table,
        "bars": judge(table),
        "better than the grid": better(table),
        "rows": sorted(rows, key=lambda r: (r["task"], r["method"], r["seed"], r["start"])),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print the summary, and write everything."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(USUAL))
    parser.add_argument("--seeds", type=int, help="instead of the number each task has")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    rows: list[Row] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    wanted = [
        (name, method, seed, start)
        for name in options.tasks
        for method in METHODS
        if method in options.methods
        for seed in range(options.seeds or TASKS[name].seeds)
        for start in METHODS[method].starts
        if not chosen(rows, task=name, method=method, seed=seed, start=start)
    ]
    failed: list[str] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(one, options.data, *job): job for job in wanted}
        for future in as_completed(futures):
            error = future.exception()
            if error is not None:
                failed.append(f"{futures[future]}: {type(error).__name__}: {error}")
                continue
            rows += future.result()
            write(options.out, report(rows))
            print(*future.result(), sep="\n", flush=True)
    write(options.out, report(rows))
    for entry in summary(rows):
        print(entry)
    if failed:
        raise SystemExit("\n".join(["these failed, all others are written:", *failed]))


if __name__ == "__main__":
    main()
