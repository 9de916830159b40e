"""Every pass compiles as one graph, agrees with eager, and does not recompile when lambda moves.

Real architectures are compiled as far as the graphs that kernels are made from; kernels themselves,
which take a C++ compiler half a minute each, are made for one small network.
"""

import warnings
from functools import partial

import pytest
import timm
import torch
from cases import convert, perceptron
from torch import nn

from stnify import (
    STN,
    Brightness,
    Dropout,
    HorizontalFlip,
    JacobianPenalty,
    ShapeError,
    WeightDecay,
    stnify,
)
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation, training_perturbation


def convolutions() -> nn.Module:
    head = [nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 4)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), *head)


MODELS = {
    "convolutions": convolutions,
    "resnet": lambda: timm.models.ResNet(
        timm.models.resnet.BasicBlock,
        [1, 1, 1, 1],
        channels=(4, 8, 8, 8),
        stem_width=8,
        num_classes=4,
    ),
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=32, depth=1, embed_dim=16, num_heads=2
    ),
}
NO_DROPOUT = 1e-9
"""A rate so low that no mask of these tests drops anything; zero itself is at infinity."""
TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}
"""Compiled kernels sum in another order, in float64."""

pytestmark = [
    # The compiler asks every tensor for its gradient, and silences the warning only by a filter.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.timeout(600),
]


def converted(name: str) -> STN:
    torch.manual_seed(0)
    declared = [Dropout(at="input", init=NO_DROPOUT), WeightDecay()]
    stn = stnify(MODELS[name]().double(), declared, seed=0)
    with torch.no_grad():
        for name, parameter in stn.model.response_parameters().items():
            if name.endswith("gate"):
                parameter.normal_(0, 0.3)
    return stn


@pytest.fixture(params=MODELS, name="stn")
def _stn(request):
    return converted(request.param)


@pytest.fixture(name="fullgraph")
def _fullgraph():
    """Compile functions as one graph each; compiling again for other values raises."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.fixture(name="without_kernels")
def _without_kernels(monkeypatch):
    """Let the public switch compile without kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def agree(stn, function, compiled, parameters):
    """Compare values and gradients of both before and after lambda has moved."""
    for decay in (1e-3, 1e-2):
        stn.hyperparameters.set_values({"weight_decay": decay})
        expected, found = (_with_gradients(run, parameters) for run in (function, compiled))
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, **TOLERANCE)
        assert any(slope.abs().max() > 1e-3 for slope in expected[1:])


def _with_gradients(run, parameters):
    prediction = run()
    return prediction, *torch.autograd.grad(prediction.square().sum(), parameters)


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


def test_general_pass(stn, fullgraph):
    compiled = fullgraph(stn.model)
    parameters = list(stn.model.general_parameters().values())
    agree(stn, lambda: stn.model(IMAGES), lambda: compiled(IMAGES), parameters)


def test_response_pass(stn, fullgraph):
    compiled = fullgraph(linearized_forward)
    parameters = list(stn.model.response_parameters().values())
    _agree_perturbed(stn, linearized_forward, compiled, parameters)


def test_validation_pass(stn, fullgraph):
    compiled = fullgraph(perturbed_forward)
    stn.model.eval()
    parameters = list(stn.model.response_parameters().values())
    _agree_perturbed(stn, perturbed_forward, compiled, parameters)


def _agree_perturbed(stn, function, compiled, parameters):
    stn.hyperparameters.raw_scale.data.fill_(-2.0)
    graph = stn.model._stnify.graph
    perturbation = training_perturbation(stn.hyperparameters, len(IMAGES))

    def run(forward):
        response_input, constrained = perturbation
        moved = Perturbation(response_input, stn.hyperparameters.current + 0 * constrained)
        return forward(graph, (IMAGES,), {}, moved)

    agree(stn, lambda: run(function), lambda: run(compiled), parameters)


@torch._inductor.config.patch(fallback_random=True)
def test_whole_steps_compile_through_the_public_switch():
    """In kernels too. With lambda frozen all parameters follow the eager run's, noise and all."""
    results = []
    for switch in (True, False):
        torch.manual_seed(0)
        model = convolutions().double()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        stn = stnify(
            model,
            [Dropout(at="input", init=0.3), WeightDecay()],
            optimizer=optimizer,
            criterion=nn.functional.cross_entropy,
            compile=switch,
            seed=0,
            train_steps=1,
            warmup_steps=0,
            response_every=1,
            valid_loader=[(IMAGES, torch.arange(4))],
        )
        stn.freeze()
        for _ in range(3):
            stn.step((IMAGES, torch.arange(4)))
        response = stn.model._stnify.response_parameters()
        theta = {name: parameter.detach().clone() for name, parameter in response.items()}
        assert all(parameter.any() for parameter in theta.values())
        stn.model.eval()
        results.append((stn.model(IMAGES).detach(), theta))
        before = stn.values()
        stn.unfreeze()
        stn.model.train()
        stn.step((IMAGES, torch.arange(4)))
        assert stn.values() != before
        assert "_orig_mod" not in "".join(stn.model.state_dict())
    torch.testing.assert_close(*results, **TOLERANCE)
    torch._dynamo.reset()


class Attending(nn.Module):
    def __init__(self, recurrent: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrence = nn.GRU(8, 8, batch_first=True) if recurrent else None
        self.mixing = nn.Parameter(torch.randn(8, 3))

    def forward(self, inputs):
        found = self.attention(inputs, inputs, inputs, need_weights=False)[0]
        if self.recurrence is not None:
            found = self.recurrence(found)[0]
        return found.mean(1) @ self.mixing


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("recurrent", [False, True], ids=["one graph", "no graph"])
def test_watched_calls_compile_as_one_graph_or_run_eagerly_with_a_warning(recurrent):
    gradients = []
    inputs = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    for switch in (False, True):
        torch.manual_seed(0)
        stn = stnify(
            Attending(recurrent).double(),
            [WeightDecay()],
            example_inputs=inputs,
            compile=switch,
            seed=0,
        )
        parameters = stn.model.response_parameters()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
        forward = stn._tuner.forwards.get("response", linearized_forward)
        drawn = Perturbation(torch.linspace(-1, 1, 6).double()[:, None], None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = forward(stn.model._stnify.graph, (inputs,), {}, drawn)
        eager = [w for w in caught if "response pass runs eagerly" in str(w.message)]
        assert len(eager) == (switch and recurrent)
        gradients.append(torch.autograd.grad(found.square().sum(), list(parameters.values())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
        assert one.abs().max() > 1e-6


def test_augmentations_compile_and_still_refuse_other_units():
    """Compiled, they are what they are eagerly; lambda moves without compiling again."""
    torch._dynamo.reset()
    declared = [HorizontalFlip(init=0.5), Brightness(init=0.3)]
    images = torch.rand(4, 3, 6, 6)
    found = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
        stn = stnify(model, declared, compile=compiled, seed=0)
        assert (stn.model._stnify.augment._compiled_call_impl is not None) == compiled
        stn.model.train()
        stn.model(images)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rate in (0.1, 0.4, 0.9):
                stn.hyperparameters.set_values({"horizontal_flip": rate})
                found.setdefault(rate, []).append(stn.model(images))
        fresh = stnify(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), declared, compile=compiled)
        with pytest.raises(ShapeError, match=r"must be in \[0, 1\] for colour operations"):
            fresh.model.train()(2 * images)
    for eager, fast in found.values():
        assert eager.shape == fast.shape == (4, 4)
        assert torch.stack([eager, fast]).isfinite().all()
    torch._dynamo.reset()


@pytest.mark.usefixtures("without_kernels")
def test_a_penalty_that_differentiates_runs_beside_compiled_passes():
    """PyTorch cannot differentiate compiled code twice; the penalty's own pass is eager."""
    steps = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        stn = convert(perceptron(), [JacobianPenalty(init=0.1)], compile=compiled)
        steps[compiled] = [stn.step(batch) for batch in stn.train_loader]
        assert not stn.model._stnify.eager
    # Float32, summed in another order, over five steps.
    assert steps[True] == pytest.approx(steps[False], rel=1e-4)
