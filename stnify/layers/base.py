"""The abstract hyper layer: an operator whose weights respond to the hyperparameters."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from stnify.layers.response import BiasResponse, WeightResponse
from stnify.rows import RowLayout, expand_rows


class HyperLayer(nn.Module, ABC):
    r"""Applies an operator with weights that are affine in the response input.

    .. math:: y = W x + b + (U\delta) \odot (W_{response} x) + (V\delta) \odot b_{response}

    It owns the response parameters only; the general weight and bias are arguments, so that they
    stay the user's own. Without a response input it *is* the operator, bit for bit.

    A final subclass gives the operator, and how a gate meets its outputs. Source: [DeltaSTN] 3.14.

    Args:
        weight_response: Response of the weight; None if the weight is frozen.
        bias_response: Response of the bias; None if there is no bias or it is frozen.

    Attributes:
        layout: Which rows of the input belong to which example.
        row_dims: Dimensions of the input that may count rows.
    """

    row_dims: ClassVar[tuple[int, ...]] = (0, 1)

    def __init__(
        self, weight_response: WeightResponse | None, bias_response: BiasResponse | None
    ) -> None:
        super().__init__()
        self.weight_response = weight_response
        self.bias_response = bias_response
        self.layout = RowLayout.BATCH

    @abstractmethod
    def operate(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any
    ) -> Tensor:
        """Compute what the original layer computes."""

    @abstractmethod
    def broadcast(self, units: Tensor, outputs: Tensor) -> Tensor:
        """Shape ``(rows, n)`` values of output units to meet ``outputs``."""

    @abstractmethod
    def is_single(self, inputs: Tensor) -> bool:
        """Whether ``inputs`` is one example without a batch dimension."""

    def forward(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor | None,
        linearized: bool,
        **arguments: Any,
    ) -> Tensor:
        """Apply the layer.

        Args:
            inputs: What the original layer receives; a dual tensor in a linearised pass.
            weight: General weight; a dual tensor if it is computed from what responds.
            bias: General bias or None, likewise.
            response_input: ``(batch, h)`` unconstrained, or None for the plain operator.
            linearized: Return a dual tensor: the plain output, and as its tangent the first-order
                effect of the response ([DeltaSTN] Eq. 3.13), three evaluations in all.
            arguments: Geometry of the call, where it is not the layer's own.
        """
        if response_input is None:
            return self.operate(inputs, weight, bias, **arguments)
        primal, tangent, turn, shift = inputs, None, None, None
        if linearized:
            primal, tangent = forward_ad.unpack_dual(inputs)
            weight, turn = forward_ad.unpack_dual(weight)
        if linearized and bias is not None:
            bias, shift = forward_ad.unpack_dual(bias)
        outputs = self.operate(primal, weight, bias, **arguments)
        change = self.change(primal, weight, bias, response_input, outputs, **arguments)
        if not linearized:
            return outputs + change
        if tangent is not None:
            change = change + self.operate(tangent, weight, None, **arguments)
        if turn is not None:
            change = change + self.operate(primal, turn, None, **arguments)
        if shift is not None:
            change = change + self.broadcast(shift[None], outputs)
        return forward_ad.make_dual(outputs, change)

    def change(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor,
        outputs: Tensor,
        **arguments: Any,
    ) -> Tensor:
        """Return what the response adds to ``outputs``, in their shape and dtype."""
        change = None
        if self.weight_response is not None:
            change = self.weight_change(inputs, weight, bias, response_input, outputs, **arguments)
        if self.bias_response is not None and bias is not None:
            shift = self.bias_response(bias, response_input)
            shift = self.broadcast(self.rows(shift, inputs), outputs)
            change = shift if change is None else change + shift
        assert change is not None, "a hyper layer without any response is never built"
        return change.to(outputs.dtype).expand_as(outputs)

    def weight_change(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        response_input: Tensor,
        outputs: Tensor,
        **arguments: Any,
    ) -> Tensor:
        r"""Return :math:`(U\delta) \odot (W_{response} x)`.

        With ``response="gate"`` the product is there already: it is the output without its bias.
        """
        assert self.weight_response is not None
        gates = self.rows(self.weight_response.gates(response_input), inputs)
        if self.weight_response.response is not None:
            product = self.operate(inputs, self.weight_response.response, None, **arguments)
        elif bias is None:
            product = outputs
        else:
            product = outputs - self.broadcast(bias[None], outputs)
        return self.broadcast(gates, outputs).to(outputs.dtype) * product

    def rows(self, values: Tensor, inputs: Tensor) -> Tensor:
        """Give each row of ``inputs`` its example's values; one example gets the batch's mean."""
        if self.is_single(inputs):
            return values.mean(0, keepdim=True)
        return expand_rows(values, inputs.shape[self.layout.dim], self.layout)
