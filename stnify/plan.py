"""2b. What a conversion will do: a ``Plan``, made before anything is changed.

A plan lists every site that will change and every refusal with its reason; it can be printed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from stnify.space import Column
from stnify.trace import Traced

ResponseKind = Literal["full", "gate"]

Granularity = tuple[Literal["element", "channel"], int]
"""Whether noise is drawn for each element or channel, and how many dimensions a channel spans."""


@dataclass(frozen=True)
class WeightSite:
    """One call in which a weight meets activations.

    Attributes:
        name: Qualified name of the module that owns the weight.
        kind: Row of the layer table.
        way: Whether a module or a function is called in the graph, or a module is swapped inside
            another that could not be traced through.
        node: Name of the call in the graph.
        weight: Qualified name of the weight, or of the parameter it is computed from.
        bias: Qualified name of the bias, if it is a parameter.
        weight_responds: False if the weight is frozen.
        bias_responds: False if there is no bias, or it is frozen or computed.
        arguments: Fixed arguments of the call beside input, weight and bias.
        layout: Which rows belong to which example, once it has been measured.
        response_parameters: Parameters this site adds; a weight used twice counts once.
        inside: For a swap, the module that could not be traced through.
        computed: Shape of the weight if the model computes it, as a standardised kernel; it is then
            the computed weight that responds.
    """

    name: str
    kind: str
    way: Literal["module", "function", "swap"]
    node: str
    weight: str
    bias: str | None
    weight_responds: bool
    bias_responds: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "batch (assumed)"
    response_parameters: int = 0
    inside: str | None = None
    computed: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """Name under which the uses of a weight share one response."""
        return self.weight if self.computed is None else f"{self.weight} (computed)"


@dataclass(frozen=True)
class NoiseSite:
    """One place where noise of a tunable rate acts.

    Attributes:
        name: Qualified name of the module it replaces or follows, or ``"input"``.
        kind: Class name of the declaration.
        place: Whether it replaces the node, is put after it, or is swapped in inside a module that
            could not be traced through.
        node: Name of that node in the graph.
        last: Name of the last node that must keep the untouched value, for ``"after"``.
        column: Name of the hyperparameter.
        granularity: Element- or channel-wise, and how many trailing dimensions a channel spans.
        inside: For a swap, the module that could not be traced through.
    """

    name: str
    kind: str
    place: Literal["replace", "after", "swap"]
    node: str
    last: str
    column: str
    granularity: Granularity
    inside: str | None = None


@dataclass(frozen=True)
class DecaySite:
    """Weights that one decay hyperparameter penalises, by qualified name."""

    column: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class LossSite:
    """A hyperparameter that acts in the loss, with its penalty if it was declared with one."""

    column: str
    penalty: Callable[[nn.Module, Any, Tensor], Tensor] | None


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
        weights, noises, decays, losses: What changes.
        refusals: What does not, and why.
        response: Full response parameters, or gates of the general weights.
        parameters: Size of the model before.
        traced: The graph the names of nodes refer to.
    """

    columns: tuple[Column, ...]
    weights: tuple[WeightSite, ...]
    noises: tuple[NoiseSite, ...]
    decays: tuple[DecaySite, ...]
    losses: tuple[LossSite, ...]
    refusals: tuple[Refusal, ...]
    response: ResponseKind
    parameters: int
    traced: Traced = field(repr=False, compare=False)

    @property
    def response_parameters(self) -> int:
        """Response parameters the conversion adds."""
        return sum(site.response_parameters for site in self.weights)

    def with_layouts(self, layouts: Mapping[str, str]) -> "Plan":
        """Return this plan with measured row layouts, by node; an empty one changes nothing."""
        weights = [replace(s, layout=layouts.get(s.node) or s.layout) for s in self.weights]
        return replace(self, weights=tuple(weights))

    def __str__(self) -> str:
        rows = [("layer", "kind", "way", "rows", "adds")]
        rows += [
            (s.name or "(root)", s.kind, s.way, s.layout, f"{s.response_parameters:,}")
            for s in self.weights
        ]
        lines = [*_table(rows), ""]
        for column in self.columns:
            where = [
                f"{site.place} {site.name}" for site in self.noises if site.column == column.name
            ]
            where += [
                f"{len(site.parameters)} weights"
                for site in self.decays
                if site.column == column.name
            ]
            where += ["the loss" for site in self.losses if site.column == column.name]
            lines.append(f"{column.name} = {column.init:g} in {column.range}: {', '.join(where)}")
        lines += ["", *(f"unchanged: {r.name}: {r.reason}" for r in self.refusals)]
        lines.append(
            f"{len(self.weights)} sites with a {self.response} response add "
            f"{self.response_parameters:,} parameters to {self.parameters:,}"
        )
        return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
