"""Residual branches are found where libraries place their own stochastic depth."""

import operator
from unittest.mock import patch

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth
from zoo import shorten

from stnify.planning.residual import residual_branches
from stnify.trace import trace


def found(model):
    return residual_branches(model, trace(model))


def names(model):
    return [branch.name for branch in found(model)]


# The libraries' models ----------------------------------------------------------------------------

COUNTS = {
    "convnext_tiny": 18,
    "densenet121": 0,
    "efficientnet_b0": 9,
    "inception_v3": 0,
    "inception_resnet_v2": 40,
    "mixer_s32_224": 16,
    "mobilenetv3_small_100": 6,
    "regnetx_002": 13,
    "resnet10t": 4,
    "resnet18": 8,
    "resnet50": 16,
    "swin_tiny_patch4_window7_224": 24,
    "vgg11": 0,
    "vit_tiny_patch16_224": 24,
}
"""Branches of models of timm, counted in their papers: two in a transformer's block, else one."""


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_has_as_many_branches_as_its_paper_says(name):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    branches = found(model)
    assert len({branch.name for branch in branches}) == len(branches) == COUNTS[name]


def test_blocks_with_a_skip_have_the_branches():
    with torch.device("meta"):
        model = timm.create_model("mobilenetv3_small_100", pretrained=False)
    blocks = [name for name, module in model.named_modules() if getattr(module, "has_skip", False)]
    assert blocks == [name.rpartition(".")[0] for name in names(model)] != []


class Rate(float):
    """A drop rate that schedules cannot scale, so that no block's is nought."""

    def __mul__(self, _):
        return self

    __rmul__ = __truediv__ = __mul__


LINSPACE = torch.linspace


def linspace(start, end, steps, **options):
    if isinstance(end, Rate):
        return torch.full((steps,), float(end), device="cpu")
    return LINSPACE(start, end, steps, **options)


def timm_model(name, rate=0.0):
    with torch.device("meta"), patch("torch.linspace", linspace):
        return timm.create_model(name, pretrained=False, drop_path_rate=rate)


def torchvision_model(name):
    return torchvision.models.get_model(name, weights=None)


def places(model, graph):
    """Number a graph's nodes; what passes its input on has the number of its input."""
    numbers = {}
    for node in graph.nodes:
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        passing = isinstance(module, nn.Identity | DropPath | StochasticDepth)
        numbers[node.name] = numbers[node.args[0].name] if passing else len(set(numbers.values()))
    return numbers


def noisy(model, graph):
    """The numbers of what a model's own stochastic depth drops."""
    numbers = places(model, graph)
    return {
        numbers[node.name]
        for node in graph.nodes
        if node.op == "call_module"
        and isinstance(model.get_submodule(node.target), DropPath | StochasticDepth)
    }


TIMM = (
    "convnext_atto",
    "efficientformerv2_s0",
    "inception_next_atto",
    "lowformer_b0",
    "mambaout_femto",
    "mixer_s32_224",
    "pit_ti_224",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "regnetz_005",
    "repvgg_a0",
    "res2next50",
    "resmlp_12_224",
    "resnet50",
    "resnetv2_50",
    "skresnet18",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "xception41p",
)
"""Models of timm that apply stochastic depth to all their residual branches, one a family."""


@pytest.mark.parametrize("name", TIMM)
def test_branches_are_where_timm_drops_paths(name):
    plain, rated = timm_model(name), timm_model(name, Rate(0.1))
    for model in (plain, rated):
        shorten(model)
    traced, other = trace(plain), trace(rated)
    numbers = places(plain, traced.graph)
    judge = noisy(rated, other.graph)
    assert set(numbers.values()) == set(places(rated, other.graph).values())
    assert {numbers[branch.node] for branch in residual_branches(plain, traced)} == judge
    assert judge
    assert not noisy(plain, traced.graph)


TORCHVISION = ("convnext_tiny", "efficientnet_b0", "swin_t")


@pytest.mark.parametrize("name", TORCHVISION)
def test_branches_are_where_torchvision_drops_paths(name):
    with torch.device("meta"):
        model = torchvision_model(name)
    traced = trace(model)
    numbers = places(model, traced.graph)
    branches = residual_branches(model, traced)
    assert {numbers[branch.node] for branch in branches} == noisy(model, traced.graph) != set()


@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("vit_b_16", 24)])
def test_torchvisions_other_models_have_one_branch_for_each_addition(name, count):
    with torch.device("meta"):
        assert len(names(torchvision_model(name))) == count


def test_only_the_backbone_of_a_segmentation_model_has_branches():
    model = torchvision.models.get_model("fcn_resnet50", weights=None, weights_backbone=None)
    assert len(names(model)) == 16
    assert all(name.startswith("backbone.layer") for name in names(model))


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("resnet18", {"layer1.0.conv2", "layer4.1.conv2"}),
        ("vit_tiny_patch16_224", {"blocks.0.attn", "blocks.11.mlp"}),
        ("swin_tiny_patch4_window7_224", {"layers.0.blocks.0.attn", "layers.3.blocks.1.mlp"}),
        ("convnext_tiny", {"stages.0.blocks.0.mlp"}),
        ("efficientnet_b0", {"blocks.1.1.conv_pwl"}),
        ("poolformerv2_s12", {"stages.0.blocks.0.norm1", "stages.0.blocks.0.mlp"}),
    ],
)
def test_names_are_of_what_the_block_calls(name, some):
    assert some <= set(names(timm_model(name)))


# Hand-made models ---------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class Handmade(nn.Module):
    """Runs ``formula(self, *inputs)``, with what formulas need at hand."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula
        self.f, self.g, self.h = mlp(), mlp(), mlp()
        self.down, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.pair = nn.Bilinear(4, 4, 4)
        self.gamma = nn.Parameter(torch.ones(4))
        self.table = nn.Parameter(torch.ones(7, 4))
        self.conv, self.up = nn.Conv1d(3, 3, 3, padding=1), nn.ConvTranspose1d(3, 3, 2, 2)
        self.conv2 = nn.Conv1d(3, 3, 3, padding=1)


class OneInput(Handmade):
    def forward(self, x):
        return self.formula(self, x)


class TwoInputs(Handmade):
    def forward(self, x, y):
        return self.formula(self, x, y)


def in_place(m, x):
    y = x.clone()
    x = m.f(x)
    x += y
    return x


def in_place_method(m, x):
    return m.f(x).add_(x)


def stage(m, x):
    x = x + m.f(x)
    return x + m.g(x)


def pre_activated(m, x):
    z = F.relu(m.norm(x))
    return m.down(z) + m.f(z)


def positioned(m, x):
    return m.norm(x) + m.table


def shared_norm(m, x):
    z = m.norm(x)
    return x + m.f(z) + m.g(z)


def parallel_first(m, x):
    z = m.norm(x)
    return m.f(z) + m.g(z) + x


def with_a_layer_scale(m, x):
    return F.dropout(m.gamma * m.f(x), 0.0) + x


BRANCHES = {
    "plain": (lambda m, x: x + m.f(x), ["f"]),
    "other way": (lambda m, x: m.f(x) + x, ["f"]),
    "torch.add": (lambda m, x: torch.add(x, m.f(x)), ["f"]),
    "scaled torch.add": (lambda m, x: torch.add(x, m.f(x), alpha=0.1), ["f"]),
    "keyword": (lambda m, x: torch.add(x, other=m.f(x)), ["f"]),
    "method": (lambda m, x: x.add(m.f(x)), ["f"]),
    "in place": (in_place, ["f"]),
    "in-place method": (in_place_method, ["f"]),
    "scaled": (lambda m, x: x + 0.1 * m.f(x), ["f"]),
    "layer scale": (with_a_layer_scale, ["f"]),
    "functional": (lambda m, x: x + F.linear(F.relu(x), m.down.weight), ["linear"]),
    "downsample": (lambda m, x: m.norm(m.down(x)) + m.f(x), ["f"]),
    "shared activation": (pre_activated, ["f"]),
    "post norm": (lambda m, x: m.norm(x + m.f(x)), ["f"]),
    "weightless mixer": (lambda m, x: x + m.norm(x).mean(1, keepdim=True), ["norm"]),
    "two in a row": (stage, ["f", "g"]),
    "around a stage": (lambda m, x: x + m.h(stage(m, x)), ["f", "g"]),
    "nested": (lambda m, x: x + m.h(x + m.f(x)), ["f"]),
    "three terms": (lambda m, x: x + m.f(x) + m.g(x), ["f", "g"]),
    "sum": (lambda m, x: sum([x, m.f(x), m.g(x)]), ["f", "g"]),
    "shared norm": (shared_norm, ["f", "g"]),
    "parallel first": (parallel_first, ["f", "g"]),
    "called twice": (lambda m, x: stage(m, stage(m, x)), ["f:0", "g:0", "f:1", "g:1"]),
    "nothing": (lambda m, x: x + x, []),
    "no weights": (lambda m, x: x + F.relu(x), []),
    "a norm": (lambda m, x: x + m.norm(x), []),
    "a bare convolution": (lambda m, x: x + m.conv(x), []),
    "a position": (positioned, []),
    "a number": (lambda m, x: m.f(x) + 1.0, []),
    "sizes": (lambda m, x: m.f(x) * (x.shape[0] + x.shape[1]), []),
    "equal weights": (lambda m, x: m.f(x) + m.g(x), []),
    "two downsamples": (lambda m, x: m.f(x) + m.g(m.h(x)), []),
    "parts": (lambda m, x: (lambda a, b: a + m.f(b))(*x.chunk(2)), []),
    "a product": (lambda m, x: x * m.f(x), []),
}
"""What is computed, and the branches in it."""


@pytest.mark.parametrize("case", BRANCHES)
def test_the_branches_of_a_formula(case):
    formula, expected = BRANCHES[case]
    assert names(OneInput(formula)) == expected


TWO_INPUTS = {
    "one from each": (lambda m, x, y: x + m.f(y), []),
    "two entries": (lambda m, x, y: x + m.pair(m.f(x), m.g(y)), []),
    "a mask": (lambda m, x, y: x + m.f(x * (y > 0)), ["f"]),
}


@pytest.mark.parametrize("case", TWO_INPUTS)
def test_a_branch_depends_on_no_other_activation(case):
    formula, expected = TWO_INPUTS[case]
    assert names(TwoInputs(formula)) == expected


def unet(m, x):
    inner = m.conv(F.max_pool1d(F.relu(x), 2))
    return x + F.interpolate(F.relu(m.conv2(inner)), scale_factor=2.0)


def deep_unet(m, x):
    one = m.conv(x)
    two = F.relu(m.conv2(F.max_pool1d(one, 2)))
    three = m.conv(F.relu(m.conv2(F.max_pool1d(two, 2))))
    return m.conv(m.conv2(one) + m.up(two + m.up(three)))


def pyramid(m, x):
    fine = m.conv(x)
    coarse = m.conv(F.relu(m.conv2(F.max_pool1d(fine, 2))))
    return m.conv2(fine) + F.interpolate(m.conv2(coarse), scale_factor=2.0)


def same_size(m, x):
    return x + m.conv(F.relu(m.conv2(F.relu(x))))


@pytest.mark.parametrize("formula", [unet, deep_unet, pyramid])
def test_skips_between_resolutions_are_not_residual(formula):
    assert names(OneInput(formula)) == []
    assert names(OneInput(same_size)) == ["conv"]


class Attention(nn.Module):
    """Works at half the resolution, inside."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv1d(3, 3, 1), nn.ConvTranspose1d(3, 3, 2, 2)

    def forward(self, x):
        return self.up(self.conv(F.max_pool1d(x, 2)).softmax(-1))


def test_a_module_that_enlarges_what_it_made_smaller_is_a_branch():
    model = OneInput(lambda m, x: x + m.f(x))
    model.f = Attention()
    assert names(model) == ["f"]


class Opaque(nn.Module):
    """Cannot be traced through, because it looks at a value."""

    def __init__(self):
        super().__init__()
        self.f = mlp()

    def forward(self, x):
        return x + self.f(x) if x.sum() > 0 else x


def test_an_addition_inside_an_opaque_module_is_not_seen():
    model = OneInput(lambda m, x: m.f(x))
    model.f = Opaque()
    traced = trace(model)
    assert traced.opaque.keys() == {"f"}
    assert residual_branches(model, traced) == []


def test_a_branch_that_is_an_opaque_module_is_found():
    model = OneInput(lambda m, x: x + m.f(x))
    model.f = Opaque()
    assert names(model) == ["f"]


def test_node_and_addition_are_in_the_graph():
    traced = trace(model := OneInput(lambda m, x: x + m.gamma * m.f(x)))
    (branch,) = residual_branches(model, traced)
    nodes = {node.name: node for node in traced.graph.nodes}
    assert nodes[branch.node].target is operator.mul
    assert nodes[branch.addition].target is operator.add
    assert nodes[branch.node] in nodes[branch.addition].all_input_nodes
