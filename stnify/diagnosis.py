"""7c. Whether the hypergradient can be trusted: how sure its sign is, how far ahead it looks."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stnify.errors import UsageError
from stnify.patterns import choose
from stnify.step import to_device
from stnify.step_sizes import step_sizes
from stnify.tunable import evaluating
from stnify.tuner import Tuner
from stnify.untouched import state_restored

BLOCKS = 4
"""Parts of the recent past whose means are compared; the response hardly changes within one."""

SURE = 4.0
"""Standard errors from zero beyond which the sign of a gradient counts as known.

Without controls it tells what is *not* known: an error taken from four blocks does not see what the
response has had wrong for longer, and hyperparameters without any effect may exceed four as well.
"""

CONTROLS = 4
"""The fewest hyperparameters without effect from which an error is taken."""


@dataclass(frozen=True)
class Diagnosis:
    """What the recent validation steps say about the hypergradient.

    Attributes:
        steps: Validation steps it is about.
        gradients: Mean hypergradient by name, per unconstrained unit.
        signal_to_noise: Mean over standard deviation of single validation steps, by name.
        certainty: Mean over its standard error, by name. The error is that of means of a few long
            blocks, which counts what validation steps close in time share; or with controls the
            root mean square of theirs, which counts all that the response has wrong.
        horizon: Training steps for which the response answers: how many steps at the current
            learning rate, each with its immediate effect, would change the validation loss as much.
            NaN if it is not known how far a step of the optimizer goes, see ``step_sizes``, the
            loss of the last batch was not finite, or the loop has changed that batch since;
            infinite if a step has no effect.
            Negative if what lies ahead has the other sign.
        horizon_error: Its standard error over noise; the last batches are given.
        controls: Names of the hyperparameters without effect that gave the error.
    """

    steps: int
    gradients: dict[str, float]
    signal_to_noise: dict[str, float]
    certainty: dict[str, float]
    horizon: float
    horizon_error: float
    controls: tuple[str, ...] = ()

    @property
    def unsure(self) -> list[str]:
        """Names of the hyperparameters whose direction is not known."""
        sure = {name for name, value in self.certainty.items() if value > SURE}
        return [name for name in self.certainty if name not in {*sure, *self.controls}]

    def __str__(self) -> str:
        width = max(map(len, ["hyperparameter", *self.gradients]))
        lines = [f"{'hyperparameter':{width}}  gradient  signal/noise  certainty"]
        remarks = dict.fromkeys(self.unsure, "  direction not known")
        remarks |= dict.fromkeys(self.controls, "  control")
        for name, gradient in self.gradients.items():
            noise, sure = self.signal_to_noise[name], self.certainty[name]
            remark = remarks.get(name, "")
            lines.append(f"{name:{width}}  {gradient:+8.1e}  {noise:12.2f}  {sure:9.2f}{remark}")
        lines.append(f"over {self.steps} validation steps; {self._ahead()}")
        return "\n".join(lines)

    def _ahead(self) -> str:
        """Say how far the response looks ahead, if it is known better than from nought."""
        if not (math.isfinite(self.horizon) and self.horizon_error < abs(self.horizon)):
            return "how far ahead the response looks is not known"
        return (
            f"the response looks about {self.horizon:.3g} training steps ahead, at the learning "
            f"rate of now (standard error {self.horizon_error:.2g})"
        )


def diagnose(
    tuner: Tuner, optimizer: Optimizer, draws: int, controls: str | Sequence[str] = ()
) -> Diagnosis:
    """Return how sure and how far-sighted the hypergradient has been lately.

    It costs ``2 * draws`` training passes with their backward pass, and moves nothing: parameters,
    buffers and random streams are afterwards what they were.

    Args:
        tuner: After a few validation steps.
        optimizer: Of the general parameters.
        draws: How often a step's effect is taken, with fresh noise each time.
        controls: Globs on the names of hyperparameters that are known to have no effect.

    Raises:
        UsageError: The method does not tune, there were too few validation steps, no training
            batch is at hand, or there are too few controls.
    """
    if not tuner.method.tunes:
        raise UsageError('method="fixed" does not tune: there is no hypergradient to diagnose.')
    if len(tuner.recent) < 2 * BLOCKS:
        raise UsageError(
            f"a diagnosis needs {2 * BLOCKS} validation steps, but there were "
            f"{len(tuner.recent)}. Train longer, or call `stn.validation_step(batch)`."
        )
    if not tuner.latest_training or tuner.latest_validation is None:
        raise UsageError(
            "a diagnosis needs the batches of the last steps, but a loaded run has none before its "
            "first step. Take a training and a validation step first."
        )
    gradients = torch.stack(list(tuner.recent))
    mean, deviation = gradients.mean(0), gradients.std(0)
    chosen = _chosen(tuner, controls)
    places = [tuner.model._stnify.space.index(name) for name in chosen]
    error = mean[places].square().mean().sqrt() if chosen else _error_of_blocks(gradients)
    horizon, horizon_error = _horizon(tuner, optimizer, mean, draws)
    return Diagnosis(
        len(gradients),
        _named(tuner, mean),
        _named(tuner, mean.abs() / deviation),
        _named(tuner, mean.abs() / error),
        horizon,
        horizon_error,
        chosen,
    )


def _error_of_blocks(gradients: Tensor) -> Tensor:
    blocks = torch.stack([block.mean(0) for block in gradients.tensor_split(BLOCKS)])
    return blocks.std(0) / math.sqrt(BLOCKS)


def _chosen(tuner: Tuner, controls: str | Sequence[str]) -> tuple[str, ...]:
    names = tuner.model._stnify.space.names
    chosen = tuple(choose(controls, dict.fromkeys(names)))
    if controls and len(chosen) < CONTROLS:
        raise UsageError(
            f"`controls` must match at least {CONTROLS} hyperparameters, all of them without "
            f"effect, but {controls!r} matches {list(chosen)} of {names}. Declare such as "
            f"Hyperparameter('idle.0', 0.5, (0, 1), penalty=lambda model, batch, value: 0 * value)."
        )
    return chosen


def _named(tuner: Tuner, values: Tensor) -> dict[str, float]:
    return dict(zip(tuner.model._stnify.space.names, values.tolist(), strict=True))


def _horizon(
    tuner: Tuner, optimizer: Optimizer, gradient: Tensor, draws: int
) -> tuple[float, float]:
    """Compare what ``gradient`` predicts with what one training step does, where it is steepest.

    Lambda goes one sigma along ``gradient``, in units of sigma, and as far back. The effect of a
    step is noisy, the prediction is not: a mean of effects is divided by, and nothing regressed on
    them, because noise in what one regresses on makes slopes too small.

    Returns:
        The ratio, and its standard error.
    """
    if tuner.latest_is_changed:
        return math.nan, math.nan
    scale = tuner.model._stnify.space.scale.detach()
    length = torch.linalg.vector_norm(scale * gradient)
    if length == 0:
        return 0.0, 0.0
    epsilon = scale * (scale * gradient / length)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _untouched(tuner),
        tuner.stream.active(),
    ):
        slopes = _validation_slopes(tuner, optimizer)
        if slopes is None:
            return math.nan, math.nan
        if not slopes:
            return math.inf, math.inf
        effects = torch.stack([_effect(tuner, slopes, epsilon) for _ in range(draws)])
    mean, error = float(effects.mean()), float(effects.std()) / math.sqrt(draws)
    if mean == 0:
        return math.inf, math.inf
    ratio = float(length) / mean
    return ratio, abs(ratio) * error / abs(mean)


def _validation_slopes(tuner: Tuner, optimizer: Optimizer) -> dict[nn.Parameter, Tensor] | None:
    """Return how the validation loss falls with each training gradient, by parameter.

    None if the optimizer's step sizes are not known.
    """
    model = tuner.model
    trained = [p for p in model._stnify.general_parameters().values() if p.requires_grad]
    if not trained:
        return {}
    with evaluating(model):
        loss = tuner.objective.validation(model, to_device(tuner.latest_validation, model))
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    slopes = {}
    for parameter, slope in zip(trained, found, strict=True):
        size = step_sizes(optimizer, parameter)
        if size is None:
            return None
        if slope is not None:
            slopes[parameter] = size * slope
    return slopes


def _effect(tuner: Tuner, slopes: dict[nn.Parameter, Tensor], epsilon: Tensor) -> Tensor:
    """Return what ``epsilon`` changes in one training step's effect on the validation loss, ``()``.

    Half the difference between ``epsilon`` and its opposite under the same noise.
    """
    rewind = tuner.stream.rewinder()
    sides = []
    for sign in (1, -1):
        rewind()
        with _moved(tuner, sign * epsilon), tuner.unobserved():
            sides.append(_projected(tuner, slopes))
    return (sides[1] - sides[0]) / 2


@contextmanager
def _moved(tuner: Tuner, change: Tensor) -> Iterator[None]:
    """Put lambda elsewhere while the body runs."""
    space = tuner.model._stnify.space
    before = space.unconstrained.detach().clone()
    try:
        with torch.no_grad():
            space.unconstrained.add_(change)
        yield
    finally:
        with torch.no_grad():
            space.unconstrained.copy_(before)


def _projected(tuner: Tuner, slopes: dict[nn.Parameter, Tensor]) -> Tensor:
    """Return the inner product of the training gradient, tuned decay included, with ``slopes``."""
    model, batches = tuner.model, tuner.latest_training
    losses = [tuner.objective.training(model, to_device(batch, model)) for batch in batches]
    loss = torch.stack(losses).mean()
    found = torch.autograd.grad(loss, list(slopes), allow_unused=True)
    decays = tuner.decays()
    total = torch.zeros((), dtype=torch.float64, device=loss.device)
    for (parameter, slope), gradient in zip(slopes.items(), found, strict=True):
        if gradient is not None:
            total += (gradient * slope).sum().double()
        decay = decays.get(parameter)
        if decay is not None:
            change = decay if isinstance(decay, Tensor) and decay.ndim else decay * parameter
            total += (change * slope).sum().detach().double()
    return total


@contextmanager
def _untouched(tuner: Tuner) -> Iterator[None]:
    """Run the body in train mode; whatever it changes is put back: buffers, what code keeps."""
    model, stream = tuner.model, tuner.stream.state_dict()
    holders = [(module, dict(module._buffers)) for module in model.modules()]
    modes = [(module, module.training) for module in model.modules()]
    for module, buffers in holders:
        for name, buffer in buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        with state_restored(model._stnify.original), tuner.unobserved():
            if not model.training:
                model.train()
            yield
    finally:
        for module, buffers in holders:
            module._buffers.update(buffers)
        for module, training in modes:
            module.training = training
        model._stnify.original.training = model.training
        tuner.stream.load_state_dict(stream)
