"""Linearised and perturbed predictions against differences, torch.func and examples one by one."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from zoo import images, shake

import stnify
from stnify import Dropout, Hyperparameter, UnsupportedModuleError, WeightDecay
from stnify.forward_mode import FORWARD_MODE_RULES, ForwardModeRules
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation

BATCH = 4


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def smooth_perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 8 * 8, 12),
        nn.Tanh(),
        nn.Linear(12, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )


def smooth_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2, padding="same", bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(100, 3),
    )


SMOOTH = {"perceptron": smooth_perceptron, "convolutions": smooth_convolutions}

NETWORKS = {
    "resnet": ("test_resnet", {}),
    "vit": ("test_vit", {"img_size": 32, "dynamic_img_size": False}),
    "convnext": ("test_convnext", {}),
}
"""timm's smallest of each family."""


def network(name: str) -> nn.Module:
    model, options = NETWORKS[name]
    model = timm.create_model(model, num_classes=5, **options)
    shake(model)
    return model


def converted(model: nn.Module, inputs: Tensor, *declared, response="full", gates=0.3):
    """Convert with two idle hyperparameters and open gates."""
    idle = [Hyperparameter(name, 0.5) for name in ("left", "right")]
    stn = stnify.stnify(model, [*declared, *idle], response=response, example_inputs=inputs, seed=0)
    for name, parameter in stn.model.response_parameters().items():
        if name.endswith("gate"):
            parameter.data.normal_(0, gates)
    return stn


def perturbation(stn: stnify.STN, batch: int = BATCH) -> Perturbation:
    draws = torch.randn(batch, len(stn.hyperparameters.columns))
    return Perturbation(draws, stn.hyperparameters.constrain(draws))


def scaled(drawn: Perturbation, factor: float) -> Perturbation:
    return drawn._replace(response_input=factor * drawn.response_input)


def predict(stn: stnify.STN, forward, inputs: Tensor, drawn: Perturbation, seed=0) -> Tensor:
    torch.manual_seed(seed)

    def run(graph, args, kwargs):
        return forward(graph, args, kwargs, drawn)

    with stn.model._stnify.running(run, drawn.constrained):
        return stn.model(inputs).detach()


def tangent(stn: stnify.STN, inputs: Tensor, drawn: Perturbation, seed=0) -> Tensor:
    """Return the first-order effect of the response alone."""
    primal = predict(stn, perturbed_forward, inputs, scaled(drawn, 0.0), seed)
    return predict(stn, linearized_forward, inputs, drawn, seed) - primal


def central_difference(stn, inputs, drawn, step, seed=0) -> Tensor:
    ahead, behind = (
        predict(stn, perturbed_forward, inputs, scaled(drawn, side * step), seed)
        for side in (1, -1)
    )
    return (ahead - behind) / (2 * step)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# The linearised prediction ------------------------------------------------------------------------


@pytest.mark.parametrize("response", ["full", "gate"])
@pytest.mark.parametrize("name", SMOOTH)
def test_halving_the_step_quarters_the_error_of_differences(name, response):
    inputs = images(BATCH, 8)
    stn = converted(SMOOTH[name](), inputs, response=response)
    drawn = perturbation(stn)
    found = tangent(stn, inputs, drawn)
    errors = [
        float((central_difference(stn, inputs, drawn, step) - found).norm())
        for step in (2**-6, 2**-7, 2**-8)
    ]
    # The error is c h^2 + O(h^4); at these steps the second term is below a per cent.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.01)
    assert errors[2] < 1e-2 * float(found.norm())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_differences(name, training):
    """In train mode BatchNorm normalises by the perturbed batch, and its change counts."""
    inputs = images(BATCH)
    stn = converted(network(name), inputs, gates=0.05)
    stn.model.train(training)
    drawn = perturbation(stn)
    found = tangent(stn, inputs, drawn)
    # Rounding of 1e-16 / 1e-6 and the square of the step, both amplified by the network.
    assert relative_error(central_difference(stn, inputs, drawn, 1e-6), found) < 1e-6
    assert relative_error(central_difference(stn, inputs, perturbation(stn), 1e-6), found) > 0.1


@pytest.mark.parametrize("response", ["full", "gate"])
@pytest.mark.parametrize("name", SMOOTH)
def test_the_linearised_prediction_is_the_jvp_along_the_change_of_weights(name, response):
    inputs = images(BATCH, 8)
    model = SMOOTH[name]()
    stn = converted(model, inputs, response=response)
    drawn = perturbation(stn)
    found = predict(stn, linearized_forward, inputs, drawn)
    for i in range(BATCH):
        primal, change = jvp_along(model, stn, inputs[i : i + 1], drawn.response_input[i])
        # Two orders of summation in float64.
        assert torch.allclose(found[i : i + 1], primal + change, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found[i : i + 1], primal, rtol=0.01)


def jvp_along(model: nn.Module, stn: stnify.STN, example: Tensor, response_input: Tensor):
    """Differentiate a functional call along the change of every weight and bias."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    changes = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for name, response in stn.model.weight_responses().items():
        changes[name] = response.materialise(parameters[name], response_input).detach()
    for name, response in stn.model.bias_responses().items():
        changes[name] = response(parameters[name], response_input[None])[0].detach()

    def call(weights):
        return functional_call(model, weights, (example,))

    return torch.func.jvp(call, (parameters,), (changes,))


def test_primal_and_tangent_share_every_dropout_mask():
    inputs = images(BATCH, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(144, 6), nn.Tanh(), nn.AlphaDropout(0.5), nn.Linear(6, 3),
    )  # fmt: skip
    stn = converted(model, inputs, Dropout(at=["1", "4"], per_layer=True))
    stn.model.train()
    drawn = perturbation(stn)
    found = tangent(stn, inputs, drawn, seed=1)
    # The square of the step times third derivatives, as in the other comparison.
    assert relative_error(central_difference(stn, inputs, drawn, 1e-5, seed=1), found) < 1e-8
    assert relative_error(central_difference(stn, inputs, drawn, 1e-5, seed=2), found) > 0.1


def test_only_response_parameters_are_differentiated_and_buffers_stay():
    inputs = images(BATCH)
    stn = converted(network("resnet"), inputs)
    stn.model.train()
    buffers = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    for forward in (linearized_forward, perturbed_forward):
        drawn = perturbation(stn)
        outputs = forward(stn.model._stnify.graph, (inputs,), {}, drawn)
        stn.model.zero_grad()
        outputs.square().sum().backward()
        assert all(p.grad is None for p in stn.model.general_parameters().values())
        assert all(p.grad.any() for p in stn.model.response_parameters().values())
        after = dict(stn.model.named_buffers())
        assert all(torch.equal(after[name], buffer) for name, buffer in buffers.items())
    stn.model(inputs)
    assert not all(torch.equal(after[name], buffer) for name, buffer in buffers.items())


# The general step ---------------------------------------------------------------------------------

PLAIN = {
    "perceptron": smooth_perceptron,
    "resnet": lambda: timm.create_model("resnet18", num_classes=5),
    "vit": lambda: network("vit"),
}


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    F.cross_entropy(model(inputs), torch.arange(BATCH) % 3).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in named.items() if gradient is not None}


@pytest.mark.parametrize("name", PLAIN)
def test_the_general_steps_gradient_is_the_plain_models_bit_for_bit(name):
    torch.set_default_dtype(torch.float32)
    inputs = images(BATCH, 8 if name == "perceptron" else 32)
    plain = PLAIN[name]()
    model = stnify.stnify(copy.deepcopy(plain), [WeightDecay()], seed=0).model
    expected, found = gradients(plain, inputs), gradients(model, inputs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in plain.named_buffers())


def test_an_active_stochastic_site_changes_the_general_steps_gradient():
    plain = smooth_perceptron()
    dropout = Dropout(after="2", init=0.5)
    model = stnify.stnify(copy.deepcopy(plain), [dropout], seed=0).model
    expected, found = (gradients(each, images(BATCH, 8)) for each in (plain, model))
    assert not torch.equal(expected["5.weight"], found["5.weight"])


# Rows ---------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """Folds four windows of each image into the batch, then a linear layer for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 6, 3, padding=1)
        self.pixels = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        batch = images.shape[0]
        windows = images.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5)
        features = self.inner(windows.flatten(0, 2)).tanh().flatten(2).transpose(1, 2)
        return self.head(self.pixels(features).tanh().reshape(batch, -1, 6).mean(1))


ROWS = {
    "perceptron": smooth_perceptron,
    "windows": Windows,
    **{name: (lambda name=name: network(name)) for name in NETWORKS},
}


@pytest.mark.parametrize("forward", [linearized_forward, perturbed_forward])
@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_its_example_alone_with_its_own_perturbation(name, forward):
    inputs = images(BATCH, 8 if name == "perceptron" else 32)
    stn = converted(ROWS[name](), inputs)
    stn.model.eval()
    drawn = perturbation(stn)
    together = predict(stn, forward, inputs, drawn)
    others = predict(stn, forward, inputs, drawn._replace(response_input=drawn[0].roll(1, 0)))
    for i in range(BATCH):
        own = Perturbation(drawn.response_input[i : i + 1], drawn.constrained[i : i + 1])
        alone = predict(stn, forward, inputs[i : i + 1], own)[0]
        # Kernels sum in another order for another batch size.
        assert torch.allclose(together[i], alone, rtol=1e-8, atol=1e-9)
        assert not torch.allclose(others[i], alone, rtol=1e-3, atol=1e-3)


# Rules for forward mode ---------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def statistics(channels: int) -> dict[str, Tensor]:
    return {"running_mean": normal(channels), "running_var": normal(channels).square() + 0.5}


def scale_and_shift(*shape: int) -> dict[str, Tensor]:
    return {"weight": normal(*shape) + 2, "bias": normal(*shape, 1)[..., 0]}


NO_STATISTICS = {"running_mean": None, "running_var": None}
MASK = normal(4, 5) > -0.5
NO_FIRST = torch.arange(4)[:, None] > torch.arange(5)
"""The first query may look nowhere."""
QUERIES = (normal(2, 3, 4, 6), normal(2, 3, 5, 6), normal(2, 3, 5, 7))

HIDDEN = normal(5, 3, 4)
"""Five positions, three examples, width four."""
ATTENTION = {
    "embed_dim_to_check": 4,
    "num_heads": 2,
    "in_proj_weight": normal(12, 4),
    "in_proj_bias": normal(12),
    "bias_k": None,
    "bias_v": None,
    "add_zero_attn": False,
    "dropout_p": 0.0,
    "out_proj_weight": normal(4, 4),
    "out_proj_bias": normal(4),
    "need_weights": False,
}

SEPARATE = {
    **ATTENTION,
    "in_proj_weight": None,
    "use_separate_proj_weight": True,
    **{f"{side}_proj_weight": normal(4, 4 + i) for i, side in enumerate("qkv")},
}
OTHERS = (normal(6, 3, 4), normal(6, 3, 4) ** 2)
LENGTHS = torch.tensor([4, 3, 3, 1])
PACKED = torch.nn.utils.rnn.pack_padded_sequence(normal(4, 4, 5), LENGTHS, batch_first=True)


def flat_weights(
    gates: int, *, layers: int = 1, sides: int = 1, biases: bool = True, projected: int = 0
) -> list[Tensor]:
    """The flat weights of a recurrent network from width five to width three."""
    found = []
    for layer in range(layers):
        for _ in range(sides):
            width = projected or 3
            found += [normal(3 * gates, 5 if layer == 0 else width * sides) / 2]
            found += [normal(3 * gates, width) / 2]
            found += [normal(3 * gates), normal(3 * gates) / 3] if biases else []
            found += [normal(projected, 3)] if projected else []
    return found


def recurrence(
    gates: int,
    *,
    packed: bool = False,
    first: bool = True,
    sides: int = 1,
    layers: int = 1,
    biases: bool = True,
    projected: int = 0,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of a recurrent network; with four gates it has a cell state."""
    hidden = normal(layers * sides, 4, projected or 3)
    state = [hidden, normal(layers * sides, 4, 3)] if gates == 4 else hidden
    weights = flat_weights(gates, layers=layers, sides=sides, biases=biases, projected=projected)
    rest = {
        "params": weights,
        "has_biases": biases,
        "num_layers": layers,
        "dropout": 0.0,
        "train": False,
        "bidirectional": sides == 2,
    }
    if packed:
        return (PACKED.data,), {"batch_sizes": PACKED.batch_sizes, "hx": state, **rest}
    inputs = normal(4, 2, 5) if first else normal(2, 4, 5)
    return (inputs,), {"hx": state, **rest, "batch_first": first}


def recurrences(gates: int) -> dict[str, Any]:
    return {
        "plain": recurrence(gates),
        "time first, no biases": recurrence(gates, first=False, biases=False),
        "two layers, both ways": recurrence(gates, layers=2, sides=2),
        "packed": recurrence(gates, packed=True, sides=2),
    }


def cell(gates: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    hidden = normal(4, 3)
    weights = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), flat_weights(gates), strict=True))
    return (normal(4, 5),), {"hx": [hidden, hidden + 1] if gates == 4 else hidden, **weights}


RULE_CASES = {
    torch.lstm: {**recurrences(4), "projected": recurrence(4, layers=2, projected=2)},
    torch.gru: recurrences(3),
    torch.rnn_tanh: recurrences(1),
    torch.rnn_relu: recurrences(1),
    torch.lstm_cell: {"plain": cell(4)},
    torch.gru_cell: {"plain": cell(3)},
    torch.rnn_tanh_cell: {"plain": cell(1)},
    torch.rnn_relu_cell: {"plain": cell(1)},
    torch._pack_padded_sequence: {
        "batch first": ((normal(4, 5, 2),), {"lengths": LENGTHS, "batch_first": True}),
        "time first": ((normal(5, 4),), {"lengths": LENGTHS, "batch_first": False}),
    },
    torch._pad_packed_sequence: {
        "batch first": (
            (PACKED.data,),
            {
                "batch_sizes": PACKED.batch_sizes,
                "batch_first": True,
                "padding_value": 0.0,
                "total_length": -1,
            },
        ),
        "longer": (
            (PACKED.data,),
            {
                "batch_sizes": PACKED.batch_sizes,
                "batch_first": False,
                "padding_value": 2.0,
                "total_length": 6,
            },
        ),
    },
    F.normalize: {
        "plain": ((normal(5, 6),), {}),
        "first dimension, wide margin": ((normal(5, 6),), {"dim": 0, "eps": 2.0}),
        "another norm": ((normal(5, 6),), {"p": 1.0}),
    },
    F.batch_norm: {
        "train": ((normal(6, 3, 4),), {**statistics(3), "training": True}),
        "train, affine": (
            (normal(6, 3, 4, 2),),
            {**statistics(3), **scale_and_shift(3), "training": True, "eps": 0.1},
        ),
        "train, no statistics": ((normal(6, 3),), {**NO_STATISTICS, "training": True}),
        "eval": ((normal(6, 3, 4),), statistics(3)),
        "eval, affine": ((normal(6, 3),), {**statistics(3), **scale_and_shift(3)}),
    },
    F.layer_norm: {
        "plain": ((normal(6, 4, 5),), {"normalized_shape": (5,)}),
        "affine": ((normal(6, 5),), {"normalized_shape": (5,), **scale_and_shift(5), "eps": 0.1}),
        "two dimensions": (
            (normal(6, 4, 5),),
            {"normalized_shape": [4, 5], "weight": normal(4, 5), "bias": None},
        ),
    },
    F.group_norm: {
        "plain": ((normal(6, 4, 3, 3),), {"num_groups": 2}),
        "affine": ((normal(6, 4, 5),), {"num_groups": 4, **scale_and_shift(4), "eps": 0.1}),
        "one group, no space": ((normal(6, 4),), {"num_groups": 1}),
    },
    F.instance_norm: {
        "plain": ((normal(6, 4, 3, 3),), {}),
        "affine": ((normal(6, 4, 5),), {**scale_and_shift(4), "eps": 0.1}),
        "updating statistics": ((normal(6, 4, 5),), statistics(4)),
        "running statistics": ((normal(6, 4, 5),), {**statistics(4), "use_input_stats": False}),
    },
    F.scaled_dot_product_attention: {
        "plain": (QUERIES, {}),
        "mask": (QUERIES, {"attn_mask": MASK}),
        "additive mask": (QUERIES, {"attn_mask": normal(3, 4, 5)}),
        "masked rows": (QUERIES, {"attn_mask": NO_FIRST}),
        "masked rows, additive": (
            QUERIES,
            {"attn_mask": normal(4, 5).masked_fill(~NO_FIRST, -torch.inf)},
        ),
        "causal": (QUERIES, {"is_causal": True}),
        "scale": (QUERIES, {"scale": 0.7}),
        "shared heads": (
            (normal(2, 6, 4, 5), normal(2, 2, 4, 5), normal(2, 2, 4, 5)),
            {"enable_gqa": True},
        ),
        "all dropped": (QUERIES, {"dropout_p": 1.0}),
    },
    torch._weight_norm: {
        "rows": ((normal(4, 5), normal(4, 1)), {}),
        "columns": ((normal(4, 5), normal(1, 5)), {"dim": 1}),
        "kernels": ((normal(4, 3, 2, 2), normal(4, 1, 1, 1)), {"dim": 0}),
        "whole": ((normal(4, 5), normal(1)[0]), {"dim": -1}),
    },
    torch.cdist: {
        "plain": ((normal(4, 3), normal(5, 3) + 1), {}),
        "many rows, batches": ((normal(2, 30, 3), normal(2, 28, 3) + 1), {}),
        "another norm": ((normal(4, 3), normal(5, 3) + 1), {"p": 1.0}),
        "largest": ((normal(4, 3), normal(5, 3) + 1), {"p": float("inf")}),
    },
    F.hardsigmoid: {
        "plain": ((4 * normal(50),), {}),
        "in place": ((4 * normal(50),), {"inplace": True}),
    },
    F.glu: {
        "last": ((normal(5, 6),), {}),
        "channels": ((normal(5, 6, 3),), {"dim": 1}),
    },
    F.multi_head_attention_forward: {
        "self": ((HIDDEN, HIDDEN, HIDDEN), ATTENTION),
        "masked, weights": (
            (HIDDEN, HIDDEN, HIDDEN),
            {**ATTENTION, "attn_mask": normal(5, 5), "need_weights": True},
        ),
        "other keys and values": ((HIDDEN, *OTHERS), ATTENTION),
        "keys are values, more of both": (
            (HIDDEN, OTHERS[0], OTHERS[0]),
            {
                **ATTENTION,
                "bias_k": normal(1, 1, 4),
                "bias_v": normal(1, 1, 4) + 1,
                "add_zero_attn": True,
            },
        ),
        "separate": ((HIDDEN, normal(6, 3, 5), normal(6, 3, 6)), SEPARATE),
        "both masks": (
            (HIDDEN, *OTHERS),
            {
                **ATTENTION,
                "attn_mask": (normal(6, 5, 6) > 1) & (torch.arange(6) > 0),
                "key_padding_mask": torch.tensor([[False] * 4 + [True] * 2] * 3),
            },
        ),
        "one example": (
            (HIDDEN[:, 0], *(side[:, 0] for side in OTHERS)),
            {**ATTENTION, "need_weights": True, "average_attn_weights": False},
        ),
    },
}
"""For every rule the calls it is tried on: differentiated arguments, constant ones."""

CALLS = [
    pytest.param(operator, *arguments, id=f"{operator.__name__}, {name}")
    for operator in FORWARD_MODE_RULES
    for name, arguments in RULE_CASES.get(operator, {}).items()
]


def test_every_rule_has_cases():
    assert RULE_CASES.keys() == FORWARD_MODE_RULES.keys()


def call(operator, inputs, arguments, dtype=torch.float64) -> Tensor:
    """Call with copies in ``dtype``."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()

    inputs, arguments = tree_map_only(Tensor, cast, (inputs, arguments))
    return first(operator(*inputs, **arguments))


def first(outputs) -> Tensor:
    """Return the prediction of operators that return more."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    # The rules round attention weights and gates to half precision, fused kernels do not.
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("operator", "inputs", "arguments"), CALLS)
def test_rules_equal_the_operator(operator, inputs, arguments, dtype):
    if operator is torch.cdist:  # which has no half precision on a CPU
        dtype = torch.promote_types(dtype, torch.float32)
    expected = call(operator, inputs, arguments, dtype)
    with ForwardModeRules():
        found = call(operator, inputs, arguments, dtype)
    assert found.dtype is expected.dtype
    tolerance = TOLERANCES[dtype]
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    if expected.any():
        moved = call(operator, tuple(tensor.flip(0) for tensor in inputs), arguments, dtype)
        assert not torch.allclose(found, moved, rtol=tolerance, atol=tolerance)


def push_forward(operator, inputs, directions, arguments) -> Tensor:
    """Return the tangent of the output under the rules."""
    with ForwardModeRules(), forward_ad.dual_level():
        duals = tuple(map(forward_ad.make_dual, inputs, directions))
        return forward_ad.unpack_dual(first(operator(*duals, **arguments))).tangent


@pytest.mark.parametrize(("operator", "inputs", "arguments"), CALLS)
def test_rules_push_tangents_forward_as_differences_do(operator, inputs, arguments):
    directions = tuple(torch.randn_like(tensor) for tensor in inputs)
    step = 1e-6
    ahead, behind = (
        call(
            operator,
            [x + side * step * v for x, v in zip(inputs, directions, strict=True)],
            arguments,
        )
        for side in (1, -1)
    )
    arguments = copy.deepcopy(arguments)
    found = push_forward(operator, [tensor.clone() for tensor in inputs], directions, arguments)
    # Rounding of 1e-16 / 1e-6, amplified by the standard deviations divided by.
    assert torch.allclose(found, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)
    assert found.any() or arguments.get("dropout_p") == 1.0


@pytest.mark.parametrize(("operator", "inputs", "arguments"), CALLS)
def test_tangents_of_rules_are_differentiated_as_linear_maps(operator, inputs, arguments):
    """Gradients reach the response through tangents: ``<c, J u> = <J' c, u>``."""
    arguments = copy.deepcopy(arguments)
    inputs = [tensor.clone() for tensor in inputs]
    through = tuple(torch.randn_like(tensor).requires_grad_() for tensor in inputs)
    along = tuple(torch.randn_like(tensor) for tensor in inputs)
    pushed = push_forward(operator, [x.clone() for x in inputs], through, arguments)
    weights = torch.randn_like(pushed)
    pulled = torch.autograd.grad(pushed, through, weights)
    forward = (push_forward(operator, inputs, along, arguments) * weights).sum()
    backward = sum((g * v).sum() for g, v in zip(pulled, along, strict=True))
    assert torch.allclose(forward, backward, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("operator", [F.batch_norm, F.instance_norm])
def test_rules_leave_running_statistics_alone(operator):
    arguments = statistics(3) | ({"training": True} if operator is F.batch_norm else {})
    before = copy.deepcopy(arguments)
    with ForwardModeRules():
        operator(normal(6, 3, 4), **arguments)
    assert torch.equal(arguments["running_mean"], before["running_mean"])
    assert torch.equal(arguments["running_var"], before["running_var"])
    operator(normal(6, 3, 4), **arguments)
    assert not torch.equal(arguments["running_mean"], before["running_mean"])


def test_rules_refuse_what_batch_norm_refuses():
    with ForwardModeRules(), pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(normal(1, 3), None, None, training=True)


def test_attention_drops_weights_at_the_rate_asked_for():
    query = normal(8, 2, 64, 4)
    with ForwardModeRules():
        kept = F.scaled_dot_product_attention(
            query, query, torch.eye(64).expand(8, 2, 64, 64), dropout_p=0.3
        )
        whole = F.scaled_dot_product_attention(query, query, torch.eye(64).expand(8, 2, 64, 64))
    dropped = (kept == 0).double().mean()
    # 65,536 draws: a standard deviation of 0.0018.
    assert dropped == pytest.approx(0.3, abs=0.01)
    assert torch.allclose(kept[kept != 0], whole[kept != 0] / 0.7)


def test_vectors_of_zeros_have_a_finite_normalised_tangent():
    inputs = torch.cat([torch.zeros(1, 3), torch.ones(1, 3)]).double()
    direction = normal(2, 3).requires_grad_()
    push_forward(F.normalize, [inputs], [direction], {}).square().sum().backward()
    assert direction.grad.isfinite().all()
    assert direction.grad[1].any()


class Leaf(nn.Sequential):
    """Wraps a module in one that cannot be traced through."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__(Branching(core))


class Branching(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, inputs: Tensor) -> Tensor:
        return self.core(inputs) if inputs.isfinite().all() else inputs


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(2, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outer(nn.functional.pdist(self.inner(inputs)).expand(len(inputs), -1)[:, :2])


@pytest.mark.parametrize(("wrap", "place"), [(nn.Sequential, "the forward"), (Leaf, "'0.core'")])
def test_an_operator_without_a_derivative_is_named_at_conversion(wrap, place):
    model = wrap(Distances())
    message = rf"'_pdist_forward' has none. It is called in '?{place}.*method=\"centered\""
    with pytest.raises(UnsupportedModuleError, match=message):
        stnify.stnify(model, [WeightDecay()], example_inputs=torch.randn(4, 3))
    options = {"example_inputs": torch.randn(4, 3), "method": "centered"}
    stn = stnify.stnify(model, [WeightDecay()], **options)
    assert len(stn.plan.weights) == 2


# Operators with some constant operands, counted ---------------------------------------------------

SQUARE = normal(3, 3) + 3
SCALED_CALLS = {
    "add": lambda a, b, c: torch.add(a, b, alpha=2),
    "add, of the class": lambda a, b, c: a.add(b, alpha=2),
    "add, in place": lambda a, b, c: a.clone().add_(b, alpha=2),
    "sub": lambda a, b, c: torch.sub(a, b, alpha=2),
    "sub, in place": lambda a, b, c: a.clone().sub_(b, alpha=2),
    "rsub": lambda a, b, c: torch.rsub(b, a, alpha=2),
    "addcmul": lambda a, b, c: torch.addcmul(a, b, c, value=2),
    "addcmul, in place": lambda a, b, c: a.clone().addcmul_(b, c, value=2),
    "addcdiv": lambda a, b, c: torch.addcdiv(a, b, c, value=2),
    "lerp": lambda a, b, c: torch.lerp(a, b, 0.3),
    "lerp by a tensor": lambda a, b, c: torch.lerp(a, b, c),
    "addmm": lambda a, b, c: torch.addmm(a, b, c, beta=2, alpha=3),
    "addmv": lambda a, b, c: torch.addmv(a[0], b, c[0], beta=2, alpha=3),
    "addr": lambda a, b, c: torch.addr(a, b[0], c[0], beta=2, alpha=3),
    "addbmm": lambda a, b, c: torch.addbmm(a, b[None], c[None], beta=2, alpha=3),
    "baddbmm": lambda a, b, c: torch.baddbmm(a[None], b[None], c[None], beta=2, alpha=3),
    "ldexp": lambda a, b, c: torch.ldexp(a, b),
    "index_add": lambda a, b, c: torch.index_add(a, 0, torch.arange(3), b, alpha=2),
}
PLACES = [[place for place in range(3) if chosen >> place & 1] for chosen in range(1, 8)]
"""Which operands depend on the response."""


class ScaledCalls(nn.Module):
    """Sums all of them, with every choice of operands that come from a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.linear(inputs)
        table = found.mean(0) * SQUARE
        for function in SCALED_CALLS.values():
            for places in PLACES:
                found = (
                    found + function(*(table if i in places else SQUARE for i in range(3))).sum()
                )
        return found


def count_scaled_calls() -> None:
    torch.set_default_dtype(torch.float64)
    stn = stnify.stnify(ScaledCalls(), [WeightDecay()], example_inputs=torch.randn(4, 3))
    assert stn.plan.flops.after > stn.plan.flops.before > 0


def test_operators_that_scale_the_tangent_of_a_constant_can_be_counted():
    """In a process of its own, which PyTorch would end by a segmentation fault."""
    code = "import test_linearize; test_linearize.count_scaled_calls()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent)
    assert done.returncode == 0


def test_operators_that_scale_the_tangent_of_a_constant_agree_with_differences():
    inputs = torch.randn(BATCH, 3)
    stn = converted(ScaledCalls(), inputs)
    stn.model.eval()
    drawn = perturbation(stn)
    found = tangent(stn, inputs, drawn)
    # Rounding of 1e-16 / 1e-6, amplified by sums of a few hundred terms.
    assert relative_error(central_difference(stn, inputs, drawn, 1e-6), found) < 1e-6
    assert relative_error(central_difference(stn, inputs, perturbation(stn), 1e-6), found) > 0.1
