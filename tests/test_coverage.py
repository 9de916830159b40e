"""The coverage benchmark sees what it is there to see, and survives what it examines."""

import argparse
import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import coverage, examine, structures
from stnify import WeightDecay, stnify

DENSE = structures.Structure("timm", "resnet", "image", "test_resnet", 3, 30)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Structures ---------------------------------------------------------------------------------------


def test_a_signature_is_of_structure_and_not_of_size():
    def tower(width, depth, **options):
        layers = [nn.Linear(width, width, **options) for _ in range(depth)]
        return structures.signature(nn.Sequential(*layers))

    assert tower(3, 2) == tower(5, 4)
    assert tower(3, 2) != tower(3, 2, bias=False)
    assert tower(3, 2) != structures.signature(nn.Sequential(nn.Sequential(nn.Linear(3, 3))))


def test_a_small_build_keeps_its_structure_and_is_nowhere_idle():
    structure = structures.Structure("timm", "convnext", "image", "convnext_atto", 1, 0)
    built = structures.small(structure)
    assert built.shape == (3, 64, 64)
    assert built.options["depths"] == (2, 2, 2, 2)
    original = structures.plain_build("timm", "convnext_atto", drop_rate=0.1, drop_path_rate=0.1)
    assert structures.signature(built.model) == structures.signature(original)
    assert all(bool(parameter.any()) for parameter in built.model.parameters())
    assert built.model.eval()(*built.call(2)).shape == (2, 1000)


def test_videos_are_small_where_their_size_stands_in_the_code():
    name = "mvit_v2_s"
    built = structures.small(structures.Structure("torchvision", "video.mvit", "video", name, 1, 0))
    assert built.shape == (3, 4, 64, 64)
    original = structures.plain_build("torchvision", name, num_classes=structures.CLASSES)
    assert structures.signature(built.model) == structures.signature(original)
    assert built.model.eval()(*built.call(2)).shape == (2, structures.CLASSES)
    assert original.pos_encoding.spatial_size == (56, 56)


def test_a_model_that_does_not_run_says_why(monkeypatch):
    def failing(built):
        raise ValueError(f"{built.shape[-1]} pixels are too few")

    monkeypatch.setattr(structures, "_try", failing)
    last = structures.timm.get_pretrained_cfg("test_resnet").input_size[-1]
    with pytest.raises(structures.NotBuiltError, match=f"ValueError: {last} pixels are too few"):
        structures.small(DENSE)


# What is examined ---------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Meets inputs with weights of every kind, and with what is none."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Embedding(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.factors = nn.Parameter(torch.randn(4, 4))
        self.kernel = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.ones(4, 1))
        self.position = nn.Parameter(torch.randn(3, 4))
        self.idle = nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs):
        tokens = self.linear(inputs) + self.position + self.table.weight
        tokens, _ = self.attention(tokens, tokens, tokens)
        tokens, _ = self.recurrent(tokens)
        return F.linear(tokens @ self.factors, self.gain * self.kernel)


def test_weights_are_found_by_what_the_forward_does_with_them():
    model = Mixture()
    found = examine.multiplied(model, (torch.randn(2, 3, 4),))
    assert found.others == set()
    assert found.weights == {
        *("linear.weight", "factors", "kernel"),
        *("attention.in_proj_weight", "attention.out_proj.weight"),
        *("recurrent.weight_ih_l0", "recurrent.weight_hh_l0"),
    }


class Table(nn.Module):
    """Reads a table in some way, and adds what it reads or multiplies with it."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.table = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("chosen", F.one_hot(torch.tensor([1, 0, 3]), 4).float())

    def forward(self, inputs):
        return self.read(inputs, self.table, self.chosen)


def one_hot(positions):
    return F.one_hot(positions, 4)


def filled(inputs):
    """Return nothing but zeros, into a part of which activations are written."""
    zeros = torch.zeros(3, 4)
    zeros[1:].copy_(inputs[0, 1:])
    return zeros


def symmetric(table):
    whole = torch.zeros(4, 4)
    whole[:2] = table[:2]
    return whole + whole.mT


def halved(inputs):
    """Return as many positions as there are numbers above nought."""
    return torch.arange(1 + min(2, int((inputs > 0).sum())))


READINGS = {
    "rows chosen by a buffer": (
        lambda x, table, chosen: x + torch.einsum("nd,pn->pd", table, chosen),
        "others",
    ),
    "rows chosen by positions made in the forward": (
        lambda x, table, _: x + one_hot(torch.arange(x.shape[1])).expand(2, 3, 4).to(table) @ table,
        "others",
    ),
    "positions as long as an input, of its type": (
        lambda x, table, _: x + (one_hot(x.new_ones(3).cumsum(0).long()).type_as(x) @ table),
        "others",
    ),
    "a product of two parameters": (lambda x, table, _: x + (table @ table)[:3], "others"),
    "rows that are taken and not multiplied": (lambda x, table, _: x + table[:3], "neither"),
    "rows chosen by the input itself": (
        lambda x, table, _: x + one_hot(x.argmax(-1)).float() @ table,
        "weights",
    ),
    "chosen rows that meet activations": (
        lambda x, table, chosen: x @ (chosen @ table).mT,
        "weights",
    ),
    "taken rows that meet activations": (
        lambda x, table, _: torch.einsum("bpd,qd->bpq", x, table[torch.arange(3)]),
        "weights",
    ),
    "a layer's weight that meets a constant": (
        lambda x, table, chosen: x + F.linear(chosen, table),
        "weights",
    ),
    "once with a constant, once with activations": (
        lambda x, table, chosen: x + chosen @ table + x @ table,
        "weights",
    ),
    "activations written to a view of a constant": (
        lambda x, table, _: x + filled(x) @ table,
        "weights",
    ),
    "written to a constant that meets activations": (
        lambda x, table, _: x @ symmetric(table),
        "weights",
    ),
    "as many positions as the numbers of the input say": (
        lambda x, table, _: x + (one_hot(halved(x)).float() @ table).mean(0),
        "weights",
    ),
    "numbers of the input by way of Python": (
        lambda x, table, _: x + torch.tensor(x.tolist()) @ table,
        "weights",
    ),
}


@pytest.mark.parametrize(("read", "kind"), READINGS.values(), ids=READINGS)
def test_a_weight_is_what_meets_activations_and_no_constant_alone(read, kind):
    found = examine.multiplied(Table(read), (torch.randn(2, 3, 4),))
    assert found._asdict() == {
        name: {"table"} if name == kind else set() for name in ("weights", "others")
    }


def test_a_table_that_meets_constants_only_is_named_and_not_counted():
    model = nn.Sequential(nn.Linear(4, 4), Table(READINGS["rows chosen by a buffer"][0]))

    def call(batch):
        return (torch.randn(batch, 3, 4),)

    *_, (_, row) = examine.examine(structures.Built(model, {}, (3, 4), call, call))
    assert examine.judged(row)["status"] == "fine"
    assert row["without_activations"] == "1.table: 16"
    assert (row["weights"], row["weight_parameters"], row["share"]) == (1, 16, 1.0)


class Sidling(nn.Module):
    """One weight is used in a way no hyper layer knows: as one operand of a chain of products."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.other = nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs):
        return torch.tensordot(self.linear(inputs), self.other, 1)


def test_coverage_counts_what_responds_and_names_what_does_not():
    model = Sidling()
    weights = examine.multiplied(model, (torch.randn(2, 4),)).weights
    assert weights == {"linear.weight", "other"}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    stn = stnify(model, [WeightDecay()])
    found = examine.coverage(stn, weights, sizes)
    assert found["weight_parameters"] == 32
    responding = {site.weight for site in stn.plan.weights}
    assert found["covered_parameters"] == 16 * len(responding & weights)
    assert ("other: " in found["uncovered"]) is ("other" not in responding)


def dense(size=4):
    model = nn.Sequential(nn.Linear(size, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))

    def call(batch):
        return (torch.randn(batch, size),)

    return structures.Built(model, {}, (size,), call, call)


def test_a_sound_model_is_fine():
    stages = list(examine.examine(dense()))
    row = stages[-1][1]
    assert [stage for stage, _ in stages][-1] == "done"
    assert examine.judged(row) == {"status": "fine", "reason": ""}
    assert (row["share"], row["way"], row["rows"], row["moved"]) == (1.0, "graph", "independent", 1)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs):
        outputs = self.linear(inputs)
        return outputs - outputs.mean(0)


def converted(model, inputs):
    stn = stnify(model.train(), [WeightDecay()], example_inputs=inputs)
    examine.open_gates(stn)
    return stn


def test_what_is_broken_is_not_fine():
    call = dense().call
    inputs = call(3)
    stn = converted(dense().model, inputs)
    assert examine.exactness(stn, call)["exact"]
    assert examine.train_exactness(stn, inputs)
    assert examine.independence(stn, inputs, {})["rows"] == "independent"
    layer = next(iter(stn.model.hyper_layers.values()))
    layer.register_forward_hook(lambda module, given, output: output + 1e-3)
    assert not examine.exactness(stn, call)["exact"]
    assert examine.exactness(stn, call)["exact_zero"] == "False"
    assert not examine.train_exactness(stn, inputs)
    mixing = converted(dense().model, inputs)
    for layer in mixing.model.hyper_layers.values():
        layer.register_forward_hook(lambda module, given, output: output + output.mean(0))
    assert examine.independence(mixing, inputs, {})["rows"] == "mixed"
    pictures = (torch.randn(3, 1, 2, 4),)
    found = examine.independence(converted(Centred(), pictures), pictures, {})
    assert found["rows"] == "mixed by the model itself"
    idle = stnify(dense().model, [WeightDecay()], example_inputs=inputs)
    assert examine.independence(idle, inputs, {})["rows"] == "dead"


# Runs ---------------------------------------------------------------------------------------------


def options(**changed):
    return argparse.Namespace(**{"jobs": 2, "time_limit": 60.0, "memory": 64.0, **changed})


def examined(monkeypatch, work, **changed):
    monkeypatch.setattr(coverage, "START", "fork")  # which knows what is patched here
    monkeypatch.setattr(coverage, "examine", work)
    monkeypatch.setattr(coverage, "small", lambda structure: dense())
    (row,) = coverage._examined([DENSE], options(**changed))
    return row


def test_a_row_is_made_in_a_process_of_its_own(monkeypatch):
    def work(built):
        yield "convert", {"parameters": os.getpid()}

    row = examined(monkeypatch, work)
    assert row["parameters"] != os.getpid()
    assert (row["models"], row["family_parameters"]) == (3, 30)


def test_a_model_that_raises_hangs_or_dies_leaves_a_row(monkeypatch):
    def starting(then):
        def work(built):
            yield "convert", {"parameters": 7}
            then()

        return work

    def failing():
        raise ValueError("no  good\n")

    row = examined(monkeypatch, starting(failing))
    assert (row["status"], row["reason"]) == ("failed", "ValueError: no good")
    assert (row["stage"], row["parameters"]) == ("convert", 7)
    row = examined(monkeypatch, starting(lambda: time.sleep(60)), time_limit=0.5)
    assert (row["status"], row["reason"]) == ("failed", "took too long in stage convert")
    row = examined(monkeypatch, starting(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert row["reason"] == "its process ended with -9 in stage convert"


def test_a_model_too_large_for_memory_is_skipped(monkeypatch):
    def work(built):
        yield "convert", {}
        torch.empty(2**33)

    row = examined(monkeypatch, work, memory=8.0)
    assert row["status"] == "skipped"
    assert "can't allocate memory" in row["reason"]


def test_a_table_resumes_and_forgets_failures(tmp_path):
    path = tmp_path / "coverage.csv"
    table = coverage.Table(path)
    for name, status in (("one", "fine"), ("two", "failed")):
        table.add({"library": "timm", "name": name, "status": status})
    again = coverage.Table(path)
    assert set(again.rows) == {("timm", "one"), ("timm", "two")}
    again.forget_failures()
    with path.open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["one"]


def test_a_table_of_fewer_columns_is_written_anew_and_goes_on(tmp_path):
    path = tmp_path / "coverage.csv"
    before = "library,name,status\ntimm,one,fine\n"
    path.write_text(before)
    table = coverage.Table(path)
    assert path.read_text() == before  # who only reads changes nothing
    for name in ("two", "three"):
        table.add({"library": "timm", "name": name, "status": "failed"})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["one", "two", "three"]
    assert [row["status"] for row in rows] == ["fine", "failed", "failed"]
    assert list(rows[0]) == list(coverage.COLUMNS)


def keep_structures(folder):
    """Write down two structures, so that a run in this folder does not look for all."""
    known = {
        "versions": {"timm": structures.timm.__version__},
        "structures": [
            vars(structures.Structure("timm", "resnet", "image", "test_resnet", 3, 30)),
            vars(structures.Structure("timm", "vit", "image", "test_vit", 1, 10)),
        ],
    }
    known["versions"]["torchvision"] = structures.torchvision.__version__
    (folder / "coverage_structures.json").write_text(json.dumps(known))


def test_what_does_not_count_is_kept_in_the_summary_and_printed(tmp_path, capsys):
    keep_structures(tmp_path)
    row = {"library": "timm", "name": "test_resnet", "kind": "image", "status": "fine"}
    table = coverage.Table(tmp_path / "coverage.csv")
    table.add({**row, "models": 1, "family_parameters": 10, "without_activations": "table: 16"})
    table.add({**row, "name": "test_vit", "models": 1, "family_parameters": 10})
    coverage.main(["--out", str(tmp_path), "--names", "nothing"])
    kept = json.loads((tmp_path / "coverage.json").read_text())["without_activations"]
    assert kept == {"timm test_resnet": "table: 16"}
    assert "without activations: timm test_resnet: table: 16\n" in capsys.readouterr().out


def test_a_run_writes_table_and_summary_and_goes_on_where_it_stopped(tmp_path, capsys):
    keep_structures(tmp_path)
    arguments = ["--out", str(tmp_path), "--jobs", "1", "--memory", "64"]
    coverage.main([*arguments, "--names", "*resnet"])
    assert "1/1 test_resnet fine graph" in capsys.readouterr().out
    first = json.loads((tmp_path / "coverage.json").read_text())
    assert (first["all"]["examined"], first["all"]["models_represented"]) == (1, 3)
    assert first["models"] == 4
    assert first["all"]["share_of_models"]["fine"] == 1.0
    assert first["all"]["share_of_weights"] == 1.0
    coverage.main(arguments)
    assert "test_resnet" not in capsys.readouterr().out
    with (tmp_path / "coverage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["test_resnet", "test_vit"]
    assert json.loads((tmp_path / "coverage.json").read_text())["all"]["models_represented"] == 4


# The committed run --------------------------------------------------------------------------------


def readme_rows(report):
    """Rows of the README's table: shares of the models examined, by kind."""
    kinds = ("all", "image", "video", "segmentation", "detection", "optical_flow", "quantization")
    for kind in kinds:
        found, shares = report[kind], report[kind]["share_of_models"]
        if shares["fine"] is not None:
            examined = f"{found['examined']} of {found['structures']}"
            cells = [kind.replace("_", " "), f"{found['models']:,}", examined]
            cells += [f"{shares[name]:.1%}" for name in ("fine", "exact", "graph")]
            cells.append(f"{found['share_of_weights']:.2%}")
            yield f"| {' | '.join(cells)} |"


def test_the_readme_says_what_the_committed_run_found():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    report = json.loads((coverage.RESULTS / "coverage.json").read_text())
    table = coverage.Table(coverage.RESULTS / "coverage.csv")
    rows = list(readme_rows(report))
    assert rows
    assert all(row in readme for row in rows)
    assert report["all"]["examined"] + report["all"]["skipped"] == len(table.rows)
    failures = {name for name, why in report["not_fine"].items() if not why.startswith("skipped")}
    assert all(f"- {name}: " in readme for name in failures)
