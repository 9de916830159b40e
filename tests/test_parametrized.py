"""Weights that a module computes at each call respond, wherever its code uses them."""

import copy
import warnings
from functools import partial

import pytest
import torch
from awkward import DataDependent, double_precision, normal
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

from stnify import (
    AttentionDropout,
    Hyperparameter,
    UnsupportedModuleError,
    UsageError,
    WeightDecay,
    stnify,
)
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation

WIDTH, UNITS, H = 5, 4, 2
HPARAMS = [Hyperparameter(name, 0.5, (0.0, 1.0)) for name in ("one", "other")]


def weight_norm(module, name):
    parametrizations.weight_norm(module, name)


def old_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, name)


def spectral_norm(module, name):
    parametrizations.spectral_norm(module, name)


def pruned(module, name):
    prune.l1_unstructured(module, name, 0.4)


def pruned_twice(module, name):
    prune.l1_unstructured(module, name, 0.2)
    prune.random_unstructured(module, name, 0.2)


def raw(module, name):
    """Keep the weight itself as another parameter, halved by a hook of the user's."""
    parameter = module._parameters.pop(name)
    module.register_parameter(f"{name}_raw", parameter)

    def halve(module, inputs):
        setattr(module, name, module._parameters[f"{name}_raw"] / 2)

    module.register_forward_pre_hook(halve)
    halve(module, ())


WAYS = [weight_norm, old_weight_norm, spectral_norm, pruned, pruned_twice, raw]
each_way = pytest.mark.parametrize("compute", WAYS)


class Recurrent(nn.Module):
    """A recurrent layer on padded or packed sequences."""

    def __init__(self, kind=nn.LSTM, packed=False, **options):
        super().__init__()
        self.layer = kind(WIDTH, UNITS, batch_first=True, **options)
        self.packed = packed

    def forward(self, inputs):
        if self.packed:
            inputs = pack_padded_sequence(inputs, [2, 4, 3], True, enforce_sorted=False)
            return self.layer(inputs)[0].data
        return self.layer(inputs)[0]


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH - 1, 2, dropout=dropout, batch_first=True)

    def forward(self, inputs):
        return self.layer(inputs, inputs, inputs, need_weights=False)[0]


def opened(model, **options):
    """Convert, with responses that have an effect."""
    stn = stnify(model, HPARAMS, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return stn


def run(stn, inputs, response_input, forward=perturbed_forward):
    rows = response_input.expand(len(inputs), H)
    perturbation = Perturbation(rows, torch.full_like(rows, 0.5))
    return forward(stn.model._stnify.graph, (inputs,), {}, perturbation)


def with_fixed_weights(model, stn, response_input):
    """The original with each weight, computed or not, as the plain parameter it is perturbed to."""
    general = stn.model.general_parameters()
    twin, layers = copy.deepcopy(model), stn.model.hyper_layers
    for site in stn.plan.weights:
        response = layers[next(use.layer for use in uses_at(stn, site))].weight_response
        owner, attribute = place(twin, site)
        weight = getattr(owner, attribute).detach()
        changed = weight + response.materialise(weight, response_input).detach()
        if parametrize.is_parametrized(owner, attribute):
            parametrize.remove_parametrizations(owner, attribute)
        owner.__dict__.pop(attribute, None)
        owner._forward_pre_hooks.clear()
        setattr(owner, attribute, nn.Parameter(changed))
        if site.bias is not None:
            bias = stn.model.bias_responses()[site.bias](general[site.bias], response_input[None])[
                0
            ]
            getattr(owner, site.bias.rpartition(".")[2]).data.add_(bias.detach())
    return twin


def uses_at(stn, site):
    return [use for use in stn.model._stnify.uses[site.weight] if use.node == site.node]


def place(model, site):
    path, _, attribute = (site.computed_by or site.weight).rpartition(".")
    return model.get_submodule(path), attribute


def recurrent_case(name, **options):
    return pytest.param(lambda: Recurrent(**options), name, id="-".join(map(str, options.values())))


RECURRENT = [
    recurrent_case("weight_hh_l0", kind=nn.LSTM),
    recurrent_case("weight_ih_l1_reverse", kind=nn.GRU, num_layers=2, bidirectional=True),
    recurrent_case("weight_ih_l0", kind=nn.RNN, bidirectional=True),
    recurrent_case("weight_hr_l0", kind=nn.LSTM, proj_size=2),
    recurrent_case("weight_hh_l0", kind=nn.GRU, packed=True),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("wrap", [lambda model: model, DataDependent], ids=["traced", "not"])
@each_way
@pytest.mark.parametrize(("build", "name"), RECURRENT)
def test_a_perturbed_recurrence_is_the_original_with_the_weights_it_is_perturbed_to(
    build, name, compute, wrap
):
    check(build, lambda model: compute(model.layer, name), wrap)


@pytest.mark.parametrize("wrap", [lambda model: model, DataDependent], ids=["traced", "not"])
@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj", "both"])
@pytest.mark.parametrize("compute", [weight_norm, spectral_norm])
def test_perturbed_attention_is_the_original_with_the_weights_it_is_perturbed_to(
    name, compute, wrap
):
    def normed(model):
        if name != "out_proj":
            compute(model.layer, "in_proj_weight")
        if name != "in_proj_weight":
            compute(model.layer.out_proj, "weight")

    check(Attention, normed, wrap, width=WIDTH - 1)


def check(build, compute, wrap, width=WIDTH):
    with double_precision():
        torch.manual_seed(0)
        inner = build()
        compute(inner)
        model = wrap(inner).eval()
        stn, inputs = opened(model), normal(3, 4, width)
        assert {site.computed is not None for site in stn.plan.weights} >= {True}
        response_input = torch.randn(H)
        with torch.no_grad():
            plain = model(inputs)
            assert torch.allclose(run(stn, inputs, 0 * response_input), plain, rtol=1e-12)
            found = run(stn, inputs, response_input)
            expected = with_fixed_weights(model, stn, response_input)(inputs)
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
            assert not torch.allclose(found, plain, atol=1e-3)  # negative control


@each_way
def test_every_computed_weight_of_a_recurrence_has_an_effect_of_its_own(compute):
    """A response that went nowhere would leave the output as it was."""
    model = Recurrent().eval()
    compute(model.layer, "weight_hh_l0")
    stn, inputs = opened(model), normal(3, 4, WIDTH)
    site = next(site for site in stn.plan.weights if site.computed)
    layer = stn.model.hyper_layers[uses_at(stn, site)[0].layer]
    before = run(stn, inputs, torch.ones(H))
    with torch.no_grad():
        layer.weight_response.gate.mul_(2)
    assert not torch.allclose(before, run(stn, inputs, torch.ones(H)), atol=1e-4)


class Counted(nn.Module):
    """A parametrization that depends on how often it was looked at."""

    def __init__(self):
        super().__init__()
        self.register_buffer("looks", torch.zeros(()))

    def forward(self, weight):
        self.looks.add_(1)
        return weight * (1 + 0.1 * self.looks)


@pytest.mark.parametrize("forward", [perturbed_forward, linearized_forward])
def test_a_weight_is_looked_at_as_often_as_in_the_model_itself(forward):
    """A recurrent layer looks several times; a perturbed pass leaves no trace of it."""
    torch.manual_seed(0)
    model, inputs = Recurrent(), normal(3, 4, WIDTH)
    parametrize.register_parametrization(model.layer, "weight_hh_l0", Counted())
    stn = opened(model, example_inputs=inputs)
    looks = model.layer.parametrizations["weight_hh_l0"][0].looks
    before = looks.clone()
    found = run(stn, inputs, torch.zeros(H), forward)
    assert torch.equal(looks, before)
    assert torch.allclose(found, stn.model(inputs), atol=1e-6)
    assert looks > before
    assert not torch.allclose(found, stn.model(inputs), atol=1e-3)  # negative control


@pytest.mark.parametrize("forward", [perturbed_forward, linearized_forward])
def test_what_another_pass_has_cached_is_not_used(forward):
    torch.manual_seed(0)
    model, inputs = Recurrent().eval(), normal(3, 4, WIDTH)
    weight_norm(model.layer, "weight_hh_l0")
    stn = opened(DataDependent(model))
    alone = run(stn, inputs, torch.ones(H), forward)
    with parametrize.cached():
        stn.model(inputs)
        assert torch.equal(run(stn, inputs, torch.ones(H), forward), alone)
        assert torch.equal(run(stn, inputs, torch.ones(H), forward), alone)
    assert not torch.equal(alone, run(stn, inputs, torch.zeros(H), forward))


class SetByItsParent(nn.Module):
    """A hook of the whole sets its part's weight, which it applies itself."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(WIDTH, UNITS)
        self.part.register_parameter("weight_raw", self.part._parameters.pop("weight"))
        self.register_forward_pre_hook(SetByItsParent.compute)
        self.compute(())

    def compute(self, inputs):
        self.part.weight = self.part.weight_raw / 2

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.part.weight, self.part.bias)


def test_a_weight_that_another_modules_hook_sets_responds():
    stn, inputs = opened(DataDependent(SetByItsParent().eval())), normal(3, WIDTH)
    (layer,) = stn.model.hyper_layers.values()
    layer.bias_response = None
    before = run(stn, inputs, torch.ones(H))
    with torch.no_grad():
        layer.weight_response.gate.mul_(2)
    assert not torch.allclose(run(stn, inputs, torch.ones(H)), before, atol=1e-3)


class LowRank(nn.Module):
    """A change of a weight by two small matrices, as in LoRA."""

    def __init__(self, rows, columns):
        super().__init__()
        self.left, self.right = (
            nn.Parameter(torch.randn(rows, 2)),
            nn.Parameter(torch.randn(2, columns)),
        )

    def forward(self, weight):
        return weight + self.left @ self.right


@pytest.mark.parametrize("wrap", [nn.Sequential, DataDependent])
def test_a_computed_weight_responds_if_a_part_of_it_trains(wrap):
    layer = nn.Linear(WIDTH, UNITS).requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", LowRank(UNITS, WIDTH))
    plan = stnify(wrap(layer), HPARAMS, seed=0).plan
    assert [(site.computed, site.weight_responds) for site in plan.weights] == [
        ((UNITS, WIDTH), True)
    ]
    layer.requires_grad_(False)
    with pytest.raises(UnsupportedModuleError, match=r"frozen \(requires_grad=False\)"):
        stnify(wrap(layer), HPARAMS, seed=0)


class Held(nn.Module):
    """Holds a layer, and cannot be traced."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(inputs) if inputs.isfinite().all() else inputs


TWICE = {
    "called twice": lambda layer: nn.Sequential(layer, nn.Tanh(), layer),
    "held twice": lambda layer: nn.Sequential(Held(layer), nn.Tanh(), Held(layer)),
    "called twice inside": lambda layer: Held(nn.Sequential(layer, nn.Tanh(), layer)),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_weight_that_is_computed_twice_has_one_response(name):
    with double_precision():
        torch.manual_seed(0)
        layer = nn.Linear(WIDTH, WIDTH)
        weight_norm(layer, "weight")
        stn, inputs = opened(TWICE[name](layer).eval()), normal(3, WIDTH)
        (response,) = {one.weight_response for one in stn.model.hyper_layers.values()}
        (bias_response,) = stn.model.bias_responses().values()
        drawn = torch.randn(H)
        with torch.no_grad():
            weight = layer.weight + response.materialise(layer.weight, drawn)
            bias = layer.bias + bias_response(layer.bias, drawn[None])[0]
            inner = nn.functional.linear(inputs, weight, bias).tanh()
            expected = nn.functional.linear(inner, weight, bias)
            assert torch.allclose(run(stn, inputs, drawn), expected, rtol=1e-10, atol=1e-12)


def test_two_weights_that_are_computed_alike_have_two_responses():
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    for layer in layers:
        weight_norm(layer, "weight")
    stn = stnify(nn.Sequential(*layers), HPARAMS, seed=0)
    assert len({layer.weight_response for layer in stn.model.hyper_layers.values()}) == 2


@pytest.mark.parametrize("at", ["0", nn.Linear, "0.parametrizations.weight.original1"])
def test_a_decay_finds_the_parameters_of_a_parametrized_layer(at):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    weight_norm(model[0], "weight")
    (decay,) = stnify(model, [WeightDecay(at=at)], seed=0).plan.decays
    assert "0.parametrizations.weight.original1" in decay.parameters
    assert ("2.weight" in decay.parameters) == (at is nn.Linear)
    (decay,) = stnify(model, [WeightDecay(at="2")], seed=0).plan.decays
    assert decay.parameters == ("2.weight",)


def test_an_export_that_will_be_refused_is_warned_of():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    weight_norm(model[0], "weight")
    with pytest.warns(UserWarning, match=r"export\(\) will be refused: .*'0\.parametrizations"):
        stn = stnify(model, HPARAMS, method="stn", seed=0)
    with pytest.raises(UsageError, match="cannot be folded"):
        stn.export()
    stnify(nn.Sequential(nn.Linear(WIDTH, 2)), HPARAMS, method="stn", seed=0).export()


# Dynamo asks for it behind code that it does not compile.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("compute", [weight_norm, spectral_norm])
def test_attention_dropout_acts_where_projections_are_computed(compute, compiled, monkeypatch):
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = Attention(dropout=0.5)
    compute(model.layer, "in_proj_weight")
    compute(model.layer.out_proj, "weight")
    stn = stnify(model, [AttentionDropout(init=0.5)], compile=compiled, seed=0)
    model.layer.out_proj.parametrizations.eval()  # without power iterations
    model.layer.parametrizations.eval()
    inputs = normal(3, 4, WIDTH - 1)
    calls = [stn.model(inputs) for _ in range(2)]
    assert not torch.equal(*calls)
    stn.hyperparameters.set_values({"attention_dropout": 1e-9})
    calls = [stn.model(inputs) for _ in range(2)]  # negative control
    assert torch.equal(*calls)
