"""Noise inside the network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from stnify.declare.base import Site, WeightNoise
from stnify.errors import DeclarationError

RATE: tuple[float, float] = (0.0, 0.95)
"""Range of dropout rates in [DeltaSTN] H.2."""

CHANNEL_DIMS = (0, 1, 2, 3)
"""Trailing dimensions that a channel may span."""


@dataclass(frozen=True)
class _Rate(Site):
    """Noise whose hyperparameter is a probability."""

    range: tuple[float, float] = RATE
    default_init: ClassVar[float] = 0.05
    widest: ClassVar[tuple[float, float]] = (0.0, 1.0)
    meaning: ClassVar[str] = "probability"


@final
@dataclass(frozen=True)
class Dropout(_Rate):
    """Tune the probability with which activations are set to zero.

    Without ``at`` or ``after`` it takes over every dropout module the model has. Each example of a
    batch has its own probability in the response step. Source: [STN] 4.1, [DeltaSTN] H.2.

    Attributes:
        channel_dims: For ``after`` and ``at="input"``: drop whole channels that span this many
            trailing dimensions, 1 to 3; 0 drops single elements. Existing modules keep theirs.

    Example:
        ``Dropout(after="layer*.*", init=0.1)`` puts one shared dropout behind each ResNet block.
    """

    name: str = "dropout"
    channel_dims: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channel_dims not in CHANNEL_DIMS:
            raise DeclarationError(
                f"`channel_dims` of {self.name!r} must be 0, 1, 2 or 3, but got "
                f"{self.channel_dims!r}."
            )


@final
@dataclass(frozen=True)
class AlphaDropout(_Rate):
    """Tune the rate of SELU networks' dropout, which keeps mean and variance.

    Without ``at`` or ``after`` it takes over ``nn.AlphaDropout`` and ``nn.FeatureAlphaDropout``.
    """

    name: str = "alpha_dropout"


@final
@dataclass(frozen=True)
class AttentionDropout(_Rate):
    """Tune the probability with which attention weights are set to zero.

    It takes over ``nn.MultiheadAttention`` and calls of ``F.scaled_dot_product_attention`` in
    traced code, by the module that makes them; the weights are written out then. A dropout module
    on attention weights is a ``Dropout`` site.
    """

    name: str = "attention_dropout"
    insertable: ClassVar[bool] = False


@final
@dataclass(frozen=True)
class EmbeddingDropout(_Rate):
    """Tune the probability with which a word is missing from an example, wherever it occurs.

    It acts on the output of ``nn.Embedding`` modules. Source: [STN] D.
    """

    name: str = "embedding_dropout"
    insertable: ClassVar[bool] = False


@final
@dataclass(frozen=True)
class LockedDropout(_Rate):
    """Tune variational dropout: one mask for all steps of a sequence.

    Attributes:
        time: Dimension of the steps, counted from the first.

    Source: [STN] D, [DeltaSTN] H.3.
    """

    name: str = "locked_dropout"
    time: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.time, int) or self.time < 0:
            raise DeclarationError(
                f"`time` of {self.name!r} must count dimensions from the first, 0, but got "
                f"{self.time!r}."
            )

    def settings(self) -> Mapping[str, Any]:
        """Return the dimension of the steps."""
        return {"time": self.time}


@final
@dataclass(frozen=True)
class DropPath(_Rate):
    """Tune stochastic depth: the probability with which an example skips a residual branch.

    Without ``at`` or ``after`` it takes over timm's ``DropPath`` and torchvision's
    ``StochasticDepth``; in a model that calls none it is put on every residual branch, as
    ``at="residual"`` does in any case; then ``exclude`` and ``per_layer`` go by the name of the
    branch in the plan. What is kept is scaled by ``1 / (1 - rate)``, also where timm's
    ``scale_by_keep=False`` did not. Source: Huang et al., ECCV 2016.

    Attributes:
        by_depth: Let the rate grow with depth, up to the hyperparameter at the last place: evenly
            from zero at the first branch, or in the ratios of the rates that the model has.
    """

    name: str = "drop_path"
    by_depth: bool = False

    default_place: ClassVar[str | None] = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_depth and self.per_layer:
            raise DeclarationError(
                f"{self.name!r} can grow with depth by one hyperparameter, `by_depth`, or have one "
                f"for each place, `per_layer`, but got both: that of the first place would be "
                f"multiplied by 0."
            )

    def settings(self) -> Mapping[str, Any]:
        """Return whether the rate grows with depth."""
        return {"by_depth": self.by_depth}


@final
@dataclass(frozen=True)
class DropBlock(_Rate):
    """Tune the share of a feature map that is set to zero in squares.

    Without ``at`` or ``after`` it takes over timm's ``DropBlock2d`` and torchvision's. Each channel
    has squares of its own, as in torchvision; timm shares them unless told otherwise.
    Source: Ghiasi et al., NeurIPS 2018.

    Attributes:
        block_size: Side of a square, in pixels of the feature map.
    """

    name: str = "drop_block"
    block_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise DeclarationError(
                f"`block_size` of {self.name!r} must be a positive whole number, but got "
                f"{self.block_size!r}."
            )

    def settings(self) -> Mapping[str, Any]:
        """Return the side of a square."""
        return {"block_size": self.block_size}


@dataclass(frozen=True)
class _Spread(Site):
    """Noise whose hyperparameter is a standard deviation; at the input unless placed elsewhere."""

    range: tuple[float, float] = (0.0, 1.0)
    default_init: ClassVar[float] = 0.05
    widest: ClassVar[tuple[float, float]] = (0.0, math.inf)
    meaning: ClassVar[str] = "standard deviation"
    default_place: ClassVar[str | None] = "input"


@final
@dataclass(frozen=True)
class GaussianNoise(_Spread):
    """Tune the standard deviation of noise added to the input, or to activations by ``after``."""

    name: str = "gaussian_noise"


@final
@dataclass(frozen=True)
class ScalingNoise(_Spread):
    """Tune noise that multiplies each number of the input by ``1 + value * standard normal``.

    Source: [STN] 4.2, [DeltaSTN] H.2.3.
    """

    name: str = "scaling_noise"


@final
@dataclass(frozen=True)
class DropConnect(WeightNoise):
    """Tune the probability with which single weights are set to zero, in all of a batch alike.

    Without ``at`` it acts on the weights that activations are multiplied with: of linear layers,
    convolutions, attention, recurrence and products. Patterns choose among all weights of two or
    more dimensions, also embeddings, class tokens and position tables.

    Example:
        ``DropConnect(at="**.weight_hh_l*")`` for the recurrent weights of LSTMs.

    Source: Wan et al., ICML 2013; [STN] D, whose units ``at`` names.
    """

    name: str = "drop_connect"
    range: tuple[float, float] = RATE
    default_init: ClassVar[float] = 0.05
    widest: ClassVar[tuple[float, float]] = (0.0, 1.0)
    meaning: ClassVar[str] = "probability"
