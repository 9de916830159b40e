"""What every declaration has in common, and the five targets one can act on."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from stnify.errors import DeclarationError

Pattern = str | type[nn.Module] | Sequence[str | type[nn.Module]]
"""Globs on qualified names, or module types."""


@dataclass(frozen=True)
class Declaration(ABC):
    """What every kind of hyperparameter declares.

    Attributes:
        name: Label in ``values()``, histories and reports.
        init: Start, constrained units, strictly inside ``range``; ``None`` takes the model's or the
            optimizer's own value where there is one inside the range (the mean of several), else
            the kind's default.
        range: Open interval of the constrained value; either end may be infinite.
        scale: Initial perturbation scale sigma, unconstrained units; ``None`` takes ``stnify``'s.
        per_example: Perturb each example by itself; otherwise one perturbation for each batch.

    Raises:
        DeclarationError: The name is empty, ``low < init < high`` fails, or ``scale`` is not
            positive and finite.
    """

    name: str
    init: float | None = None
    range: tuple[float, float] = (-math.inf, math.inf)
    scale: float | None = None
    per_example: bool = True

    default_init: ClassVar[float] = 0.0
    widest: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    """What any range of this kind must lie within."""
    meaning: ClassVar[str] = "number"
    """What the value is, for a reader."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise DeclarationError(f"`name` must be a non-empty string, but got {self.name!r}.")
        if not _is_pair(self.range):
            raise DeclarationError(
                f"the range of {self.name!r} must be a pair of numbers, (low, high), but got "
                f"{self.range!r}."
            )
        low, high = self.range
        if not low < high:
            raise DeclarationError(
                f"`low < high` must hold for the range of {self.name!r}, but got {self.range}."
            )
        if not (self.widest[0] <= low and high <= self.widest[1]):
            raise DeclarationError(
                f"the range of {self.name!r} must lie within {self.widest}, because it is a "
                f"{self.meaning}, but got range={self.range}."
            )
        if not isinstance(self.init, Real | None):
            raise DeclarationError(
                f"`init` of {self.name!r} must be a number, but got {self.init!r}."
            )
        if self.init is not None and not low < self.init < high:
            raise DeclarationError(
                f"`low < init < high` must hold for {self.name!r}, but got init={self.init} with "
                f"range={self.range}. The ends lie at infinity in unconstrained units, so start "
                f"strictly inside them."
            )
        if self.init is not None and not math.isfinite(self.init):
            raise DeclarationError(f"`init` of {self.name!r} must be finite, but got {self.init}.")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise DeclarationError(
                f"`0 < scale < inf` must hold for {self.name!r}, but got scale={self.scale}."
            )

    def settings(self) -> Mapping[str, Any]:
        """Return what the operation needs to know besides the hyperparameter's value."""
        return MappingProxyType({})


def _is_pair(value: object) -> bool:
    """Whether something is two numbers."""
    if not isinstance(value, tuple | list):
        return False
    return len(value) == 2 and all(isinstance(end, Real) for end in value)


def _refuse_tie(name: str, tie: object) -> None:
    """Raise DeclarationError if ``tie`` names no groups."""
    if not isinstance(tie, Mapping):
        raise DeclarationError(
            f"`tie` of {name!r} must be a dictionary from the last part of a name to patterns, "
            f"such as {{'early': 'layer[12].*'}}, but got {tie!r}. Without it, and without "
            f"`per_layer`, all places share one."
        )


@dataclass(frozen=True)
class Site(Declaration):
    """A hyperparameter that controls an operation inside the model's graph.

    Attributes:
        at: Existing modules of the kind, by glob on qualified names (``*`` stays within one
            dotted part, ``**`` crosses dots) or by type; ``"input"`` inserts at the model's input.
        after: Insert the operation after each matching module's output; several act in the order
            they are declared in.
        exclude: Patterns taken out again.
        per_layer: One hyperparameter for each site, named ``name.<module>``, instead of one shared.
        tie: Sites that share one, by the last part of its name: ``{"early": "layer[12].*"}`` makes
            ``name.early``. Sites in no group go by ``per_layer``.
    """

    at: Pattern | None = None
    after: Pattern | None = None
    exclude: Pattern = ()
    per_layer: bool = False
    tie: Mapping[str, Pattern] = field(default_factory=dict)

    default_place: ClassVar[str | None] = None
    """Where it acts if neither ``at`` nor ``after`` is given and there is nothing to take over."""
    insertable: ClassVar[bool] = True
    """Whether it can act on any tensor; else it takes over what the model has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_tie(self.name, self.tie)
        inserted = self.after is not None or self.at in ("input", "residual")
        if inserted and not self.insertable:
            raise DeclarationError(
                f"{self.name!r} takes over what the model has, and cannot be inserted, but got "
                f"at={self.at!r} and after={self.after!r}. Choose among the model's own by `at`."
            )
        if self.at is not None and self.after is not None:
            raise DeclarationError(
                f"give {self.name!r} either `at` or `after`, but got at={self.at!r} and "
                f"after={self.after!r}. Declare it twice, under two names, to have both."
            )


@dataclass(frozen=True)
class Decay(Declaration):
    """A hyperparameter that multiplies a penalty on weights.

    Attributes:
        at: Weights, by glob on parameter or module names or by module type.
        exclude: Patterns taken out again.
        per_layer: One hyperparameter for each layer, named ``name.<module>``, instead of one.
        tie: Weights that share one, as for a ``Site``.

    Raises:
        DeclarationError: The range holds negative coefficients, but is not the whole line, where
            the constrained value is the unconstrained one.
    """

    at: Pattern = "**"
    exclude: Pattern = ()
    per_layer: bool = False
    tie: Mapping[str, Pattern] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_tie(self.name, self.tie)
        if self.range[0] < 0 and self.range != (-math.inf, math.inf):
            raise DeclarationError(
                f"the range of {self.name!r} must not go below 0, because a negative coefficient "
                f"lets weights grow without end, but got range={self.range}."
            )


@dataclass(frozen=True)
class WeightNoise(Declaration):
    """A hyperparameter that disturbs weights; one draw for each batch.

    Attributes:
        at: Weights, by glob on parameter or module names or by module type.
        exclude: Patterns taken out again.
        per_layer: One hyperparameter for each layer, named ``name.<module>``, instead of one.
        tie: Weights that share one, as for a ``Site``.
    """

    per_example: bool = False
    at: Pattern = "**"
    exclude: Pattern = ()
    per_layer: bool = False
    tie: Mapping[str, Pattern] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_tie(self.name, self.tie)
        if self.per_example:
            raise DeclarationError(
                f"{self.name!r} must have `per_example=False`, because the examples of a batch "
                f"share their weights."
            )


@dataclass(frozen=True)
class Augmentation(Declaration):
    """A hyperparameter that changes the images a model is trained on, inside ``model(x)``.

    All declared augmentations act on the model's first input, in one fixed order.
    """


@dataclass(frozen=True)
class LossTerm(Declaration):
    """A hyperparameter that acts in the loss; the loop computes it with ``stn.criterion``."""


@dataclass(frozen=True)
class Group(ABC):
    """Several hyperparameters declared at once, wherever one may stand."""

    @abstractmethod
    def members(self) -> tuple[Declaration, ...]:
        """Return the declarations it stands for."""


Penalty = Callable[[nn.Module, Any, Tensor], Tensor]
"""``(model, batch, value) -> scalar or (batch,)``."""
