"""The recipes run: files, printed numbers, and the promise that every recipe is run by a test."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch

import stnify
from recipes import quickstart

ROOT = Path(quickstart.__file__).parent.parent
EPOCHS = 6  # 36 training steps, 7 of them followed by a validation step
NAMES = ["input_dropout", *(f"dropout.layer{i}.0" for i in range(1, 5)), "weight_decay"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def printed(out):
    """What a short run prints, as name to (fixed, tuned)."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(words)))
        quickstart.main(["--epochs", str(EPOCHS), "--out", str(out)])
    rows = re.findall(r"^([a-z][\w. ]*?)\s{2,}(\S+)\s+(\S+)$", "\n".join(lines), re.MULTILINE)
    return {name: (float(fixed), float(tuned)) for name, fixed, tuned in rows}


def test_it_prints_losses_accuracies_and_values_of_both_runs(printed):
    assert list(printed) == ["test loss", "test accuracy", *NAMES]
    assert all(0 < loss < 10 for loss in printed["test loss"])
    assert all(0 <= accuracy <= 1 for accuracy in printed["test accuracy"])


def test_values_held_fixed_stay_and_tuned_ones_move(printed):
    starts = {**dict.fromkeys(NAMES, 0.3), "weight_decay": 5e-4}
    assert {name: printed[name][0] for name in NAMES} == starts
    assert all(printed[name][1] != starts[name] for name in NAMES)


def test_the_schedule_ends_at_the_values_printed(out, printed):
    with (out / "quickstart_schedule.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, *range(5, 36, 5)]
    for name in NAMES:
        # Four digits are printed.
        assert math.isclose(float(rows[-1][name]), printed[name][1], rel_tol=1e-3)
        assert not math.isclose(float(rows[0][name]), printed[name][1], rel_tol=1e-3)


def test_the_picture_is_a_picture(out):
    assert (out / "quickstart_schedule.png").read_bytes().startswith(b"\x89PNG")


def test_the_parts_of_the_data_are_disjoint_and_complete():
    data = quickstart.load(seed=0)
    sizes = [len(part) for part in (data.train, data.valid, data.test)]
    assert sizes == [300, 300, 1197]
    images = torch.cat([part.tensors[0].flatten(1) for part in (data.train, data.valid, data.test)])
    assert len(images.unique(dim=0)) == 1797  # no image occurs twice in the data set
    other = quickstart.load(seed=1)
    assert not torch.equal(data.train.tensors[1], other.train.tensors[1])


def test_a_fixed_run_is_the_plain_loop():
    """The baseline of the comparison, written out without stnify's loop, gives the same network."""
    data = quickstart.load(seed=0)
    run = quickstart.train(data, method="fixed", dropout=1e-6, epochs=1, seed=0)
    torch.manual_seed(0)
    model = quickstart.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    weights = [p for p in model.parameters() if p.ndim > 1]
    loader = torch.utils.data.DataLoader(data.train, quickstart.BATCH, shuffle=True)
    for images, targets in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        norm = sum(weight.square().sum() for weight in weights)
        (loss + 0.5 * 5e-4 * norm).backward()
        optimizer.step()
    loss, accuracy = quickstart.evaluate(model, data.test)
    # Single precision; a dropout of one in a million drops nothing worth noticing.
    assert math.isclose(loss, run.test_loss, rel_tol=1e-2)
    assert math.isclose(accuracy, run.test_accuracy, abs_tol=1e-2)
    untrained, _ = quickstart.evaluate(quickstart.build(), data.test)
    assert not math.isclose(untrained, run.test_loss, rel_tol=1e-2)


def test_the_loop_says_what_it_lacks():
    data = quickstart.load(seed=0)
    with pytest.raises(stnify.UsageError, match="`method` must be one of"):
        quickstart.train(data, method="detla", dropout=0.3, epochs=1, seed=0)


def test_every_recipe_has_a_test():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert recipes
    assert recipes <= tests
    assert not recipes | {"a_recipe_nobody_tests"} <= tests
