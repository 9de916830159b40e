"""The README keeps its word: its code runs, its numbers were measured, its map is complete."""

import json
import re
from pathlib import Path

import pytest
import torch

import stnify
from benchmarks.ingredients import INGREDIENTS
from stnify import Declaration

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
INGREDIENT_COSTS = RESULTS / "step_cost_cpu_ingredients.json"
COSTS = sorted({*RESULTS.glob("step_cost_*.json")} - {INGREDIENT_COSTS})
EAGER = RESULTS / "step_cost_cpu.json"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def cost_rows(report):
    """Table rows: medians of ratios to a plain step."""
    mode = "compiled" if report["compiled"] else "eager"
    for result in report["results"]:
        parts = ("general", "response", "validation", "whole")
        ratios = [f"{result['ratio'][part]['median']:.2f}" for part in parts]
        cells = [result["model"], mode, result["response"], *ratios, f"{result['peak_ratio']:.2f}"]
        yield f"| {' | '.join(cells)} |"


def missed_bars(report):
    """One line for every bar the benchmark found missed."""
    for bar in report.get("bars", []):
        if not bar["met"]:
            yield "- {model}, {response}, {part}: {measured} against a bar of {limit}.".format(
                **bar
            )


def seed_rows(report):
    """Table rows: medians over seeds."""
    for start in report["starts"]:
        losses = [f"{start[method]['test_loss']:.3f}" for method in ("fixed", "delta")]
        accuracies = [f"{start[method]['test_accuracy']:.1%}" for method in ("fixed", "delta")]
        pairs = [f"{loss} ({share})" for loss, share in zip(losses, accuracies, strict=True)]
        wins = f"{start['seeds_where_tuning_is_better']} of {start['seeds']}"
        yield f"| {start['dropout']} | {' | '.join(pairs)} | {wins} |"


@pytest.fixture(scope="module")
def namespace():
    """What the README's Python code leaves behind, run from top to bottom."""
    torch.manual_seed(0)
    found = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), found)
    return found


def test_its_code_runs_and_tunes(namespace):
    stn = namespace["stn"]
    assert len(blocks("python")) >= 4
    assert stn.counters.training_steps > 0
    assert stn.counters.validation_steps > 0
    assert stn.values() != stn.history.records[0].values


def test_what_it_exports_is_the_users_class(namespace):
    plain = namespace["plain"]
    assert type(plain) is type(namespace["fresh"])
    assert plain.state_dict().keys() == namespace["fresh"].state_dict().keys()
    assert namespace["model"].state_dict().keys() != plain.state_dict().keys()


def test_the_loop_after_is_the_loop_before():
    before, after = (block.partition("\nfor epoch in ") for block in blocks("python")[1:3])
    assert before[2]
    assert before[2] == after[2]
    assert before[0] in after[0]
    assert before[0] != after[0]


def test_its_commands_are_two_and_the_second_is_the_one_ci_runs():
    commands = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert len(commands) == 2
    assert all((ROOT / path).exists() for path in ("recipes/quickstart.py", ".ci/test"))
    assert commands[0].endswith("recipes/quickstart.py")
    assert '-e ".[quickstart]"' in commands[0]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[0] not in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("path", COSTS, ids=lambda path: path.stem)
def test_its_table_of_costs_is_the_measured_one(path):
    report = json.loads(path.read_text())
    rows = list(cost_rows(report))
    assert rows
    assert all(row in README for row in rows)
    report["results"][0]["ratio"]["whole"]["median"] += 0.02
    assert next(cost_rows(report)) not in README
    assert report["torch"] in README
    assert report["device"] in README


def test_it_admits_every_bar_that_is_missed():
    report = json.loads(EAGER.read_text())
    found = re.findall(r"^- .* against a bar of .*\.$", README, re.MULTILINE)
    assert found == list(missed_bars(report))
    report["bars"][0]["met"] = not report["bars"][0]["met"]
    assert found != list(missed_bars(report))


def test_its_table_of_results_is_the_measured_one():
    report = json.loads((RESULTS / "quickstart_seeds.json").read_text())
    rows = list(seed_rows(report))
    assert len(rows) == 2
    assert all(row in README for row in rows)
    report["starts"][0]["delta"]["test_loss"] += 0.01
    assert next(seed_rows(report)) not in README


def count_rows(report):
    for result in report["results"]:
        yield f"| {result['hyperparameters']:,} | {result['ratio']['median']:.2f} |"


def task_cost_rows(report):
    for result in report["results"]:
        yield f"| {result['task']} | {result['ratio']['median']:.2f} |"


def augmentation_rows(report):
    for result in report["results"]:
        ratios = [
            f"{result['ratio_to_stnify'][side]['median']:.2f}"
            for side in ("stnify_compiled", "torchvision", "kornia")
        ]
        yield f"| {' | '.join(['x'.join(map(str, result['batch'])), *ratios])} |"


def short_budget_rows(report):
    """One row for each task and settings: medians from the low, the middle and the high start."""
    found = {(row["task"], row["method"], row["start"]): row for row in report["summary"]}
    settings = [key[:2] for key in found if key[1] in ("default", "paper") and key[2] == "low"]
    for task, method in sorted(settings):
        starts = [found[task, method, start] for start in ("low", "middle", "high")]
        losses = [f"{row['validation']:.2f} ({row['test']:.2f})" for row in starts]
        worst = max(row["worst seed"] for row in starts)
        cells = [task, method, *losses, f"{worst:.2f}", str(starts[0]["seeds"])]
        yield f"| {' | '.join(cells)} |"


def search_rows(report):
    """One row for each task that was searched, in the time of one tuned run and of five."""
    found = {(row["task"], row["method"], row["start"]): row for row in report["summary"]}
    for task in sorted({task for task, method, _ in found if method == "tpe"}):
        searches = [found[task, m, budget] for budget in ("1x", "5x") for m in ("random", "tpe")]
        losses = [f"{row['validation']:.2f} ({row['test']:.2f})" for row in searches]
        seeds = dict.fromkeys(str(row["seeds"]) for row in searches)  # one number if all are alike
        yield f"| {' | '.join([task, *losses, ', '.join(seeds)])} |"


def ingredient_rows(budget, costs):
    """Each ingredient of the default settings by itself, and the papers': quality, then cost."""
    whole = {r["response"]: r["ratio"]["whole"]["median"] for r in costs["results"]}
    whole["paper"] = whole["full"]
    found = {r["method"]: {} for r in budget["summary"] if r["task"] == "mnist_mlp"}
    for row in (row for row in budget["summary"] if row["task"] == "mnist_mlp"):
        found[row["method"]][row["start"]] = f"{row['validation']:.2f} ({row['test']:.2f})"
    for name in (*INGREDIENTS, "paper"):
        losses = [found[name][start] for start in ("low", "middle", "high")]
        yield f"| {' | '.join([name, *losses, f'{whole[name]:.2f}'])} |"


def conversion_rows(report):
    for result in report["results"]:
        plain, proven = (result[way]["median"] for way in ("plain", "proven"))
        yield f"| {result['model']} | {plain:.1f} | {result['limit']:.0f} | {proven:.1f} |"


@pytest.mark.parametrize(
    ("name", "rows_of"),
    [
        ("hyperparameter_count_cpu", count_rows),
        ("task_cost_cpu", task_cost_rows),
        ("augmentations_cpu", augmentation_rows),
        ("conversion_time", conversion_rows),
        ("short_budget", short_budget_rows),
        ("short_budget", search_rows),
    ],
)
def test_its_smaller_tables_are_the_measured_ones(name, rows_of):
    rows = list(rows_of(json.loads((RESULTS / f"{name}.json").read_text())))
    assert len(rows) >= 2
    assert all(row in README for row in rows)
    assert rows[0].replace(".", ",") not in README


def test_its_table_of_ingredients_is_the_measured_one():
    budget = json.loads((RESULTS / "short_budget.json").read_text())
    costs = json.loads(INGREDIENT_COSTS.read_text())
    rows = list(ingredient_rows(budget, costs))
    assert all(row in README for row in rows)
    costs["results"][-1]["ratio"]["whole"]["median"] += 0.02
    assert not all(row in README for row in ingredient_rows(budget, costs))


def test_it_says_how_many_aims_of_short_runs_are_met():
    report = json.loads((RESULTS / "short_budget.json").read_text())
    bars, text = report["bars"], " ".join(README.split())
    met = {bar["bar"]: 0 for bar in bars}
    for bar in bars:
        met[bar["bar"]] += bar["met"]
    assert f"(met {met['validation']} times of {len(bars) // 3})" in text
    assert f"test loss within 4% ({met['test']} times)" in text
    assert f"3% above the start held fixed ({met['worst seed']} times)" in text
    assert f"{sum(met.values())} of {len(bars)} are met" in text
    tasks = {bar["task"] for bar in bars}
    assert f"on {len(report['better than the grid'])} of {len(tasks)}." in text


def test_it_says_how_many_idle_directions_are_called_sure():
    report = json.loads((RESULTS / "idle_directions.json").read_text())
    shares = {by: report[f"idle called sure by {by}"] for by in ("blocks", "controls")}
    text = " ".join(README.split())
    assert f"{shares['blocks']:.0%} of hyperparameters without any effect are above" in text
    assert shares["controls"] == 0
    count = sum(r["diagnoses"] for r in report["results"]) * 8
    assert f"none of {count} others like them is above" in text
    acting = [r["controls"]["dropout"] for r in report["results"]]
    assert f"which does act, is at {min(acting):.1f} to {max(acting):.1f} (medians" in text


def signs_at_the_end(task):
    """For each settings and point, how many signs that retraining to the end knows are right."""
    report = json.loads((RESULTS / f"hypergradient_{task}.json").read_text())
    found = {}
    for start in report["starts"].values():
        for settings, estimate in start["estimates"].items():
            for point in estimate["points"]:
                signs = point["compared"]["signs"]
                last = max((k for k in signs if k.startswith("retrained")), key=numbers_last)
                found.setdefault(settings, []).append(tuple(signs[last]))
    return found


def numbers_last(name):
    return int(name.split()[1])


def right_and_known(task):
    """By settings, how many of the signs that retraining knows are right; and how many it knows."""
    found = signs_at_the_end(task)
    right = {name: sum(one for one, _ in points) for name, points in found.items()}
    (known,) = {sum(of for _, of in points) for points in found.values()}
    return right, known


def test_the_signs_it_tells_of_are_the_measured_ones():
    text = " ".join(README.split())
    right, known = right_and_known("mnist_mlp")
    said = f"{right['default']} of the {known} signs that retraining to the end knows are right"
    assert f"{said} by the default settings, {right['paper']} by the papers'" in text
    right, known = right_and_known("fashion_cnn")
    counts = right["default"], right["single perturbations"], right["paper"]
    assert (
        "{} of {} by the defaults, {} by single perturbations and {} by".format(
            counts[0], known, *counts[1:]
        )
        in text
    )
    ridge = signs_at_the_end("ridge")
    all_right = {n: sum(one == of for one, of in points) for n, points in ridge.items()}
    assert len(ridge["default"]) == 6
    assert (all_right["default"], all_right["single perturbations"]) == (5, 1)
    assert "right at five of six points, the single ones at one" in text


def test_the_aims_of_the_smaller_tables_are_met():
    counts = json.loads((RESULTS / "hyperparameter_count_cpu.json").read_text())["results"]
    ratio = {result["hyperparameters"]: result["ratio"]["median"] for result in counts}
    assert ratio[100] < 1.15
    times = json.loads((RESULTS / "conversion_time.json").read_text())["results"]
    assert all(result["plain"]["median"] <= result["limit"] for result in times)
    assert {result["model"] for result in times} == {"resnet50", "vit_base_patch16_224"}


def test_its_map_lists_every_file_once():
    section = README.split("## The rooms")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\S+\.py)` \|", section, re.MULTILINE)
    files = {str(p.relative_to(ROOT / "stnify")) for p in (ROOT / "stnify").rglob("*.py")}
    assert set(listed) == files
    assert len(listed) == len(files)


def test_its_catalogue_lists_every_kind():
    section = README.split("## What it tunes")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    kinds = {name for name, kind in vars(stnify).items() if is_kind(kind)}
    assert listed == kinds
    assert "Dropout" in kinds


def is_kind(value):
    return isinstance(value, type) and issubclass(value, Declaration) and value is not Declaration


def test_links_and_citation_keys_lead_somewhere():
    for target in re.findall(r'(?:\]\(|src=")(?!http)([^)#"]+)', README):
        assert (ROOT / target).exists(), target
    for key, paper in (("DeltaSTN", "2010.13514"), ("STN", "1903.03088")):
        assert re.search(rf"^\[{key}\]: https://arxiv.org/abs/{paper}$", README, re.MULTILINE)
    assert "[NoSuchKey]:" not in README
