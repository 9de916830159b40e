"""1. Declare what is tuned: names, ranges, start and perturbation scale.

Units: *constrained* is what a person reads (a probability, a coefficient, pixels); *unconstrained*
is what the optimizer moves (any real number). [DeltaSTN] F.1 calls the map between them ``s``.

A kind of hyperparameter is one final dataclass here, under one of three abstract targets: a
``Site`` acts inside the graph, a ``Decay`` on weights, a ``LossTerm`` in the loss.
"""

import json
import math
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

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


@final
@dataclass(frozen=True)
class Column:
    """One resolved hyperparameter: a column of every ``(batch, h)`` tensor.

    Attributes:
        name: Unique.
        init: Start, constrained units.
        range: Open interval, constrained units.
        scale: Initial sigma, unconstrained units.
        per_example: Whether rows of a batch are perturbed independently.
        kind: Class name of the declaration it came from.
    """

    name: str
    init: float
    range: tuple[float, float]
    scale: float
    per_example: bool
    kind: str

    @classmethod
    def of(cls, declaration: Declaration, name: str, init: float, scale: float) -> "Column":
        """Resolve ``declaration`` under ``name``; its own ``init`` and ``scale`` come first."""
        return cls(
            name=name,
            init=float(init if declaration.init is None else declaration.init),
            range=declaration.range,
            scale=float(scale if declaration.scale is None else declaration.scale),
            per_example=declaration.per_example,
            kind=type(declaration).__name__,
        )

    @property
    def transform(self) -> Transform:
        """Bijection from unconstrained to constrained units; ``.inv`` goes back."""
        return _bijection(*self.range)


@cache
def _bijection(low: float, high: float) -> Transform:
    if math.isinf(low) and math.isinf(high):
        return biject_to(constraints.real)
    if math.isinf(high):
        return biject_to(constraints.greater_than(low))
    if math.isinf(low):
        return biject_to(constraints.less_than(high))
    return biject_to(constraints.interval(low, high))


class HyperparameterSpace(nn.Module):
    """The hyperparameters lambda and their perturbation scale sigma.

    Attributes:
        unconstrained: lambda, ``(h,)``, what the optimizer moves.
        raw_scale: ``(h,)``; sigma is its softplus.
        columns: What each entry means.

    ``space[name]`` is the constrained value under the pass that is running: ``()`` ordinarily and
    ``(batch,)`` while a perturbed training pass runs.
    """

    _current: Tensor

    def __init__(self, columns: Sequence[Column], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        refuse_duplicates(column.name for column in columns)
        self.columns = tuple(columns)
        self.unconstrained = nn.Parameter(torch.zeros(len(columns), dtype=dtype, device=device))
        self.raw_scale = nn.Parameter(torch.zeros(len(columns), dtype=dtype, device=device))
        self.register_buffer("_current", torch.zeros_like(self.unconstrained), persistent=False)
        self._current_key: tuple[int, int] | None = None
        self._values: dict[str, float] | None = None
        self.set_values({column.name: column.init for column in columns})
        scales = torch.tensor([c.scale for c in columns], dtype=torch.float64)
        self.raw_scale.data.copy_(scales + torch.log(-torch.expm1(-scales)))  # softplus inverse
        self.active: Tensor | None = None
        self.read: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Names in column order."""
        return tuple(column.name for column in self.columns)

    @property
    def scale(self) -> Tensor:
        """Sigma, ``(h,)``, unconstrained units, differentiable in ``raw_scale``."""
        return F.softplus(self.raw_scale)

    @property
    def current(self) -> Tensor:
        """Constrained values at lambda_0, ``(h,)``, detached; always the same tensor.

        It is computed when lambda has changed, but not inside compiled code, which reads it.
        """
        if not torch.compiler.is_compiling():
            # Both change when an optimizer or ``load_state_dict`` moves lambda; see ``refresh``.
            key = (self.unconstrained._version, self.unconstrained.data_ptr())
            if key != self._current_key:
                self._current_key, self._values = key, None
                self._current.copy_(self.constrain(self.unconstrained.detach()))
        return self._current

    def refresh(self) -> None:
        """Compute ``current`` anew when it is next read, however lambda was moved."""
        self._current_key = None

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Map ``(..., h)`` unconstrained to constrained units, differentiably: ``s`` of F.1."""
        if not self.columns:
            return unconstrained
        columns = [
            column.transform(entries)
            for column, entries in zip(self.columns, unconstrained.unbind(-1), strict=True)
        ]
        return torch.stack(columns, dim=-1)

    def entropy(self) -> Tensor:
        """Entropy of the perturbation, the sum of ``log(sigma sqrt(2 pi e))``; ``()``."""
        return (self.scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def index(self, name: str) -> int:
        """Return the column of ``name``; DeclarationError names the nearest if there is none."""
        if name not in self.names:
            raise DeclarationError(
                f"no hyperparameter is called {name!r}; nearest: {nearest(name, self.names)}."
            )
        return self.names.index(name)

    def __getitem__(self, name: str) -> Tensor:
        column = self.index(name)
        self.read.add(name)
        values = self.current.clone() if self.active is None else self.active
        return values[..., column]

    def values(self) -> dict[str, float]:
        """Return the current values by name, constrained units; read once for each change."""
        current = self.current
        if self._values is None:
            self._values = dict(zip(self.names, current.tolist(), strict=True))
        return dict(self._values)

    def scales(self) -> dict[str, float]:
        """Return sigma by name, unconstrained units."""
        return dict(zip(self.names, self.scale.tolist(), strict=True))

    @torch.no_grad()
    def set_values(self, values: Mapping[str, float]) -> None:
        """Move the named hyperparameters to ``values``, constrained units: all of them or none.

        Raises:
            DeclarationError: An unknown name, or a value outside its open range.
        """
        moved = {name: self._unconstrained_value(name, value) for name, value in values.items()}
        for name, unconstrained in moved.items():
            self.unconstrained[self.index(name)] = unconstrained

    def _unconstrained_value(self, name: str, value: float) -> Tensor:
        column = self.columns[self.index(name)]
        low, high = column.range
        if not low < value < high:
            raise DeclarationError(
                f"`low < value < high` must hold for {name!r}, but got {value} with "
                f"range={column.range}."
            )
        unconstrained = column.transform.inv(torch.tensor(value, dtype=torch.float64))
        unconstrained = unconstrained.to(self.unconstrained)
        if not low < column.transform(unconstrained) < high:
            raise DeclarationError(
                f"{name!r} = {value} is too close to an end of {column.range} to be told from it "
                f"in {unconstrained.dtype}. Start further inside."
            )
        return unconstrained

    def to_json(self) -> str:
        """Write columns, values and scales as JSON; ``from_json`` reads it back."""
        values, scales = self.values(), self.scales()
        entries = [
            {
                "name": c.name,
                "value": values[c.name],
                "init": c.init,
                "range": [_json_end(end) for end in c.range],
                "scale": scales[c.name],
                "per_example": c.per_example,
                "kind": c.kind,
            }
            for c in self.columns
        ]
        return json.dumps({"hyperparameters": entries}, indent=2)

    @classmethod
    def from_json(
        cls,
        text: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> "HyperparameterSpace":
        """Rebuild the space ``to_json`` wrote, with its values and scales."""
        entries = json.loads(text)["hyperparameters"]
        columns = [
            Column(
                name=entry["name"],
                init=entry["init"],
                range=(
                    -math.inf if entry["range"][0] is None else entry["range"][0],
                    math.inf if entry["range"][1] is None else entry["range"][1],
                ),
                scale=entry["scale"],
                per_example=entry["per_example"],
                kind=entry["kind"],
            )
            for entry in entries
        ]
        space = cls(columns, dtype, device)
        space.set_values({entry["name"]: entry["value"] for entry in entries})
        return space


def _json_end(end: float) -> float | None:
    return None if math.isinf(end) else end
