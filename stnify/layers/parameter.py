"""Parameters that respond by themselves: scales and shifts of norms, LayerScale, class tokens."""

from typing import Any, final

import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from stnify.layers.base import HyperLayer
from stnify.layers.response import WeightResponse
from stnify.rows import expand_rows, placed


@final
class HyperParameter(HyperLayer):
    """The value of a parameter for each row of the activations it meets.

    Whatever is then computed with these values is computed with perturbed parameters; the layer
    knows nothing about it. Argument of the call: ``first``, the dimension of the activations at
    which those of the parameter begin.

    Args:
        weight_response: Response of the parameter.

    Shapes: inputs are the activations; outputs ``(rows, *parameter.shape)``, or one row where the
    parameter leaves no dimension for rows.
    """

    def __init__(self, weight_response: WeightResponse | None) -> None:
        super().__init__(weight_response, None)

    def operate(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any
    ) -> Tensor:
        """Repeat the parameter for every row."""
        row, first = self.layout.dim, arguments["first"]
        covered = [1] * first + list(weight.shape)
        beside = row < inputs.ndim and (row >= len(covered) or covered[row] == 1)
        rows = inputs.shape[row] if beside else 1
        return weight.expand(rows, *weight.shape).contiguous()  # dual numbers cannot overlap

    def broadcast(self, units: Tensor, outputs: Tensor) -> Tensor:
        """Put rows first and units along the gated dimension."""
        assert self.weight_response is not None
        if outputs.ndim == 1:
            return units[:, 0]
        return placed(units, outputs.ndim, 0, self.weight_response.axis + 1)

    def is_single(self, inputs: Tensor) -> bool:
        """Activations without the dimension of rows are one example."""
        return inputs.ndim <= self.layout.dim

    def forward(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor | None,
        linearized: bool,
        **arguments: Any,
    ) -> Tensor:
        """Return the values, which do not depend on what the activations are."""
        inputs = forward_ad.unpack_dual(inputs).primal
        return super().forward(inputs, weight, bias, response_input, linearized, **arguments)

    def weight_change(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor,
        outputs: Tensor,
        **arguments: Any,
    ) -> Tensor:
        """Gate the parameter; one row takes the mean over the batch."""
        response = self.weight_response
        assert response is not None
        gates = expand_rows(response.gates(response_input), len(outputs), self.layout)
        return self.broadcast(gates, outputs) * response.weight(weight)
