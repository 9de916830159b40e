"""The table of short runs: every method makes its rows, and the summary is what they say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import reports, short_budget, tasks


def rows_of(validations, **entries):
    return [
        {"task": "t", "seed": seed, "test": 2 * v, "seconds": 1.0, "validation": v, **entries}
        for seed, v in enumerate(validations)
    ]


@pytest.fixture
def rows():
    """Two seeds, whose best fixed strengths differ: 0.2 with 1.0, and 0.5 with 2.0."""
    fixed = {"0.05": (3.0, 4.0), "0.2": (1.0, 3.0), "0.35": (2.0, 5.0), "0.5": (2.0, 2.0)}
    grid = [row for s, v in fixed.items() for row in rows_of(v, method="grid", start=s)]
    grid += rows_of((4.0, 4.0), method="grid", start="0.7")
    low = rows_of((1.1, 2.0), method="default", start="low")
    searched = rows_of((0.9, 1.9), method="random", start="5x", spent=10.0)
    return grid + low + searched


def test_ratios_are_to_the_best_of_the_grid_of_the_same_seed(rows):
    default, random = short_budget.summary(rows)
    assert (default["method"], default["start"], default["seeds"]) == ("default", "low", 2)
    assert default["validation"] == pytest.approx((1.1 + 1.0) / 2)
    assert default["test"] == pytest.approx((1.1 + 1.0) / 2)
    assert default["fixed start"] == pytest.approx((1.1 / 3 + 2.0 / 4) / 2, abs=1e-3)
    assert default["worst seed"] == pytest.approx(0.5)
    assert (random["method"], random["validation"]) == ("random", pytest.approx(0.925))
    assert random["time"] == 10.0
    assert "fixed start" not in random


def test_bars_are_held_against_the_defaults_alone(rows):
    verdicts = short_budget.judge(short_budget.summary(rows))
    assert {v["bar"]: v["met"] for v in verdicts} == {
        "validation": False,
        "test": False,
        "worst seed": True,
    }


def test_a_task_is_better_by_the_median_of_its_starts():
    table = [
        {"task": task, "method": "default", "start": start, "validation": validation}
        for task, found in {"won": (0.9, 0.99, 3.0), "lost": (0.5, 1.0, 1.01)}.items()
        for start, validation in zip(("low", "middle", "high"), found, strict=True)
    ]
    assert short_budget.better(table) == ["won"]
    assert short_budget.better(table, "paper") == []


def test_searched_strengths_become_values_of_their_own_declaration():
    strengths = {"dropout.1": 0.2, "dropout.3": 0.4, "weight_decay.0": 0.5}
    values = short_budget._values(tasks.TASKS["concrete"], strengths)
    assert values == {
        "dropout.1": 0.2,
        "dropout.3": 0.4,
        "weight_decay.0": pytest.approx(1e-3),
    }


@pytest.mark.filterwarnings("ignore:.*experimental:Warning")
def test_every_method_makes_its_rows_and_none_is_made_twice(tmp_path, monkeypatch, capsys):
    task = replace(tasks.TASKS["digits_vit"], build=network, declare=declared, epochs=2)
    monkeypatch.setattr(short_budget, "TASKS", {"digits": task})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "rows.json"
    arguments = ["--data", ".", "--tasks", "digits", "--seeds", "1", "--out", str(path)]
    arguments += ["--methods", *short_budget.USUAL, "paper", "random", "tpe"]
    short_budget.main(arguments)
    report = json.loads(path.read_text())
    found = {(r["method"], r["start"]) for r in report["rows"]}
    starts = ("low", "middle", "high")
    assert found == {
        *(("grid", str(strength)) for strength in short_budget.GRID),
        *((method, start) for method in ("default", "paper", "replay") for start in starts),
        *((method, budget) for method in ("random", "tpe") for budget in ("1x", "5x")),
    }
    assert len(report["rows"]) == len(found)
    assert len(report["bars"]) == 9
    five = short_budget.chosen(report["rows"], method="tpe", start="5x")[0]
    assert (
        five["trials"] >= short_budget.chosen(report["rows"], method="tpe", start="1x")[0]["trials"]
    )
    capsys.readouterr()
    monkeypatch.setattr(short_budget, "one", None)
    short_budget.main(arguments)
    assert json.loads(path.read_text())["rows"] == report["rows"]


@pytest.mark.filterwarnings("ignore:.*experimental:Warning")
def test_what_is_interrupted_goes_on_run_by_run(tmp_path, monkeypatch):
    """Killed in its third run, it has two rows; what fails is told, and costs no other row."""
    path, tried = tmp_path / "rows.json", []

    def one(failing, error):
        def run(folder, name, method, seed, start):
            tried.append(start)
            if start == failing:
                raise error
            losses = {"validation": 1.0, "test": 1.0, "seconds": 1.0, "values": {}}
            return [{"task": name, "seed": seed, "method": method, "start": start, **losses}]

        return run

    def starts():
        return [r["start"] for r in json.loads(path.read_text())["rows"]]

    arguments = ["--data", ".", "--tasks", "concrete", "--seeds", "1", "--methods", "grid"]
    arguments += ["--out", str(path)]
    monkeypatch.setattr(short_budget, "one", one("0.35", KeyboardInterrupt("killed")))
    with pytest.raises(KeyboardInterrupt, match="killed"):
        short_budget.main(arguments)
    assert starts() == ["0.05", "0.2"]
    monkeypatch.setattr(short_budget, "one", one("0.5", MemoryError("no more")))
    with pytest.raises(SystemExit, match=r"'grid', 0, '0.5'\): MemoryError: no more"):
        short_budget.main(arguments)
    assert starts() == ["0.05", "0.2", "0.35", "0.7"]
    tried.clear()
    monkeypatch.setattr(short_budget, "one", one(None, None))
    short_budget.main(arguments)
    assert tried == ["0.5"]
    assert len(starts()) == 5


def test_a_file_of_results_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    reports.write(path, {"rows": [1]})
    with pytest.raises(TypeError, match="not JSON serializable"):
        reports.write(path, {"rows": [1], "other": object()})

    def cut(self, text):
        with self.open("w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            reports.write(path, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"rows": [1]}


def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Linear(16, 10))


def declared(strength):
    return tasks.layers_of_a_table(strength)[1:]


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    monkeypatch.setattr(short_budget, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(short_budget, "as_completed", list)


class InThisProcess:
    """A pool that computes what is asked for when it is asked for."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, function, *args):
        return Job(function, args)


class Job:
    def __init__(self, function, args):
        self.function, self.args = function, args

    def exception(self):
        try:
            self.found = self.function(*self.args)
        except Exception as error:
            return error
        return None

    def result(self):
        return self.found
