"""Embeddings with a response."""

from typing import Any, final

import torch.nn.functional as F
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
        options: Other arguments of ``F.embedding``, unless the call brings them.

    Shapes: inputs ``(batch, ...)`` integers; outputs ``(batch, ..., width)``. Source: [STN] D.
    """

    def __init__(self, weight_response: WeightResponse | None, **options: Any) -> None:
        super().__init__(weight_response, None)
        self.options = options

    def operate(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any
    ) -> Tensor:
        """Look the indices up."""
        return F.embedding(inputs, weight, **{**self.options, **arguments})

    def broadcast(self, units: Tensor, outputs: Tensor) -> Tensor:
        """Put the embedding width last and rows where the batch is."""
        return by_last(units, outputs, self.layout.dim)

    def is_single(self, inputs: Tensor) -> bool:
        """A single index is one example."""
        return inputs.ndim <= self.layout.dim

    def weight_change(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor,
        outputs: Tensor,
        **arguments: Any,
    ) -> Tensor:
        """Gate the vectors, or the entries where the tied weight is gated along its rows."""
        response = self.weight_response
        if response is None or response.axis == 1:
            return super().weight_change(inputs, weight, bias, response_input, outputs, **arguments)
        gates = self.rows(response.gates(response_input), inputs)
        return self._chosen(gates, inputs).to(outputs.dtype) * self.operate(
            inputs, response.weight(weight), None, **arguments
        )

    def _chosen(self, gates: Tensor, inputs: Tensor) -> Tensor:
        """Return the gate of every looked-up entry, ``(*inputs.shape, 1)``."""
        if gates.shape[0] == 1:
            return gates[0][inputs][..., None]
        by_row = inputs.movedim(self.layout.dim, 0)
        chosen = gates.gather(1, by_row.reshape(len(gates), -1)).reshape(by_row.shape)
        return chosen.movedim(0, self.layout.dim)[..., None]
