"""Which rows of a tensor belong to which example of the batch.

Row ``i`` of a perturbed pass uses perturbation ``i``. A model may fold windows, heads or frames
into its first dimension, batch-major: then each example owns a block of consecutive rows; or
time-major: then it owns every n-th row; or it may keep time first and the batch second. Where no
such ownership exists (a table that does not depend on the input), one value serves all rows: the
mean over the batch, which is an unbiased draw of the same direction.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum

from torch import Tensor


class RowLayout(StrEnum):
    """How a site's input relates to the batch."""

    BATCH = "batch"
    """One row, or one block of consecutive rows, for each example."""

    SINGLE = "single"
    """One row for each example; of more rows it is not known in which order they would be."""

    INTERLEAVED = "interleaved"
    """Row ``i`` belongs to example ``i % batch``: time-major data folded into one dimension."""

    SECOND = "second"
    """The batch is the second dimension: time-major data."""

    SHARED = "shared"
    """Rows belong to no single example: one perturbation for the whole batch."""

    @property
    def dim(self) -> int:
        """The dimension that counts rows."""
        return 1 if self is RowLayout.SECOND else 0


def expand_rows(values: Tensor, rows: int, layout: RowLayout) -> Tensor:
    """Give each of ``rows`` rows the value of the example it belongs to.

    Args:
        values: ``(batch, n)``, one row for each example.
        rows: Size of the dimension of rows that the result must broadcast against.
        layout: Whom rows belong to. ``SHARED``, or a row count that does not fit the batch, takes
            the mean.

    Returns:
        ``(rows, n)``, or ``(1, n)`` if rows are shared.
    """
    batch = values.shape[0]
    if not _belong(rows, batch, layout):
        return values.mean(dim=0, keepdim=True)
    if rows == batch:
        return values
    if layout is RowLayout.INTERLEAVED:
        return values.repeat(rows // batch, 1)
    return values.repeat_interleave(rows // batch, dim=0)


def gather_rows(values: Tensor, batch: int, layout: RowLayout) -> Tensor:
    """Return the mean of each example's rows, ``(batch,)``; of all where rows belong to none.

    Args:
        values: ``(rows,)``.
        batch: Examples.
        layout: Whom rows belong to.
    """
    rows = values.shape[0]
    if not _belong(rows, batch, layout):
        return values.mean().expand(batch)
    if layout is RowLayout.INTERLEAVED:
        return values.reshape(rows // batch, batch).mean(0)
    return values.reshape(batch, rows // batch).mean(1)


def _belong(rows: int, batch: int, layout: RowLayout) -> bool:
    """Whether each row belongs to an example."""
    single = layout is RowLayout.SINGLE and rows != batch
    return not (single or layout is RowLayout.SHARED or rows % batch)


def placed(values: Tensor, dims: int, row: int, unit: int) -> Tensor:
    """Shape ``(rows, n)`` to broadcast against ``dims`` dimensions, two of which are these."""
    row, unit = row % dims, unit % dims
    shape = [1] * dims
    shape[row], shape[unit] = values.shape
    return (values if row < unit else values.t()).reshape(shape)


def trailing(values: Tensor, dims: int) -> Tensor:
    """Append singleton dimensions until ``values`` has ``dims`` of them."""
    return values.reshape(*values.shape, *([1] * (dims - values.ndim)))


CHANNELS = {1, 3, 4}
"""First dimensions of a picture ``(c, h, w)``: grey, colour, colour and opacity."""


def first_dimensions(inputs: object) -> list[int]:
    """Return the first dimension of every tensor in nested ``inputs``, scalars left out.

    A list of dictionaries, as detection models take them, counts its entries, and so does a list of
    pictures ``(c, h, w)``. Tensors ``(batch, m, n)`` in a list look like pictures if the batch has
    one, three or four examples, so their first dimensions are returned as well, behind. A tuple
    never counts its entries.
    """
    match inputs:
        case Tensor():
            return [inputs.shape[0]] if inputs.ndim else []
        case Mapping():
            children = list(inputs.values())
        case list() if _dictionaries(inputs):
            return [len(inputs)]
        case list() if _pictures(inputs):
            return [len(inputs)] * len(inputs) + [picture.shape[0] for picture in inputs]
        case list() | tuple():
            if any(_dictionaries(child) for child in inputs):  # then images are a list as well
                children = [child for child in inputs if _dictionaries(child)]
            else:
                children = list(inputs)
        case _ if is_dataclass(inputs):
            children = [getattr(inputs, field.name) for field in fields(inputs)]
        case _:
            return []
    return [size for child in children for size in first_dimensions(child)]


def by_example(value: object, batch: int) -> bool:
    """Whether ``value`` is a list that holds an entry for each of ``batch`` examples."""
    listed = isinstance(value, list) and len(value) == batch
    return listed and (_dictionaries(value) or _pictures(value))


def _dictionaries(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _pictures(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(v, Tensor) and v.ndim == 3 for v in value):
        return False
    channels = {picture.shape[0] for picture in value}
    return len(channels) == 1 and channels <= CHANNELS


def batch_size(inputs: object) -> int:
    """Return the commonest first dimension in nested ``inputs``, the earliest of equals; 0 if none.

    So a mask or a table that comes with a batch does not count its examples, and pictures in a list
    do unless the targets say otherwise.
    """
    sizes = first_dimensions(inputs)
    return Counter(sizes).most_common(1)[0][0] if sizes else 0
