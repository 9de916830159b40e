"""Plans say what a conversion costs: as a table, as JSON, before and after inputs were seen."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from cases import IDLE, convert
from torch import nn
from zoo import ZOO, images

from stnify import Dropout, Hyperparameter, WeightDecay, stnify

DECAY = WeightDecay()
CONVOLUTION = 2 * (4 * 3 * 3 * 3) * (8 * 8)
"""Two operations for each entry of a 4x3x3x3 kernel, at each of 8x8 positions."""
HEAD = 2 * 256 * 5


class Twice(nn.Module):
    """Calls one layer two times, and a bare parameter meets activations."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, inputs):
        return F.linear(self.inner(self.inner(inputs).tanh()), self.weight)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )


def costs(plan):
    return {site.node: site.flops for site in plan.weights}


# Operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_an_example_costs_what_its_layers_cost(batch):
    stn = stnify(convolutional(), [DECAY], example_inputs=images(batch, 8))
    before = {site.name: site.flops.before for site in stn.plan.weights}
    assert before == {"0": CONVOLUTION, "4": HEAD}
    assert stn.plan.flops.before == CONVOLUTION + HEAD


def test_a_linearised_layer_costs_three_of_itself_and_its_gates():
    plan = stnify(convolutional(), [DECAY], example_inputs=images(2, 8)).plan
    # The first layer sees no tangent; a gate is one product for each hyperparameter and unit.
    gates = {"0": 2 * (2 * 4), "4": 2 * (2 * 5)}  # of the weight and of the bias
    after = {site.name: site.flops.after for site in plan.weights}
    assert after == {"0": 2 * CONVOLUTION + gates["0"], "4": 3 * HEAD + gates["4"]}
    assert plan.flops.after == sum(after.values())
    gate = stnify(convolutional(), [DECAY], response="gate", example_inputs=images(2, 8)).plan
    assert {s.name: s.flops.after for s in gate.weights} == {
        "0": CONVOLUTION + gates["0"],
        "4": 2 * HEAD + gates["4"],
    }


def test_a_perturbed_pass_costs_less_than_a_linearised_one():
    plans = {
        method: stnify(convolutional(), [DECAY], method=method, example_inputs=images(2, 8)).plan
        for method in ("delta", "centered", "fixed")
    }
    assert plans["fixed"].flops == (CONVOLUTION + HEAD,) * 2
    assert plans["fixed"].flops.after < plans["centered"].flops.after < plans["delta"].flops.after


def test_a_layer_called_twice_counts_once():
    plan = stnify(Twice(), [DECAY], example_inputs=torch.randn(2, 6)).plan
    assert [site.name for site in plan.weights] == ["inner", "inner", ""]
    assert [site.flops.before for site in plan.weights] == [2 * 2 * 36, 0, 2 * 18]
    assert [site.parameters for site in plan.weights] == [42, 0, 18]
    assert plan.flops.before == 2 * 2 * 36 + 2 * 18


def test_layers_in_code_that_is_not_traced_count_too():
    model = nn.Sequential(Branching(), convolutional(), nn.Flatten(1), nn.Unflatten(1, (5, 1)))
    model.append(nn.LSTM(1, 3, batch_first=True))
    plan = stnify(model, [DECAY], example_inputs=images(3, 8)).plan
    before = {site.weight: site.flops.before for site in plan.weights}
    assert before == {
        "0.inner.weight": 2 * 9 * 64,
        "1.0.weight": CONVOLUTION,
        "1.4.weight": HEAD,
        "4.weight_ih_l0": 5 * 2 * 12 * 1,
        "4.weight_hh_l0": 5 * 2 * 12 * 3,
    }
    assert plan.flops.before == sum(before.values())
    assert all(site.flops.after > site.flops.before for site in plan.weights)


def test_costs_are_known_from_the_first_batch_on_and_resumed():
    model = convolutional()
    data = [(images(4, 8), torch.zeros(4, dtype=torch.long))]
    stn = convert(model, [DECAY], train_loader=data, valid_loader=data)
    assert stn.plan.flops is None
    assert set(costs(stn.plan).values()) == {None}
    inputs, target = next(iter(stn.train_loader))
    F.cross_entropy(stn.model(inputs), target).backward()
    stn.optimizer.step()
    assert stn.plan.flops.before == CONVOLUTION + HEAD
    resumed = convert(convolutional(), [DECAY], train_loader=data, valid_loader=data)
    resumed.load_state_dict(stn.state_dict())
    assert resumed.plan.flops == stn.plan.flops
    assert costs(resumed.plan) == costs(stn.plan)


def test_counting_leaves_model_and_generators_as_they_were():
    model = ZOO["timm vit_tiny"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(p._backward_hooks or ()) for p in model.parameters()]
    state = torch.get_rng_state()
    stn = stnify(model, [DECAY], example_inputs=images(2))
    assert stn.plan.flops.before > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [len(p._backward_hooks or ()) for p in model.parameters()] == hooks
    assert all(p.grad is None for p in stn.model.parameters())


def test_attention_outside_layers_counts_in_the_whole():
    plan = stnify(ZOO["timm vit_tiny"](), [DECAY], example_inputs=images(2)).plan
    layers = sum(site.flops.before for site in plan.weights)
    assert plan.flops.before > layers > 0


# Table --------------------------------------------------------------------------------------------


def table(plan):
    """The rows of the table a plan prints, as lists of words."""
    lines = str(plan).splitlines()
    return [line.split() for line in lines[: len(plan.weights) + 1]]


def test_the_table_has_sizes_and_costs_before_and_after():
    plan = stnify(convolutional(), [DECAY], example_inputs=images(2, 8)).plan
    assert table(plan) == [
        ["layer", "kind", "way", "rows", "params", "after", "FLOPs", "after"],
        ["0", "Conv2d", "module", "batch", "112", "232", "13.8k", "27.7k"],
        ["4", "Linear", "module", "batch", "1.28k", "2.58k", "2.56k", "7.7k"],
    ]
    last = "one example costs 16.4k FLOPs in the model and 35.4k in the response pass"
    assert str(plan).endswith(last)


def test_what_is_not_known_yet_is_a_question_mark():
    plan = stnify(convolutional(), [DECAY]).plan
    assert table(plan)[1:] == [
        ["0", "Conv2d", "module", "batch", "112", "232", "?", "?"],
        ["4", "Linear", "module", "batch", "1.28k", "2.58k", "?", "?"],
    ]
    assert "rows batch (assumed): 0 and 1 more" in str(plan)
    assert "FLOPs in the model" not in str(plan)


@pytest.mark.parametrize("name", ["timm vit_tiny", "timm convnext_atto", "torchvision resnet18"])
def test_the_table_fits_a_terminal_and_its_columns_are_aligned(name):
    plan = stnify(ZOO[name](), [DECAY], example_inputs=images(2)).plan
    lines = str(plan).splitlines()[: len(plan.weights) + 1]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 100
    assert "?" not in "".join(lines)


def test_the_report_shows_the_table():
    stn = stnify(convolutional(), [DECAY], example_inputs=images(2, 8))
    assert str(stn.plan) in stn.report()


# JSON ---------------------------------------------------------------------------------------------


def test_json_says_everything_the_plan_does():
    model = nn.Sequential(convolutional(), nn.Dropout(0.3), nn.Linear(5, 2))
    frozen = model[2].requires_grad_(False)
    stn = stnify(
        model,
        [Dropout(), DECAY, IDLE, Hyperparameter("free", 1.0, (0.0, math.inf))],
        example_inputs=images(2, 8),
        response="gate",
    )
    plan, found = stn.plan, json.loads(stn.plan.to_json())
    assert found["response"] == "gate"
    assert found["counts"] == {
        "sites": 2,
        "parameters": sum(p.numel() for p in model.parameters()),
        "response_parameters": plan.response_parameters,
        "flops": {"before": plan.flops.before, "after": plan.flops.after},
    }
    names = ["dropout", "weight_decay", "idle", "free"]
    assert [column["name"] for column in found["columns"]] == names
    assert found["columns"][0] == {
        "name": "dropout",
        "init": 0.3,
        "range": [0.0, 0.95],
        "scale": None,
        "per_example": True,
        "kind": "Dropout",
    }
    assert found["columns"][3]["range"] == [0.0, None]
    for site, entry in zip(plan.weights, found["weights"], strict=True):
        assert set(entry) == set(vars(site))
        assert (entry["name"], entry["kind"], entry["node"]) == (site.name, site.kind, site.node)
        assert (entry["layout"], entry["way"]) == ("batch", "module")
        assert entry["flops"] == {"before": site.flops.before, "after": site.flops.after}
    assert [(n["name"], n["column"], n["granularity"]) for n in found["noises"]] == [
        ("1", "dropout", ["element", 0])
    ]
    assert found["decays"][0]["column"] == "weight_decay"
    assert "0.0.weight" in found["decays"][0]["parameters"]
    assert found["losses"] == [
        {"column": "idle", "kind": "Hyperparameter", "penalty": "no_penalty"},
        {"column": "free", "kind": "Hyperparameter", "penalty": None},
    ]
    assert {r["name"]: r["reason"] for r in found["refusals"]} == {
        "2": "frozen (requires_grad=False)"
    }
    assert found["opaque"] == {}
    assert not frozen.weight.requires_grad


def test_json_of_unknown_costs():
    model = nn.Sequential(Branching(), convolutional())
    found = json.loads(stnify(model, [DECAY]).plan.to_json())
    assert found["counts"]["flops"] is None
    assert [entry["flops"] for entry in found["weights"]] == [None] * 3
    assert "cannot be traced through" in found["opaque"]["0"]
    assert [entry["inside"] for entry in found["weights"]] == ["0", None, None]
    function = json.loads(stnify(ZOO["functional"](), [DECAY]).plan.to_json())
    units = {entry["weight"]: entry["units"] for entry in function["weights"]}
    assert units == {"kernel": 4, "fourier.weight": 6, "weight": 5}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, inputs):
        return self.inner(inputs) if inputs.isfinite().all() else inputs
