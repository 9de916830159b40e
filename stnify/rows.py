"""Which rows of a tensor belong to which example of the batch.

Row ``i`` of a perturbed pass uses perturbation ``i``. A model may fold windows, heads or frames
into its first dimension, batch-major: then each example owns a block of consecutive rows. Where
no such ownership exists (a table that does not depend on the input), one value serves all rows:
the mean over the batch, which is an unbiased draw of the same direction.
"""

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum

from torch import Tensor


class RowLayout(StrEnum):
    """How the first dimension of a site's input relates to the batch."""

    BATCH = "batch"
    """One row, or one block of consecutive rows, for each example."""

    SHARED = "shared"
    """Rows belong to no single example: one perturbation for the whole batch."""


def expand_rows(values: Tensor, rows: int, layout: RowLayout) -> Tensor:
    """Give each of ``rows`` rows the value of the example it belongs to.

    Args:
        values: ``(batch, n)``, one row for each example.
        rows: Size of the first dimension the result must broadcast against.
        layout: ``BATCH`` repeats each example's row ``rows / batch`` times; ``SHARED``, or a row
            count that is no multiple of the batch, takes the mean.

    Returns:
        ``(rows, n)`` for ``BATCH``, ``(1, n)`` for ``SHARED``.
    """
    batch = values.shape[0]
    if layout is RowLayout.BATCH and rows == batch:
        return values
    if layout is RowLayout.BATCH and rows % batch == 0:
        return values.repeat_interleave(rows // batch, dim=0)
    return values.mean(dim=0, keepdim=True)


def trailing(values: Tensor, dims: int) -> Tensor:
    """Append singleton dimensions until ``values`` has ``dims`` of them."""
    return values.reshape(*values.shape, *([1] * (dims - values.ndim)))


def first_dimensions(inputs: object) -> list[int]:
    """Return the first dimension of every tensor in nested ``inputs``, scalars left out."""
    match inputs:
        case Tensor():
            return [inputs.shape[0]] if inputs.ndim else []
        case Mapping():
            children = list(inputs.values())
        case list() | tuple():
            children = list(inputs)
        case _:
            return []
    return [size for child in children for size in first_dimensions(child)]


def batch_size(inputs: object) -> int:
    """Return the commonest first dimension in nested ``inputs``, the earliest of equals; 0 if none.

    So a mask or a table that comes with a batch does not count its examples.
    """
    sizes = first_dimensions(inputs)
    return Counter(sizes).most_common(1)[0][0] if sizes else 0
