"""Augmentations of images, each example with a strength of its own in the response step.

Ranges and starts are those of [DeltaSTN] H.2.3 where it has them; semantics are torchvision's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, final

from stnify.declare.base import Augmentation, Declaration, Group
from stnify.errors import DeclarationError


@dataclass(frozen=True)
class _Strength(Augmentation):
    """An augmentation that grows with its value, from none at zero."""

    range: tuple[float, float] = (0.0, 1.0)
    default_init: ClassVar[float] = 0.05
    widest: ClassVar[tuple[float, float]] = (0.0, math.inf)
    meaning: ClassVar[str] = "strength"


def _refuse_none(name: str, setting: str, value: float, *, whole: bool) -> None:
    """Raise DeclarationError unless a number of things, or of pixels, is one or more."""
    counts = isinstance(value, int if whole else Real) and not isinstance(value, bool)
    if not counts or not 1 <= value < math.inf:
        raise DeclarationError(
            f"`{setting}` of {name!r} must be a {'whole number' if whole else 'number'} from 1 on, "
            f"but got {value!r}."
        )


def _refuse_always_none(declaration: Declaration) -> None:
    """Raise DeclarationError if every value of a range is rounded to 0."""
    if not declaration.range[1] > 0.5:
        raise DeclarationError(
            f"the range of {declaration.name!r} must reach beyond 0.5, because values are rounded "
            f"in use and all of range={declaration.range} are 0 then."
        )


@dataclass(frozen=True)
class _Probability(Augmentation):
    """An augmentation of its own strength that acts on a share of the examples."""

    range: tuple[float, float] = (0.0, 1.0)
    default_init: ClassVar[float] = 0.05
    widest: ClassVar[tuple[float, float]] = (0.0, 1.0)
    meaning: ClassVar[str] = "probability"


@final
@dataclass(frozen=True)
class Brightness(_Strength):
    """Tune how far brightness varies: by a factor within ``1 - value`` and ``1 + value``."""

    name: str = "brightness"


@final
@dataclass(frozen=True)
class Contrast(_Strength):
    """Tune how far contrast varies: by a factor within ``1 - value`` and ``1 + value``."""

    name: str = "contrast"


@final
@dataclass(frozen=True)
class Saturation(_Strength):
    """Tune how far saturation varies: by a factor within ``1 - value`` and ``1 + value``."""

    name: str = "saturation"


@final
@dataclass(frozen=True)
class Hue(_Strength):
    """Tune how far hue turns: by up to ``value`` of the colour circle either way."""

    name: str = "hue"
    range: tuple[float, float] = (0.0, 0.5)
    widest: ClassVar[tuple[float, float]] = (0.0, 0.5)


@final
@dataclass(frozen=True)
class Translate(_Strength):
    """Tune how far images are moved: by up to ``value`` of their width and height."""

    name: str = "translate"
    range: tuple[float, float] = (0.0, 0.5)


@final
@dataclass(frozen=True)
class Scale(_Strength):
    """Tune how far images are resized: by a factor within ``1 - value`` and ``1 + value``."""

    name: str = "scale"
    range: tuple[float, float] = (0.0, 0.5)
    widest: ClassVar[tuple[float, float]] = (0.0, 1.0)


@final
@dataclass(frozen=True)
class Rotate(_Strength):
    """Tune how far images are turned: by up to ``value`` degrees either way."""

    name: str = "rotate"
    range: tuple[float, float] = (0.0, 45.0)
    widest: ClassVar[tuple[float, float]] = (0.0, 180.0)


@final
@dataclass(frozen=True)
class Shear(_Strength):
    """Tune how far images are sheared: by up to ``value`` degrees either way."""

    name: str = "shear"
    range: tuple[float, float] = (0.0, 45.0)
    widest: ClassVar[tuple[float, float]] = (0.0, 90.0)


@final
@dataclass(frozen=True)
class CutoutHoles(_Strength):
    """Tune how many squares are cut out; rounded in use.

    Attributes:
        length: Side of a square in pixels, if ``CutoutLength`` is not declared beside it.

    Source: DeVries & Taylor 2017, [STN] 4.2.
    """

    name: str = "cutout_holes"
    range: tuple[float, float] = (0.0, 4.0)
    length: float = 8.0
    default_init: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_none(self.name, "length", self.length, whole=False)
        _refuse_always_none(self)
        if math.isinf(self.range[1]):
            raise DeclarationError(
                f"the range of {self.name!r} must end somewhere, because as many holes are drawn "
                f"as there can be, but got range={self.range}."
            )

    def settings(self) -> Mapping[str, Any]:
        """Return the largest number of holes, and their side if it is not tuned."""
        return {"most_holes": round(self.range[1]), "CutoutLength": self.length}


@final
@dataclass(frozen=True)
class CutoutLength(_Strength):
    """Tune the side in pixels of the squares cut out; rounded in use.

    Attributes:
        holes: Number of squares, if ``CutoutHoles`` is not declared beside it.

    Source: DeVries & Taylor 2017, [STN] 4.2.
    """

    name: str = "cutout_length"
    range: tuple[float, float] = (0.0, 24.0)
    holes: int = 1
    default_init: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_none(self.name, "holes", self.holes, whole=True)
        _refuse_always_none(self)

    def settings(self) -> Mapping[str, Any]:
        """Return the number of holes if it is not tuned."""
        return {"CutoutHoles": self.holes}


@final
@dataclass(frozen=True)
class RandomErasing(_Probability):
    """Tune the probability that a random rectangle of an image is erased."""

    name: str = "random_erasing"


@final
@dataclass(frozen=True)
class HorizontalFlip(_Probability):
    """Tune the probability that an image is mirrored."""

    name: str = "horizontal_flip"


@final
@dataclass(frozen=True)
class Mixup(_Strength):
    """Tune how far examples and targets are mixed in pairs.

    Each example keeps the larger share of a draw from ``Beta(value, value)``. Targets are mixed by
    ``stn.criterion``: of PyTorch's cross-entropy the loss is mixed, any other criterion receives
    mixed targets, which are probabilities for class indices. Source: Zhang et al., ICLR 2018.
    """

    name: str = "mixup"
    default_init: ClassVar[float] = 0.1


@final
@dataclass(frozen=True)
class CutMix(_Strength):
    """Tune how large a rectangle of another example takes the place of one's own.

    One's own keeps the larger share of a draw from ``Beta(value, value)``; targets are mixed as
    for ``Mixup``.
    Source: Yun et al., ICCV 2019.
    """

    name: str = "cutmix"
    default_init: ClassVar[float] = 0.1


@final
@dataclass(frozen=True)
class RandAugment(_Strength):
    """Tune one magnitude that drives a list of operations, some of them for each example.

    Attributes:
        operations: Names of the operations to draw from; None for all there are.
        count: Operations for each example.

    Source: Cubuk et al. 2020; magnitudes as torchvision scales them, 0 to 30.
    """

    name: str = "rand_augment"
    range: tuple[float, float] = (0.0, 30.0)
    default_init: ClassVar[float] = 3.0
    widest: ClassVar[tuple[float, float]] = (0.0, 30.0)
    operations: tuple[str, ...] | None = None
    count: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_none(self.name, "count", self.count, whole=True)

    def settings(self) -> Mapping[str, Any]:
        """Return the operations and how many each example gets."""
        chosen = {} if self.operations is None else {"operations": self.operations}
        return {**chosen, "count": self.count}


@final
@dataclass(frozen=True)
class ColorJitter(Group):
    """Brightness, contrast, saturation and hue, all from ``init``."""

    init: float | None = None

    def members(self) -> tuple[Declaration, ...]:
        """Return the four."""
        return tuple(kind(init=self.init) for kind in (Brightness, Contrast, Saturation, Hue))


@final
@dataclass(frozen=True)
class Affine(Group):
    """Translation, scale, rotation and shear, which act in one warp.

    Attributes:
        init: Start of the four, in their own units.
    """

    init: float | None = None

    def members(self) -> tuple[Declaration, ...]:
        """Return the four."""
        return tuple(kind(init=self.init) for kind in (Translate, Scale, Rotate, Shear))


@final
@dataclass(frozen=True)
class Cutout(Group):
    """Number and side of squares cut out of images: ``CutoutHoles`` and ``CutoutLength``.

    Attributes:
        holes: Start of the number.
        length: Start of the side, in pixels.
    """

    holes: float | None = None
    length: float | None = None

    def members(self) -> tuple[Declaration, ...]:
        """Return the two."""
        return CutoutHoles(init=self.holes), CutoutLength(init=self.length)
