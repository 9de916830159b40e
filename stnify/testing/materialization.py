"""Assertion that a perturbed pass computes with the perturbed weights, and with nothing else."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stnify.layouts import UNSEEN
from stnify.testing.differences import Step, first_difference, record
from stnify.testing.exactness import fused_kernels_off
from stnify.testing.subject import Hparams, Model, Subject, prepared, real, tensors


def assert_perturbation_exact(
    model: Model, inputs: Any, hparams: Hparams = None, *, tolerance: float = 1e-8
) -> None:
    """Assert that a perturbed prediction is the original's with the perturbed weights themselves.

    In float64 and eval mode, with one perturbation for all examples: the judge is the original's
    own forward, with ``W + (U delta) o W_response`` in the place of every weight and likewise for
    biases ([DeltaSTN] Eq. 3.14). Left out are weights from which the model computes others, such as
    those of a weight norm, and layers it never calls; but the prediction must not depend on a
    weight whose response is never asked for.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        tolerance: Relative error.
    """
    with prepared(model, inputs, hparams, double=True) as subject:
        check_perturbation(subject, tolerance)


def check_perturbation(subject: Subject, tolerance: float = 1e-8) -> None:
    """Do what ``assert_perturbation_exact`` does; what is left out is closed afterwards."""
    subject = subject.several()
    words = subject.layouts()
    _refuse_lost(subject, {name for name, word in words.items() if word == UNSEEN[0]})
    uncalled = [name for name, word in words.items() if word in UNSEEN]
    subject.close([*uncalled, *_of_computed_weights(subject)])
    response_input = subject.draw()[:1].repeat(subject.batch, 1)
    perturbed = partial(subject.perturbed, response_input)
    with subject.mode(training=False), fused_kernels_off(), torch.no_grad():
        found = real(tensors(perturbed()))
        with _perturbed_weights(subject, response_input[0]):
            expected = real(tensors(subject.original()))
            trail = record(subject, subject.plain)
        error = max(map(_distance, expected, found))
        if not error <= tolerance:

            def judge(steps: Sequence[Step]) -> float:
                sizes = map(_distance, *(step.values for step in steps))
                return max((size for size in sizes if not size <= tolerance), default=0.0)

            raise AssertionError(
                f"the perturbed prediction of {subject.name} must be what it predicts with the "
                f"perturbed weights up to {tolerance:.1g}, but its relative error is {error:.3g}. "
                f"{first_difference([trail, record(subject, perturbed)], judge)}"
            )


def _refuse_lost(subject: Subject, uncalled: Collection[str]) -> None:
    """Raise AssertionError if the prediction depends on a weight none of whose layers is called."""
    added = subject.model._stnify
    general = added.general_parameters()
    idle = {
        name: general[name]
        for name, uses in added.uses.items()
        if general[name].requires_grad and all(use.layer in uncalled for use in uses)
    }
    if not idle:
        return
    with subject.mode(training=False), torch.enable_grad():
        total = sum((value.sum() for value in real(tensors(subject.plain()))), torch.zeros(()))
        slopes = torch.autograd.grad(total, list(idle.values()), materialize_grads=True)
    lost = [name for name, slope in zip(idle, slopes, strict=True) if slope.any()]
    if lost:
        raise AssertionError(
            f"{subject.name} must ask for the response of every weight that its prediction depends "
            f"on, but no pass asks for that of {', '.join(map(repr, lost))}."
        )


def _of_computed_weights(subject: Subject) -> list[str]:
    """Return the layers of weights some call of which is with a weight computed from them."""
    several = subject.model._stnify.uses.values()
    computed = [uses for uses in several if any(use.computed for use in uses)]
    return [use.layer for uses in computed for use in uses]


@contextmanager
def _perturbed_weights(subject: Subject, response_input: Tensor) -> Iterator[None]:
    """Let the general parameters be what they are at one perturbation, ``(h,)``."""
    added = subject.model._stnify
    general = added.general_parameters()
    before = {name: parameter.clone() for name, parameter in general.items()}
    changes = {
        name: response.materialise(general[name], response_input)
        for name, response in added.weight_responses().items()
    } | {
        name: response(general[name], response_input[None])[0]
        for name, response in added.bias_responses().items()
    }
    try:
        for name, change in changes.items():
            general[name].add_(change)
        yield
    finally:
        for name, value in before.items():
            general[name].copy_(value)


def _distance(expected: Tensor, found: Tensor) -> float:
    """Return the relative distance; numbers that are not finite must be the same."""
    if expected.shape != found.shape or not torch.equal(expected.isfinite(), found.isfinite()):
        return torch.inf
    finite = expected.isfinite()
    expected, found = (torch.where(finite, value.double(), 0.0) for value in (expected, found))
    return float((found - expected).norm()) / (float(expected.norm()) + 1e-12)
