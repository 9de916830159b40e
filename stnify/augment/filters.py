"""Sharpness, posterize, solarize and autocontrast, as torchvision means them on floats.

Sizes below: images ``(n, c, h, w)``, in [0, 1]; one value ``(n,)`` for each image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stnify.augment.examples import beside


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Move each image away from its blurred version, or towards it; the border stays.

    Images of fewer than three pixels along a side have nothing but border.
    """
    if min(images.shape[-2:]) < 3:
        return images
    channels = images.shape[1]
    kernel = torch.ones(3, 3, dtype=images.dtype, device=images.device)
    kernel[1, 1] = 5
    blurred = F.conv2d(images, (kernel / 13).expand(channels, 1, 3, 3), groups=channels)
    change = F.pad(blurred - images[..., 1:-1, 1:-1], (1, 1, 1, 1))
    return (images + change * beside(1 - factor, images).to(images.dtype)).clamp(0, 1)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep ``2 ** bits`` levels, the lower end of each; at 8 bits an image is as it was."""
    bits = beside(bits, images)
    levels = (2**bits).round().to(images.dtype)
    coarse = torch.minimum((images * levels).floor(), levels - 1).clamp(min=0) / levels
    return torch.where(bits < 8, coarse, images)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is not below the threshold."""
    return torch.where(images < beside(threshold, images), images, 1 - images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to reach from 0 to 1; a constant one stays."""
    lowest, highest = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    span = highest - lowest
    stretched = ((images - lowest) / torch.where(span == 0, 1, span)).clamp(0, 1)
    return torch.where(span == 0, images, stretched)
