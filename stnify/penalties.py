"""Parts: loss terms with a tunable coefficient."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor


class SquaredNormChange(Protocol):
    """A response that knows by how much it changes the squared norm of its weight."""

    def squared_norm_change(self, general: Tensor, response_input: Tensor) -> Tensor:
        """Return ``(batch,)``."""
        ...


def weight_decay(
    coefficient: Tensor,
    weights: Iterable[str],
    parameters: Mapping[str, Tensor],
    responses: Mapping[str, SquaredNormChange],
    response_input: Tensor,
) -> Tensor:
    r"""Return the batch mean of :math:`\frac{1}{2} c_i \lVert w_0 + \Theta\epsilon_i \rVert^2`.

    Exact for each example's own perturbed weights, without building them, up to what is constant:
    the norm of a general weight counts only if that weight requires a gradient.

    Args:
        coefficient: c, ``(batch,)``, constrained units.
        weights: Names of the weights to decay.
        parameters: General parameters by name.
        responses: Responses by weight name; a weight without one stays at its general value.
        response_input: ``(batch, h)``.

    Source: [DeltaSTN] Eqs. G.2, H.1.
    """
    total: Tensor | float = 0.0
    for name in weights:
        general = parameters[name]
        if general.requires_grad:
            total = total + general.square().sum()
        if name in responses:
            total = total + responses[name].squared_norm_change(general, response_input)
    return (0.5 * coefficient * total).mean()
