"""2b. What a conversion will do: a ``Plan``, made before anything is changed.

A plan lists every site that will change and every refusal with its reason; it can be printed, and
written as JSON.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from stnify.space import Column
from stnify.trace import Traced

ResponseKind = Literal["full", "gate"]

Granularity = tuple[Literal["element", "channel", "row", "batch", "time"], int]
"""What one draw of noise serves, and the dimensions a channel spans (0 for all after the second) or
the one of the steps."""

NoisePlace = Literal["replace", "after", "operand", "swap"]
"""How noise gets into the graph; see ``NoiseSite``."""


class Flops(NamedTuple):
    """Floating-point operations of one example.

    Attributes:
        before: As the model was.
        after: In the pass of the response step.
    """

    before: int
    after: int


@dataclass(frozen=True)
class WeightSite:
    """One call in which a weight meets activations.

    Attributes:
        name: Qualified name of the module that owns the weight.
        kind: Row of the layer table.
        way: Whether a module or a function is called in the graph, or the weight is recognised in
            calls made by the code of a module that is not traced through.
        node: Name of the call in the graph, and of the weight if the call has several.
        weight: Qualified name of the weight, or of the parameter it is computed from.
        bias: Qualified name of the bias, if it is a parameter.
        weight_responds: False if the weight is frozen.
        bias_responds: False if there is no bias, or it is frozen or computed.
        axis: Dimension of the weight whose units are gated.
        units: How many gates there are.
        layout: Which rows belong to which example, once it has been measured.
        response_parameters: Parameters this site adds; a weight used twice counts once.
        inside: For a swap, the module whose code runs.
        computed: Shape of the weight if the model computes it, as a standardised kernel; it is then
            the computed weight that responds.
        computed_by: The node that computes it.
        value: The node whose value a function receives as the weight, if it is watched for calls.
        value_bias: Likewise for the bias.
        transposed: Whether that value is the transpose of the weight.
        parameters: General parameters of this site, once counted; a weight used twice counts once.
        flops: What this site costs, once inputs have been seen; a layer called twice counts once.
    """

    name: str
    kind: str
    way: Literal["module", "function", "swap"]
    node: str
    weight: str
    bias: str | None
    weight_responds: bool
    bias_responds: bool
    axis: int = 0
    units: int = 0
    layout: str = "batch (assumed)"
    response_parameters: int = 0
    inside: str | None = None
    computed: tuple[int, ...] | None = None
    computed_by: str | None = None
    value: str | None = None
    value_bias: str | None = None
    transposed: bool = False
    parameters: int | None = None
    flops: Flops | None = None

    @property
    def key(self) -> str:
        """Name under which the uses of a weight share one response."""
        return self.weight if self.computed is None else f"{self.weight} ({self.computed_by})"

    @property
    def label(self) -> str:
        """Name for a reader: the layer's if the weight is all it has, else the weight's."""
        path, _, attribute = self.weight.rpartition(".")
        return path or "(root)" if attribute == "weight" else self.weight


@dataclass(frozen=True)
class NoiseSite:
    """One place where noise of a tunable rate acts.

    Attributes:
        name: Qualified name of the module it replaces or follows, or ``"input"``.
        kind: Class name of the declaration.
        place: Whether it replaces the node, is put after it, is put on the way from it to one
            operation, or is swapped in inside a module that could not be traced through.
        node: Name of that node in the graph.
        last: Name of the last node that must keep the untouched value, for ``"after"``; of the
            operation that receives the noisy one, for ``"operand"``.
        column: Name of the hyperparameter.
        granularity: What one draw serves.
        inside: For a swap, the module that could not be traced through.
        settings: What the operation needs to know besides its rate.
        factor: What the hyperparameter is multiplied by here.
    """

    name: str
    kind: str
    place: NoisePlace
    node: str
    last: str
    column: str
    granularity: Granularity
    inside: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0


@dataclass(frozen=True)
class AugmentationSite:
    """An operation on the model's input images, with what it needs to know besides its strength."""

    column: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightNoiseSite:
    """Weights whose entries one rate sets to zero, by qualified name."""

    column: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class DecaySite:
    """Weights that one decay hyperparameter penalises, by qualified name."""

    column: str
    parameters: tuple[str, ...]
    kind: str = "WeightDecay"


@dataclass(frozen=True)
class LossSite:
    """A hyperparameter that acts in the loss.

    Attributes:
        column: Name of the hyperparameter.
        penalty: The user's own, if it was declared with one.
        kind: Class name of the declaration.
        settings: What the term needs to know besides its value.
        at_validation: Whether the validation loss reads it as well.
    """

    column: str
    penalty: Callable[[nn.Module, Any, Tensor], Tensor] | None
    kind: str = "Hyperparameter"
    settings: Mapping[str, Any] = field(default_factory=dict)
    at_validation: bool = False


@dataclass(frozen=True)
class Refusal:
    """Something that stays an ordinary general parameter or module, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do; ``str(plan)`` is a table.

    Attributes:
        columns: The hyperparameters, resolved.
        weights, noises, augmentations, weight_noises, decays, losses: What changes.
        refusals: What does not, and why.
        response: Full response parameters, or gates of the general weights.
        parameters: Size of the model before.
        flops: What the whole model costs, once inputs have been seen.
        traced: The graph the names of nodes refer to.
    """

    columns: tuple[Column, ...]
    weights: tuple[WeightSite, ...]
    noises: tuple[NoiseSite, ...]
    augmentations: tuple[AugmentationSite, ...]
    weight_noises: tuple[WeightNoiseSite, ...]
    decays: tuple[DecaySite, ...]
    losses: tuple[LossSite, ...]
    refusals: tuple[Refusal, ...]
    response: ResponseKind
    parameters: int
    traced: Traced = field(repr=False, compare=False)
    flops: Flops | None = None

    @property
    def response_parameters(self) -> int:
        """Response parameters the conversion adds."""
        return sum(site.response_parameters for site in self.weights)

    def with_layouts(self, layouts: Mapping[str, str]) -> "Plan":
        """Return this plan with measured row layouts, by node; an empty one changes nothing."""
        weights = [replace(s, layout=layouts.get(s.node) or s.layout) for s in self.weights]
        return replace(self, weights=tuple(weights))

    def with_sizes(self, sizes: Mapping[str, int]) -> "Plan":
        """Return this plan with the general parameters of each site, given sizes by name."""
        weights, seen = [], set[str]()
        for site in self.weights:
            fresh = {name for name in (site.weight, site.bias) if name is not None} - seen
            seen |= fresh
            weights.append(replace(site, parameters=sum(sizes[name] for name in fresh)))
        return replace(self, weights=tuple(weights))

    def with_flops(self, whole: Flops, layers: Mapping[str, Flops]) -> "Plan":
        """Return this plan with measured costs: of the model, and of each site by its node."""
        weights = [replace(site, flops=layers.get(site.node)) for site in self.weights]
        return replace(self, weights=tuple(weights), flops=whole)

    def to_json(self) -> str:
        """Write the whole plan as JSON.

        The object has these entries; a number that is not known yet is ``null``.

        - ``response``: ``"full"`` or ``"gate"``.
        - ``counts``: ``sites``, ``parameters`` (general), ``response_parameters``, ``flops``.
        - ``columns``: hyperparameters with ``name``, ``kind``, ``init``, ``range`` (``null`` is an
          infinite end), ``scale`` (``null`` follows the value) and ``per_example``.
        - ``weights``, ``noises``, ``augmentations``, ``weight_noises``, ``decays``, ``refusals``:
          lists with the attributes of ``WeightSite`` and so on; what is not JSON is text.
        - ``losses``: ``column``, ``kind``, and ``penalty`` as the function's qualified name or
          ``null``.
        - ``opaque``: modules that could not be traced through, with the reason.

        ``flops`` is ``{"before": ..., "after": ...}`` for one example; see ``Flops``.
        """
        found = {
            "response": self.response,
            "counts": {
                "sites": len(self.weights),
                "parameters": self.parameters,
                "response_parameters": self.response_parameters,
                "flops": self.flops and self.flops._asdict(),
            },
            "columns": [
                {**asdict(c), "range": [None if math.isinf(end) else end for end in c.range]}
                for c in self.columns
            ],
            "weights": [
                {**asdict(site), "flops": site.flops and site.flops._asdict()}
                for site in self.weights
            ],
            "noises": [asdict(site) for site in self.noises],
            "augmentations": [asdict(site) for site in self.augmentations],
            "weight_noises": [asdict(site) for site in self.weight_noises],
            "decays": [asdict(site) for site in self.decays],
            "losses": [
                {
                    "column": site.column,
                    "kind": site.kind,
                    "penalty": _function_name(site.penalty),
                }
                for site in self.losses
            ],
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "opaque": dict(self.traced.opaque),
        }
        return json.dumps(found, indent=2, default=str, allow_nan=False)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "kind", "way", "rows", "params", "after", "FLOPs", "after")
        ]
        rows += [_row(site) for site in self.weights]
        lines = [*_table(rows, left=4), *_notes(self.weights), ""]
        for column in self.columns:
            where = ", ".join(self._places_of(column.name))
            lines.append(f"{column.name} = {column.init:g} in {column.range}: {where}")
        lines += ["", *(f"unchanged: {r.name}: {r.reason}" for r in self.refusals)]
        lines.append(
            f"{len(self.weights)} sites with a {self.response} response add "
            f"{self.response_parameters:,} parameters to {self.parameters:,}"
        )
        if self.flops is not None:
            lines.append(
                f"one example costs {_compact(self.flops.before)} FLOPs in the model and "
                f"{_compact(self.flops.after)} in the response pass"
            )
        return "\n".join(lines)

    def _places_of(self, column: str) -> Iterator[str]:
        """Yield in words where a hyperparameter acts."""
        for noise in (site for site in self.noises if site.column == column):
            yield f"{_PLACES[noise.place]} {noise.name}"
        for images in (site for site in self.augmentations if site.column == column):
            yield f"{images.kind} of the input"
        on_weights = [(s.column, s.parameters) for s in self.weight_noises]
        on_weights += [(s.column, s.parameters) for s in self.decays]
        for weights in (names for owner, names in on_weights if owner == column):
            yield f"{len(weights)} weights"
        for _ in (site for site in self.losses if site.column == column):
            yield "the loss"


_PLACES: dict[NoisePlace, str] = {
    "replace": "replace",
    "after": "after",
    "operand": "branch",
    "swap": "swap",
}
"""Way noise gets into the graph, in words."""


def _row(site: WeightSite) -> tuple[str, ...]:
    before, added = site.parameters, site.response_parameters
    sizes = (before, None if before is None else before + added)
    costs: tuple[int | None, ...] = site.flops or (None, None)
    numbers = map(_compact, (*sizes, *costs))
    return (site.label, site.kind, site.way, _brief(site.layout), *numbers)


def _brief(layout: str) -> str:
    return layout.partition(" (")[0]


def _notes(sites: Sequence[WeightSite]) -> list[str]:
    """Say once, below the table, what stands in brackets in the layouts of several sites."""
    by_layout: dict[str, list[str]] = {}
    for site in sites:
        if site.layout != _brief(site.layout):
            by_layout.setdefault(site.layout, []).append(site.label)
    return [f"rows {layout}: {_some(names)}" for layout, names in by_layout.items()]


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _function_name(function: Callable[..., Any] | None) -> str | None:
    return None if function is None else getattr(function, "__qualname__", repr(function))


def _compact(count: int | None) -> str:
    """Write a count with three digits and a unit, ``?`` if it is not known."""
    if count is None:
        return "?"
    value, units = float(count), iter(("", "k", "M", "G", "T"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units, "P")
    return f"{value:.3g}{unit}"


def _table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Align columns; the first ``left`` of them hold words, the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
