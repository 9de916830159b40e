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
from stnify.rows import trailing

Criterion = Callable[..., Tensor]


class Mixing(NamedTuple):
    """Whom each example of a batch was mixed with.

    Attributes:
        partner: ``(batch,)``, the row it was mixed with.
        share: ``(batch,)``, what is left of its own.
    """

    partner: Tensor
    share: Tensor


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


def has_classes(criterion: Criterion) -> bool:
    """Whether a criterion may have targets that are classes, as far as is known."""
    function = criterion.func if isinstance(criterion, partial) else criterion
    return function not in REAL_TARGETS and type(function) not in REAL_TARGETS


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
        prediction: Logits ``(batch, classes, ...)``; anything if targets are only mixed.
        target: Class indices ``(batch, ...)``, or real numbers.
        smoothing: Share spread over all classes, ``()`` or ``(batch,)``.
        mixing: Partners and shares.

    Raises:
        ShapeError: Targets are to be smoothed, but are no classes.
    """
    known = CrossEntropy.of(criterion)
    if known is not None and not target.is_floating_point():
        return known(prediction, target, smoothing, mixing)
    if mixing is not None:
        classes = prediction.shape[1] if prediction.ndim > 1 else 1
        target = mixed_targets(target, mixing.partner, mixing.share, classes)
    if smoothing is not None:
        target = smoothed(target, prediction, smoothing)
    return criterion(prediction, target)


def smoothed(target: Tensor, prediction: Tensor, value: Tensor) -> Tensor:
    """Spread a share of each target evenly over all classes.

    Args:
        target: Class indices ``(batch, ...)``, or probabilities ``(batch, classes, ...)``.
        prediction: Logits ``(batch, classes, ...)``.
        value: The share, ``()`` or ``(batch,)``.

    Raises:
        ShapeError: There are no classes to spread over.
    """
    if prediction.ndim < 2 or prediction.shape[1] < 2:
        raise ShapeError(
            f"label smoothing needs logits (batch, classes, ...) of two classes or more, but the "
            f"prediction has the shape {tuple(prediction.shape)}. Leave LabelSmoothing out."
        )
    classes = prediction.shape[1]
    if not target.is_floating_point():
        target = F.one_hot(target, classes).movedim(-1, 1).to(prediction.dtype)
    if target.shape != prediction.shape:
        raise ShapeError(
            f"label smoothing needs class indices, or a probability for each logit, but got "
            f"targets {tuple(target.shape)} for predictions {tuple(prediction.shape)}."
        )
    share = trailing(value, target.ndim) if value.ndim else value
    return (1 - share) * target + share * target.sum(1, keepdim=True) / classes


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
