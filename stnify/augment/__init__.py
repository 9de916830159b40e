"""Parts: augmentations of images whose strength is a tensor, one value for each example.

Draws come from torch's global generator, in numbers that do not depend on the strengths: a row's
result depends on its own strength alone. No gradient flows through a strength, nothing is read
back from the device, and other strengths of the same shape need no new compilation.

Add an augmentation: a function ``(images, strength (n,)) -> images`` in the file of its kind, and
its row in the table of `stnify.augment.pipeline` that gives its place in the order.
"""

from stnify.augment.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    brightness,
    contrast,
    hue,
    saturation,
)
from stnify.augment.erase import cutout, random_erasing
from stnify.augment.geometry import affine, horizontal_flip, inverse_matrices, warp
from stnify.augment.mix import Mixed, cutmix, mixed_targets, mixup
from stnify.augment.pipeline import AUGMENTATIONS, MIXES, Augment, Stats
from stnify.augment.randaugment import OPERATIONS, rand_augment

__all__ = [
    "AUGMENTATIONS",
    "MIXES",
    "OPERATIONS",
    "Augment",
    "Mixed",
    "Stats",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "affine",
    "brightness",
    "contrast",
    "cutmix",
    "cutout",
    "horizontal_flip",
    "hue",
    "inverse_matrices",
    "mixed_targets",
    "mixup",
    "rand_augment",
    "random_erasing",
    "saturation",
    "warp",
]
