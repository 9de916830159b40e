"""Parts: loss terms with a tunable coefficient."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def confidence(prediction: Tensor, classes: int = 1) -> Tensor:
    """Return the negative entropy of predicted classes for each row, ``(rows,)``.

    Args:
        prediction: Logits ``(rows, ...)``; dimensions other than rows and classes are averaged.
        classes: Dimension of the classes.

    Raises:
        ShapeError: There are no two classes.
    """
    if prediction.ndim < 2 or prediction.shape[classes] < 2:
        raise ShapeError(
            f"the confidence penalty needs logits of two classes or more, (batch, classes, ...), "
            f"but the prediction has the shape {tuple(prediction.shape)}."
        )
    entropy = -(prediction.softmax(classes) * prediction.log_softmax(classes)).sum(classes)
    return -entropy.reshape(len(entropy), -1).mean(1)


def temporal_change(activations: Tensor, time: int) -> Tensor:
    """Return the change of activations from step to step; nought where there is one step.

    Args:
        activations: ``(rows, ...)``.
        time: Dimension of the steps.

    Raises:
        ShapeError: There is no such dimension.
    """
    if not -activations.ndim <= time < activations.ndim:
        raise ShapeError(
            f"the change from step to step needs a dimension of steps, but there is no dimension "
            f"{time} in activations of shape {tuple(activations.shape)}. Choose another `time`, or "
            f"another place by `after`."
        )
    if activations.shape[time] < 2:
        return torch.zeros_like(activations)
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


def ancestors(tensors: Iterable[Tensor]) -> set[Any]:
    """Return the nodes of the autograd graph that ``tensors`` were computed by."""
    ahead = [tensor.grad_fn for tensor in tensors]
    found: set[Any] = set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [before for before, _ in node.next_functions]
    return found


class Recorder(nn.Module):
    """Keeps the activations that pass through it for a penalty, and returns them as they are.

    Args:
        column: Name of the hyperparameter that is the penalty's coefficient.

    Attributes:
        records: Activations of the latest differentiable training pass.
        earlier: Those of each pass before it, as long as no loss took them.
        layout: Which rows of the activations belong to which example.
    """

    def __init__(self, column: str) -> None:
        super().__init__()
        self.column = column
        self.records: list[Tensor] = []
        self.earlier: list[list[Tensor]] = []
        self.layout = RowLayout.BATCH

    def extra_repr(self) -> str:
        """Name the hyperparameter."""
        return f"column={self.column!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "records": [], "earlier": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        twin = Recorder(self.column)
        twin.layout = self.layout
        return twin.train(self.training)

    @property
    def passes(self) -> list[list[Tensor]]:
        """Activations kept, by the pass they are of."""
        return [kept for kept in (*self.earlier, self.records) if kept]

    def begin(self) -> None:
        """Tell what is kept from now on from what was kept before."""
        self.earlier, self.records = self.passes, []

    def forget(self) -> None:
        """Let go of all that is kept."""
        self.earlier, self.records = [], []

    def forward(self, inputs: Tensor, constrained: Tensor | None) -> Tensor:
        """Keep ``inputs`` if this is a training pass that may be differentiated."""
        if self.training and constrained is not None and torch.is_grad_enabled():
            self.records.append(inputs)
        return inputs

    def penalty(
        self, value: Tensor, act: Callable[[Tensor], Tensor], depending: Sequence[Tensor]
    ) -> Tensor:
        """Return ``value`` times the mean square of what ``act`` makes of the activations, ``()``.

        The activations are those that the loss depends on: of several passes by their mean. They
        are let go of.

        Args:
            value: ``()``, or ``(batch,)`` for the coefficient of each example.
            act: Activations to what is to be small in them.
            depending: The loss and the prediction that the penalty is about.

        Raises:
            UsageError: No pass was kept, or none of several is the loss's.
            ShapeError: ``act`` changes the dimension of the examples.
        """
        squares = [(record, act(record).square()) for record in self._take(depending)]
        if not value.ndim:
            return value * torch.stack([square.mean() for _, square in squares]).mean()
        of_examples = [self._by_example(*pair, batch=len(value)) for pair in squares]
        return (value * torch.stack(of_examples).mean(0)).mean()

    def _take(self, depending: Sequence[Tensor]) -> list[Tensor]:
        """Return the activations of the passes that the loss depends on, and let go of them."""
        passes = self.passes
        if not passes:
            raise UsageError(
                f"the penalty of {self.column!r} needs a prediction made in train mode with "
                f"gradients since the last one, but there is none. Call the model before "
                f"`stn.criterion`, once for each loss."
            )
        taken = passes if len(passes) == 1 else self._found(passes, ancestors(depending))
        self.forget()
        self.earlier = [kept for kept in passes if not any(kept is each for each in taken)]
        return [record for kept in taken for record in kept]

    def _found(self, passes: list[list[Tensor]], nodes: set[Any]) -> list[list[Tensor]]:
        """Return the passes whose nodes are among these; the latest if no pass has any."""
        own = [[record.grad_fn for record in kept if record.grad_fn] for kept in passes]
        found = [kept for kept, of in zip(passes, own, strict=True) if not nodes.isdisjoint(of)]
        if any(own) and not found:
            raise UsageError(
                f"the penalty of {self.column!r} needs the prediction that its loss depends on, "
                f"but of {len(passes)} predictions made in train mode with gradients since the "
                f"last step the loss depends on none of them. Make those that no loss is about "
                f"under torch.no_grad()."
            )
        return found or passes[-1:]

    def _by_example(self, record: Tensor, squares: Tensor, batch: int) -> Tensor:
        row = self.layout.dim
        if squares.shape[row] != record.shape[row]:
            raise ShapeError(
                f"the penalty of {self.column!r} must compare steps of an example, but dimension "
                f"{row} of {tuple(record.shape)} counts examples. Give the dimension of the steps "
                f"by `time`."
            )
        return gather_rows(squares.movedim(row, 0).flatten(1).mean(1), batch, self.layout)
