"""Find what one declaration acts on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from stnify.declare import (
    ActivationTerm,
    Augmentation,
    Decay,
    Declaration,
    Hyperparameter,
    LossTerm,
    Site,
    WeightNoise,
)
from stnify.errors import DeclarationError
from stnify.plan import AugmentationSite, DecaySite, LossSite, NoiseSite, WeightNoiseSite
from stnify.planning.decay import decay_sites, weight_noise_sites
from stnify.planning.noise import activation_sites, noise_sites
from stnify.space import Column
from stnify.trace import Traced


@dataclass(frozen=True)
class Found:
    """The hyperparameters one declaration stands for, and where they act."""

    columns: list[Column]
    noises: tuple[NoiseSite, ...] = ()
    augmentations: tuple[AugmentationSite, ...] = ()
    weight_noises: tuple[WeightNoiseSite, ...] = ()
    decays: tuple[DecaySite, ...] = ()
    losses: tuple[LossSite, ...] = ()


def found_for(
    model: nn.Module,
    traced: Traced,
    declaration: Declaration,
    scale: float | None,
    own_decays: Mapping[str, float],
) -> Found:
    """Return what ``declaration`` acts on; the arguments are those of ``make_plan``.

    Raises:
        DeclarationError: It has no place, or matches nothing.
    """
    kind, settings = type(declaration).__name__, dict(declaration.settings())
    match declaration:
        case Site():
            columns, noises = noise_sites(model, traced, declaration, scale)
            return Found(columns, noises=tuple(noises))
        case Decay():
            columns, decays = decay_sites(model, declaration, scale, own_decays)
            return Found(columns, decays=tuple(decays))
        case WeightNoise():
            columns, weight_noises = weight_noise_sites(model, traced, declaration, scale)
            return Found(columns, weight_noises=tuple(weight_noises))
        case ActivationTerm():
            columns, noises = activation_sites(model, traced, declaration, scale)
            losses = [LossSite(column.name, None, kind, settings) for column in columns]
            return Found(columns, noises=tuple(noises), losses=tuple(losses))
        case Augmentation() | LossTerm():
            start = declaration.default_init
            columns = [Column.of(declaration, declaration.name, start, scale)]
        case _:
            raise DeclarationError(
                f"{declaration!r} must be a Site, WeightNoise, Decay, Augmentation or LossTerm to "
                f"have a place."
            )
    if isinstance(declaration, Augmentation):
        return Found(columns, augmentations=(AugmentationSite(declaration.name, kind, settings),))
    penalty, at_validation = None, False
    if isinstance(declaration, Hyperparameter):
        penalty, at_validation = declaration.penalty, declaration.at_validation
    if at_validation:
        columns = [replace(column, per_example=False) for column in columns]
    site = LossSite(declaration.name, penalty, kind, settings, at_validation)
    return Found(columns, losses=(site,))
