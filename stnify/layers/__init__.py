"""Parts: layers that hold general weights and their response to the hyperparameters.

Add a layer: one file here and one row in each table that applies. ``HYPER_MODULES`` is looked up by
exact type, because a subclass may compute something else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stnify.layers.base import HyperLayer
from stnify.layers.conv import Convolution, HyperConv, TransposedConvolution
from stnify.layers.embedding import HyperEmbedding
from stnify.layers.linear import HyperLinear
from stnify.layers.response import BiasResponse, ResponseKind, WeightResponse, fan_in_bound

__all__ = [
    "HYPER_FUNCTIONS",
    "HYPER_MODULES",
    "BiasResponse",
    "HyperConv",
    "HyperEmbedding",
    "HyperLayer",
    "HyperLinear",
    "LayerKind",
    "ResponseKind",
    "WeightResponse",
    "fan_in_bound",
]

Responses = tuple[WeightResponse | None, BiasResponse | None]
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class LayerKind:
    """How one kind of layer gets its response.

    Attributes:
        build: ``(original, responses, call arguments) -> hyper layer``; ``original`` is the module,
            or the function of a function site.
        axis: Dimension of the weight whose units are gated.
    """

    build: Callable[[Any, Responses, Arguments], HyperLayer]
    axis: int = 0

    def units(self, weight: Tensor, groups: int) -> int:
        """Return how many units are gated; transposed kernels list theirs group by group."""
        return weight.shape[self.axis] * (groups if self.axis == 1 else 1)


def _linear(original: Any, responses: Responses, arguments: Arguments) -> HyperLayer:
    return HyperLinear(*responses)


def _conv(module: Any, responses: Responses, arguments: Arguments) -> HyperLayer:
    return HyperConv(*responses, Convolution(module), len(module.kernel_size))


def _conv_transpose(module: Any, responses: Responses, arguments: Arguments) -> HyperLayer:
    convolve = TransposedConvolution(module, arguments.get("output_size"))
    return HyperConv(*responses, convolve, len(module.kernel_size))


def _conv_function(dims: int) -> Callable[[Any, Responses, Arguments], HyperLayer]:
    def build(function: Any, responses: Responses, arguments: Arguments) -> HyperLayer:
        return HyperConv(*responses, partial(_call, function, dict(arguments)), dims)

    return build


def _call(
    function: Any, arguments: dict[str, Any], inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return function(inputs, weight, bias, **arguments)


def _embedding(module: Any, responses: Responses, arguments: Arguments) -> HyperLayer:
    response = responses[0]
    assert response is not None, "an embedding has no bias, so its weight responds"
    if module.padding_idx is not None and response.response is not None:
        response.response.data[module.padding_idx].zero_()  # as the padding vector itself
    embed = partial(
        F.embedding,
        padding_idx=module.padding_idx,
        scale_grad_by_freq=module.scale_grad_by_freq,
    )
    return HyperEmbedding(response, embed)


HYPER_MODULES: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(_linear),
    nn.Conv1d: LayerKind(_conv),
    nn.Conv2d: LayerKind(_conv),
    nn.Conv3d: LayerKind(_conv),
    nn.ConvTranspose1d: LayerKind(_conv_transpose, axis=1),
    nn.ConvTranspose2d: LayerKind(_conv_transpose, axis=1),
    nn.ConvTranspose3d: LayerKind(_conv_transpose, axis=1),
    nn.Embedding: LayerKind(_embedding, axis=1),
}
"""Exact module type to its hyper layer."""

HYPER_FUNCTIONS: dict[Callable[..., Any], LayerKind] = {
    F.linear: LayerKind(_linear),
    F.conv1d: LayerKind(_conv_function(1)),
    F.conv2d: LayerKind(_conv_function(2)),
    F.conv3d: LayerKind(_conv_function(3)),
    F.conv_transpose1d: LayerKind(_conv_function(1), axis=1),
    F.conv_transpose2d: LayerKind(_conv_function(2), axis=1),
    F.conv_transpose3d: LayerKind(_conv_function(3), axis=1),
}
"""Function called on a parameter to its hyper layer."""
