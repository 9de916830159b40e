"""1b. The hyperparameters as numbers: values, perturbation scale, and the maps between units."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

from stnify.declare import Declaration, refuse_duplicates
from stnify.errors import DeclarationError, nearest


@final
@dataclass(frozen=True)
class Column:
    """One resolved hyperparameter: a column of every ``(batch, h)`` tensor.

    Attributes:
        name: Unique.
        init: Start, constrained units.
        range: Open interval, constrained units.
        scale: Initial sigma, unconstrained units; None if it follows the value.
        per_example: Whether rows of a batch are perturbed independently.
        kind: Class name of the declaration it came from.
    """

    name: str
    init: float
    range: tuple[float, float]
    scale: float | None
    per_example: bool
    kind: str

    @classmethod
    def of(cls, declaration: Declaration, name: str, init: float, scale: float | None) -> "Column":
        """Resolve ``declaration`` under ``name``; its own ``init`` and ``scale`` come first."""
        own = scale if declaration.scale is None else declaration.scale
        return cls(
            name=name,
            init=float(init if declaration.init is None else declaration.init),
            range=declaration.range,
            scale=None if own is None else float(own),
            per_example=declaration.per_example,
            kind=type(declaration).__name__,
        )

    @property
    def transform(self) -> Transform:
        """Bijection from unconstrained to constrained units; ``.inv`` goes back."""
        return _bijection(*self.range)

    @property
    def follows(self) -> bool:
        """Whether sigma depends on the value: so it was asked, and the range has two ends."""
        return self.scale is None and all(map(math.isfinite, self.range))


SPREAD = 0.2
"""How far one sigma reaches, as a part of the range, where sigma follows the value and may."""

FOLLOWING = (0.5, 2.0)
"""Smallest and largest sigma that follows a value, unconstrained units."""


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
        self._following = [i for i, column in enumerate(columns) if column.follows]
        self.set_values({column.name: column.init for column in columns})
        scales = [1.0 if column.scale is None else column.scale for column in columns]
        self.raw_scale.data.copy_(_softplus_inverse(torch.tensor(scales, dtype=torch.float64)))
        self.follow_values()
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

    @torch.no_grad()
    def follow_values(self) -> None:
        """Set each sigma that follows its value, so that it widens towards the ends of the range.

        Near an end of the range a sigma of one hardly moves the value: what a response is learned
        from there drowns in noise. Sigma is a fifth of the range, in unconstrained units:
        ``0.2 / (u (1 - u))``, ``u`` the part of the range below the value, within ``FOLLOWING``.
        """
        if self._following:
            share = self.unconstrained[self._following].sigmoid()
            scales = (SPREAD / (share * (1 - share))).clamp(*FOLLOWING)
            self.raw_scale[self._following] = _softplus_inverse(scales)

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
        self.follow_values()

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
                "follows": c.follows,
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
                scale=None if entry["follows"] else entry["scale"],
                per_example=entry["per_example"],
                kind=entry["kind"],
            )
            for entry in entries
        ]
        space = cls(columns, dtype, device)
        space.set_values({entry["name"]: entry["value"] for entry in entries})
        return space


def _softplus_inverse(values: Tensor) -> Tensor:
    return values + torch.log(-torch.expm1(-values))


def _json_end(end: float) -> float | None:
    return None if math.isinf(end) else end
