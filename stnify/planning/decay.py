"""Find the weights a decay penalises, or noise disturbs."""

from collections.abc import Mapping, Sequence

from torch import nn

from stnify.declare import Decay, Pattern, WeightNoise
from stnify.errors import DeclarationError
from stnify.patterns import choose, matches, require
from stnify.plan import DecaySite, WeightNoiseSite
from stnify.planning.sharing import columns_of
from stnify.space import Column

DECAYS = ("WeightDecay", "L1Penalty")
"""Kinds of decay that have a penalty."""


def decay_sites(
    model: nn.Module, declaration: Decay, scale: float | None, own: Mapping[str, float]
) -> tuple[list[Column], list[DecaySite]]:
    """Return the hyperparameters of ``declaration`` and the weights they decay.

    Candidates are trainable weights of two or more dimensions, with dense gradients, that the
    model's own ``no_weight_decay()`` does not list.

    Raises:
        DeclarationError: It matches no candidate, or is of a kind without a penalty.
    """
    kind = type(declaration).__name__
    if kind not in DECAYS:
        raise DeclarationError(
            f"{declaration.name!r} must be one of {', '.join(DECAYS)} to have a penalty, but is a "
            f"{kind}. Use Hyperparameter(penalty=...) for one of your own."
        )
    by_column = _weights_by_column(model, declaration, without=_no_decay(model))
    if kind != "WeightDecay":
        own = {}
    columns = [
        Column.of(declaration, column, _start(declaration, [own.get(n, 0.0) for n in names]), scale)
        for column, names in by_column.items()
    ]
    return columns, [DecaySite(column, tuple(names), kind) for column, names in by_column.items()]


def weight_noise_sites(
    model: nn.Module, declaration: WeightNoise, scale: float | None
) -> tuple[list[Column], list[WeightNoiseSite]]:
    """Return the hyperparameters of ``declaration`` and the weights they disturb.

    Candidates are trainable weights of two or more dimensions.

    Raises:
        DeclarationError: It matches no candidate.
    """
    by_column = _weights_by_column(model, declaration)
    columns = [
        Column.of(declaration, column, declaration.default_init, scale) for column in by_column
    ]
    return columns, [WeightNoiseSite(column, tuple(names)) for column, names in by_column.items()]


def _weights_by_column(
    model: nn.Module, declaration: Decay | WeightNoise, without: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Return the weights a declaration chooses, by the name of their hyperparameter."""
    candidates = {
        name: model.get_submodule(name.rpartition(".")[0])
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and parameter.requires_grad and name not in without
    }
    candidates = {n: m for n, m in candidates.items() if not getattr(m, "sparse", False)}
    purpose = f"`at` of {declaration.name!r}"
    chosen = _chosen_each(declaration.at, candidates, purpose)
    excluded = set(_chosen_each(declaration.exclude, candidates, f"`exclude` of {purpose}"))
    kept = [name for name in chosen if name not in excluded]
    require(kept, declaration.exclude, chosen, f"{purpose} less `exclude`")
    held = {name: candidates[name] for name in kept}
    columns = columns_of(declaration, held, _chosen, lambda name: name.rpartition(".")[0])
    by_column: dict[str, list[str]] = {}
    for name, column in columns.items():
        by_column.setdefault(column, []).append(name)
    return by_column


def _start(declaration: Decay, own: Sequence[float]) -> float:
    """Return the mean of the optimizer's own decays if it lies in the range, else the default."""
    mean, (low, high) = sum(own) / len(own), declaration.range
    return mean if low < mean < high else declaration.default_init


def _chosen_each(
    patterns: Pattern, weights: Mapping[str, nn.Module | None], purpose: str
) -> list[str]:
    """Choose weights; every single pattern must match one.

    Raises:
        DeclarationError: One matches nothing.
    """
    for pattern in [patterns] if isinstance(patterns, str | type) else patterns:
        require(_chosen(pattern, weights), pattern, weights, purpose)
    return _chosen(patterns, weights)


def _chosen(patterns: Pattern, weights: Mapping[str, nn.Module | None]) -> list[str]:
    """Choose weights by their own name, their module's name or its type."""
    by_weight = set(choose(patterns, weights))
    globs = [patterns] if isinstance(patterns, str | type) else list(patterns)
    return [
        name
        for name in weights
        if name in by_weight
        or any(isinstance(g, str) and matches(g, name.rpartition(".")[0]) for g in globs)
    ]


def _no_decay(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "no_weight_decay", None)
    return tuple(names()) if callable(names) else ()
