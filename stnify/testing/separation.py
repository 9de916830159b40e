"""The assertion that each step differentiates its own parameters only."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stnify.linearize import linearized_forward, perturbed_forward
from stnify.objective import Objective
from stnify.perturb import Perturbation, training_perturbation, validation_perturbation
from stnify.step import StepResult, response_step, validation_step
from stnify.testing.differences import Step, distance, first_difference, identical, record
from stnify.testing.subject import Criterion, Hparams, Model, Subject, mean_square, prepared
from stnify.tunable import TunableModule


class Pass(NamedTuple):
    """One of the three passes.

    Attributes:
        training: The mode it runs in.
        reaches: Groups of parameters it may be differentiated by.
        run: Predicts.
    """

    training: bool
    reaches: tuple[str, ...]
    run: Callable[[], Any]


def assert_gradients_separated(
    model: Model, inputs: Any, hparams: Hparams = None, *, criterion: Criterion | None = None
) -> None:
    """Assert that each step differentiates its own parameters and changes nothing else.

    The general step reaches the user's own parameters only (with ``method="stn"`` the response
    parameters too, which train with them), the response step only the response parameters, the
    validation step only lambda and sigma. What a pass must not reach, no path leads to; and the
    response and the validation step leave every parameter and buffer as it was.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        criterion: ``prediction -> scalar``; the mean square by default.
    """
    criterion = criterion or mean_square
    with prepared(model, inputs, hparams) as subject:
        subject = subject.several()
        subject.shared_sites()
        for name, each in _passes(subject).items():
            _check_paths(subject, name, each, criterion)
        _check_steps(subject, criterion)


def _passes(subject: Subject) -> dict[str, Pass]:
    space = subject.model._stnify.space
    draw = {"response": training_perturbation, "validation": validation_perturbation}
    drawn = {name: make(space, subject.batch) for name, make in draw.items()}
    # With method="stn" the user's own backward pass trains the response too.
    uncentred = subject.model._stnify.training_pass is not None
    trained = ("general", "response") if uncentred else ("general",)
    return {
        "general": Pass(True, trained, lambda: subject.call(subject.model)),
        "response": Pass(
            True, ("response",), lambda: _run(subject, linearized_forward, drawn["response"])
        ),
        # The validation step differentiates by the hyperparameters alone; see `_check_steps`.
        "validation": Pass(
            False,
            ("hyperparameter", "response"),
            lambda: _run(subject, perturbed_forward, drawn["validation"]),
        ),
    }


def _run(subject: Subject, forward: Callable[..., Any], drawn: Perturbation) -> Any:
    def chosen(graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return forward(graph, args, kwargs, drawn)

    with subject.model._stnify.running(chosen, drawn.constrained):
        return subject.call(subject.model)


def _groups(model: TunableModule) -> dict[str, dict[str, Tensor]]:
    space = model._stnify.space
    general = {name: p for name, p in model._stnify.general_parameters().items() if p.requires_grad}
    return {
        "general": dict(general),
        "response": dict(model._stnify.response_parameters()),
        "hyperparameter": {"lambda": space.unconstrained, "sigma": space.raw_scale},
    }


def _check_paths(subject: Subject, name: str, each: Pass, criterion: Criterion) -> None:
    """Differentiate a pass by everything, and see where a path leads."""
    with subject.mode(each.training):
        loss = criterion(each.run())
        for group, members in _groups(subject.model).items():
            reached = _reached(loss, members)
            if reached and group not in each.reaches:
                leaking = members[reached[0]]
                trail = record(subject, each.run, attached=True)
                raise AssertionError(
                    f"the {name} step of {subject.name} must not reach {group} parameters, but a "
                    f"gradient leaks into {', '.join(map(repr, reached[:3]))}. "
                    f"{first_difference([trail], _reaching(leaking))}"
                )
            if members and not reached and group == each.reaches[0]:
                raise AssertionError(
                    f"the {name} step of {subject.name} must reach {group} parameters, but no path "
                    f"leads to any of them."
                )


def _reached(loss: Tensor, members: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters to which a path leads from ``loss``."""
    gradients = _gradients(loss, members.values())
    return [name for name, found in zip(members, gradients, strict=True) if found is not None]


def _gradients(value: Tensor, parameters: Iterable[Tensor]) -> Sequence[Tensor | None]:
    parameters = list(parameters)
    if not parameters or not value.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)


def _reaching(parameter: Tensor) -> Callable[[Sequence[Step]], float]:
    """Judge a step by the largest gradient of the sum of its values; at least tiny if any."""

    def judge(steps: Sequence[Step]) -> float:
        found = [_gradients(value.sum(), [parameter])[0] for value in steps[0].all()]
        sizes = [max(float(g.abs().max()), 1e-45) for g in found if g is not None]
        return max(sizes, default=0.0)

    return judge


# Steps --------------------------------------------------------------------------------------------


def _check_steps(subject: Subject, criterion: Criterion) -> None:
    """Take a response and a validation step, and see that all they do is return gradients."""

    def loss(model: Any, batch: Any) -> Tensor:
        return criterion(model(*batch[0], **batch[1]))

    objective, model = Objective(forward_loss=loss), subject.model
    steps: dict[str, tuple[bool, set[str], Callable[[Any], StepResult]]] = {
        "response": (
            True,
            set(model._stnify.response_parameters()),
            lambda batch: response_step(model, [batch], objective),
        ),
        "validation": (
            False,
            {"unconstrained", "raw_scale"},
            lambda batch: validation_step(model, batch, objective),
        ),
    }
    for name, (training, expected, step) in steps.items():
        model.train(training)
        before = {key: value.detach().clone() for key, value in _state(model)}
        result = step(subject.inputs)
        if set(result.gradients) != expected:
            raise AssertionError(
                f"the {name} step of {subject.name} must return gradients of {sorted(expected)}, "
                f"but returned those of {sorted(result.gradients)}."
            )
        for key, value in _state(model):
            if not identical(before[key], value):
                raise AssertionError(
                    f"the {name} step of {subject.name} must leave {key!r} as it was, but changed "
                    f"it by {distance(before[key], value):.3g}."
                )
            if value.grad is not None:
                raise AssertionError(
                    f"the {name} step of {subject.name} must leave no gradient behind, but "
                    f"{key!r} has one."
                )


def _state(model: TunableModule) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
