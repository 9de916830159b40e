"""The masks of the dropout family: which entries share a draw, and what is kept."""

from typing import Literal

import torch
from torch import Tensor

from stnify.errors import ShapeError

Granularity = Literal["element", "channel", "row", "time", "batch"]


def mask_shape(
    inputs: Tensor, granularity: Granularity, channel_dims: int, row: int, place: str
) -> tuple[int, ...]:
    """Return the shape of a mask for ``inputs``: one where entries share a draw.

    Args:
        inputs: What the mask must broadcast against.
        granularity: What a draw is for.
        channel_dims: As ``TunedDropout`` takes it.
        row: The dimension that counts rows.
        place: Where this is, for errors.

    Raises:
        ShapeError: ``inputs`` have no such dimension.
    """
    if granularity == "element":
        return tuple(inputs.shape)
    if granularity == "batch":
        return (1,) * inputs.ndim
    if granularity == "row":
        return tuple(size if dim == row else 1 for dim, size in enumerate(inputs.shape))
    if not inputs.ndim > channel_dims:
        raise ShapeError(
            f"noise by {granularity} needs more than {channel_dims} dimensions, but at {place!r} "
            f"the shape is {tuple(inputs.shape)}. Choose another place by `at`, `after` or "
            "`exclude`."
        )
    if granularity == "time":
        return tuple(1 if dim == channel_dims else n for dim, n in enumerate(inputs.shape))
    channels = inputs.ndim - channel_dims if channel_dims else 2
    return (*inputs.shape[:channels], *([1] * (inputs.ndim - channels)))


def drawn(probability: Tensor, shape: tuple[int, ...], inputs: Tensor) -> Tensor:
    """Draw what is True with ``probability``; always if that is one, never if it is zero.

    Returns:
        Truth values of ``shape`` broadcast with ``probability``, where ``inputs`` are.
    """
    return torch.rand(shape, device=inputs.device) < probability


def wide_type(inputs: Tensor) -> torch.dtype:
    """Return the type of ``inputs``, or single precision if that is wider."""
    return torch.promote_types(inputs.dtype, torch.float32)


def keep_probability(inputs: Tensor, rate: Tensor) -> Tensor:
    """Return ``1 - rate`` in at least single precision: in bfloat16 0.999 would be one."""
    return 1 - rate.to(wide_type(inputs))


def rescaled(inputs: Tensor, kept: Tensor, keep: Tensor) -> Tensor:
    """Zero what is not ``kept`` and divide the rest by the probability ``keep`` of that.

    One product, so that the primal and the tangent of a dual number meet the same mask.
    """
    return inputs * torch.where(kept, keep.reciprocal().to(inputs.dtype), 0)


def dropped(inputs: Tensor, rate: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zero entries with probability ``rate`` and scale the others by ``1 / (1 - rate)``.

    Args:
        inputs: Of any floating type, perhaps a dual number.
        rate: Probability, broadcast against ``inputs``. At zero ``inputs`` stay as they are, at
            one nothing is left.
        shape: Of the mask.
    """
    keep = keep_probability(inputs, rate)
    return rescaled(inputs, drawn(keep, shape, inputs), keep)
