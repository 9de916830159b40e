"""Embeddings with a response."""

from collections.abc import Callable
from typing import final

from torch import Tensor

from stnify.layers.base import HyperLayer
from stnify.layers.linear import by_last
from stnify.layers.response import WeightResponse


@final
class HyperEmbedding(HyperLayer):
    """``F.embedding`` whose rows respond to the hyperparameters.

    The gate acts on the embedding width; if the weight is tied to a linear layer's, whose gate
    acts on its outputs, it acts on the *entries*, so that both use the same perturbed weight.

    Args:
        weight_response: Response of the table.
        embed: ``(indices, weight) -> vectors``, the original lookup.

    Shapes: inputs ``(batch, ...)`` integers; outputs ``(batch, ..., width)``. Source: [STN] D.
    """

    def __init__(
        self, weight_response: WeightResponse, embed: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__(weight_response, None)
        self.embed = embed

    def operate(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Look the indices up."""
        return self.embed(inputs, weight)

    def broadcast(self, units: Tensor, outputs: Tensor) -> Tensor:
        """Put the embedding width last and rows first."""
        return by_last(units, outputs)

    def is_single(self, inputs: Tensor) -> bool:
        """A single index is one example."""
        return inputs.ndim == 0

    def weight_change(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor,
        outputs: Tensor,
    ) -> Tensor:
        """Gate the vectors, or the entries where the tied weight is gated along its rows."""
        response = self.weight_response
        if response is None or response.axis == 1:
            return super().weight_change(inputs, weight, bias, response_input, outputs)
        gates = self.rows(response.gates(response_input), inputs)
        flat = inputs.reshape(gates.shape[0], -1) if gates.shape[0] > 1 else inputs.reshape(1, -1)
        chosen = gates.gather(1, flat).reshape(*inputs.shape, 1)
        return chosen.to(outputs.dtype) * self.embed(inputs, response.weight(weight))
