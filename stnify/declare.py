"""1. Declare what is tuned: names, ranges, start and perturbation scale.

Units: *constrained* is what a person reads (a probability, a coefficient, pixels); *unconstrained*
is what the optimizer moves (any real number). [DeltaSTN] F.1 calls the map between them ``s``.

A kind of hyperparameter is one final dataclass here, under one of three abstract targets: a
``Site`` acts inside the graph, a ``Decay`` on weights, a ``LossTerm`` in the loss.
"""

import math
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, final

from torch import Tensor, nn

from stnify.errors import DeclarationError, nearest

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

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise DeclarationError(f"`name` must be a non-empty string, but got {self.name!r}.")
        low, high = self.range
        if not low < high:
            raise DeclarationError(
                f"`low < high` must hold for the range of {self.name!r}, but got {self.range}."
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

    default_init: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Site(Declaration):
    """A hyperparameter that controls an operation inside the model's graph.

    Attributes:
        at: Existing modules of the kind, by glob on qualified names (``*`` stays within one
            dotted part, ``**`` crosses dots) or by type; ``"input"`` inserts at the model's input.
        after: Insert the operation after each matching module's output.
        exclude: Patterns taken out again.
        per_layer: One hyperparameter for each site, named ``name.<module>``, instead of one shared.
    """

    at: Pattern | None = None
    after: Pattern | None = None
    exclude: Pattern = ()
    per_layer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at is not None and self.after is not None:
            raise DeclarationError(
                f"give {self.name!r} either `at` or `after`, but got at={self.at!r} and "
                f"after={self.after!r}. Declare it twice, under two names, to have both."
            )


@dataclass(frozen=True)
class Decay(Declaration):
    """A hyperparameter that multiplies a penalty on weights.

    Attributes:
        at: Weights to decay, by glob on parameter or module names or by module type.
        exclude: Patterns taken out again.
        per_layer: One hyperparameter for each layer, named ``name.<module>``, instead of one.
    """

    at: Pattern = "**"
    exclude: Pattern = ()
    per_layer: bool = False


@dataclass(frozen=True)
class LossTerm(Declaration):
    """A hyperparameter that acts in the loss.

    Attributes:
        penalty: ``(model, batch, value) -> scalar or (batch,)``, added to the training loss by
            ``stn.criterion``; ``value`` is ``()`` in the general step and ``(batch,)`` in the
            response step, constrained units.
    """

    penalty: Callable[[nn.Module, Any, Tensor], Tensor] | None = None


@final
@dataclass(frozen=True)
class Dropout(Site):
    """Tune the probability with which activations are set to zero.

    Without ``at`` or ``after`` it takes over every dropout module the model has. Each example of a
    batch has its own probability in the response step. Source: [STN] 4.1, [DeltaSTN] H.2.

    Example:
        ``Dropout(after="layer*.*", init=0.1)`` puts one shared dropout behind each ResNet block.
    """

    name: str = "dropout"
    range: tuple[float, float] = (0.0, 0.95)
    default_init: ClassVar[float] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.range[0] < self.range[1] <= 1:
            raise DeclarationError(
                f"the range of {self.name!r} must lie within (0, 1), because it is a probability, "
                f"but got range={self.range}."
            )


@final
@dataclass(frozen=True)
class WeightDecay(Decay):
    """Tune the coefficient of half the squared norm of the weights (L2 penalty).

    It covers trainable weights of two or more dimensions, except those the model lists in
    ``no_weight_decay()``. It is the gradient of the penalty that enters the optimizer, as in
    ``torch.optim.SGD``; the optimizer's own ``weight_decay`` is switched off for groups that hold
    covered weights. Source: [DeltaSTN] Eqs. G.1, H.1.
    """

    name: str = "weight_decay"
    range: tuple[float, float] = (0.0, math.inf)
    default_init: ClassVar[float] = 5e-4


@final
@dataclass(frozen=True)
class Hyperparameter(LossTerm):
    """Tune any number your own loss reads.

    Either give a ``penalty``, or read ``stn.hyperparameters[name]`` inside the criterion or
    ``forward_loss``, there only while ``model.training`` is true, because the validation loss is
    computed by the same function. ``init`` is required.

    It must act through predictions, ``model(x)``: a penalty on ``model.parameters()`` sees general
    weights only, to which nothing responds. ``WeightDecay`` is the one on weights.

    Example:
        ``Hyperparameter("logits", 1e-3, (0, 1), penalty=lambda model, batch, value:
        value * model(batch[0]).square().mean(-1))``
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is None:
            raise DeclarationError(f"`init` must be given for Hyperparameter {self.name!r}.")


KINDS: dict[str, type[Declaration]] = {
    "dropout": Dropout,
    "weight_decay": WeightDecay,
}
"""The dict shorthand: ``{"dropout": 0.1}`` means ``Dropout(init=0.1)``."""


def declarations(hparams: Iterable[Declaration] | Mapping[str, float]) -> tuple[Declaration, ...]:
    """Read a list of declarations or the dict shorthand.

    Raises:
        DeclarationError: An unknown shorthand, something that is no declaration, a name used
            twice, or nothing declared.
    """
    if isinstance(hparams, Declaration):
        hparams = [hparams]
    if isinstance(hparams, Mapping):
        hparams = [_from_shorthand(name, init) for name, init in hparams.items()]
    if not isinstance(hparams, Iterable):
        raise DeclarationError(
            f"hyperparameters must be a list of declarations or a dict, but got {hparams!r} of "
            f"type {type(hparams).__name__}."
        )
    declared = tuple(hparams)
    if not declared:
        raise DeclarationError("at least one hyperparameter must be declared, but got none.")
    for declaration in declared:
        if not isinstance(declaration, Declaration):
            raise DeclarationError(
                f"hyperparameters must be declarations such as Dropout() or WeightDecay(), but "
                f"got {declaration!r} of type {type(declaration).__name__}."
            )
    refuse_duplicates(declaration.name for declaration in declared)
    return declared


def refuse_duplicates(names: Iterable[str]) -> None:
    """Raise DeclarationError if a name occurs twice."""
    names = list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DeclarationError(
            f"names of hyperparameters must be unique, but {twice} occur more than once. "
            f"Pass `name=` to tell them apart."
        )


def _from_shorthand(name: str, init: float) -> Declaration:
    if name not in KINDS:
        raise DeclarationError(
            f"{name!r} is no hyperparameter kind with a shorthand; known are {sorted(KINDS)}, "
            f"nearest {nearest(name, KINDS)}. Use a declaration for anything else."
        )
    return KINDS[name](name=name, init=init)
