"""2c. Understand: from a traced graph and declarations to a plan."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from stnify.declare import Declaration, Pattern, refuse_duplicates
from stnify.errors import DeclarationError, UnsupportedModuleError
from stnify.plan import (
    AugmentationSite,
    DecaySite,
    LossSite,
    NoiseSite,
    Plan,
    ResponseKind,
    WeightNoiseSite,
)
from stnify.planning.declared import found_for
from stnify.planning.modules import MODULE_WEIGHTS, public_names
from stnify.planning.weights import count_responses, weight_sites
from stnify.trace import Traced, caller


def make_plan(
    model: nn.Module,
    traced: Traced,
    declared: Sequence[Declaration],
    *,
    response: ResponseKind = "full",
    exclude: Pattern = (),
    affine: bool = False,
    scale: float | None = 1.0,
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
        scale: Default perturbation scale, unconstrained units; None lets it follow the value.
        decays: What the optimizer has for each parameter; where a tuned decay starts.
        responds: False for ``method="fixed"``, where no weight needs a response.

    Raises:
        DeclarationError: A pattern matches nothing, or two declarations claim one place.
        UnsupportedModuleError: No layer can respond.
    """
    _refuse_derivatives(model, traced)
    weights, refusals = weight_sites(model, traced, exclude, affine) if responds else ([], [])
    if responds and not any(site.weight_responds or site.bias_responds for site in weights):
        kinds = sorted(name for kind in MODULE_WEIGHTS for name in public_names(kind))
        named = [f"{r.name or '(root)'}: {r.reason}" for r in refusals]
        refused = "; ".join(named) or "it has no such layer"
        raise UnsupportedModuleError(
            f"{type(model).__name__} must hold at least one trainable layer that can respond "
            f"({', '.join(kinds)}, or a product of a parameter with activations), but there is "
            f"none to rewrite: {refused}."
        )
    found = [found_for(model, traced, declaration, scale, decays) for declaration in declared]
    columns = [column for part in found for column in part.columns]
    noises = [site for part in found for site in part.noises]
    decayed = [site for part in found for site in part.decays]
    disturbed = [site for part in found for site in part.weight_noises]
    refuse_duplicates(column.name for column in columns)
    _refuse_shared_places(noises)
    _refuse_repeated([site for part in found for site in part.augmentations], "augmentation")
    terms = [site for part in found for site in part.losses]
    _refuse_repeated([site for site in terms if site.kind == "LabelSmoothing"], "term")
    _refuse_shared_weights(decayed, "decay")
    _refuse_shared_weights(disturbed, "noise")
    return Plan(
        columns=tuple(columns),
        weights=tuple(count_responses(model, weights, len(columns), response)),
        noises=tuple(noises),
        augmentations=tuple(site for part in found for site in part.augmentations),
        weight_noises=tuple(disturbed),
        decays=tuple(decayed),
        losses=tuple(site for part in found for site in part.losses),
        refusals=tuple(refusals),
        response=response,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        traced=traced,
    )


def _refuse_derivatives(model: nn.Module, traced: Traced) -> None:
    """Raise UnsupportedModuleError if the graph itself differentiates.

    A graph does not hold the ``enable_grad`` that such code needs where gradients are off.
    """
    found = [node for node in traced.graph.nodes if node.target is torch.autograd.grad]
    if found:
        raise UnsupportedModuleError(
            f"a forward that is traced must not differentiate, but "
            f"{caller(found[0]) or type(model).__name__!r} calls torch.autograd.grad. Put that "
            f'code into a submodule, name it in `leaves=`, and use method="centered".'
        )


def _refuse_shared_places(noises: Sequence[NoiseSite]) -> None:
    claims = [(site.place, site.node, site.last, site.kind, site.name) for site in noises]
    twice = [claim for claim, count in Counter(claims).items() if count > 1]
    if twice:
        name = twice[0][-1]
        raise DeclarationError(
            f"a place can have one hyperparameter of a kind, but {name!r} is claimed by "
            f"{[site.column for site in noises if site.name == name]}. Narrow `at`, "
            f"`after` or `exclude`."
        )


def _refuse_repeated(sites: Sequence[AugmentationSite] | Sequence[LossSite], what: str) -> None:
    kinds = Counter(site.kind for site in sites)
    for kind in (kind for kind, count in kinds.items() if count > 1):
        raise DeclarationError(
            f"there can be one {what} of a kind, but {kind} is declared as "
            f"{[site.column for site in sites if site.kind == kind]}. Keep one of them."
        )


def _refuse_shared_weights(
    sites: Sequence[DecaySite] | Sequence[WeightNoiseSite], what: str
) -> None:
    """Raise DeclarationError if two hyperparameters of one kind act on a weight."""
    claims = [(getattr(site, "kind", what), name) for site in sites for name in site.parameters]
    shared = [claim for claim, count in Counter(claims).items() if count > 1]
    if shared:
        name = shared[0][1]
        columns = [s.column for s in sites if name in s.parameters]
        raise DeclarationError(
            f"a weight can have one tuned {what} of a kind, but {name!r} is claimed by "
            f"{columns}. Narrow `at` or `exclude`."
        )
