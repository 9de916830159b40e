"""Linear layers with a response."""

from typing import final

import torch.nn.functional as F
from torch import Tensor

from stnify.layers.base import HyperLayer


@final
class HyperLinear(HyperLayer):
    """``F.linear`` whose weight and bias respond to the hyperparameters.

    The gate acts on output units; if the weight is tied to an embedding's, whose gate acts on the
    embedding width, it acts on this layer's *inputs*, so that both use the same perturbed weight.

    Shapes: inputs ``(batch, ..., in)`` or ``(in,)``; outputs ``(batch, ..., out)`` or ``(out,)``.
    """

    def operate(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``inputs @ weight.T + bias``."""
        return F.linear(inputs, weight, bias)

    def broadcast(self, units: Tensor, outputs: Tensor) -> Tensor:
        """Put units last and rows first, with singletons between."""
        return by_last(units, outputs)

    def is_single(self, inputs: Tensor) -> bool:
        """A vector is one example."""
        return inputs.ndim == 1

    def weight_change(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor,
        outputs: Tensor,
    ) -> Tensor:
        """Gate the outputs, or the inputs where the tied weight is gated along its columns."""
        response = self.weight_response
        if response is None or response.axis == 0:
            return super().weight_change(inputs, weight, bias, response_input, outputs)
        gates = by_last(self.rows(response.gates(response_input), inputs), inputs)
        return F.linear(gates.to(inputs.dtype) * inputs, response.weight(weight))


def by_last(units: Tensor, like: Tensor) -> Tensor:
    """Shape ``(rows, n)`` as ``(rows, 1, ..., 1, n)`` to meet ``like``; ``(n,)`` meets a vector."""
    if like.ndim == 1:
        return units[0]
    return units.reshape(units.shape[0], *([1] * (like.ndim - 2)), units.shape[1])
