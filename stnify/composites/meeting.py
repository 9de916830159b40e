"""Where a parameter meets activations element by element, in terms of ``meet``.

``meet(parameter, activations, first)`` takes the place of the parameter: it has as many dimensions
as the activations, the parameter's own from dimension ``first`` on, and may have rows.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Meet = Callable[[Tensor, Tensor, int], Tensor]
Meeting = Callable[[Meet, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _norm(
    channel: int | None,
    meet: Meet,
    function: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Normalise, then scale and shift; parameters begin at ``channel``, None if they are last."""
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    scale, shift = arguments.pop("weight", None), arguments.pop("bias", None)
    normal = outputs = function(**arguments)
    for parameter, apply in ((scale, torch.mul), (shift, torch.add)):
        if parameter is not None:
            first = normal.ndim - parameter.ndim if channel is None else channel
            outputs = apply(outputs, meet(parameter, normal, first))
    return outputs.to(normal.dtype)


def _elementwise(
    meet: Meet, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Let each operand meet the largest one."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    largest = max(tensors, key=lambda tensor: (tensor.ndim, tensor.numel()))

    def met(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return meet(value, largest, largest.ndim - value.ndim)

    return function(*map(met, args), **{name: met(value) for name, value in kwargs.items()})


def _repetition(
    meet: Meet, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Repeat a parameter, such as a class token, for every example."""
    parameter, outputs = args[0], function(*args, **kwargs)
    first = outputs.ndim - parameter.ndim
    repeated = zip(outputs.shape[first:], parameter.shape, strict=True)
    if any(size not in {1, after} for after, size in repeated):
        return outputs  # several copies along a dimension of its own
    return meet(parameter, outputs, first).expand(outputs.shape)


_OPERATIONS = ("add", "sub", "mul", "div", "subtract", "multiply", "divide", "true_divide")
MEETINGS: dict[Callable[..., Any], Meeting] = {
    F.batch_norm: partial(_norm, 1),
    F.instance_norm: partial(_norm, 1),
    F.group_norm: partial(_norm, 1),
    F.layer_norm: partial(_norm, None),
    F.rms_norm: partial(_norm, None),
    **{getattr(torch, name): _elementwise for name in (*_OPERATIONS, "addcmul", "where")},
    **{getattr(Tensor, name): _elementwise for name in (*_OPERATIONS, "addcmul", "where")},
    **{getattr(Tensor, f"{name}_"): _elementwise for name in _OPERATIONS},
    Tensor.__rsub__: _elementwise,
    Tensor.expand: _repetition,
    Tensor.expand_as: _repetition,
    Tensor.repeat: _repetition,
}
"""Function to the way it treats parameters among its arguments."""

TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH"}
"""Attributes of a tensor that are tensors computed from it."""
