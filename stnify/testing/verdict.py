"""Convert a model and prove it, or be told why it is refused."""

from typing import Any

from stnify.errors import StnifyError
from stnify.testing.exactness import check_identity
from stnify.testing.materialization import check_perturbation
from stnify.testing.perturbations import check_finite, check_linear, check_rows, check_tangent
from stnify.testing.subject import Hparams, Model, prepared, refuse_arguments


def converts_or_refuses(
    model: Model, inputs: Any, hparams: Hparams = None, *, thorough: bool = True
) -> str | None:
    """Assert that a model is converted and exact, or refused; return the reason for a refusal.

    Exact: identity and independent rows, as the assertions of these names, and a finite prediction
    to first order in train mode with finite gradients. A refusal is an error of stnify, which says
    what to do; any other error is let through.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        thorough: Also compare the linearised pass with differences, and the perturbed one with
            perturbed weights, in float64; and look for rows that mix in both passes in both modes,
            not only in those that a tuner runs.

    Raises:
        AssertionError: The model is converted, and something is wrong without a word.
        UsageError: ``hparams`` came with an STN, or there are no examples in ``inputs``.
    """
    refuse_arguments(model, inputs, hparams)
    try:
        with prepared(model, inputs, hparams) as subject:
            check_identity(subject)
            check_rows(subject, every_pass=thorough)
            check_finite(subject)
        if thorough:
            with prepared(model, inputs, hparams, double=True) as subject:
                check_tangent(subject)
                check_linear(subject)
                check_perturbation(subject)
    except StnifyError as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return None
