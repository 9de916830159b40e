"""Which dimensions of a product are whose: what ``matmul``, ``einsum`` and their kin share.

The same reading serves a plan, where operands are nodes, and a pass, where they are tensors.
"""

import operator
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stnify.layers import Product


@dataclass(frozen=True)
class Multiplication:
    """A call of one of ``MULTIPLICATIONS``, its arguments sorted.

    Attributes:
        operands: What is multiplied, in the order of the call.
        equation: Of an ``einsum``, else None.
        added: What ``addmm`` and ``baddbmm`` add to the product.
        factors: Of what is added, and of the product.
    """

    operands: tuple[Any, ...]
    equation: str | None = None
    added: Any = None
    factors: tuple[float, float] = (1, 1)


def _pair(input: Any, other: Any, **_: Any) -> Multiplication:
    return Multiplication((input, other))


def _added_pair(
    input: Any, first: Any, second: Any, *, beta: float = 1, alpha: float = 1, **_: Any
) -> Multiplication:
    return Multiplication((first, second), None, input, (beta, alpha))


def _einsum(equation: Any, *operands: Any) -> Multiplication | None:
    if not isinstance(equation, str):
        return None
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    return Multiplication(operands, equation.replace(" ", ""))


def _mm(input: Any, mat2: Any, **_: Any) -> Multiplication:
    return Multiplication((input, mat2))


def _addmm(input: Any, mat1: Any, mat2: Any, **options: Any) -> Multiplication:
    return _added_pair(input, mat1, mat2, **options)


def _baddbmm(input: Any, batch1: Any, batch2: Any, **options: Any) -> Multiplication:
    return _added_pair(input, batch1, batch2, **options)


def _reflected(input: Any, other: Any) -> Multiplication:
    return Multiplication((other, input))


MULTIPLICATIONS: dict[Callable[..., Any], Callable[..., Multiplication | None]] = {
    torch.matmul: _pair,
    operator.matmul: _pair,
    Tensor.matmul: _pair,
    Tensor.__matmul__: _pair,
    Tensor.__rmatmul__: _reflected,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.bmm: _mm,
    Tensor.bmm: _mm,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    torch.einsum: _einsum,
}
"""Function to the reading of its arguments."""


def multiplication(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Multiplication | None:
    """Sort the arguments of a call; None if the function is no product, or cannot be read."""
    read = MULTIPLICATIONS.get(function)
    try:
        return None if read is None else read(*args, **kwargs)
    except TypeError:
        return None


def product(found: Multiplication, dims: Sequence[int], weight: int) -> Product:
    """Name the dimensions of a product.

    Args:
        found: The call.
        dims: How many dimensions each operand has.
        weight: Which operand is the weight; the first of the others is the inputs.
    """
    if found.equation is None:
        letters, outputs = _matmul_letters(*dims)
        multiply: Callable[..., Tensor] = torch.matmul
    else:
        letters, outputs = _einsum_letters(found.equation, dims)
        multiply = _Einsum(found.equation)
    inputs = 0 if weight else 1
    return Product(_Placed(multiply, weight), letters[inputs], letters[weight], outputs)


def bilinear(dims: int) -> Product:
    """Name the dimensions of ``F.bilinear`` for inputs of so many dimensions."""
    batch = string.ascii_uppercase[: dims - 1]
    function = _Placed(_Einsum(f"{batch}i,oij,{batch}j->{batch}o"), 1)
    return Product(function, f"{batch}i", "oij", f"{batch}o")


def gated_axis(product: Product, shape: Sequence[int]) -> int:
    """Return the dimension of the weight whose units are gated.

    It is the last one that the result has and the inputs have not, as in a linear layer. If it is
    very long, as where a row holds all kernels of an expert, it is the last one summed over: gates
    are few beside what they gate.
    """
    own = [i for i, c in enumerate(product.weight) if c in product.outputs]
    outer = [i for i in own if product.weight[i] not in product.inputs] or own
    inner = [i for i, c in enumerate(product.weight) if c in product.inputs and i not in own]
    if outer and inner and shape[outer[-1]] > LONG * shape[inner[-1]]:
        return inner[-1]
    return (outer or inner)[-1]


LONG = 64
"""Outputs for each input from which the inputs are gated."""


@dataclass(frozen=True)
class _Placed:
    """Calls a multiplication with the weight at its place among the operands."""

    multiply: Callable[..., Tensor]
    weight: int

    def __call__(self, inputs: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        operands = [inputs, *others]
        operands.insert(self.weight, weight)
        return self.multiply(*operands)


@dataclass(frozen=True)
class _Einsum:
    equation: str

    def __call__(self, *operands: Tensor) -> Tensor:
        return torch.einsum(self.equation, *operands)


def _matmul_letters(left: int, right: int) -> tuple[list[str], str]:
    """Return the letters of both operands of a ``matmul`` and of its result."""
    batch = string.ascii_uppercase[: max(left, right, 2) - 2]
    rows, columns = "i" if left > 1 else "", "k" if right > 1 else ""
    of_left = batch[len(batch) - max(left - 2, 0) :] + rows + "j"
    of_right = batch[len(batch) - max(right - 2, 0) :] + "j" + columns
    return [of_left, of_right], batch + rows + columns


def _einsum_letters(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """Return the letters of all operands and of the result, an ellipsis written out."""
    terms, arrow, outputs = equation.partition("->")
    operands = terms.split(",")
    spare = [c for c in string.ascii_letters if c not in equation]
    named = [len(term.replace("...", "")) for term in operands]
    hidden = [count - own for count, own in zip(dims, named, strict=True)]
    ellipsis = "".join(spare[: max(0, *hidden)])
    letters = [
        term.replace("...", ellipsis[len(ellipsis) - count :])
        for term, count in zip(operands, hidden, strict=True)
    ]
    if not arrow:
        once = sorted(c for c in set(terms) - set(",.") if terms.count(c) == 1)
        outputs = "..." * ("..." in terms) + "".join(once)
    return letters, outputs.replace("...", ellipsis)
