"""Find the places where noise acts: existing modules and functions, and places to insert it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import fx, nn

from stnify.declare import Dropout, Pattern, Site
from stnify.errors import DeclarationError
from stnify.patterns import require, require_each
from stnify.plan import Granularity, NoiseSite
from stnify.space import Column
from stnify.trace import Traced, caller, swappable

ELEMENTS: Granularity = ("element", 0)
EXISTING_MODULES: dict[type[Site], dict[type[nn.Module], Granularity]] = {
    Dropout: {
        nn.Dropout: ELEMENTS,
        nn.Dropout1d: ("channel", 1),
        nn.Dropout2d: ("channel", 2),
        nn.Dropout3d: ("channel", 3),
    },
}
"""Modules a kind of site takes over, by exact type."""

EXISTING_FUNCTIONS: dict[type[Site], dict[Callable[..., Any], Granularity]] = {
    Dropout: {
        F.dropout: ELEMENTS,
        F.dropout1d: ("channel", 1),
        F.dropout2d: ("channel", 2),
        F.dropout3d: ("channel", 3),
    },
}
"""Functions a kind of site takes over."""


@dataclass(frozen=True)
class _Place:
    """A ``NoiseSite`` before it has a hyperparameter, and the rate the model had there."""

    name: str
    place: Literal["replace", "after", "swap"]
    node: str
    last: str
    granularity: Granularity = ELEMENTS
    rate: float | None = None
    inside: str | None = None


def noise_sites(
    model: nn.Module, traced: Traced, declaration: Site, scale: float
) -> tuple[list[Column], list[NoiseSite]]:
    """Return the hyperparameters of ``declaration`` and the sites they control.

    Raises:
        DeclarationError: It matches nothing, or a module that does not return one tensor.
    """
    if declaration.at == "input":
        places = [_input_place(traced)]
    elif declaration.after is not None:
        places = _places_after(model, traced, declaration)
    else:
        places = _existing_places(model, traced, declaration)
    by_column: dict[str, list[_Place]] = {}
    for place in places:
        suffix = f".{place.name}" if declaration.per_layer else ""
        by_column.setdefault(declaration.name + suffix, []).append(place)
    columns = [
        Column.of(declaration, name, _start(declaration, members), scale)
        for name, members in by_column.items()
    ]
    kind = type(declaration).__name__
    sites = [
        NoiseSite(p.name, kind, p.place, p.node, p.last, column, p.granularity, p.inside)
        for column, members in by_column.items()
        for p in members
    ]
    return columns, sites


def _start(declaration: Site, places: Sequence[_Place]) -> float:
    """Return the mean of the model's own rates if it lies in the range, else the default."""
    rates = [place.rate for place in places if place.rate is not None]
    mean = sum(rates) / len(rates) if rates else declaration.default_init
    low, high = declaration.range
    return mean if low < mean < high else declaration.default_init


def _input_place(traced: Traced) -> _Place:
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if not inputs or "" in traced.opaque:
        raise DeclarationError(
            '`at="input"` needs a model whose forward takes an input and can be traced: '
            f"{traced.opaque.get('', 'it takes no input')}."
        )
    return _Place("input", "after", inputs[0].name, inputs[-1].name)


def _places_after(model: nn.Module, traced: Traced, declaration: Site) -> list[_Place]:
    assert declaration.after is not None
    candidates = {name: model.get_submodule(name) for name in traced.outputs if name}
    purpose = f"`after` of {declaration.name!r}"
    places: list[_Place] = []
    for name in _chosen(declaration.after, declaration, candidates, purpose):
        for output in traced.outputs[name]:
            if not isinstance(output.value, fx.Node):
                raise DeclarationError(
                    f"{purpose} must match modules that return one tensor, but {name!r} returns "
                    f"{type(output.value).__name__}. Choose a module inside it."
                )
            places.append(_Place(name, "after", output.value.name, output.last.name))
    return places


def _existing_places(model: nn.Module, traced: Traced, declaration: Site) -> list[_Place]:
    places = [p for node in traced.graph.nodes for p in _existing(model, node, type(declaration))]
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates = {place.name: modules.get(place.name) for place in places}
    if declaration.at is None and not candidates:
        kinds = ", ".join(kind.__name__ for kind in EXISTING_MODULES[type(declaration)])
        raise DeclarationError(
            f"{declaration.name!r} takes over existing modules ({kinds}), but "
            f'{type(model).__name__} calls none. Insert some with `after=PATTERN` or `at="input"`.'
        )
    patterns: Pattern = "**" if declaration.at is None else declaration.at
    chosen = _chosen(patterns, declaration, candidates, f"`at` of {declaration.name!r}")
    return [place for place in places if place.name in chosen]


def _existing(model: nn.Module, node: fx.Node, kind: type[Site]) -> Iterator[_Place]:
    """Yield the places at one node where the model has noise of this kind."""
    if node.op == "call_function" and node.target in EXISTING_FUNCTIONS[kind]:
        rate = node.args[1] if len(node.args) > 1 else node.kwargs.get("p")
        granularity = EXISTING_FUNCTIONS[kind][node.target]
        known = float(rate) if isinstance(rate, int | float) else None
        yield _Place(_function_name(node), "replace", node.name, node.name, granularity, known)
    elif node.op == "call_module":
        name = str(node.target)
        module = model.get_submodule(name)
        if type(module) in EXISTING_MODULES[kind]:
            granularity = EXISTING_MODULES[kind][type(module)]
            rate = getattr(module, "p", None)
            yield _Place(name, "replace", node.name, node.name, granularity, rate)
        for inner, child in swappable(model, node).items():
            if type(child) in EXISTING_MODULES[kind]:
                granularity, where = EXISTING_MODULES[kind][type(child)], f"{node.name}:{inner}"
                rate = getattr(child, "p", None)
                yield _Place(inner, "swap", where, where, granularity, rate, name)


def _function_name(node: fx.Node) -> str:
    """Name a function call by the module that makes it, e.g. ``layer1.0.dropout``."""
    function = getattr(node.target, "__name__", node.name)
    return ".".join(filter(None, (caller(node), function)))


def _chosen(
    patterns: Pattern,
    declaration: Site,
    candidates: Mapping[str, nn.Module | None],
    purpose: str,
) -> list[str]:
    """Return the candidates that ``patterns`` matches, less those excluded; at least one."""
    found = require_each(patterns, candidates, purpose)
    excluded = set(require_each(declaration.exclude, candidates, f"`exclude` of {purpose}"))
    kept = [name for name in found if name not in excluded]
    return require(kept, declaration.exclude, found, f"{purpose} less `exclude`")
