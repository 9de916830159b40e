"""6. The response step and the validation step, as functions from a batch to gradients.

The general step is the user's own ``loss.backward()`` and ``optimizer.step()``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stnify.errors import ShapeError
from stnify.linearize import Forward, linearized_forward, perturbed_forward
from stnify.nested import leaves, map_tensors
from stnify.objective import Objective
from stnify.perturb import (
    Drawn,
    Perturbation,
    joined,
    opposite,
    training_perturbation,
    validation_perturbation,
)
from stnify.rows import batch_size, by_example, first_dimensions
from stnify.tunable import TunableModule, evaluating


@dataclass(frozen=True)
class StepResult:
    """What one step found.

    Attributes:
        loss: Detached, ``()``; weight decay is left out.
        gradients: By name, in the order of the parameters they belong to.
    """

    loss: Tensor
    gradients: dict[str, Tensor] = field(repr=False)

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are all finite numbers."""
        values = [self.loss, *self.gradients.values()]
        # A norm is the fastest pass over a tensor; half precision would overflow in it.
        norms = [torch.linalg.vector_norm(value, dtype=_wide(value)).double() for value in values]
        return bool(torch.stack(norms).isfinite().all())


def response_step(
    model: TunableModule,
    batches: Sequence[Any],
    objective: Objective,
    *,
    linearized: bool = True,
    fraction: float = 1.0,
    antithetic: bool = False,
    forward: Forward | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> StepResult:
    """Return the gradient of the perturbed training loss for the response parameters.

    Every example has its own perturbation; noise and penalties act at the perturbed values; general
    parameters are constants. Several batches (gradient accumulation) count by their size.

    Args:
        model: In the mode the user trains in.
        batches: Batches the general step saw.
        objective: Training loss.
        linearized: First-order predictions ([DeltaSTN] 3.13) or the perturbed weights' own (3.10).
        fraction: Leading part of each batch that is used.
        antithetic: Use each example twice, perturbed by epsilon and by -epsilon under the same
            noise. What does not depend on epsilon then cancels from the gradient instead of
            drowning what does; its expectation stays.
        forward: Compiled stand-in for the forward function.
        buffers: Tensors to overwrite with the gradients, by parameter; fresh ones by default.
    """
    eager = linearized_forward if linearized else perturbed_forward
    forwards = forward or eager, eager
    space, parameters = model._stnify.space, model._stnify.response_parameters()
    sizes = [_part(_examples(batch), fraction) for batch in batches]
    losses: list[Tensor] = []
    with _gradients_taken(parameters, buffers) as gradients:
        for batch, size in zip(batches, sizes, strict=True):
            share = size / max(sum(sizes), 1)
            batch = first_rows(to_device(batch, model), size)
            drawn = [training_perturbation(space, size)]
            if antithetic:
                drawn.append(opposite(drawn[0], space))
            rewind = model._stnify.stream.rewinder()
            for perturbation in drawn:
                rewind()
                with _running(model, forwards, perturbation, perturbation.constrained):
                    loss = share / len(drawn) * objective.training(model, batch)
                torch.autograd.backward(loss, inputs=list(parameters.values()))
                losses.append(loss.detach())
            objective.add_decay_gradients(model, joined(drawn), share)
    return StepResult(torch.stack(losses).sum(), gradients)


def validation_step(
    model: TunableModule,
    batch: Any,
    objective: Objective,
    *,
    entropy_weight: float = 0.0,
    centred: bool = True,
    forward: Forward | None = None,
    baseline: float | None = None,
) -> StepResult:
    """Return the gradient of the validation loss for lambda and sigma.

    Eval mode, perturbed but not linearised, lambda_0 held fixed:
    ``E L_V(f(x, r(lambda + epsilon, lambda_0))) - tau H``. Source: [DeltaSTN] Algorithm 1, Eq. 2.7.
    Of hyperparameters that the validation loss itself reads, the gradient is the score function's,
    ``(L_V - baseline) * grad log p(lambda + epsilon)``, through the response as well ([STN] 3.5).

    Args:
        model: Any mode; it is put back.
        batch: Validation batch.
        objective: Validation loss; its penalties are not used.
        entropy_weight: tau.
        centred: False for the uncentred [STN] parameterisation.
        forward: Compiled stand-in for the forward function.
        baseline: What the score function subtracts from the loss; None for the loss itself, which
            leaves no gradient of such hyperparameters.

    Returns:
        The loss without the entropy term, and gradients ``"unconstrained"`` and ``"raw_scale"``.
    """
    space = model._stnify.space
    forwards = forward or perturbed_forward, perturbed_forward
    batch = to_device(batch, model)
    direct = [space.index(site.column) for site in objective.losses if site.at_validation]
    examples = _examples(batch)
    perturbation = validation_perturbation(space, examples, centred=centred, detached=direct)
    drawn = Drawn.by(perturbation, space, centred)
    read = drawn.constrained if direct else None
    with evaluating(model), _running(model, forwards, perturbation, read):
        loss = objective.validation(model, batch)
    minimised = loss - entropy_weight * space.entropy()
    if direct and baseline is not None:
        minimised = minimised + (loss.detach() - baseline) * drawn.log_density(direct)
    parameters = {"unconstrained": space.unconstrained, "raw_scale": space.raw_scale}
    found = torch.autograd.grad(minimised, list(parameters.values()), materialize_grads=True)
    return StepResult(loss.detach(), dict(zip(parameters, found, strict=True)))


@contextmanager
def _gradients_taken(
    parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor] | None
) -> Iterator[dict[str, Tensor]]:
    """Gather gradients of the body, from zero, and leave the parameters without, also on errors."""
    gradients = {
        name: torch.zeros_like(parameter) if buffers is None else buffers[name].zero_()
        for name, parameter in parameters.items()
    }
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    try:
        yield gradients
    finally:
        for parameter in parameters.values():
            parameter.grad = None


def _running(
    model: TunableModule,
    forwards: tuple[Forward, Forward],
    perturbation: Perturbation,
    read: Tensor | None,
) -> AbstractContextManager[None]:
    """Return a context in which the model predicts perturbed, and losses read ``read``.

    ``forwards`` are the ordinary one, which may be compiled, and the one for passes set aside.
    """
    rows = len(perturbation.response_input)

    def chosen(graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = first_dimensions((args, kwargs))
        if given and rows not in given:
            raise ShapeError(
                f"the model must be called with the {rows} examples of the batch, one perturbation "
                f"each, but it was called with {given[0]}. Call it once for each view, or put the "
                f"views into the batch."
            )
        args, kwargs = model._stnify.augmented(args, kwargs, perturbation.constrained)
        outputs = forwards[model._stnify.eager](graph, args, kwargs, perturbation)
        if not any(isinstance(leaf, Tensor) for leaf in leaves(outputs)):
            raise ShapeError(
                f"the model must return tensors, or tuples, lists, dictionaries or dataclasses of "
                f"them, but returned {type(outputs).__name__}: a response in it could not be seen."
            )
        return outputs

    return model._stnify.running(chosen, read)


def to_device(batch: Any, model: TunableModule) -> Any:
    """Move every tensor of ``batch``, or a batch that can move itself, to where the model is."""
    device = model._stnify.space.unconstrained.device
    if not isinstance(batch, Tensor | tuple | list | dict) and callable(getattr(batch, "to", None)):
        return batch.to(device)
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def first_rows(batch: Any, size: int) -> Any:
    """Keep the first ``size`` examples of every tensor with the batch dimension, and every list.

    The target of a pair may have several rows for each example, one behind the other.
    """
    full = batch_size(batch)
    if size >= full:
        return batch
    target: Any = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value[:size]
        rows = value.shape[0] if value.ndim else 0
        if value is target and rows % full == 0:
            return value[: rows // full * size]
        return value[:size] if rows == full else value

    return map_tensors(cut, batch, partial(by_example, batch=full))


def _examples(batch: Any) -> int:
    size = batch_size(batch)
    if size == 0:
        raise ShapeError(
            f"a batch must hold a tensor whose first dimension counts its examples, but got "
            f"{type(batch).__name__} with none. Use tuples, lists or dicts of tensors."
        )
    return size


def _part(full: int, fraction: float) -> int:
    """Return the examples of a batch that are used: at least two, for BatchNorm, if there are."""
    return min(full, max(2, round(full * fraction)))


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
