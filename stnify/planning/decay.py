"""Find the weights a decay penalises, or noise disturbs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from stnify.declare import Decay, Pattern, WeightNoise
from stnify.errors import DeclarationError
from stnify.patterns import choose, matches, require
from stnify.plan import DecaySite, WeightNoiseSite
from stnify.planning.modules import own_weights
from stnify.planning.sharing import columns_of
from stnify.planning.weights import weight_sites
from stnify.space import Column
from stnify.trace import Traced

DECAYS = ("WeightDecay", "L1Penalty")
"""Kinds of decay that have a penalty."""


def decay_sites(
    model: nn.Module, declaration: Decay, scale: float | None, own: Mapping[str, float]
) -> tuple[list[Column], list[DecaySite]]:
    """Return the hyperparameters of ``declaration`` and the weights they decay.

    Candidates are trainable weights of two or more dimensions, with dense gradients, that neither
    the model nor a module inside it lists in ``no_weight_decay()``, by names or globs, or by parts
    of names in ``no_weight_decay_keywords()``.

    Raises:
        DeclarationError: It matches no candidate, or is of a kind without a penalty.
    """
    kind = type(declaration).__name__
    if kind not in DECAYS:
        raise DeclarationError(
            f"{declaration.name!r} must be one of {', '.join(DECAYS)} to have a penalty, but is a "
            f"{kind}. Use Hyperparameter(penalty=...) for one of your own."
        )
    undecayed = _no_decay(model)
    by_column = _weights_by_column(model, declaration, lambda name, _: name not in undecayed)
    if kind != "WeightDecay":
        own = {}
    columns = [
        Column.of(declaration, column, _start(declaration, [own.get(n, 0.0) for n in names]), scale)
        for column, names in by_column.items()
    ]
    return columns, [DecaySite(column, tuple(names), kind) for column, names in by_column.items()]


def weight_noise_sites(
    model: nn.Module, traced: Traced, declaration: WeightNoise, scale: float | None
) -> tuple[list[Column], list[WeightNoiseSite]]:
    """Return the hyperparameters of ``declaration`` and the weights they disturb.

    Candidates are trainable weights of two or more dimensions; for ``at="**"`` those alone that
    activations are multiplied with.

    Raises:
        DeclarationError: It matches no candidate.
    """
    meeting = _meeting(model, traced) if declaration.at == "**" else None
    by_column = _weights_by_column(
        model, declaration, lambda _, parameter: meeting is None or id(parameter) in meeting
    )
    columns = [
        Column.of(declaration, column, declaration.default_init, scale) for column in by_column
    ]
    return columns, [WeightNoiseSite(column, tuple(names)) for column, names in by_column.items()]


def _weights_by_column(
    model: nn.Module,
    declaration: Decay | WeightNoise,
    eligible: Callable[[str, Tensor], bool],
) -> dict[str, list[str]]:
    """Return the weights a declaration chooses, by the name of their hyperparameter."""
    candidates = {
        name: model.get_submodule(_layer(name))
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and parameter.requires_grad and eligible(name, parameter)
    }
    candidates = {n: m for n, m in candidates.items() if not getattr(m, "sparse", False)}
    purpose = f"`at` of {declaration.name!r}"
    chosen = _chosen_each(declaration.at, candidates, purpose)
    excluded = set(_chosen_each(declaration.exclude, candidates, f"`exclude` of {purpose}"))
    kept = [name for name in chosen if name not in excluded]
    require(kept, declaration.exclude, chosen, f"{purpose} less `exclude`")
    held = {name: candidates[name] for name in kept}
    columns = columns_of(declaration, held, _chosen, _layer)
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
        if name in by_weight or any(isinstance(g, str) and matches(g, _layer(name)) for g in globs)
    ]


def _layer(weight: str) -> str:
    """Return the module whose weight it is, or for which a parametrization computes one from it."""
    owner, parametrized, _ = f".{weight}".partition(".parametrizations.")
    return owner.removeprefix(".") if parametrized else weight.rpartition(".")[0]


def _no_decay(model: nn.Module) -> set[str]:
    """Return the parameters that a module says are not to be decayed, by all their names."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: set[str] = set()
    asking = [(path, globs) for path, m in model.named_modules() if (globs := _listed(m))]
    for path, globs in asking:
        prefix = f"{path}." if path else ""
        inside = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        found |= {n for n, own in inside.items() if any(fnmatchcase(own, g) for g in globs)}
    return found


def _listed(module: nn.Module) -> list[str]:
    """Return globs on the names of a module's parameters for which it asks to have no decay."""
    lists = {"no_weight_decay": "{}", "no_weight_decay_keywords": "*{}*"}
    asked = [(getattr(type(module), name, None), glob) for name, glob in lists.items()]
    return [glob.format(name) for ask, glob in asked if callable(ask) for name in ask(module)]


def _meeting(model: nn.Module, traced: Traced) -> set[int]:
    """Return the weights that activations are multiplied with, by identity."""
    return {id(parameter) for parameter in _multiplied(model, traced)}


def _multiplied(model: nn.Module, traced: Traced) -> Iterator[Tensor]:
    for module in model.modules():
        owned = [own.weight for own in own_weights(module) if own.kind != "Embedding"]
        yield from (module.get_parameter(name) for name in owned)
    for site in weight_sites(model, traced, ())[0]:
        if site.kind not in {"Embedding", "Parameter"}:
            yield model.get_parameter(site.weight)
