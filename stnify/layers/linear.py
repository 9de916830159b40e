"""Linear layers with a response."""

from typing import Any, final

import torch.nn.functional as F
from torch import Tensor

from stnify.layers.base import HyperLayer
from stnify.rows import placed


@final
class HyperLinear(HyperLayer):
    """``F.linear`` whose weight and bias respond to the hyperparameters.

    The gate acts on output units; if the weight is tied to an embedding's, whose gate acts on the
    embedding width, it acts on this layer's *inputs*, so that both use the same perturbed weight.

    Shapes: inputs ``(batch, ..., in)`` or ``(in,)``; outputs ``(batch, ..., out)`` or ``(out,)``.
    """

    def operate(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any
    ) -> Tensor:
        """Return ``inputs @ weight.T + bias``."""
        return F.linear(inputs, weight, bias)

    def broadcast(self, units: Tensor, outputs: Tensor) -> Tensor:
        """Put units last and rows where the batch is, with singletons between."""
        return by_last(units, outputs, self.layout.dim)

    def is_single(self, inputs: Tensor) -> bool:
        """A vector is one example."""
        return inputs.ndim <= self.layout.dim + 1

    def weight_change(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor,
        outputs: Tensor,
        **arguments: Any,
    ) -> Tensor:
        """Gate the outputs, or the inputs where the tied weight is gated along its columns."""
        response = self.weight_response
        if response is None or response.axis == 0:
            return super().weight_change(inputs, weight, bias, response_input, outputs)
        gates = self.rows(response.gates(response_input), inputs)
        gated = by_last(gates, inputs, self.layout.dim).to(inputs.dtype) * inputs
        return F.linear(gated, response.weight(weight))


def by_last(units: Tensor, like: Tensor, row: int) -> Tensor:
    """Shape ``(rows, n)`` to meet ``like``, whose rows are dimension ``row`` and units the last.

    A single example's ``(1, n)`` meets one without a dimension of rows.
    """
    if like.ndim <= row + 1:
        return units[0]
    return placed(units, like.ndim, row, -1)
