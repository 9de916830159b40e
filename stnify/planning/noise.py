"""Find the places where noise acts: existing modules and functions, and places to insert it."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import fx, nn

from stnify.declare import (
    ActivationTerm,
    AlphaDropout,
    AttentionDropout,
    DropBlock,
    Dropout,
    DropPath,
    EmbeddingDropout,
    LockedDropout,
    Pattern,
    Site,
)
from stnify.errors import DeclarationError
from stnify.patterns import choose, require, require_each
from stnify.plan import Granularity, NoisePlace, NoiseSite
from stnify.planning.residual import residual_branches
from stnify.planning.sharing import columns_of
from stnify.space import Column
from stnify.trace import Traced, caller, swappable

ELEMENTS: Granularity = ("element", 0)
CHANNELS: dict[int, Granularity] = {1: ("channel", 1), 2: ("channel", 2), 3: ("channel", 3)}
FEATURES: Granularity = ("channel", 0)
"""Channels are the second dimension, whatever follows, as PyTorch's feature dropout has it."""
ROWS: Granularity = ("row", 0)
BATCH: Granularity = ("batch", 0)

Existing = Granularity | Callable[[nn.Module], Granularity]


def _by_mode(module: nn.Module) -> Granularity:
    """Return what torchvision's ``mode`` means."""
    return BATCH if module.mode == "batch" else ROWS


EXISTING_MODULES: dict[type[Site], dict[type[nn.Module] | str, Existing]] = {
    Dropout: {
        nn.Dropout: ELEMENTS,
        nn.Dropout1d: CHANNELS[1],
        nn.Dropout2d: FEATURES,
        nn.Dropout3d: CHANNELS[3],
    },
    AttentionDropout: {nn.MultiheadAttention: ELEMENTS},
    AlphaDropout: {nn.AlphaDropout: ELEMENTS, nn.FeatureAlphaDropout: FEATURES},
    EmbeddingDropout: {nn.Embedding: ELEMENTS},
    DropPath: {
        "timm.layers.drop.DropPath": ROWS,
        "torchvision.ops.stochastic_depth.StochasticDepth": _by_mode,
    },
    DropBlock: {
        "timm.layers.drop.DropBlock2d": ELEMENTS,
        "torchvision.ops.drop_block.DropBlock2d": ELEMENTS,
    },
}
"""Modules a kind of site takes over, by exact type or its qualified name."""

EXISTING_FUNCTIONS: dict[type[Site], dict[Callable[..., Any], Granularity]] = {
    Dropout: {
        F.dropout: ELEMENTS,
        F.dropout1d: CHANNELS[1],
        F.dropout2d: FEATURES,
        F.dropout3d: CHANNELS[3],
    },
    AlphaDropout: {F.alpha_dropout: ELEMENTS, F.feature_alpha_dropout: FEATURES},
    AttentionDropout: {F.scaled_dot_product_attention: ELEMENTS},
}
"""Functions a kind of site takes over."""

RATE_NAMES = ("p", "dropout_p", "drop_prob", "dropout")
"""What libraries call the rate of their noise, in modules and as arguments."""


@dataclass(frozen=True)
class _Place:
    """A ``NoiseSite`` before it has a hyperparameter, and the rate the model had there."""

    name: str
    place: NoisePlace
    node: str
    last: str
    granularity: Granularity = ELEMENTS
    rate: float | None = None
    inside: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def noise_sites(
    model: nn.Module, traced: Traced, declaration: Site, scale: float | None
) -> tuple[list[Column], list[NoiseSite]]:
    """Return the hyperparameters of ``declaration`` and the sites they control.

    Raises:
        DeclarationError: It matches nothing, or a module that does not return one tensor.
    """
    places = _places(model, traced, declaration)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = columns_of(declaration, {p.name: modules.get(p.name) for p in places}, choose)
    by_column: dict[str, list[_Place]] = {}
    for place in places:
        by_column.setdefault(names[place.name], []).append(place)
    columns = [
        Column.of(declaration, name, _start(declaration, members), scale)
        for name, members in by_column.items()
    ]
    settings = dict(declaration.settings())
    factors = _factors(places) if settings.pop("by_depth", False) else [1.0] * len(places)
    factor_of = dict(zip([(place.node, place.last) for place in places], factors, strict=True))
    sites = [
        NoiseSite(
            name=place.name,
            kind=type(declaration).__name__,
            place=place.place,
            node=place.node,
            last=place.last,
            column=column,
            granularity=place.granularity,
            inside=place.inside,
            settings={**settings, **place.settings},
            factor=factor_of[place.node, place.last],
        )
        for column, members in by_column.items()
        for place in members
    ]
    return columns, sites


def _places(model: nn.Module, traced: Traced, declaration: Site) -> list[_Place]:
    """Return where a declaration acts: where it says, on what exists, or at its usual place."""
    if declaration.after is not None:
        return _places_after(model, traced, declaration)
    if isinstance(declaration.at, str) and declaration.at in INSERTIONS:
        return INSERTIONS[declaration.at](model, traced, declaration)
    places = [p for node in traced.graph.nodes for p in _existing(model, node, type(declaration))]
    if declaration.at is None and not places and declaration.default_place is not None:
        return INSERTIONS[declaration.default_place](model, traced, declaration)
    return _existing_places(model, places, declaration)


def _factors(places: Sequence[_Place]) -> list[float]:
    """Return what the rate is multiplied by along the depth, up to one at the last place.

    Rates that the model has keep their ratios; else they grow evenly from zero.
    """
    rates = [place.rate or 0.0 for place in places]
    if any(rates):
        return [rate / max(rates) for rate in rates]
    return [index / (len(places) - 1) for index in range(len(places))] if len(places) > 1 else [1.0]


def _start(declaration: Site, places: Sequence[_Place]) -> float:
    """Return what the model's own rates say if it lies in the range, else the default.

    It is their mean, or the largest if the rate grows with depth.
    """
    rates = [place.rate for place in places if place.rate is not None]
    own = sum(rates) / len(rates) if rates else declaration.default_init
    if rates and declaration.settings().get("by_depth"):
        own = max(rates)
    low, high = declaration.range
    return own if low < own < high else declaration.default_init


# Insertion ----------------------------------------------------------------------------------------


def _inserted(declaration: Site | ActivationTerm) -> Granularity:
    """Return the granularity of noise that is inserted."""
    match declaration:
        case DropPath():
            return ROWS
        case LockedDropout():
            return ("time", declaration.time)
        case Dropout() if declaration.channel_dims:
            return CHANNELS[declaration.channel_dims]
        case _:
            return ELEMENTS


def _input_place(model: nn.Module, traced: Traced, declaration: Site) -> list[_Place]:
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if not inputs or "" in traced.opaque:
        raise DeclarationError(
            '`at="input"` needs a model whose forward takes an input and can be traced: '
            f"{traced.opaque.get('', 'it takes no input')}."
        )
    granularity = _inserted(declaration)
    return [_Place("input", "after", inputs[0].name, inputs[-1].name, granularity)]


def _residual_places(model: nn.Module, traced: Traced, declaration: Site) -> list[_Place]:
    """Return a place at the end of every residual branch."""
    found = residual_branches(model, traced)
    if not found:
        opaque = "; ".join(f"{name or 'it'} {why}" for name, why in traced.opaque.items())
        raise DeclarationError(
            f"{declaration.name!r} acts on residual branches, but no addition in the graph of "
            f"{type(model).__name__} has a branch and a skip{f' ({opaque})' if opaque else ''}. "
            f"Name modules in `after=`."
        )
    excluded = require_each(
        declaration.exclude,
        {branch.name: None for branch in found},
        f"`exclude` of {declaration.name!r}",
    )
    return [
        _Place(branch.name, "operand", branch.node, branch.addition, _inserted(declaration))
        for branch in found
        if branch.name not in excluded
    ]


INSERTIONS: dict[str, Callable[[nn.Module, Traced, Site], list[_Place]]] = {
    "input": _input_place,
    "residual": _residual_places,
}
"""Word for ``at`` to the places it stands for."""


def _places_after(
    model: nn.Module, traced: Traced, declaration: Site | ActivationTerm
) -> list[_Place]:
    """Return the places behind the modules that ``after`` matches."""
    assert declaration.after is not None
    granularity = _inserted(declaration)
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
            value, last = _first_of_several(output.value), output.last
            last = value if value is not output.value else last
            places.append(_Place(name, "after", value.name, last.name, granularity))
    return places


def activation_sites(
    model: nn.Module, traced: Traced, declaration: ActivationTerm, scale: float | None
) -> tuple[list[Column], list[NoiseSite]]:
    """Return the hyperparameters of a penalty on activations and the places they are taken at.

    Raises:
        DeclarationError: It matches nothing, or a module that does not return one tensor.
    """
    places = _places_after(model, traced, declaration)
    names = {place.name: declaration.name for place in places}
    if declaration.per_layer:
        names = {place.name: f"{declaration.name}.{place.name}" for place in places}
    columns = [
        Column.of(declaration, name, declaration.default_init, scale)
        for name in dict.fromkeys(names.values())
    ]
    kind = type(declaration).__name__
    sites = [
        NoiseSite(p.name, kind, p.place, p.node, p.last, names[p.name], p.granularity)
        for p in places
    ]
    return columns, sites


def _first_of_several(value: fx.Node) -> fx.Node:
    """Return the node of the first part of a tuple, as recurrent modules return, or ``value``."""
    parts = [user for user in value.users if user.target is operator.getitem]
    firsts = [user for user in parts if user.args[1] == 0]
    recurrent = value.op == "call_module" and len(parts) == len(value.users)
    return firsts[0] if recurrent and firsts else value


# Existing noise -----------------------------------------------------------------------------------


def _existing_places(model: nn.Module, places: Sequence[_Place], declaration: Site) -> list[_Place]:
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates = {place.name: modules.get(place.name) for place in places}
    if declaration.at is None and not candidates:
        taken = EXISTING_MODULES.get(type(declaration), {}).keys()
        kinds = ", ".join(_type_name(kind).rpartition(".")[2] for kind in taken)
        insert = 'Insert some with `after=PATTERN` or `at="input"`.'
        raise DeclarationError(
            f"{declaration.name!r} takes over existing modules ({kinds or 'none'}), but "
            f"{type(model).__name__} calls none where they can be replaced. "
            f"{insert if declaration.insertable else 'Leave it out.'}"
        )
    patterns: Pattern = "**" if declaration.at is None else declaration.at
    chosen = _chosen(patterns, declaration, candidates, f"`at` of {declaration.name!r}")
    return [place for place in places if place.name in chosen]


def _existing(model: nn.Module, node: fx.Node, kind: type[Site]) -> Iterator[_Place]:
    """Yield the places at one node where the model has noise of this kind."""
    functions = EXISTING_FUNCTIONS.get(kind, {})
    if node.op == "call_function" and node.target in functions and not _is_off(node):
        rates = [node.kwargs[name] for name in RATE_NAMES if name in node.kwargs]
        if not rates and kind is not AttentionDropout:
            rates = list(node.args[1:2])
        known = float(rates[0]) if rates and isinstance(rates[0], int | float) else None
        granularity = functions[node.target]
        yield _Place(_function_name(node), "replace", node.name, node.name, granularity, known)
    elif node.op == "call_module":
        name = str(node.target)
        found = _noise_of(model.get_submodule(name), kind)
        if found is not None and kind is AttentionDropout:
            where = f"{node.name}:{name}"
            yield replace(found, name=name, node=where, last=where, inside=name)
        elif found is not None:
            place: NoisePlace = "after" if kind is EmbeddingDropout else "replace"
            yield replace(found, name=name, place=place, node=node.name, last=node.name)
        for inner, child in swappable(model, node).items():
            found = _noise_of(child, kind)
            if found is not None and kind is not EmbeddingDropout:
                where = f"{node.name}:{inner}"
                yield replace(found, name=inner, node=where, last=where, inside=name)


def _is_off(node: fx.Node) -> bool:
    """Whether a call of a dropout function says ``training=False`` in any mode."""
    names = ("input", "p", "training")
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return arguments.get("training") is False


def _noise_of(module: nn.Module, kind: type[Site]) -> _Place | None:
    """Return a place that is still to be named if a module is noise of this kind."""
    rows = EXISTING_MODULES.get(kind, {})
    own = parametrize.type_before_parametrizations(module)
    existing = rows.get(own, rows.get(_type_name(own)))
    if existing is None:
        return None
    granularity = existing(module) if callable(existing) else existing
    rates = [float(getattr(module, name)) for name in RATE_NAMES if hasattr(module, name)]
    settings: dict[str, Any] = {}
    if kind is DropBlock:
        settings["block_size"] = module.block_size
    if kind is EmbeddingDropout:
        settings["words"] = module.num_embeddings
    rate = rates[0] if rates else None
    return _Place("", "swap", "", "", granularity, rate, settings=settings)


def _type_name(kind: type[nn.Module] | str) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _function_name(node: fx.Node) -> str:
    """Name a function call by the module that makes it, e.g. ``layer1.0.dropout``."""
    function = getattr(node.target, "__name__", node.name)
    return ".".join(filter(None, (caller(node), function)))


def _chosen(
    patterns: Pattern,
    declaration: Site | ActivationTerm,
    candidates: Mapping[str, nn.Module | None],
    purpose: str,
) -> list[str]:
    """Return the candidates that ``patterns`` matches, less those excluded; at least one."""
    found = require_each(patterns, candidates, purpose)
    excluded = set(require_each(declaration.exclude, candidates, f"`exclude` of {purpose}"))
    kept = [name for name in found if name not in excluded]
    return require(kept, declaration.exclude, found, f"{purpose} less `exclude`")
