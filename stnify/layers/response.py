"""Response parameters: how a weight or a bias responds to the hyperparameters.

Sizes below: ``h`` hyperparameters, ``n`` gated units (output units or channels; embedding width).
"""

from typing import Literal

import torch
from torch import Tensor, nn

ResponseKind = Literal["full", "gate"]


class WeightResponse(nn.Module):
    r"""Responds to a perturbation by :math:`(U\delta) \odot_{row} W_{response}`.

    ``U`` starts at zero, so a fresh response changes nothing; ``W_response`` starts like an
    ordinary layer's weight. With ``kind="gate"`` there is no ``W_response``: the general weight
    itself is gated ([STN] Theorem 2). Source: [DeltaSTN] Eqs. 3.14, E.1.

    Args:
        weight: The general weight it belongs to; gives shape, dtype and device.
        hyperparameters: ``h``.
        axis: Dimension of ``weight`` whose units are gated.
        units: Size of the gate, if not ``weight.shape[axis]`` (grouped transposed convolutions).
        kind: ``"full"`` or ``"gate"``.
    """

    def __init__(
        self,
        weight: Tensor,
        hyperparameters: int,
        axis: int,
        kind: ResponseKind,
        units: int | None = None,
    ) -> None:
        super().__init__()
        self.axis = axis
        units = weight.shape[axis] if units is None else units
        self.gate = nn.Parameter(weight.new_zeros(units, hyperparameters))
        self.response = nn.Parameter(_fresh_weight(weight, axis)) if kind == "full" else None

    def weight(self, general: Tensor) -> Tensor:
        """Return the matrix that is gated: ``W_response``, or the general weight itself."""
        return general if self.response is None else self.response

    def silence(self, entry: int) -> None:
        """Keep one entry of a table, such as the padding vector, from responding."""
        if self.response is not None:
            self.response.data[entry].zero_()

    def gates(self, response_input: Tensor) -> Tensor:
        """Return ``U delta``, ``(batch, n)``, for ``response_input`` of shape ``(batch, h)``."""
        return response_input.to(self.gate.dtype) @ self.gate.t()

    def materialise(self, general: Tensor, response_input: Tensor) -> Tensor:
        """Return the change of the weight for one ``(h,)`` response input, the slow way."""
        gate = self.gates(response_input[None])[0]
        return _along(gate, general, self.axis) * self.weight(general)

    def squared_norm_change(self, general: Tensor, response_input: Tensor) -> Tensor:
        """Return ``||W + gate * W_response||^2 - ||W||^2`` for each example, ``(batch,)``.

        It needs two inner products for each gated unit and no perturbed weight.
        """
        gates = self.gates(response_input)
        units = gates.shape[-1]
        general = _by_unit(general, self.axis, units)
        response = general if self.response is None else _by_unit(self.response, self.axis, units)
        products, squares = (general * response).sum(1), response.square().sum(1)
        return gates @ (2 * products) + gates.square() @ squares

    @torch.no_grad()
    def add_decay_gradient(
        self, general: Tensor, response_input: Tensor, coefficient: Tensor
    ) -> None:
        """Add the gradient of ``sum_i c_i / 2 ||W + gate_i * W_response||^2`` to ``.grad``.

        It is what autograd would find, in a third of the passes and without fresh memory.

        Args:
            general: W, a constant.
            response_input: ``(batch, h)``.
            coefficient: c, ``(batch,)``.
        """
        gates = self.gates(response_input)
        weighted = coefficient.to(gates.dtype)[:, None] * gates
        response = self.weight(general)
        products, squares = _inner_products(
            _by_unit(general, self.axis, gates.shape[1]),
            _by_unit(response, self.axis, gates.shape[1]),
        )
        slopes = coefficient.to(gates.dtype)[:, None] * products + weighted * squares
        assert self.gate.grad is not None
        self.gate.grad.addmm_(slopes.t(), response_input.to(gates.dtype))
        if self.response is not None:
            assert self.response.grad is not None
            first, second = weighted.sum(0), (weighted * gates).sum(0)
            self.response.grad.addcmul_(general, _along(first, general, self.axis))
            self.response.grad.addcmul_(response, _along(second, general, self.axis))

    @torch.no_grad()
    def add_slope_gradient(
        self, general: Tensor, slope: Tensor, response_input: Tensor, coefficient: Tensor
    ) -> None:
        """Add the gradient of ``sum_i c_i <slope, gate_i * W_response>`` to ``.grad``.

        Args:
            general: W, a constant.
            slope: Gradient of a penalty on the weight at W, of its shape.
            response_input: ``(batch, h)``.
            coefficient: c, ``(batch,)``.
        """
        gates = self.gates(response_input)
        weights = coefficient.to(gates.dtype)[:, None]
        products = _by_unit(slope * self.weight(general), self.axis, gates.shape[1]).sum(1)
        assert self.gate.grad is not None
        weighted_inputs = (weights * response_input.to(gates.dtype)).sum(0)
        self.gate.grad.addmm_(products[:, None], weighted_inputs[None])
        if self.response is not None:
            assert self.response.grad is not None
            along = _along((weights * gates).sum(0), general, self.axis)
            self.response.grad.addcmul_(slope, along)


_CACHED = 2**19
"""Numbers whose product stays in the cache: fresh memory costs more than the arithmetic."""


def _inner_products(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``<one, other>`` and ``<other, other>`` of each row, ``(units,)`` both."""
    rows = one.shape[0]
    if one.device.type == "cpu":
        rows = max(1, _CACHED // max(1, one.shape[1]))
    pairs = zip(one.split(rows), other.split(rows), strict=True)
    products = torch.cat([(left * right).sum(1) for left, right in pairs])
    return products, torch.linalg.vector_norm(other, dim=1).square()


class BiasResponse(nn.Module):
    r"""Responds to a perturbation by :math:`(V\delta) \odot b_{response}`.

    Args:
        bias: The general bias it belongs to, ``(n,)``.
        hyperparameters: ``h``.
        bound: ``b_response`` starts uniform in ``(-bound, bound)``.
        kind: ``"full"``, or ``"gate"`` to gate the general bias itself.

    Source: [DeltaSTN] Eq. 3.14.
    """

    def __init__(
        self, bias: Tensor, hyperparameters: int, bound: float, kind: ResponseKind
    ) -> None:
        super().__init__()
        self.gate = nn.Parameter(bias.new_zeros(bias.shape[0], hyperparameters))
        self.response = None
        if kind == "full":
            self.response = nn.Parameter(nn.init.uniform_(torch.empty_like(bias), -bound, bound))

    def forward(self, general: Tensor, response_input: Tensor) -> Tensor:
        """Return the change of the bias for each example, ``(batch, n)``."""
        response = general if self.response is None else self.response
        return (response_input.to(self.gate.dtype) @ self.gate.t()) * response


def fan_in_bound(weight: Tensor) -> float:
    """Return the half-width PyTorch gives a fresh bias: one over the root of the fan-in."""
    fan_in = weight[0].numel() if weight.ndim > 1 else weight.numel()
    return 1.0 / max(fan_in, 1) ** 0.5


def _fresh_weight(weight: Tensor, axis: int) -> Tensor:
    """Return what an ordinary layer starts with; scales start at one."""
    if weight.ndim < 2:
        return torch.ones_like(weight)
    fresh = torch.empty_like(weight)
    by_unit = fresh if axis <= 1 else fresh.movedim(axis, 0)
    nn.init.kaiming_uniform_(by_unit, a=5**0.5)
    return fresh


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Shape ``(n,)`` values to broadcast along ``axis`` of ``like``, in equal blocks of axis 0."""
    shape = [1] * like.ndim
    if not shape:
        return values.reshape(())
    if axis == 1 and values.shape[0] != like.shape[1]:  # grouped transposed convolution
        groups = values.shape[0] // like.shape[1]
        per_group = values.reshape(groups, like.shape[1])
        blocks = per_group.repeat_interleave(like.shape[0] // groups, dim=0)
        return blocks.reshape(*blocks.shape, *([1] * (like.ndim - 2)))
    shape[axis] = -1
    return values.reshape(shape)


def _by_unit(weight: Tensor, axis: int, units: int) -> Tensor:
    """Arrange a weight as ``(units, everything else)``, ``units`` along ``axis``."""
    if units == weight.shape[axis]:
        return weight.movedim(axis, 0).reshape(units, -1)
    groups = units // weight.shape[1]
    split = weight.reshape(groups, -1, weight.shape[1], *weight.shape[2:])
    return split.transpose(1, 2).reshape(units, -1)
