"""5a. Sums, products and quotients of a dual number and a constant.

PyTorch gives the constant a tangent of zeros. It works out that one's shape and type in Python,
which takes longer than the operation itself unless tensors are large.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import is_batchedtensor

Operation = Callable[..., Tensor]
Parts = tuple[Any, Tensor | None]
"""A primal, or a number, and its tangent."""

Change = Callable[[Operation, Parts, Parts, Tensor], Tensor]
"""``(operation, left, right, outputs) -> tangent`` if one operand alone has one."""


def _of_sum(operation: Operation, left: Parts, right: Parts, outputs: Tensor) -> Tensor:
    tangent = right[1] if left[1] is None else left[1]
    assert tangent is not None
    # A copy: code may change the sum in place, and with it its tangent.
    return tangent.to(outputs.dtype).expand(outputs.shape).clone()


def _of_difference(operation: Operation, left: Parts, right: Parts, outputs: Tensor) -> Tensor:
    moved = _of_sum(operation, left, right, outputs)
    return moved if right[1] is None else -moved


def _of_product(operation: Operation, left: Parts, right: Parts, outputs: Tensor) -> Tensor:
    if right[1] is None:
        return operation(left[1], right[0])
    return operation(left[0], right[1])


def _of_quotient(operation: Operation, left: Parts, right: Parts, outputs: Tensor) -> Tensor:
    if right[1] is None:
        return operation(left[1], right[0])
    return -(outputs / right[0]) * right[1]


def _reversed(
    change: Change, operation: Operation, left: Parts, right: Parts, outputs: Tensor
) -> Tensor:
    def turned(one: Any, other: Any) -> Tensor:
        return operation(other, one)

    return change(turned, right, left, outputs)


_CHANGES: dict[Change, tuple[Operation, ...]] = {
    _of_sum: (torch.add, Tensor.add),
    _of_difference: (torch.sub, Tensor.sub, torch.subtract, Tensor.subtract),
    _of_product: (torch.mul, Tensor.mul, torch.multiply, Tensor.multiply),
    _of_quotient: (
        *(torch.div, Tensor.div, torch.divide, Tensor.divide),
        *(torch.true_divide, Tensor.true_divide),
    ),
    partial(_reversed, _of_difference): (Tensor.__rsub__,),
    partial(_reversed, _of_quotient): (Tensor.__rdiv__,),
}


def _meeting_constant(operation: Operation, change: Change, *args: Any, **kwargs: Any) -> Tensor:
    """Call ``operation``; write primal and tangent apart if one operand alone has a tangent.

    Under ``torch.vmap`` nobody can see whether it has.
    """
    if kwargs or len(args) != 2 or any(map(_under_vmap, args)):
        return operation(*args, **kwargs)
    left, right = map(_parts, args)
    if (left[1] is None) == (right[1] is None):
        return operation(*args)
    outputs = operation(left[0], right[0])
    return forward_ad.make_dual(outputs, change(operation, left, right, outputs))


def _under_vmap(value: Any) -> bool:
    return isinstance(value, Tensor) and is_batchedtensor(value)


def _parts(value: Any) -> Parts:
    return forward_ad.unpack_dual(value) if isinstance(value, Tensor) else (value, None)


CONSTANT_RULES: dict[Operation, Operation] = {
    operation: partial(_meeting_constant, operation, change)
    for change, operations in _CHANGES.items()
    for operation in operations
}
"""Operator to what takes its place in a linearised pass, unless that is compiled."""

ADD, MULTIPLY = CONSTANT_RULES[torch.add], CONSTANT_RULES[torch.mul]
"""For use inside of other rules, where no rule is looked up."""
