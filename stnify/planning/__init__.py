"""2c. Understand: from a traced graph and declarations to a plan."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from stnify.declare import Decay, Declaration, LossTerm, Pattern, Site, refuse_duplicates
from stnify.errors import DeclarationError, UnsupportedModuleError
from stnify.plan import DecaySite, LossSite, NoiseSite, Plan, ResponseKind
from stnify.planning.decay import decay_sites
from stnify.planning.modules import WEIGHT_MODULES
from stnify.planning.noise import noise_sites
from stnify.planning.weights import count_responses, weight_sites
from stnify.space import Column
from stnify.trace import Traced


def make_plan(
    model: nn.Module,
    traced: Traced,
    declared: Sequence[Declaration],
    *,
    response: ResponseKind = "full",
    exclude: Pattern = (),
    affine: bool = False,
    scale: float = 1.0,
    responds: bool = True,
    decays: Mapping[str, float] = MappingProxyType({}),
) -> Plan:
    """Find every site of ``declared`` in ``traced`` and every weight that can respond.

    Args:
        model: The model that was traced.
        traced: Its graph.
        declared: Hyperparameters.
        response: ``"full"`` or ``"gate"``.
        exclude: Layers that get no response, by pattern or type.
        affine: Whether every other parameter responds as well, such as a norm's.
        scale: Default perturbation scale, unconstrained units.
        decays: What the optimizer has for each parameter; where a tuned decay starts.
        responds: False for ``method="fixed"``, where no weight needs a response.

    Raises:
        DeclarationError: A pattern matches nothing, or two declarations claim one place.
        UnsupportedModuleError: No layer can respond.
    """
    weights, refusals = weight_sites(model, traced, exclude, affine) if responds else ([], [])
    if responds and not any(site.weight_responds or site.bias_responds for site in weights):
        kinds = sorted({*WEIGHT_MODULES.values()})
        named = [f"{r.name or '(root)'}: {r.reason}" for r in refusals]
        refused = "; ".join(named) or "it has no such layer"
        raise UnsupportedModuleError(
            f"{type(model).__name__} must hold at least one trainable layer that can respond "
            f"({', '.join(kinds)}), but there is none to rewrite: {refused}."
        )
    columns: list[Column] = []
    noises: list[NoiseSite] = []
    decayed_sites: list[DecaySite] = []
    losses: list[LossSite] = []
    for declaration in declared:
        match declaration:
            case Site():
                resolved, found = noise_sites(model, traced, declaration, scale)
                noises += found
            case Decay():
                resolved, decayed = decay_sites(model, declaration, scale, decays)
                decayed_sites += decayed
            case LossTerm():
                resolved = [Column.of(declaration, declaration.name, 0.0, scale)]
                losses.append(LossSite(declaration.name, declaration.penalty))
            case _:
                raise DeclarationError(
                    f"{declaration!r} must be a Site, a Decay or a LossTerm to have a place."
                )
        columns += resolved
    refuse_duplicates(column.name for column in columns)
    _refuse_shared_places(noises, decayed_sites)
    return Plan(
        columns=tuple(columns),
        weights=tuple(count_responses(model, weights, len(columns), response)),
        noises=tuple(noises),
        decays=tuple(decayed_sites),
        losses=tuple(losses),
        refusals=tuple(refusals),
        response=response,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        traced=traced,
    )


def _refuse_shared_places(noises: Sequence[NoiseSite], decays: Sequence[DecaySite]) -> None:
    claims = [(site.place, site.node, site.kind, site.name) for site in noises]
    twice = [claim for claim, count in Counter(claims).items() if count > 1]
    if twice:
        raise DeclarationError(
            f"a place can have one hyperparameter of a kind, but {twice[0][3]!r} is claimed by "
            f"{[site.column for site in noises if site.name == twice[0][3]]}. Narrow `at`, "
            f"`after` or `exclude`."
        )
    decayed = Counter(name for site in decays for name in site.parameters)
    shared = [name for name, count in decayed.items() if count > 1]
    if shared:
        raise DeclarationError(
            f"a weight can have one tuned decay, but {shared[0]!r} is claimed by "
            f"{[site.column for site in decays if shared[0] in site.parameters]}. Narrow `at` or "
            f"`exclude`."
        )
