"""5c. What is minimised: the criterion, with everything that is tuned in it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from stnify.augment import MIXES
from stnify.declare import Penalty
from stnify.errors import ShapeError
from stnify.penalties import confidence, jacobian, temporal_change
from stnify.perturb import Perturbation
from stnify.plan import DecaySite, LossSite
from stnify.space import HyperparameterSpace
from stnify.targets import at_targets, class_dimension, of_rows
from stnify.tunable import TunableModule


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ShapeError(
            f"batches must be (inputs, target) pairs, but got {type(batch).__name__}"
            f"{f' of length {len(batch)}' if isinstance(batch, list | tuple) else ''}. "
            f"Pass `forward_loss=fn(model, batch) -> scalar` for any other kind."
        )
    return batch[0], batch[1]


def mixing_columns(space: HyperparameterSpace) -> list[str]:
    """Return the hyperparameters that mix targets."""
    return [column.name for column in space.columns if column.kind in MIXES]


MOVING = (
    "CutMix",
    "HorizontalFlip",
    "RandAugment",
    "Rotate",
    "Scale",
    "Shear",
    "Translate",
)
"""Augmentations that move what is in an image."""


def _refuse_places(space: HyperparameterSpace, target: Any) -> None:
    """Raise ShapeError if images are moved about and their targets, class by pixel, are not."""
    moving = [column.name for column in space.columns if column.kind in MOVING]
    by_pixel = isinstance(target, Tensor) and target.ndim > 2
    if moving and by_pixel:
        raise ShapeError(
            f"targets for each pixel must go where the pixels go, but {moving[0]!r} moves images "
            f"and leaves targets of shape {tuple(target.shape)} where they are. Leave it out; "
            f"colours, noise and cutout can stay."
        )


def _jacobian(model: nn.Module, batch: Any, value: Tensor) -> Tensor:
    inputs = batch[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ShapeError(
            f"a Jacobian needs inputs to differentiate in, one tensor of real numbers, but they "
            f"are {found}. Leave JacobianPenalty out, or convert the inputs before."
        )
    return value * jacobian(model, inputs)


def _unchanged(activations: Tensor) -> Tensor:
    return activations


PREDICTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"ConfidencePenalty": confidence}
"""Kind of loss term to its penalty on predictions with classes in a dimension, ``(rows,)``."""

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "ActivationPenalty": _unchanged,
    "TemporalActivationPenalty": temporal_change,
}
"""Kind of loss term to that of activations whose mean square it penalises."""

PASSES: dict[str, Penalty] = {"JacobianPenalty": _jacobian}
"""Kind of loss term to a penalty that needs a pass of its own, as users' penalties do."""


@dataclass(frozen=True)
class Objective:
    """How a batch becomes a loss.

    Attributes:
        criterion: ``(prediction, target) -> scalar`` for batches ``(inputs, target)``.
        forward_loss: ``(model, batch) -> scalar`` for all others; comes first if both are given.
        decays: Weight decays.
        losses: Hyperparameters that act in the loss.
        amp_dtype: Autocast to this dtype, if any.
    """

    criterion: Callable[..., Tensor] | None = None
    forward_loss: Callable[[nn.Module, Any], Tensor] | None = None
    decays: tuple[DecaySite, ...] = ()
    losses: tuple[LossSite, ...] = ()
    amp_dtype: torch.dtype | None = None

    def validation(self, model: TunableModule, batch: Any) -> Tensor:
        """Return the plain loss of ``batch``, ``()``.

        Raises:
            ShapeError: The loss is not one number, or the batch is not ``(inputs, target)``.
        """
        with self.autocast(model._stnify.space.unconstrained.device):
            if self.forward_loss is not None:
                return _scalar(self.forward_loss(model, batch), "forward_loss")
            inputs, target = _pair(batch)
            assert self.criterion is not None
            return _scalar(self.criterion(model(inputs), target), "criterion")

    def training(self, model: TunableModule, batch: Any) -> Tensor:
        """Return the loss of ``batch`` with all that is tuned in it but decay, ``()``.

        Raises:
            ShapeError: As in ``validation``.
        """
        for recorder in model._stnify.recorders:
            recorder.forget()
        if self.forward_loss is not None:
            return self.validation(model, batch)
        with self.autocast(model._stnify.space.unconstrained.device):
            inputs, target = _pair(batch)
            loss = self.criterion_of(model, model(inputs), target)
        return loss + self.penalty(model, batch)

    def criterion_of(self, model: TunableModule, prediction: Any, target: Any) -> Tensor:
        """Return the criterion at tuned targets, with the penalties on predictions and activations.

        Values are those of the pass that made the prediction.

        Raises:
            ShapeError: The criterion does not return one number.
        """
        self._refuse_prediction(model, prediction)
        _refuse_places(model._stnify.space, target)
        loss = _scalar(self._at_targets(model, prediction, target), "criterion")
        depending = [part for part in (loss, prediction) if isinstance(part, Tensor)]
        terms = [*self._of_prediction(model, prediction, target)]
        terms += self._of_activations(model, depending)
        return sum(terms, start=loss)

    def _refuse_prediction(self, model: TunableModule, prediction: Any) -> None:
        """Raise ShapeError if something acts on a prediction that is no tensor."""
        acting = [s.column for s in self.losses if s.kind in {"LabelSmoothing", *PREDICTIONS}]
        acting += mixing_columns(model._stnify.space)
        if acting and not isinstance(prediction, Tensor):
            raise ShapeError(
                f"the model must return one tensor for {acting}, but returned "
                f"{type(prediction).__name__}. Pass `forward_loss=` as well, which calls "
                f"`stn.criterion` with the part they are about."
            )

    def _at_targets(self, model: TunableModule, prediction: Any, target: Any) -> Tensor:
        """Return the criterion at targets that are mixed and smoothed, if anything does that."""
        assert self.criterion is not None
        space = model._stnify.space
        smoothing = [space[site.column] for site in self.losses if site.kind == "LabelSmoothing"]
        mixes = mixing_columns(space)
        space.read.update(mixes)
        if not smoothing and not mixes:
            return self.criterion(prediction, target)
        mixing, value = model._stnify.mixing_of(prediction), smoothing[0] if smoothing else None
        return at_targets(self.criterion, prediction, target, value, mixing)

    def _of_prediction(
        self, model: TunableModule, prediction: Any, target: Any
    ) -> Iterator[Tensor]:
        """Yield the penalties on predictions, ``()``."""
        assert self.criterion is not None
        for site in (site for site in self.losses if site.kind in PREDICTIONS):
            classes = class_dimension(self.criterion, prediction, target)
            values = of_rows(model._stnify.space[site.column], len(prediction))
            yield (values * PREDICTIONS[site.kind](prediction, classes)).mean()

    def _of_activations(self, model: TunableModule, depending: list[Tensor]) -> Iterator[Tensor]:
        """Yield the penalties on the activations that the loss depends on, ``()``."""
        for site in (site for site in self.losses if site.kind in ACTIVATIONS):
            value = model._stnify.space[site.column]
            act = partial(ACTIVATIONS[site.kind], **site.settings)
            for recorder in (r for r in model._stnify.recorders if r.column == site.column):
                yield recorder.penalty(value, act, depending)

    def penalty(self, model: TunableModule, batch: Any) -> Tensor | float:
        """Return the penalties that predict by themselves, averaged over the batch.

        Their passes update no buffer.
        """
        terms = self.passes
        if not terms:
            return 0.0
        space = model._stnify.space
        with model._stnify.set_aside():
            penalties = [term(model, batch, space[name]).mean() for name, term in terms.items()]
        return torch.stack(penalties).sum()

    def each_penalty(self) -> dict[str, "Objective"]:
        """Return, by its name, each of the users' penalties as an objective of its own."""
        sites = {site.column: site for site in self.losses if site.penalty is not None}
        alone = {name: Objective(losses=(site,)) for name, site in sites.items()}

        def loss(of: Objective, model: nn.Module, batch: Any) -> Tensor:
            # Something to differentiate, also where a penalty depends on no parameter.
            return of.penalty(cast(TunableModule, model), batch) + torch.zeros(
                (), requires_grad=True
            )

        return {
            name: replace(of, forward_loss=partial(loss, of), amp_dtype=self.amp_dtype)
            for name, of in alone.items()
        }

    @property
    def passes(self) -> dict[str, Penalty]:
        """Penalties that need a pass of their own, by the name of their coefficient."""
        terms = {site.column: site.penalty or PASSES.get(site.kind) for site in self.losses}
        return {column: term for column, term in terms.items() if term is not None}

    def add_decay_gradients(
        self, model: TunableModule, perturbation: Perturbation, share: float
    ) -> None:
        """Add ``share`` of the weight decays' gradient to that of the response parameters.

        The penalty is the batch mean of ``c_i / 2 ||w_0 + Theta epsilon_i||^2``, each example with
        its own coefficient and weights; w_0 is a constant. Source: [DeltaSTN] G.2, H.1. The L1
        penalty is taken to first order: ``c_i <sign(w_0), Theta epsilon_i>``.
        """
        space, constrained = model._stnify.space, perturbation.constrained
        assert constrained is not None
        parameters, responses = model._stnify.general_parameters(), model._stnify.weight_responses()
        for site in self.decays:
            coefficient = constrained[:, space.index(site.column)] * (share / len(constrained))
            for name in (name for name in site.parameters if name in responses):
                weight, inputs = parameters[name].detach(), perturbation.response_input
                if site.kind == "L1Penalty":
                    responses[name].add_slope_gradient(weight, weight.sign(), inputs, coefficient)
                else:
                    responses[name].add_decay_gradient(weight, inputs, coefficient)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which operations run in ``amp_dtype``, if there is one."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.amp_dtype)


def _scalar(loss: Tensor, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ShapeError(
            f"`{name}` must return one number, but got {got}. Use reduction='mean' or `.mean()`."
        )
    return loss.reshape(())
