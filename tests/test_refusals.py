"""Models that hide their weights, or have none to train, are refused by name with a way out."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from stnify import UnsupportedModuleError, WeightDecay, stnify


def linear():
    return nn.Linear(3, 2)


def sparse():
    model = linear()
    model.weight = nn.Parameter(torch.eye(2, 3).to_sparse())
    return model


def quantised_dynamically():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces that the function will move
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear})


def quantised_statically():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        return torchvision.models.quantization.mobilenet_v2(quantize=True)


REFUSED = {
    "data parallel": (lambda: nn.DataParallel(linear()), r"DataParallel.*`\.module` inside"),
    "compiled": (lambda: torch.compile(linear()), r"OptimizedModule.*before it is compiled"),
    "scripted": (lambda: _script(linear()), r"ScriptModule.*the Python module it was made from"),
    "compiled part": (
        lambda: nn.Sequential(linear(), torch.compile(linear())),
        r"'1' \(OptimizedModule\) is a OptimizedModule",
    ),
    "quantised": (quantised_dynamically, r"'0' \(Linear\) is quantised.*quantise `stn.export"),
    "statically": (quantised_statically, r"'features.0.0' \(ConvReLU2d\) is quantised"),
    "sparse": (sparse, r"'weight' has layout torch\.sparse_coo.*`\.to_dense\(\)`"),
}


def _script(model):
    return torch.jit.trace(model, torch.randn(1, 3))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_way_out(name):
    build, message = REFUSED[name]
    with pytest.raises(UnsupportedModuleError, match=message):
        stnify(build(), [WeightDecay()])


def test_the_plain_model_is_not_refused():
    assert stnify(linear(), [WeightDecay()]).plan.weights[0].kind == "Linear"
