"""10. Leave stnify: a plain module of the user's class, with nothing of stnify in it."""

import copy

import torch
from torch import nn

from stnify.errors import UsageError
from stnify.tunable import TunableModule, intermediate_results


def export(model: TunableModule) -> nn.Module:
    """Return a copy of the user's model with its trained weights and nothing of stnify in it.

    Its outputs in eval mode are those of the tunable model, bit for bit: the response is zero at
    the current hyperparameters. The copy is in the mode ``model`` is in.
    """
    return copy.deepcopy(model._stnify.original, intermediate_results(model._stnify.original))


@torch.no_grad()
def export_folded(model: TunableModule) -> nn.Module:
    r"""Return the user's model at the current hyperparameters of an uncentred run.

    Weights become :math:`W + (U\lambda) \odot W_{response}`, biases likewise; equal to the tunable
    model in eval mode up to rounding. Source: [STN] Eq. 11.

    Raises:
        UsageError: A weight that responds is computed from parameters, as in standardised kernels.
    """
    computed = model._stnify.computed_weights()
    if computed:
        raise UsageError(
            f"the response of a computed weight cannot be folded into its parameter, but "
            f"{computed[0]!r} and {len(computed) - 1} more are computed. Exclude their layers, or "
            f'use method="delta", whose export needs no folding.'
        )
    plain = export(model)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    unconstrained = model._stnify.space.unconstrained
    general = dict(model.named_parameters(remove_duplicate=False))
    for name, response in model._stnify.weight_responses().items():
        parameters[name].add_(response.materialise(general[name], unconstrained))
    for name, bias_response in model._stnify.bias_responses().items():
        parameters[name].add_(bias_response(general[name], unconstrained[None])[0])
    return plain
