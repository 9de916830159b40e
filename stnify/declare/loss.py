"""Hyperparameters that act in the loss."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from stnify.declare.base import LossTerm, Pattern, Penalty
from stnify.errors import DeclarationError


@final
@dataclass(frozen=True)
class Hyperparameter(LossTerm):
    """Tune any number your own loss reads.

    Either give a ``penalty``, or read ``stn.hyperparameters[name]`` inside the criterion or
    ``forward_loss``, there only while ``model.training`` is true, because the validation loss is
    computed by the same function. ``init`` is required.

    It must act through predictions, ``model(x)``: a penalty on ``model.parameters()`` sees general
    weights only, to which nothing responds. ``WeightDecay`` is the one on weights.

    Attributes:
        penalty: ``(model, batch, value) -> scalar or (batch,)``, added to the training loss by
            ``stn.criterion``; ``value`` is ``()`` in the general step and ``(batch,)`` in the
            response step, constrained units.
        at_validation: The validation loss reads it as well ([STN] 3.5, case 2), at a value drawn
            for the whole batch. Its gradient comes from the score function on top of the
            response's, with a running mean of the loss as the baseline; it may be rounded or
            branched on.

    Example:
        ``Hyperparameter("logits", 1e-3, (0, 1), penalty=lambda model, batch, value:
        value * model(batch[0]).square().mean(-1))``
    """

    penalty: Penalty | None = None
    at_validation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is None:
            raise DeclarationError(f"`init` must be given for Hyperparameter {self.name!r}.")
        if self.at_validation and self.penalty is not None:
            raise DeclarationError(
                f"{self.name!r} must be read by the criterion to act at validation, but has a "
                f"`penalty`, which is part of the training loss alone."
            )


@final
@dataclass(frozen=True)
class LabelSmoothing(LossTerm):
    """Tune the share of each target that is spread evenly over all classes.

    ``stn.criterion`` computes PyTorch's cross-entropy as its ``label_smoothing`` means it, with
    class weights and ``ignore_index``. Any other criterion receives smoothed probabilities, which
    it must accept; classes are in the second dimension of predictions, or in the last if the
    targets' shape says so. Several rows of a prediction for each example must follow each other.
    Source: Szegedy et al., CVPR 2016.
    """

    name: str = "label_smoothing"
    range: tuple[float, float] = (0.0, 0.5)
    default_init: ClassVar[float] = 0.05
    widest: ClassVar[tuple[float, float]] = (0.0, 1.0)
    meaning: ClassVar[str] = "share"


@dataclass(frozen=True)
class _Coefficient(LossTerm):
    """A term of the loss with a coefficient."""

    range: tuple[float, float] = (0.0, math.inf)
    default_init: ClassVar[float] = 1e-3
    widest: ClassVar[tuple[float, float]] = (0.0, math.inf)
    meaning: ClassVar[str] = "coefficient"


@final
@dataclass(frozen=True)
class ConfidencePenalty(_Coefficient):
    """Tune the weight of the predictions' negative entropy; predictions are logits.

    Classes are in the second dimension, as for PyTorch's cross-entropy; for another criterion in
    the last if the targets' shape says so, and what cannot be told is refused. Several rows of a
    prediction for each example must follow each other.

    Source: Pereyra et al., ICLR 2017 workshop.
    """

    name: str = "confidence_penalty"
    default_init: ClassVar[float] = 0.05


@final
@dataclass(frozen=True)
class JacobianPenalty(_Coefficient):
    """Tune the weight of half the squared norm of the predictions' Jacobian in the inputs.

    Exact for one output; for several, an unbiased estimate by one random projection, with one more
    pass and two differentiations of it. Source: [STN] Eq. 13, [DeltaSTN] Eq. H.4.
    """

    name: str = "jacobian_penalty"


@dataclass(frozen=True)
class ActivationTerm(_Coefficient):
    """A penalty on activations at named places.

    Attributes:
        after: Modules whose output is penalised, by pattern or type.
        exclude: Patterns taken out again.
        per_layer: One hyperparameter for each module, named ``name.<module>``.
    """

    after: Pattern = ()
    exclude: Pattern = ()
    per_layer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.after:
            raise DeclarationError(
                f"{self.name!r} must say where it acts, but got no `after`. Name modules whose "
                f"output is penalised."
            )


@final
@dataclass(frozen=True)
class ActivationPenalty(ActivationTerm):
    """Tune the weight of the mean square of activations (AR), summed over the modules named.

    Several predictions that one ``stn.criterion`` depends on count by their mean; others, such as
    one made for a log line, do not count.
    Source: Merity et al. 2017.
    """

    name: str = "activation_penalty"
    range: tuple[float, float] = (0.0, 4.0)
    default_init: ClassVar[float] = 0.05


@final
@dataclass(frozen=True)
class TemporalActivationPenalty(ActivationTerm):
    """Tune the weight of the mean squared change from step to step (TAR).

    Attributes:
        time: Dimension of the steps.

    Source: Merity et al. 2017, [DeltaSTN] H.3.
    """

    name: str = "temporal_activation_penalty"
    range: tuple[float, float] = (0.0, 4.0)
    default_init: ClassVar[float] = 0.05
    time: int = 1

    def settings(self) -> Mapping[str, Any]:
        """Return the dimension of the steps."""
        return {"time": self.time}
