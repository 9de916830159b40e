"""Products of activations with a weight, by ``matmul``, ``einsum`` or ``bilinear``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from stnify.layers.base import HyperLayer
from stnify.layers.linear import by_last
from stnify.rows import RowLayout, placed


@dataclass(frozen=True)
class Product:
    """A function linear in each operand, with the names of all dimensions as in ``einsum``.

    Attributes:
        function: ``(inputs, weight, *others) -> outputs``.
        inputs: One letter for each dimension of the activations that carry the batch.
        weight: Letters of the weight.
        outputs: Letters of the result.
    """

    function: Callable[..., Tensor]
    inputs: str
    weight: str
    outputs: str

    def transposed(self) -> "Product":
        """Return the same product as a function of the transposed weight."""

        def function(inputs: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
            return self.function(inputs, weight.mT, *others)

        letters = f"{self.weight[:-2]}{self.weight[-1]}{self.weight[-2]}"
        return Product(function, self.inputs, letters, self.outputs)


@final
class HyperProduct(HyperLayer):
    """A product whose weight responds to the hyperparameters.

    The gated dimension of the weight is one of the outputs', or one of the inputs' that is summed
    over. Arguments of the call: ``product``, and ``others``, the operands beside inputs and weight.
    """

    def operate(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any
    ) -> Tensor:
        """Return the product, plus the bias along its last dimension."""
        outputs: Tensor = arguments["product"].function(inputs, weight, *arguments["others"])
        return outputs if bias is None else outputs + bias

    def broadcast(self, units: Tensor, outputs: Tensor) -> Tensor:
        """Put units last and rows where the batch is."""
        return by_last(units, outputs, self.layout.dim)

    def is_single(self, inputs: Tensor) -> bool:
        """Inputs without the dimension of rows are one example.

        A vector's only dimension counts rows if the outputs have it, see ``weight_change``.
        """
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
        """Apply the product; forward mode carries the tangents of all operands itself."""
        outputs = self.operate(inputs, weight, bias, **arguments)
        if response_input is None:
            return outputs
        if not linearized:
            return outputs + self.change(inputs, weight, bias, response_input, outputs, **arguments)
        arguments["others"] = tuple(_primal(other) for other in arguments["others"])
        inputs, weight = _primal(inputs), _primal(weight)
        primal, tangent = forward_ad.unpack_dual(outputs)
        change = self.change(inputs, weight, bias, response_input, primal, **arguments)
        return forward_ad.make_dual(primal, change if tangent is None else tangent + change)

    def weight_change(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor,
        outputs: Tensor,
        **arguments: Any,
    ) -> Tensor:
        """Gate the outputs, or the inputs if the gated dimension is summed over."""
        response, product = self.weight_response, arguments["product"]
        assert response is not None
        assert isinstance(product, Product)
        gates = self.rows(response.gates(response_input), inputs).to(outputs.dtype)
        unit = product.weight[response.axis]
        row = product.inputs[min(self.layout.dim, inputs.ndim - 1)]
        if row not in product.outputs or row == unit or self.layout is RowLayout.SHARED:
            gates, row = gates.mean(0, keepdim=True), ""
        matrix = response.weight(weight)
        if unit in product.outputs:
            gates = _meeting(gates, row, unit, product.outputs)
            return gates * self.operate(inputs, matrix, None, **arguments)
        gates = _meeting(gates, row, unit, product.inputs)
        return self.operate(gates * inputs, matrix, None, **arguments)


def _meeting(gates: Tensor, row: str, unit: str, letters: str) -> Tensor:
    """Shape ``(rows, n)`` gates, or ``(1, n)`` without a row, to meet these dimensions."""
    if row:
        return placed(gates, len(letters), letters.index(row), letters.index(unit))
    return gates.reshape([-1 if letter == unit else 1 for letter in letters])


def _primal(value: Tensor) -> Tensor:
    return forward_ad.unpack_dual(value).primal
