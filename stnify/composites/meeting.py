"""Where a parameter meets activations element by element, in terms of ``meet``."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Parameters(Protocol):
    """Knows the parameters that respond."""

    def responds_alone(self, value: object) -> bool:
        """Whether a value is one of them."""
        ...

    def meet(self, parameter: Tensor, activations: Tensor, first: int) -> Tensor:
        """Return what takes the place of a parameter.

        It has as many dimensions as the activations, the parameter's own from ``first`` on, and
        may have rows.
        """
        ...

    def mean(self, value: Tensor) -> Tensor:
        """Return a tensor, or what takes the place of a parameter where rows have none."""
        ...


Meeting = Callable[[Parameters, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _norm(
    names: Sequence[str],
    channel: int | None,
    known: Parameters,
    function: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Normalise, then scale and shift; parameters begin at ``channel``, None if they are last."""
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    scale, shift = arguments.pop("weight", None), arguments.pop("bias", None)
    normal = outputs = function(**arguments)
    for parameter, apply in ((scale, torch.mul), (shift, torch.add)):
        if parameter is not None:
            first = normal.ndim - parameter.ndim if channel is None else channel
            outputs = apply(outputs, known.meet(parameter, arguments["input"], first))
    return outputs.to(normal.dtype)


def _elementwise(
    known: Parameters, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Let each operand meet the largest one, in the shape that all have together."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    activations = [tensor for tensor in tensors if not known.responds_alone(tensor)] or tensors
    largest = max(activations, key=Tensor.numel)
    if largest.shape != shape:
        largest = largest.expand(shape)

    def met(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known.meet(value, largest, largest.ndim - value.ndim)

    return function(*map(met, args), **{name: met(value) for name, value in kwargs.items()})


# Forward mode crashes in ``addcmul``, and in sums with ``alpha``, while operations are counted.


def _sum(
    known: Parameters, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Add or subtract, the other operand scaled beforehand."""
    operands = {name: value for name, value in kwargs.items() if name != "alpha"}

    def scaled(input: Tensor, other: Any) -> Any:
        return function(input, kwargs["alpha"] * other)

    return _elementwise(known, scaled if "alpha" in kwargs else function, args, operands)


def _sum_with_product(
    known: Parameters, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Write ``addcmul`` out."""
    return _elementwise(known, _add_product, args, kwargs)


def _add_product(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * tensor1 * tensor2


def _repetition(
    known: Parameters, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Repeat a parameter, such as a class token, for every example."""
    parameter, outputs = args[0], function(*args, **kwargs)
    first = outputs.ndim - parameter.ndim
    repeated = zip(outputs.shape[first:], parameter.shape, strict=True)
    if any(size not in {1, after} for after, size in repeated):
        # Several copies along a dimension of its own: rows have no place there.
        return function(known.mean(parameter), *args[1:], **kwargs)
    return known.meet(parameter, outputs, first).expand(outputs.shape)


_NORMS: dict[Callable[..., Any], int | None] = {
    F.batch_norm: 1,
    F.instance_norm: 1,
    F.group_norm: 1,
    F.layer_norm: None,
    F.rms_norm: None,
}
_SUMS = ("add", "sub", "subtract")
_OPERATIONS = ("mul", "div", "multiply", "divide", "true_divide", "pow", "lerp")
_COMPARISONS = ("where", "maximum", "minimum")
MEETINGS: dict[Callable[..., Any], Meeting] = {
    **{
        norm: partial(_norm, tuple(inspect.signature(norm).parameters), channel)
        for norm, channel in _NORMS.items()
    },
    **{getattr(torch, name): _elementwise for name in (*_OPERATIONS, *_COMPARISONS)},
    **{getattr(Tensor, name): _elementwise for name in (*_OPERATIONS, *_COMPARISONS)},
    **{getattr(Tensor, f"{name}_"): _elementwise for name in _OPERATIONS},
    **{getattr(torch, name): _sum for name in _SUMS},
    **{getattr(Tensor, name): _sum for name in _SUMS},
    **{getattr(Tensor, f"{name}_"): _sum for name in _SUMS},
    Tensor.__rsub__: _elementwise,
    Tensor.__pow__: _elementwise,
    torch.addcmul: _sum_with_product,
    Tensor.addcmul: _sum_with_product,
    Tensor.expand: _repetition,
    Tensor.expand_as: _repetition,
    Tensor.repeat: _repetition,
}
"""Function to the way it treats parameters among its arguments."""

DESCRIPTIONS = {"size", "dim", "numel", "stride", "is_floating_point", "get_device"}
"""Methods of a tensor that read what it is like, not its numbers."""

TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH"}
"""Attributes of a tensor that are tensors computed from it."""
