"""Assertions about perturbed and linearised passes: whose row, which derivative."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stnify.testing.differences import Judge, Step, first_difference, record
from stnify.testing.subject import Hparams, Model, Subject, prepared, real, tensors

MODES = {"train": True, "eval": False}

Run = Callable[[], Any]


# Rows ---------------------------------------------------------------------------------------------


def assert_rows_independent(
    model: Model, inputs: Any, hparams: Hparams = None, *, allow_shared: bool = True
) -> None:
    """Assert that each example's prediction depends on its own perturbation only.

    One example's perturbation is changed at a time, in the perturbed and in the linearised pass;
    nothing may change in the others' predictions. In eval mode all examples are changed, of a large
    batch every few, eight in all; in train mode the first one, with every BatchNorm in eval mode,
    unless the original's own predictions of the others change with the input of the first.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        allow_shared: Leave out layers whose rows belong to no example (``stn.report()`` lists
            them: they use one perturbation for the batch); otherwise they fail.
    """
    with prepared(model, inputs, hparams) as subject:
        check_rows(subject, allow_shared)


def check_rows(subject: Subject, allow_shared: bool = True, every_pass: bool = True) -> None:
    """Do what ``assert_rows_independent`` does; layers without rows are closed afterwards.

    Without ``every_pass`` it looks at the validation step's in eval mode, and at the response
    step's in train mode.
    """
    subject = subject.several()
    passes = [subject.perturbed, subject.linearized]
    with subject.mode(training=False), torch.no_grad():
        shared = subject.shared_sites()
        if shared and not allow_shared:
            raise AssertionError(
                f"every layer of {subject.name} must know whose rows it gets, but "
                f"{', '.join(map(repr, shared))} use one perturbation for the whole batch."
            )
        subject.close(shared)
        for forward in passes if every_pass else passes[:1]:
            rows = range(0, subject.batch, max(1, subject.batch // 8))[:8]
            _check_rows(subject, forward, "eval", rows)
    with subject.mode(training=True), torch.no_grad():
        for module in subject.model._stnify.original.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        if not _mixes(subject):
            for forward in passes if every_pass else passes[1:]:
                _check_rows(subject, forward, "train", [0])


def _mixes(subject: Subject) -> bool:
    """Whether the original predicts other examples differently if the first is like the last.

    Also if it cannot be told: it fails, or predicts nothing by example.
    """
    batch = subject.batch

    def changed(tensor: Tensor) -> Tensor:
        batched = tensor.ndim > 0 and len(tensor) == batch
        return torch.cat([tensor[-1:], tensor[1:]]) if batched else tensor

    twin = subject.twin()
    other = replace(subject, inputs=tree_map_only(Tensor, changed, subject.inputs))
    try:
        before, after = (tensors(each.call(twin)) for each in (subject, other))
    except Exception:  # such inputs are not meant for training
        return True
    if [value.shape for value in before] != [value.shape for value in after]:
        return True
    apart = any(_by_example(value, batch) for value in before)
    return not apart or any(_leak(a, b, 0, batch) for a, b in zip(before, after, strict=True))


def _check_rows(
    subject: Subject, forward: Callable[[Tensor], Any], mode: str, rows: Sequence[int]
) -> None:
    """Change one perturbation at a time, and compare with the pass in which none is changed."""
    batch, given, other = subject.batch, subject.draw(0), subject.draw(1)
    before = tensors(forward(given))
    if not any(_by_example(value, batch) for value in before):
        raise AssertionError(
            f"a prediction of {subject.name} must have a dimension that counts the {batch} "
            f"examples, but its shapes are {[tuple(value.shape) for value in before]}."
        )
    for row in rows:
        changed = given.clone()
        changed[row] = other[row]
        after = tensors(forward(changed))
        leak = max(_leak(a, b, row, batch) for a, b in zip(before, after, strict=True))
        if leak:
            trails = [record(subject, partial(forward, each)) for each in (given, changed)]
            raise AssertionError(
                f"in the {forward.__name__} pass of {subject.name}, in {mode} mode, the "
                f"perturbation of example {row} must change row {row} only, but other rows change "
                f"by {leak:.3g}. "
                f"{first_difference(trails, _leaking(row, batch))}"
            )


def _leaking(row: int, batch: int) -> Judge:
    def judge(steps: Sequence[Step]) -> float:
        before, after = steps
        leaks = [
            _leak(one, other, row, batch)
            for one, other in zip(before.all(), after.all(), strict=True)
            if one.shape == other.shape
        ]
        return max(leaks, default=0.0)

    return judge


def _leak(before: Tensor, after: Tensor, row: int, batch: int) -> float:
    """Return how much changed in other rows, if it is more than rounding."""
    if not before.numel() or not before.is_floating_point():
        return 0.0
    pairs = zip(_by_example(before, batch), _by_example(after, batch), strict=True)
    return min((_leak_between(one, other, row) for one, other in pairs), default=0.0)


def _leak_between(one: Tensor, other: Tensor, row: int) -> float:
    change = torch.where(one == other, 0.0, (one - other).abs()).amax(1)
    own = float(change[row])
    change[row] = 0
    largest = float(one.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
    rounding = 8 * torch.finfo(one.dtype).eps * largest
    leak = float(change.max())
    return leak if leak > 1e-4 * own + rounding else 0.0


def _by_example(value: Tensor, batch: int) -> list[Tensor]:
    """Arrange a tensor as ``(batch, everything else)`` in each way that its shape allows."""
    dims = [dim for dim, size in enumerate(value.shape) if size == batch]
    if dims or not value.ndim or not value.shape[0] or value.shape[0] % batch:
        return [value.movedim(dim, 0).reshape(batch, -1) for dim in dims]
    return [value.reshape(batch, -1)]


# Linear in the perturbation -----------------------------------------------------------------------


def assert_linear_in_perturbation(
    model: Model, inputs: Any, hparams: Hparams = None, *, tolerance: float = 1e-8
) -> None:
    """Assert that the linearised prediction is the plain one plus a linear map of the perturbation.

    In float64, in train mode with the same noise, and in eval mode.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        tolerance: Relative error of the tangent of a sum against the sum of the tangents.
    """
    with prepared(model, inputs, hparams, double=True) as subject:
        check_linear(subject, tolerance)


def check_linear(subject: Subject, tolerance: float = 1e-8) -> None:
    """Do what ``assert_linear_in_perturbation`` does."""
    subject = subject.several()
    subject.shared_sites()
    left, right = subject.draw(0), subject.draw(1)
    draws = [left, right, 2.0 * left - 3.0 * right]
    for mode, training in MODES.items():
        with subject.mode(training), torch.no_grad():
            plain = real(tensors(subject.perturbed(0.0 * left)))
            found = [real(tensors(subject.linearized(given))) for given in (0.0 * left, *draws)]
            error = max(
                _misfit([value - here for value in values], here)
                for here, _, *values in zip(plain, *found, strict=True)
            )
            offset = _offset(plain, found[0])
            if not max(error, offset) <= tolerance:
                trails = [record(subject, partial(subject.linearized, given)) for given in draws]
                raise AssertionError(
                    f"in {mode} mode the linearised prediction of {subject.name} must be the plain "
                    f"one plus a linear map of the perturbation up to {tolerance:.1g}, but its "
                    f"relative error is {max(error, offset):.3g}. "
                    f"{first_difference(trails, _nonlinear(tolerance))}"
                )


def _offset(plain: Sequence[Tensor], at_zero: Sequence[Tensor]) -> float:
    """Return the relative distance of a linearised pass at zero from the plain one."""
    return max(
        float((one - other).norm()) / (float(one.norm()) + 1e-12)
        for one, other in zip(plain, at_zero, strict=True)
    )


def _nonlinear(tolerance: float) -> Judge:
    def judge(steps: Sequence[Step]) -> float:
        errors = [
            _misfit([t for t in tangents if t is not None], here)
            for here, *tangents in zip(
                steps[0].values, *(step.tangents for step in steps), strict=True
            )
            if all(tangent is not None for tangent in tangents)
        ]
        return max((error for error in errors if not error <= tolerance), default=0.0)

    return judge


def _misfit(tangents: Sequence[Tensor], here: Tensor) -> float:
    """Return how far the third tangent is from ``2 first - 3 second``, relative to its size."""
    first, second, both = tangents
    expected = 2.0 * first - 3.0 * second
    scale = float(expected.norm()) + 1e-4 * float(here.norm()) + 1e-12
    return float((both - expected).norm()) / scale


# Finite -------------------------------------------------------------------------------------------


def check_finite(subject: Subject) -> None:
    """Assert that the linearised prediction and its gradients are finite in train mode.

    Numbers that are not finite in the original's own prediction are left out.
    """
    subject = subject.several()
    with subject.mode(training=True):
        plain = tensors(subject.perturbed(0.0 * subject.draw()))
        found = tensors(subject.linearized(subject.draw()))
        kept = [
            torch.where(here.isfinite(), value, 0.0)
            for here, value in zip(plain, found, strict=True)
            if value.is_floating_point()
        ]
        parameters = list(subject.model._stnify.response_parameters().values())
        loss = torch.stack([value.square().mean() for value in kept]).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for value in [*kept, *(g for g in gradients if g is not None)]:
            if not value.isfinite().all():
                trail = record(subject, lambda: subject.linearized(subject.draw()))
                raise AssertionError(
                    f"in train mode the linearised prediction of {subject.name} and its gradients "
                    f"must be finite, but are not. {first_difference([trail], _infinite)}"
                )


def _infinite(steps: Sequence[Step]) -> float:
    tangents = [t for t in steps[0].tangents if t is not None]
    return 0.0 if all(t.isfinite().all() for t in tangents) else torch.inf


# The tangent --------------------------------------------------------------------------------------


def assert_tangent_matches_differences(
    model: Model,
    inputs: Any,
    hparams: Hparams = None,
    *,
    step: float = 1e-6,
    tolerance: float = 1e-4,
) -> None:
    """Assert that the linearised pass has the derivative of the perturbed one as its tangent.

    In float64, in train mode with the same noise, and in eval mode, against the differences of
    perturbed passes one step ahead and one behind. Their mean is the central difference; where the
    two disagree, at the kink of a ReLU, the tangent must lie between them. Where a step is too long
    for the curvature, as behind norms of next to nothing, a shorter one decides. Differences see
    what a ``detach`` in the model hides from derivatives: a straight-through estimator fails.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        step: Of the differences, relative to a perturbation of size one.
        tolerance: Relative error.
    """
    with prepared(model, inputs, hparams, double=True) as subject:
        check_tangent(subject, step, tolerance)


def check_tangent(subject: Subject, step: float = 1e-6, tolerance: float = 1e-4) -> None:
    """Do what ``assert_tangent_matches_differences`` does."""
    subject = subject.several()
    subject.shared_sites()
    direction = subject.draw()
    for mode, training in MODES.items():
        with subject.mode(training), torch.no_grad():
            errors = {}
            for length in (step, SHORTER * step):
                errors[length] = _tangent_error(_passes(subject, direction, length), length)
                if errors[length] <= tolerance:
                    break
            length, error = min(errors.items(), key=lambda item: _nan_last(item[1]))
            if not error <= tolerance:
                trails = [record(subject, run) for run in _passes(subject, direction, length)]
                raise AssertionError(
                    f"in {mode} mode the tangent of {subject.name} must be the derivative of the "
                    f"perturbed prediction up to {tolerance:.1g}, but its relative error is "
                    f"{error:.3g}. {first_difference(trails, _no_derivative(length, tolerance))}"
                )


SHORTER = 1 / 32
"""Of the second step, relative to the first."""


def _passes(subject: Subject, direction: Tensor, step: float) -> list[Run]:
    """Return the linearised pass, and the perturbed ones here, ahead and behind."""
    sides = (partial(subject.perturbed, side * direction) for side in (0.0, step, -step))
    return [partial(subject.linearized, direction), *sides]


def _tangent_error(passes: Sequence[Run], step: float) -> float:
    found = [real(tensors(run())) for run in passes]
    errors = [
        _outside(linear - here, here, ahead, behind, step)
        for linear, here, ahead, behind in zip(*found, strict=True)
    ]
    return max(errors, key=_nan_last)


def _no_derivative(step: float, tolerance: float) -> Judge:
    def judge(steps: Sequence[Step]) -> float:
        linear, *perturbed = steps
        values = (other.values for other in perturbed)
        errors = [
            _outside(0 * here if tangent is None else tangent, here, ahead, behind, step)
            for tangent, here, ahead, behind in zip(linear.tangents, *values, strict=True)
            if tangent is None or tangent.shape == here.shape
        ]
        return max((error for error in errors if not error <= tolerance), default=0.0)

    return judge


def _outside(tangent: Tensor, here: Tensor, ahead: Tensor, behind: Tensor, step: float) -> float:
    """Return how far a tangent lies outside the two one-sided differences, relative to its size.

    Values that are not finite, as in masks, have no difference and are left out. What is smaller
    than the rounding of a value divided by the step counts as nothing.
    """
    finite = here.isfinite()
    here = torch.where(finite, here, 0.0)
    sides = [torch.where(finite, side, 0.0) / step for side in (ahead - here, here - behind)]
    tangent = torch.where(finite, tangent, 0.0)
    low, high = torch.minimum(*sides), torch.maximum(*sides)
    outside = (low - tangent).clamp_min(0) + (tangent - high).clamp_min(0)
    scale = float((low + high).norm()) / 2 + 1e-4 * float(here.norm()) + 1e-9
    return float(outside.norm()) / scale


def _nan_last(value: float) -> float:
    return value if value == value else float("inf")
