"""4. Draw perturbations: epsilon, the constrained values it leads to, what the layers receive."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from stnify.space import HyperparameterSpace


class Perturbation(NamedTuple):
    """One draw for a batch.

    Attributes:
        response_input: ``(batch, h)`` unconstrained; what hyper layers receive.
        constrained: ``(batch, h)`` constrained; what noise, penalties and losses use. None in
            eval mode, where there is no regularisation.
    """

    response_input: Tensor
    constrained: Tensor | None


def standard_normal(space: HyperparameterSpace, batch: int) -> Tensor:
    """Draw ``(batch, h)`` from the standard normal; columns declared per batch repeat one row."""
    draws = torch.randn(
        batch, len(space.columns), dtype=space.raw_scale.dtype, device=space.raw_scale.device
    )
    shared = [i for i, column in enumerate(space.columns) if not column.per_example]
    if shared:
        draws[:, shared] = draws[:1, shared]
    return draws


@torch.no_grad()
def training_perturbation(
    space: HyperparameterSpace, batch: int, *, centred: bool = True
) -> Perturbation:
    """Perturb the hyperparameters for training; nothing is differentiable.

    Args:
        space: lambda_0 and sigma.
        batch: Examples.
        centred: Hyper layers receive epsilon ([DeltaSTN] 3.1), else lambda + epsilon ([STN]).
    """
    epsilon = space.scale * standard_normal(space, batch)
    perturbed = space.unconstrained + epsilon
    return Perturbation(epsilon if centred else perturbed, space.constrain(perturbed))


@torch.no_grad()
def opposite(perturbation: Perturbation, space: HyperparameterSpace) -> Perturbation:
    """Return the centred training perturbation with ``-epsilon`` in the place of ``epsilon``."""
    epsilon = -perturbation.response_input
    return Perturbation(epsilon, space.constrain(space.unconstrained + epsilon))


def joined(perturbations: Sequence[Perturbation]) -> Perturbation:
    """Return training perturbations of several passes as one of all their rows."""
    inputs, constrained = zip(*perturbations, strict=True)
    return Perturbation(torch.cat(inputs), torch.cat(constrained))


def validation_perturbation(
    space: HyperparameterSpace,
    batch: int,
    *,
    centred: bool = True,
    detached: Sequence[int] = (),
) -> Perturbation:
    """Perturb the hyperparameters for validation, differentiably in lambda and sigma.

    Centred, the response input is ``lambda + epsilon - lambda_0`` with lambda_0 held at lambda's
    current value; epsilon is reparameterised as sigma times a standard normal draw.
    Source: [DeltaSTN] Algorithm 1, Eq. 2.7.

    Args:
        space: lambda and sigma.
        batch: Examples.
        centred: False for the uncentred [STN] parameterisation.
        detached: Columns that are constants here, because their gradient is the score function's.
    """
    epsilon = space.scale * standard_normal(space, batch)
    centre = space.unconstrained.detach() if centred else torch.zeros_like(space.unconstrained)
    response_input = space.unconstrained - centre + epsilon
    if detached:
        chosen = torch.zeros_like(centre, dtype=torch.bool)
        chosen[list(detached)] = True
        response_input = torch.where(chosen, response_input.detach(), response_input)
    return Perturbation(response_input, None)


class Drawn(NamedTuple):
    """The values one validation perturbation stands for.

    Attributes:
        unconstrained: ``lambda + epsilon``, ``(batch, h)``, constants.
        space: The hyperparameters.
    """

    unconstrained: Tensor
    space: HyperparameterSpace

    @classmethod
    def by(cls, perturbation: Perturbation, space: HyperparameterSpace, centred: bool) -> "Drawn":
        """Return the values that ``perturbation`` leads to."""
        offset = space.unconstrained if centred else 0.0
        return cls((perturbation.response_input + offset).detach(), space)

    @property
    def constrained(self) -> Tensor:
        """The values, ``(batch, h)``, constrained units."""
        return self.space.constrain(self.unconstrained)

    def log_density(self, columns: Sequence[int]) -> Tensor:
        """Return the log-density of what the batch drew in ``columns``, ``()``, differentiably."""
        chosen = list(columns)
        normal = Normal(self.space.unconstrained[chosen], self.space.scale[chosen])
        return normal.log_prob(self.unconstrained[0, chosen]).sum()
