"""Parts: layers that hold general weights and their response to the hyperparameters.

Add a layer: one file here and one row in each table that applies. ``HYPER_MODULES`` is looked up by
exact type, because a subclass may compute something else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from stnify.layers.base import HyperLayer
from stnify.layers.conv import Convolution, HyperConv, TransposedConvolution
from stnify.layers.embedding import HyperEmbedding
from stnify.layers.linear import HyperLinear
from stnify.layers.parameter import HyperParameter
from stnify.layers.product import HyperProduct, Product
from stnify.layers.response import BiasResponse, ResponseKind, WeightResponse, fan_in_bound

__all__ = [
    "HYPER_MODULES",
    "HYPER_OPERATORS",
    "OPERATOR_ARGUMENTS",
    "BiasResponse",
    "HyperConv",
    "HyperEmbedding",
    "HyperLayer",
    "HyperLinear",
    "HyperParameter",
    "HyperProduct",
    "Product",
    "ResponseKind",
    "WeightResponse",
    "fan_in_bound",
]

Responses = tuple[WeightResponse | None, BiasResponse | None]


def _linear(module: Any, responses: Responses) -> HyperLayer:
    return HyperLinear(*responses)


def _conv(module: Any, responses: Responses) -> HyperLayer:
    return HyperConv(*responses, Convolution(module), len(module.kernel_size))


def _conv_transpose(module: Any, responses: Responses) -> HyperLayer:
    return HyperConv(*responses, TransposedConvolution(module), len(module.kernel_size))


def _embedding(module: Any, responses: Responses) -> HyperLayer:
    if module.padding_idx is not None and responses[0] is not None:
        responses[0].silence(module.padding_idx)
    options = {
        "padding_idx": module.padding_idx,
        "scale_grad_by_freq": module.scale_grad_by_freq,
    }
    return HyperEmbedding(responses[0], **options)


def _conv_operator(
    convolve: Callable[..., Any], dims: int
) -> Callable[[WeightResponse | None, BiasResponse | None], HyperLayer]:
    return partial(HyperConv, convolve=convolve, spatial_dims=dims)


def _embedding_operator(weight: WeightResponse | None, bias: BiasResponse | None) -> HyperLayer:
    return HyperEmbedding(weight)


def _parameter_operator(weight: WeightResponse | None, bias: BiasResponse | None) -> HyperLayer:
    return HyperParameter(weight)


HYPER_MODULES: dict[type[nn.Module], Callable[[Any, Responses], HyperLayer]] = {
    nn.Linear: _linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv_transpose,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
    nn.Embedding: _embedding,
}
"""Exact module type to ``(module, responses) -> hyper layer``, with the module's geometry."""

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONVOLUTION[:5], "output_padding", "groups", "dilation")
OPERATOR_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: _CONVOLUTION[:3],
    F.conv1d: _CONVOLUTION,
    F.conv2d: _CONVOLUTION,
    F.conv3d: _CONVOLUTION,
    F.conv_transpose1d: _TRANSPOSED,
    F.conv_transpose2d: _TRANSPOSED,
    F.conv_transpose3d: _TRANSPOSED,
}
"""Names of the arguments of operators that a hyper layer takes the place of, in order."""

HYPER_OPERATORS: dict[str, Callable[[WeightResponse | None, BiasResponse | None], HyperLayer]] = {
    "Linear": HyperLinear,
    "Conv1d": _conv_operator(F.conv1d, 1),
    "Conv2d": _conv_operator(F.conv2d, 2),
    "Conv3d": _conv_operator(F.conv3d, 3),
    "ConvTranspose1d": _conv_operator(F.conv_transpose1d, 1),
    "ConvTranspose2d": _conv_operator(F.conv_transpose2d, 2),
    "ConvTranspose3d": _conv_operator(F.conv_transpose3d, 3),
    "Embedding": _embedding_operator,
    "Product": HyperProduct,
    "Parameter": _parameter_operator,
}
"""Kind of operator to its hyper layer, whose geometry comes with each call."""
