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

from stnify import AttentionDropout, Hyperparameter, stnify
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


@pytest.mark.parametrize("training", [True, False])
def test_a_spectral_norm_iterates_as_often_as_in_the_model_itself(training):
    """It does at each look at the weight in train mode; a perturbed pass leaves no trace of it."""
    torch.manual_seed(0)
    model = Recurrent().train(training)
    spectral_norm(model.layer, "weight_hh_l0")
    twin = copy.deepcopy(model)
    stn, inputs = opened(model), normal(3, 4, WIDTH)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    perturbed = run(stn, inputs, torch.zeros(H), linearized_forward)
    assert state.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, state[name]) for name, buffer in model.named_buffers())
    assert torch.allclose(perturbed, twin(inputs), atol=1e-6)
    assert torch.equal(stn.model(inputs), stn_free(model, state, inputs))


def stn_free(model, state, inputs):
    """What the model itself gives from this state."""
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    outputs = model(inputs)
    assert all(torch.equal(buffer, after[name]) for name, buffer in model.named_buffers())
    return outputs


# Dynamo asks for it behind code that it does not compile.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("compute", [weight_norm, spectral_norm])
def test_attention_dropout_acts_where_the_output_projection_is_computed(
    compute, compiled, monkeypatch
):
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = Attention(dropout=0.5)
    compute(model.layer.out_proj, "weight")
    stn = stnify(model, [AttentionDropout(init=0.5)], compile=compiled, seed=0)
    model.layer.out_proj.parametrizations.eval()  # without power iterations
    inputs = normal(3, 4, WIDTH - 1)
    calls = [stn.model(inputs) for _ in range(2)]
    assert not torch.equal(*calls)
    stn.hyperparameters.set_values({"attention_dropout": 1e-9})
    calls = [stn.model(inputs) for _ in range(2)]  # negative control
    assert torch.equal(*calls)
