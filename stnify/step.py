"""6. The response step and the validation step, as functions from a batch to gradients.

The general step is the user's own ``loss.backward()`` and ``optimizer.step()``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stnify.errors import ShapeError
from stnify.linearize import Forward, linearized_forward, perturbed_forward
from stnify.nested import leaves, map_tensors
from stnify.perturb import Perturbation, training_perturbation, validation_perturbation
from stnify.plan import DecaySite, LossSite
from stnify.rows import batch_size, first_dimensions
from stnify.tunable import TunableModule


@dataclass(frozen=True)
class Objective:
    """How a batch becomes a loss.

    Attributes:
        criterion: ``(prediction, target) -> scalar`` for batches ``(inputs, target)``.
        forward_loss: ``(model, batch) -> scalar`` for all others; comes first if both are given.
        decays: Weight decays.
        losses: Hyperparameters with a penalty.
        amp_dtype: Autocast to this dtype, if any.
    """

    criterion: Callable[..., Tensor] | None = None
    forward_loss: Callable[[nn.Module, Any], Tensor] | None = None
    decays: tuple[DecaySite, ...] = ()
    losses: tuple[LossSite, ...] = ()
    amp_dtype: torch.dtype | None = None

    def __call__(self, model: TunableModule, batch: Any) -> Tensor:
        """Return the loss of ``batch`` without penalties, ``()``.

        Raises:
            ShapeError: The loss is not one number, or the batch is not ``(inputs, target)``.
        """
        device = model.hyperparameters.unconstrained.device
        with self.autocast(device):
            if self.forward_loss is not None:
                return _scalar(self.forward_loss(model, batch), "forward_loss")
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise ShapeError(
                    f"batches must be (inputs, target) pairs, but got {type(batch).__name__}"
                    f"{f' of length {len(batch)}' if isinstance(batch, list | tuple) else ''}. "
                    f"Pass `forward_loss=fn(model, batch) -> scalar` for any other kind."
                )
            assert self.criterion is not None
            return _scalar(self.criterion(model(batch[0]), batch[1]), "criterion")

    def penalty(self, model: TunableModule, batch: Any) -> Tensor | float:
        """Return the users' penalties in the pass that runs, averaged over the batch."""
        space = model.hyperparameters
        penalties = [
            site.penalty(model, batch, space[site.column]).mean()
            for site in self.losses
            if site.penalty is not None
        ]
        return torch.stack(penalties).sum() if penalties else 0.0

    def add_decay_gradients(
        self, model: TunableModule, perturbation: Perturbation, share: float
    ) -> None:
        """Add ``share`` of the weight decays' gradient to that of the response parameters.

        The penalty is the batch mean of ``c_i / 2 ||w_0 + Theta epsilon_i||^2``, each example with
        its own coefficient and weights; w_0 is a constant. Source: [DeltaSTN] G.2, H.1.
        """
        space, constrained = model.hyperparameters, perturbation.constrained
        assert constrained is not None
        parameters, responses = model.general_parameters(), model.weight_responses()
        for site in self.decays:
            coefficient = constrained[:, space.index(site.column)] * (share / len(constrained))
            for name in (name for name in site.parameters if name in responses):
                responses[name].add_decay_gradient(
                    parameters[name], perturbation.response_input, coefficient
                )

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which operations run in ``amp_dtype``, if there is one."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.amp_dtype)


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
        forward: Compiled stand-in for the forward function.
        buffers: Tensors to overwrite with the gradients, by parameter; fresh ones by default.
    """
    forward = forward or (linearized_forward if linearized else perturbed_forward)
    parameters = model.response_parameters()
    sizes = [_part(_examples(batch), fraction) for batch in batches]
    losses: list[Tensor] = []
    with _gradients_taken(parameters, buffers) as gradients:
        for batch, size in zip(batches, sizes, strict=True):
            share = size / max(sum(sizes), 1)
            batch = first_rows(to_device(batch, model), size)
            perturbation = training_perturbation(model.hyperparameters, size)
            with _running(model, forward, perturbation):
                loss = objective(model, batch) + objective.penalty(model, batch)
            torch.autograd.backward(share * loss, inputs=list(parameters.values()))
            objective.add_decay_gradients(model, perturbation, share)
            losses.append(share * loss.detach())
    return StepResult(torch.stack(losses).sum(), gradients)


def validation_step(
    model: TunableModule,
    batch: Any,
    objective: Objective,
    *,
    entropy_weight: float = 0.0,
    centred: bool = True,
    forward: Forward | None = None,
) -> StepResult:
    """Return the gradient of the validation loss for lambda and sigma.

    Eval mode, perturbed but not linearised, lambda_0 held fixed:
    ``E L_V(f(x, r(lambda + epsilon, lambda_0))) - tau H``. Source: [DeltaSTN] Algorithm 1, Eq. 2.7.

    Args:
        model: Any mode; it is put back.
        batch: Validation batch.
        objective: Validation loss; its penalties are not used.
        entropy_weight: tau.
        centred: False for the uncentred [STN] parameterisation.
        forward: Compiled stand-in for the forward function.

    Returns:
        The loss without the entropy term, and gradients ``"unconstrained"`` and ``"raw_scale"``.
    """
    space = model.hyperparameters
    forward = forward or perturbed_forward
    batch = to_device(batch, model)
    perturbation = validation_perturbation(space, _examples(batch), centred=centred)
    with model.evaluating(), _running(model, forward, perturbation):
        loss = objective(model, batch)
    parameters = {"unconstrained": space.unconstrained, "raw_scale": space.raw_scale}
    found = torch.autograd.grad(
        loss - entropy_weight * space.entropy(), list(parameters.values()), materialize_grads=True
    )
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
    model: TunableModule, forward: Forward, perturbation: Perturbation
) -> AbstractContextManager[None]:
    rows = len(perturbation.response_input)

    def chosen(graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = first_dimensions((args, kwargs))
        if given and rows not in given:
            raise ShapeError(
                f"the model must be called with the {rows} examples of the batch, one perturbation "
                f"each, but it was called with {given[0]}. Call it once for each view, or put the "
                f"views into the batch."
            )
        outputs = forward(graph, args, kwargs, perturbation)
        if not any(isinstance(leaf, Tensor) for leaf in leaves(outputs)):
            raise ShapeError(
                f"the model must return tensors, or tuples, lists, dictionaries or dataclasses of "
                f"them, but returned {type(outputs).__name__}: a response in it could not be seen."
            )
        return outputs

    return model.running(chosen, perturbation.constrained)


def to_device(batch: Any, model: TunableModule) -> Any:
    """Move every tensor of ``batch``, or a batch that can move itself, to where the model is."""
    device = model.hyperparameters.unconstrained.device
    if not isinstance(batch, Tensor | tuple | list | dict) and callable(getattr(batch, "to", None)):
        return batch.to(device)
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def first_rows(batch: Any, size: int) -> Any:
    """Keep the first ``size`` examples of every tensor that has the batch dimension."""
    full = batch_size(batch)
    if size >= full:
        return batch

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:size] if tensor.ndim and tensor.shape[0] == full else tensor

    return map_tensors(cut, batch)


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


def _scalar(loss: Tensor, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ShapeError(
            f"`{name}` must return one number, but got {got}. Use reduction='mean' or `.mean()`."
        )
    return loss.reshape(())
