"""History: recorded, saved, drawn, replayed; and fixed values that are moved about."""

import copy
import math
import sys

import pytest
import torch
from cases import IDLE, batches, convert, perceptron, train
from hypothesis import example, given
from hypothesis import strategies as st

from stnify import (
    DeclarationError,
    Dropout,
    History,
    Hyperparameter,
    UsageError,
    WeightDecay,
)
from stnify.schedule import Record

numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


AWKWARD = {"step": 0.1, "validation_loss": 0.2, "scale.step": 0.3, 'a,b\n"c': 0.4}


@st.composite
def histories(draw):
    """Draw a history of some steps with any names and numbers."""
    columns = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    steps = sorted(draw(st.lists(st.integers(0, 10**9), min_size=1, max_size=6)))
    losses = st.floats(allow_infinity=False)
    return History(
        [
            Record(
                step,
                {name: draw(numbers) for name in columns},
                {name: draw(numbers) for name in columns},
                draw(losses),
            )
            for step in steps
        ]
    )


def plain(history):
    """Return the records with a NaN that equals itself."""
    return [
        (r.step, r.values, r.scales, None if math.isnan(r.validation_loss) else r.validation_loss)
        for r in history.records
    ]


def recorded(values):
    return History([Record(step, {"a": value}, {"a": 1.0}, 0.5) for step, value in values.items()])


# Files --------------------------------------------------------------------------------------------


@given(history=histories())
@example(history=History([Record(1, AWKWARD, AWKWARD, 0.5), Record(2, AWKWARD, AWKWARD, 0.5)]))
def test_csv_brings_a_history_back(tmp_path_factory, history):
    path = tmp_path_factory.mktemp("history") / "history.csv"
    history.to_csv(path)
    assert plain(History.from_csv(path)) == plain(history)


@given(history=histories())
def test_json_brings_a_history_back(tmp_path_factory, history):
    path = tmp_path_factory.mktemp("history") / "history.json"
    history.to_json(path)
    assert plain(History.from_json(path)) == plain(history)
    assert plain(History.from_dict(history.to_dict())) == plain(history)


def test_files_tell_histories_apart(tmp_path):
    left, right = recorded({0: 0.1, 5: 0.2}), recorded({0: 0.1, 5: 0.25})
    for write, read in ((History.to_csv, History.from_csv), (History.to_json, History.from_json)):
        write(left, tmp_path / "file")
        assert plain(read(tmp_path / "file")) != plain(right)


def test_csv_has_one_row_for_each_record_and_one_column_for_each_number(tmp_path):
    stn = convert(perceptron(0.2), [Dropout(), WeightDecay()])
    train(*stn, 2)
    stn.history.to_csv(tmp_path / "history.csv")
    header, *rows = (tmp_path / "history.csv").read_text().splitlines()
    assert header == "step,validation_loss,dropout,weight_decay,scale.dropout,scale.weight_decay"
    assert [row.split(",")[0] for row in rows] == ["0", "1", "2"]
    assert float(rows[-1].split(",")[2]) == stn.values()["dropout"]


def test_losses_that_are_not_finite_are_null_in_json(tmp_path):
    history = History([Record(1, {"a": 0.5}, {"a": 1.0}, math.inf)])
    history.to_json(tmp_path / "history.json")
    text = (tmp_path / "history.json").read_text()
    assert "null" in text
    assert "Infinity" not in text


# Values over time ---------------------------------------------------------------------------------


@given(
    steps=st.lists(st.integers(0, 20), min_size=1, max_size=8).map(sorted), asked=st.integers(0, 25)
)
def test_at_returns_the_last_record_so_far(steps, asked):
    history = History([Record(s, {"a": float(i)}, {"a": 1.0}, 0.0) for i, s in enumerate(steps)])
    expected = history.records[0].values
    for record in history.records:  # the slow, obvious way
        if record.step <= asked:
            expected = record.values
    assert history.at(asked) == expected


def test_a_history_begins_with_the_start_and_names_its_columns():
    stn = convert(perceptron(0.2), [Dropout(), WeightDecay()])
    start = stn.values()
    assert len(stn.history) == 1
    assert stn.history.names == ("dropout", "weight_decay")
    assert stn.history.records[0].values == start
    assert math.isnan(stn.history.records[0].validation_loss)
    train(*stn, 3)
    assert len(stn.history) == 4
    assert stn.history.records[-1].values == stn.values() != start
    assert stn.history.records[-1].scales == stn.scales()
    assert stn.history.records[-1].validation_loss > 0
    assert History().names == ()


def test_an_empty_history_cannot_be_asked_or_drawn():
    with pytest.raises(UsageError, match="a schedule must hold at least one record"):
        History().at(3)
    with pytest.raises(UsageError, match="a plot needs at least one record"):
        History().plot()


# Replay -------------------------------------------------------------------------------------------


def test_replay_follows_the_recorded_values_step_by_step():
    torch.manual_seed(0)
    model = perceptron()
    hparams = [WeightDecay(init=0.05)]
    options = {"train_steps": 3, "hyper_optimizer": lambda p: torch.optim.SGD(p, lr=30.0)}
    tuned = convert(copy.deepcopy(model), hparams, **options)
    replayed = convert(
        copy.deepcopy(model), hparams, method="fixed", schedule=tuned_history(tuned, 12)
    )
    held = convert(copy.deepcopy(model), hparams, method="fixed")
    assert replayed.values() == pytest.approx(tuned.history.at(0), rel=1e-6)
    for step in range(1, 13):
        train(*replayed, 1)
        # Values pass through float32 and its bijection.
        assert replayed.values() == pytest.approx(tuned.history.at(step), rel=1e-5)
    train(*held, 12)
    assert len({record.values["weight_decay"] for record in tuned.history.records}) == 5
    assert held.values() == pytest.approx(tuned.history.at(0), rel=1e-6)
    assert [record.step for record in replayed.history.records] == list(range(13))


def tuned_history(stn, steps):
    train(*stn, steps)
    return stn.history


def test_replay_trains_the_same_weights_as_the_run_it_repeats():
    torch.manual_seed(0)
    model = perceptron().double()
    loader = [(inputs.double(), target) for inputs, target in batches()]
    hparams = [WeightDecay(init=0.05)]
    options = {
        "train_loader": loader,
        "valid_loader": loader,
        "hyper_optimizer": lambda p: torch.optim.SGD(p, lr=30.0),
    }
    tuned = convert(copy.deepcopy(model), hparams, **options)
    # Each pass starts the loader anew, so all runs see the same batches.
    train(*tuned, 10)
    replayed = convert(
        copy.deepcopy(model), hparams, method="fixed", schedule=tuned.history, train_loader=loader
    )
    held = convert(copy.deepcopy(model), hparams, method="fixed", train_loader=loader)
    train(*replayed, 10)
    train(*held, 10)
    expected, found, other = (
        torch.cat([p.detach().flatten() for p in stn.model.general_parameters().values()])
        for stn in (tuned, replayed, held)
    )
    # float64: the recorded values lose a few digits in the bijection.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert (other - expected).abs().max() > 1e-4


def test_a_schedule_of_other_hyperparameters_is_refused():
    with pytest.raises(DeclarationError, match="called 'a'; nearest: 'weight_decay'"):
        convert(perceptron(), [WeightDecay()], method="fixed", schedule=recorded({0: 0.1}))
    with pytest.raises(UsageError, match="at least one record"):
        convert(perceptron(), [WeightDecay()], method="fixed", schedule=History())


# Jitter -------------------------------------------------------------------------------------------


def unit(**options):
    """A conversion whose hyperparameter is its own unconstrained value."""
    free = Hyperparameter("free", 2.0, penalty=IDLE.penalty)
    return convert(perceptron(), [free], method="fixed", **options)


def test_gaussian_jitter_draws_about_the_start_with_the_scale():
    stn = unit(jitter="gaussian", scale=0.3)
    train(*stn, 1000, criterion=stn.criterion)
    values = torch.tensor([record.values["free"] for record in stn.history.records])
    # Five standard errors over 1001 independent draws.
    assert abs(values.mean() - 2.0) < 5 * 0.3 / math.sqrt(1001)
    assert abs(values.std() - 0.3) < 5 * 0.3 / math.sqrt(2 * 1001)
    lagged = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]
    assert abs(lagged) < 5 / math.sqrt(1000)  # no random walk


def test_sinusoid_jitter_follows_the_sine():
    stn = unit(jitter="sinusoid", scale=0.3)
    train(*stn, 40, criterion=stn.criterion)
    for record in stn.history.records:
        expected = 2.0 + 0.3 * math.sin(2 * math.pi * record.step / 1200)
        # float32.
        assert record.values["free"] == pytest.approx(expected, rel=1e-6)
    assert stn.values()["free"] > 2.05


def test_jitter_moves_about_the_schedule():
    schedule = History(
        [Record(0, {"free": 1.0}, {"free": 1.0}, 0.0), Record(5, {"free": 9.0}, {"free": 1.0}, 0.0)]
    )
    stn = unit(jitter="sinusoid", scale=0.3, schedule=schedule)
    train(*stn, 8, criterion=stn.criterion)
    found = [record.values["free"] for record in stn.history.records]
    expected = [
        (1.0 if step < 5 else 9.0) + 0.3 * math.sin(2 * math.pi * step / 1200) for step in range(9)
    ]
    # float32.
    assert found == pytest.approx(expected, rel=1e-6)


def test_jitter_leaves_the_global_random_state():
    stn = unit(jitter="gaussian")
    inputs, target = next(iter(batches()))
    before = torch.get_rng_state()
    stn.observe((inputs, target))
    stn.criterion(stn.model(inputs), target).backward()
    stn.optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert stn.values()["free"] != 2.0


# Pictures -----------------------------------------------------------------------------------------


def test_plot_writes_a_picture_of_every_column(tmp_path):
    stn = convert(perceptron(0.2), [Dropout(), WeightDecay()])
    train(*stn, 3)
    figure = stn.history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(figure.axes) == 3
    for axis, name in zip(figure.axes, stn.history.names, strict=False):
        (line,) = axis.get_lines()
        assert axis.get_ylabel() == name
        assert line.get_xdata().tolist() == [0, 1, 2, 3]
        assert line.get_ydata().tolist() == [r.values[name] for r in stn.history.records]
    assert figure.axes[-1].get_ylabel() == "validation loss"
    (losses,) = figure.axes[-1].get_lines()
    assert losses.get_ydata().tolist()[1:] == [
        record.validation_loss for record in stn.history.records[1:]
    ]


def test_plot_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recorded({0: 0.1, 1: 0.2}).plot().axes
    assert list(tmp_path.iterdir()) == []


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"needs matplotlib.*pip install stnify\[plots\]"):
        recorded({0: 0.1}).plot()
