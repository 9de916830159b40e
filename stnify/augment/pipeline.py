"""All augmentations of a batch in one module, in a fixed order."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from stnify.augment.color import brightness, contrast, hue, saturation
from stnify.augment.erase import cutout, random_erasing
from stnify.augment.examples import beside, check_images
from stnify.augment.geometry import horizontal_flip, warp
from stnify.augment.mix import Mixed, cutmix, mixup
from stnify.augment.randaugment import OPERATIONS, check_operations, rand_augment
from stnify.errors import DeclarationError, ShapeError, nearest

Stats = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation for each channel, as the inputs were normalised with."""

WARPS = {"Translate": "translate", "Scale": "scale", "Rotate": "rotate", "Shear": "shear"}
"""Name of the hyperparameter to `warp`'s argument."""

COLORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": brightness,
    "Contrast": contrast,
    "Saturation": saturation,
    "Hue": hue,
}

CUTOUT = ("CutoutHoles", "CutoutLength")

MIXES: dict[str, Callable[[Tensor, Tensor], Mixed]] = {"Mixup": mixup, "CutMix": cutmix}

AUGMENTATIONS = (
    "HorizontalFlip",
    *WARPS,
    "RandAugment",
    *COLORS,
    *CUTOUT,
    "RandomErasing",
    *MIXES,
)
"""What can be tuned, in the order it is applied."""

SETTINGS = (*CUTOUT, "most_holes", "operations", "count")
"""What can be fixed: see `Augment`."""

SLACK = 1e-3
"""How far beyond [0, 1] values may lie and still be taken for rounding."""


@final
class Augment(nn.Module):
    """Augments each example with a strength of its own, in the order of ``AUGMENTATIONS``.

    All warps take one interpolation. Colours act on ``images * std + mean``, clamped to [0, 1],
    and the result is normalised again; everything else acts in the units the images come in, where
    what a warp, cutout or erasing leaves empty is 0 (RandAugment's warps leave black). If both
    mixup and CutMix are declared, each batch is mixed by one of them, with equal chances. An
    example whose strengths are all 0 stays as it is, to the last bit. Off in eval mode.

    Images may be of 8 bits: they are augmented as floats in [0, 1] and rounded. Halves are
    augmented in float32.

    Args:
        columns: Name from ``AUGMENTATIONS`` to the column of the hyperparameter.
        settings: What is not tuned: ``"CutoutHoles"`` (1 if it is missing) or ``"CutoutLength"`` if
            only the other is a hyperparameter; ``"most_holes"`` an image may get, which tuned holes
            need; ``"operations"`` and ``"count"`` of `rand_augment`. None stands for what it is
            without the setting.
        stats: Mean and standard deviation the inputs were normalised with; None if they are in
            [0, 1].

    Raises:
        DeclarationError: A name is unknown, cutout is incomplete, or a standard deviation is not
            positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        columns: Mapping[str, int],
        settings: Mapping[str, Any] | None = None,
        stats: Stats | None = None,
    ) -> None:
        super().__init__()
        self.columns = dict(columns)
        self.settings = {k: v for k, v in (settings or {}).items() if v is not None}
        self.stats = stats
        _check_names(self.columns, AUGMENTATIONS, "augmentation")
        _check_names(self.settings, SETTINGS, "setting of augmentations")
        check_operations(self.settings.get("operations", OPERATIONS))
        _check_cutout(self.columns, self.settings)
        for name, values in zip(("mean", "std"), _checked(stats), strict=True):
            buffer = torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self._range_is_known = stats is not None

    def extra_repr(self) -> str:
        """Name the columns, settings and statistics."""
        named = [f"{name}={column}" for name, column in self.columns.items()]
        named += [f"{name}={value!r}" for name, value in self.settings.items()]
        return ", ".join([*named, f"stats={self.stats}"])

    def forward(self, images: Tensor, constrained: Tensor) -> Mixed:
        """Augment a batch.

        Args:
            images: ``(n, c, h, w)``, floating or of 8 bits.
            constrained: ``(h,)`` for one strength, ``(n, h)`` for one for each example, constrained
                units. No gradient flows through it.

        Returns:
            Images of the same shape and type; partner and share, if mixup or CutMix is declared.

        Raises:
            ShapeError: The images are not four-dimensional or of another kind of number, the
                hyperparameters are not one row or one for each example, the statistics are for
                another number of channels, or (in the first call, if not compiled) colours are
                declared and the images are not in [0, 1].
        """
        self.check(images)
        strengths = self._strengths(images, constrained)
        if not self.training:
            return Mixed(images)
        work = _as_floats(images)
        if "HorizontalFlip" in strengths:
            work = horizontal_flip(work, strengths["HorizontalFlip"])
        warps = {WARPS[name]: row for name, row in strengths.items() if name in WARPS}
        work = warp(work, **warps)
        work = self._colored(work, strengths)
        work, partner, share = _mixed(self._erased(work, strengths), strengths)
        return Mixed(_as_before(work, images.dtype), partner, share)

    def _strengths(self, images: Tensor, constrained: Tensor) -> dict[str, Tensor]:
        if constrained.ndim not in (1, 2) or constrained.shape[:-1] not in ((), images.shape[:1]):
            raise ShapeError(
                f"hyperparameters must be one row (h,) or one for each example (n, h), but got "
                f"{tuple(constrained.shape)} for {len(images)} images. Pass as many rows as images."
            )
        rows = constrained.detach().expand(len(images), -1)
        return {name: rows[:, column] for name, column in self.columns.items()}

    def check(self, images: Tensor) -> None:
        """Raise ShapeError if these are no images, or not in the units colours need.

        Their values are looked at once. Compiled code cannot do that: call this before it.
        """
        check_images(images, "augmentation")
        if not self.training:
            return
        if images.dtype == torch.uint8:
            if self.stats is not None:
                raise ShapeError(
                    "images of 8 bits must not have `input_stats`, but got "
                    f"{self.stats}. Leave them out, or normalise the images before."
                )
            return
        if not images.is_floating_point():
            raise ShapeError(
                f"images must be floating or of 8 bits, but got {images.dtype}. Convert them: "
                "`images.float()`."
            )
        if self.stats is not None and self.mean.shape[0] not in (1, images.shape[1]):
            raise ShapeError(
                f"`input_stats` must have 1 value or one for each channel, but got "
                f"{self.mean.shape[0]} for images of {images.shape[1]} channels."
            )
        if torch.compiler.is_compiling() or self._range_is_known or not self._needs_color:
            return
        low, high = images.min().item(), images.max().item()
        if not (low >= -SLACK and high <= 1 + SLACK):
            raise ShapeError(
                f"images must be in [0, 1] for colour operations, but they reach from {low:.4g} to "
                f"{high:.4g}. Tell what they were normalised with: `input_stats=(mean, std)`."
            )
        self._range_is_known = True

    @property
    def _needs_color(self) -> bool:
        return any(name in self.columns for name in (*COLORS, "RandAugment"))

    def _colored(self, images: Tensor, strengths: dict[str, Tensor]) -> Tensor:
        """Apply what needs [0, 1]; rows that have no strength keep their last bits."""
        if not self._needs_color:
            return images
        pixels = self._denormalised(images).clamp(0, 1)
        touched = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        if "RandAugment" in strengths:
            chosen = {k: v for k, v in self.settings.items() if k in ("operations", "count")}
            pixels = rand_augment(pixels, strengths["RandAugment"], **chosen)
            touched = touched | (strengths["RandAugment"] != 0)
        for name in (name for name in COLORS if name in strengths):
            pixels = COLORS[name](pixels, strengths[name])
            touched = touched | (strengths[name] != 0)
        return torch.where(beside(touched, images), self._normalised(pixels), images)

    def _denormalised(self, images: Tensor) -> Tensor:
        return images if self.stats is None else images * self.std.to(images) + self.mean.to(images)

    def _normalised(self, images: Tensor) -> Tensor:
        if self.stats is None:
            return images
        return (images - self.mean.to(images)) / self.std.to(images)

    def _erased(self, images: Tensor, strengths: dict[str, Tensor]) -> Tensor:
        if any(name in strengths for name in CUTOUT):
            holes, length = (self._cutout(name, images, strengths) for name in CUTOUT)
            images = cutout(images, holes, length, self._most_holes)
        if "RandomErasing" in strengths:
            images = random_erasing(images, strengths["RandomErasing"])
        return images

    def _cutout(self, name: str, images: Tensor, strengths: dict[str, Tensor]) -> Tensor:
        if name in strengths:
            return strengths[name]
        fixed = float(self.settings.get(name, 1))
        return torch.full((len(images),), fixed, device=images.device)

    @property
    def _most_holes(self) -> int:
        most = self.settings.get("most_holes", self.settings.get("CutoutHoles", 1))
        return math.ceil(most)


def _mixed(images: Tensor, strengths: dict[str, Tensor]) -> Mixed:
    """Mix by what is declared; by one of the two, drawn for the batch, if both are."""
    mixes = [MIXES[name](images, strengths[name]) for name in MIXES if name in strengths]
    if len(mixes) < 2:
        return mixes[0] if mixes else Mixed(images)
    first = torch.rand((), device=images.device) < 0.5
    return Mixed(*(torch.where(first, one, other) for one, other in zip(*mixes, strict=True)))


def _as_floats(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images / 255
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _as_before(images: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        images = (images * 255).round().clamp(0, 255)
    return images.to(dtype)


def _checked(stats: Stats | None) -> Stats:
    if stats is None:
        return (0.0,), (1.0,)
    mean, std = stats
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise DeclarationError(
            "`input_stats` must be the mean and a positive standard deviation for each channel, "
            f"but got {stats}."
        )
    return stats


def _check_names(names: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    for name in names:
        if name not in known:
            raise DeclarationError(
                f"the name of each {kind} must be one of {', '.join(known)}, but got {name!r}. "
                f"Nearest: {nearest(name, known)}."
            )


def _check_cutout(columns: Mapping[str, int], settings: Mapping[str, Any]) -> None:
    holes, length = CUTOUT
    if holes in columns and length not in columns and length not in settings:
        raise DeclarationError(
            f"tuned {holes} must have a {length}, but there is none. Declare it, or fix it: "
            f"`settings={{{length!r}: pixels}}`."
        )
    if holes in columns and "most_holes" not in settings:
        raise DeclarationError(
            f"tuned {holes} must have an end, but `settings['most_holes']` is missing. Set it to "
            "the end of the hyperparameter's range."
        )
