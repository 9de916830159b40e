"""Numbers that belong to the examples of a batch: one value for each row."""

import torch
from torch import Tensor

from stnify.errors import ShapeError


def of_examples(values: Tensor, inputs: Tensor, operation: str) -> Tensor:
    """Return the values cut off from gradients and tangents, in float32 or better.

    Args:
        values: ``(n,)``, constrained units.
        inputs: ``(n, ...)``.
        operation: Whose values they are, for the error.

    Raises:
        ShapeError: There is not one value for each example.
    """
    if values.shape != inputs.shape[:1]:
        raise ShapeError(
            f"{operation} must get one value for each example, but got the shape "
            f"{tuple(values.shape)} for inputs {tuple(inputs.shape)}. Expand a single value: "
            "`value.expand(len(inputs))`."
        )
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def check_images(images: object, operation: str) -> None:
    """Refuse what is no batch of images.

    Raises:
        ShapeError: The images are not ``(n, c, h, w)``.
    """
    shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ShapeError(
            f"{operation} must get images of shape (n, channels, height, width), but got "
            f"{shape}. Add the missing dimension: `images[None]` for a single image."
        )


def beside(values: Tensor, inputs: Tensor) -> Tensor:
    """Shape ``(n,)`` to meet ``inputs`` of shape ``(n, ...)``."""
    return values.reshape(-1, *[1] * (inputs.ndim - 1))


def uniform(low: Tensor, high: Tensor) -> Tensor:
    """Draw uniformly from ``[low, high)``; the value itself where both are the same."""
    return low + (high - low) * torch.rand_like(low)


def rectangles(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, images: Tensor) -> Tensor:
    """Mark the pixels of one rectangle in each image, ends excluded, parts outside cut off.

    Args:
        top: ``(n,)``, whole pixels, as the other three.
        bottom: The first row below.
        left: The first column.
        right: The first column beyond.
        images: ``(n, c, h, w)``.

    Returns:
        ``(n, 1, h, w)``, boolean.
    """
    height, width = images.shape[-2:]
    row = torch.arange(height, device=images.device)[:, None]
    column = torch.arange(width, device=images.device)
    top, bottom, left, right = (beside(end, images) for end in (top, bottom, left, right))
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)
