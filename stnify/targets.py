"""Parts: a criterion at targets that are smoothed or mixed, by an amount for each example."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stnify.augment import mixed_targets
from stnify.errors import ShapeError
from stnify.rows import RowLayout, expand_rows, trailing

Criterion = Callable[..., Tensor]


class Mixing(NamedTuple):
    """Whom each example of a batch was mixed with.

    Attributes:
        partner: ``(batch,)``, the row it was mixed with.
        share: ``(batch,)``, what is left of its own.
    """

    partner: Tensor
    share: Tensor

    def of_rows(self, rows: int) -> "Mixing":
        """Return the partner and share of each target, where those of an example follow each other.

        Raises:
            ShapeError: ``rows`` is no multiple of the batch.
        """
        batch = len(self.partner)
        if rows % batch:
            raise ShapeError(
                f"there must be a target for each of the {batch} examples that were mixed, or "
                f"several, but there are {rows}. Give `stn.criterion` the prediction the model "
                f"returned for them."
            )
        each = rows // batch
        own = torch.arange(each, device=self.partner.device)
        partner = (self.partner[:, None] * each + own).flatten()
        return Mixing(partner, self.share.repeat_interleave(each))


REAL_TARGETS: tuple[Any, ...] = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.GaussianNLLLoss,
    nn.HuberLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.MultiLabelSoftMarginLoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.gaussian_nll_loss,
    F.huber_loss,
    F.l1_loss,
    F.mse_loss,
    F.multilabel_soft_margin_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
)
"""Criteria whose targets are no classes of which one is right."""


INDICES: tuple[Any, ...] = (nn.MultiMarginLoss, nn.NLLLoss, F.multi_margin_loss, F.nll_loss)
"""Criteria whose targets must be class indices, which can be neither smoothed nor mixed."""

CLASSES_SECOND: tuple[Any, ...] = (nn.CrossEntropyLoss, F.cross_entropy, *INDICES)
"""Criteria that count classes in the second dimension of predictions."""


def _among(criterion: Criterion, known: tuple[Any, ...]) -> bool:
    function = criterion.func if isinstance(criterion, partial) else criterion
    return function in known or type(function) in known


def has_classes(criterion: Criterion) -> bool:
    """Whether a criterion may have targets that are classes, as far as is known."""
    return not _among(criterion, REAL_TARGETS)


def takes_indices_alone(criterion: Criterion) -> bool:
    """Whether a criterion refuses probabilities for targets."""
    return _among(criterion, INDICES)


def class_dimension(criterion: Criterion, prediction: Tensor, target: Any) -> int:
    """Return the dimension of a prediction that counts classes, as the criterion counts them.

    It is the second of a matrix and for PyTorch's criteria. Else it is the second or the last, by
    what class indices lack of the prediction's dimensions.

    Raises:
        ShapeError: It cannot be told.
    """
    shape, last = tuple(prediction.shape), prediction.ndim - 1
    if last < 2 or _among(criterion, CLASSES_SECOND):
        return 1
    indices = isinstance(target, Tensor) and not target.is_floating_point()
    given = tuple(target.shape) if indices else None
    found = [dim for dim in (1, last) if given == (*shape[:dim], *shape[dim + 1 :])]
    if len(found) != 1:
        raise ShapeError(
            f"it must be known which dimension of predictions {shape} counts classes, but neither "
            f"the criterion {criterion!r} nor the targets tell. Pass nn.CrossEntropyLoss(), for "
            f"which it is the second, or a prediction (rows, classes)."
        )
    return found[0]


def of_rows(value: Tensor, rows: int) -> Tensor:
    """Give each row of a prediction the value of its example.

    Args:
        value: ``()``, or ``(batch,)``.
        rows: Those of an example follow each other; if they are no multiple of the batch, they
            belong to no single example.

    Returns:
        ``()``, ``(rows,)``, or the mean, ``(1,)``.
    """
    return expand_rows(value[:, None], rows, RowLayout.BATCH)[:, 0] if value.ndim else value


def at_targets(
    criterion: Criterion,
    prediction: Tensor,
    target: Tensor,
    smoothing: Tensor | None,
    mixing: Mixing | None,
) -> Tensor:
    """Return the criterion at targets that are mixed, then smoothed.

    PyTorch's cross-entropy keeps what it means at class indices, with its class weights and
    ``ignore_index``. Any other criterion receives probabilities for class indices.

    Args:
        criterion: ``(prediction, target) -> scalar``.
        prediction: Logits ``(rows, classes, ...)``; anything if targets are only mixed.
        target: Class indices ``(rows, ...)``, or real numbers.
        smoothing: Share spread over all classes, ``()`` or ``(batch,)``.
        mixing: Partners and shares of the batch, of which each example has one row or more.

    Raises:
        ShapeError: Targets are to be smoothed, but are no classes.
    """
    if smoothing is not None:
        smoothing = of_rows(smoothing, len(prediction))
    if mixing is not None:
        mixing = mixing.of_rows(len(target))
    known = CrossEntropy.of(criterion)
    if known is not None and not target.is_floating_point():
        return known(prediction, target, smoothing, mixing)
    at = 1 if smoothing is None else class_dimension(criterion, prediction, target)
    if mixing is not None:
        classes = prediction.shape[1] if prediction.ndim > 1 else 1
        _refuse_ignored(target, classes)
        target = mixed_targets(target, mixing.partner, mixing.share, classes)
    if smoothing is not None:
        target = smoothed(target, prediction, smoothing, at)
    return criterion(prediction, target)


def _refuse_ignored(target: Tensor, classes: int) -> None:
    """Raise ShapeError if a class index is that of no class."""
    if target.is_floating_point() or not target.numel():
        return
    low, high = target.min(), target.max()
    if low < 0 or high >= classes:
        raise ShapeError(
            f"targets that become probabilities must be class indices from 0 to {classes - 1}, "
            f"but some are {int(low if low < 0 else high)}. If that means a target is ignored, "
            f"pass nn.CrossEntropyLoss(ignore_index=...), whose settings are known."
        )


def smoothed(target: Tensor, prediction: Tensor, value: Tensor, at: int = 1) -> Tensor:
    """Spread a share of each target evenly over all classes.

    Args:
        target: Class indices ``(rows, ...)``, or probabilities of the prediction's shape.
        prediction: Logits ``(rows, classes, ...)``.
        value: The share, ``()`` or ``(rows,)``.
        at: Dimension of the classes.

    Raises:
        ShapeError: There are no classes to spread over.
    """
    if prediction.ndim < 2 or prediction.shape[at] < 2:
        raise ShapeError(
            f"label smoothing needs logits (batch, classes, ...) of two classes or more, but the "
            f"prediction has the shape {tuple(prediction.shape)}. Leave LabelSmoothing out."
        )
    classes, given = prediction.shape[at], tuple(target.shape)
    if not target.is_floating_point():
        _refuse_ignored(target, classes)
        target = F.one_hot(target.long(), classes).movedim(-1, at).to(prediction.dtype)
    if target.shape != prediction.shape:
        raise ShapeError(
            f"label smoothing needs class indices, or a probability for each logit, but got "
            f"targets {given} for predictions {tuple(prediction.shape)}."
        )
    share = trailing(value, target.ndim) if value.ndim else value
    return (1 - share) * target + share * target.sum(at, keepdim=True) / classes


@dataclass(frozen=True)
class CrossEntropy:
    """PyTorch's cross-entropy at class indices, with its settings."""

    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, criterion: Criterion) -> "CrossEntropy | None":
        """Read the settings of ``nn.CrossEntropyLoss`` or ``F.cross_entropy``; None for others.

        One that returns a number for each target is another: it is refused as it would be alone.
        """
        settings: dict[str, Any] = {}
        if type(criterion) is nn.CrossEntropyLoss:
            settings = {name: getattr(criterion, name) for name in cls.__dataclass_fields__}
        elif isinstance(criterion, partial) and criterion.func is F.cross_entropy:
            settings = criterion.keywords
            if criterion.args or not settings.keys() <= cls.__dataclass_fields__.keys():
                return None
        elif criterion is not F.cross_entropy:
            return None
        return None if settings.get("reduction") == "none" else cls(**settings)

    def __call__(
        self, prediction: Tensor, target: Tensor, smoothing: Tensor | None, mixing: Mixing | None
    ) -> Tensor:
        """Return the loss, of own and partners' targets by their shares.

        Raises:
            ShapeError: There is not one class index for each prediction.
        """
        if prediction.ndim < 2 or target.shape != (len(prediction), *prediction.shape[2:]):
            raise ShapeError(
                f"class indices must be one for each prediction to be mixed or smoothed, but there "
                f"are targets {tuple(target.shape)} for predictions {tuple(prediction.shape)}. "
                f"Pass probabilities of that shape for several classes at once."
            )
        whole = torch.ones(len(target), device=target.device)
        parts = [(target, whole)]
        if mixing is not None:
            other = target[mixing.partner], 1 - mixing.share
            parts = [(target, mixing.share), other]
        losses, weights = [], []
        for indices, share in parts:
            share = trailing(share, indices.ndim).to(prediction.dtype)
            losses.append((share * self._each(prediction, indices, smoothing)).sum())
            weights.append((share * self._weights(indices)).sum())
        total = torch.stack(losses).sum()
        return total if self.reduction == "sum" else total / torch.stack(weights).sum()

    def _each(self, prediction: Tensor, target: Tensor, smoothing: Tensor | None) -> Tensor:
        """Return the loss of each target, nought where it is ignored."""
        at = partial(
            F.cross_entropy,
            prediction,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        if smoothing is None:
            return at(label_smoothing=self.label_smoothing)
        share = trailing(smoothing, target.ndim) if smoothing.ndim else smoothing
        share = self.label_smoothing + share * (1 - self.label_smoothing)
        return (1 - share) * at() + share * at(label_smoothing=1.0)

    def _weights(self, target: Tensor) -> Tensor:
        """Return what each target counts in the mean."""
        counts = target != self.ignore_index
        if self.weight is None:
            return counts.to(torch.get_default_dtype())
        return self.weight[torch.where(counts, target, 0)] * counts
