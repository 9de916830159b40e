"""Parts: loss terms with a tunable coefficient."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stnify.errors import ShapeError, UsageError
from stnify.rows import RowLayout, gather_rows


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


def confidence(prediction: Tensor) -> Tensor:
    """Return the negative entropy of predicted classes for each example, ``(batch,)``.

    Args:
        prediction: Logits ``(batch, classes, ...)``; other dimensions are averaged.

    Raises:
        ShapeError: There are no two classes.
    """
    if prediction.ndim < 2 or prediction.shape[1] < 2:
        raise ShapeError(
            f"the confidence penalty needs logits (batch, classes, ...) of two classes or more, "
            f"but the prediction has the shape {tuple(prediction.shape)}."
        )
    entropy = -(prediction.softmax(1) * prediction.log_softmax(1)).sum(1)
    return -entropy.reshape(len(entropy), -1).mean(1)


def temporal_change(activations: Tensor, time: int) -> Tensor:
    """Return the change of activations from step to step.

    Args:
        activations: ``(rows, ...)``.
        time: Dimension of the steps.
    """
    return activations.diff(dim=time)


def jacobian(predict: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Return half the squared norm of the predictions' Jacobian for each example, ``(batch,)``.

    For several outputs it is the estimate by one random projection with unit covariance, whose
    mean is the norm. Differentiable.

    Args:
        predict: Inputs to predictions ``(batch, ...)``; the predictions of an example must depend
            on its own inputs alone.
        inputs: Of floating type.
    """
    inputs = inputs.detach().requires_grad_()
    prediction = predict(inputs)
    single = prediction[0].numel() == 1
    directions = torch.ones_like(prediction) if single else torch.randn_like(prediction)
    (slopes,) = torch.autograd.grad(prediction, inputs, directions, create_graph=True)
    return 0.5 * slopes.reshape(len(slopes), -1).square().sum(1)


class Recorder(nn.Module):
    """Keeps the activations that pass through it for a penalty, and returns them as they are.

    Args:
        column: Name of the hyperparameter that is the penalty's coefficient.

    Attributes:
        records: Activations of differentiable training passes since they were last taken.
        layout: Which rows of the activations belong to which example.
    """

    def __init__(self, column: str) -> None:
        super().__init__()
        self.column = column
        self.records: list[Tensor] = []
        self.layout = RowLayout.BATCH

    def extra_repr(self) -> str:
        """Name the hyperparameter."""
        return f"column={self.column!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "records": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        return Recorder(self.column)

    def forward(self, inputs: Tensor, constrained: Tensor | None) -> Tensor:
        """Keep ``inputs`` if this is a training pass that may be differentiated."""
        if self.training and constrained is not None and torch.is_grad_enabled():
            self.records.append(inputs)
        return inputs

    def penalty(self, value: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``value`` times the mean square of what ``act`` makes of the activations, ``()``.

        Several passes count by their mean. What was kept is let go of.

        Args:
            value: ``()``, or ``(batch,)`` for the coefficient of each example.
            act: Activations to what is to be small in them.

        Raises:
            UsageError: No pass was kept.
            ShapeError: ``act`` changes the dimension of the examples.
        """
        records, self.records = self.records, []
        if not records:
            raise UsageError(
                f"the penalty of {self.column!r} needs a prediction made in train mode with "
                f"gradients since the last one, but there is none. Call the model before "
                f"`stn.criterion`, once for each loss."
            )
        squares = [(record, act(record).square()) for record in records]
        if not value.ndim:
            return value * torch.stack([square.mean() for _, square in squares]).mean()
        of_examples = [self._by_example(*pair, batch=len(value)) for pair in squares]
        return (value * torch.stack(of_examples).mean(0)).mean()

    def _by_example(self, record: Tensor, squares: Tensor, batch: int) -> Tensor:
        row = self.layout.dim
        if squares.shape[row] != record.shape[row]:
            raise ShapeError(
                f"the penalty of {self.column!r} must compare steps of an example, but dimension "
                f"{row} of {tuple(record.shape)} counts examples. Give the dimension of the steps "
                f"by `time`."
            )
        return gather_rows(squares.movedim(row, 0).flatten(1).mean(1), batch, self.layout)
