"""7a. What the methods are, and how often each of their steps runs."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from stnify.errors import UsageError


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        response: How predictions of the response step are made; None if there is none.
        centred: Hyper layers receive epsilon rather than lambda + epsilon.
        tunes: Whether lambda and sigma move by validation steps.
    """

    response: Literal["linearized", "perturbed"] | None
    centred: bool = True
    tunes: bool = True


METHODS: dict[str, Method] = {
    "delta": Method("linearized"),  # [DeltaSTN] Algorithm 1
    "centered": Method("perturbed"),  # [DeltaSTN] 3.9, 3.10
    "stn": Method(None, centred=False),  # [STN], [DeltaSTN] Algorithm 2: one joint update
    "fixed": Method(None, tunes=False),  # the baselines
}
"""Name to method."""


@dataclass(frozen=True)
class Cadence:
    """How often, and how much of, each step runs.

    Attributes:
        train_steps: Training steps between validation steps.
        valid_steps: Validation steps each time.
        warmup_steps: Training steps before the first validation step.
        response_every: Training steps for each response step.
        response_fraction: Leading part of each batch that the response step uses.
        antithetic: Whether it uses each example twice, with opposite perturbations.
        entropy_weight: tau.
        tune_scale: Whether sigma moves.
    """

    train_steps: int = 5
    valid_steps: int = 1
    warmup_steps: int = 100
    response_every: int = 3
    response_fraction: float = 1.0
    antithetic: bool = False
    entropy_weight: float = 1e-3
    tune_scale: bool = True

    def __post_init__(self) -> None:
        counts = ("train_steps", "valid_steps", "warmup_steps", "response_every")
        for name in counts:
            if not isinstance(getattr(self, name), Integral):
                raise UsageError(f"`{name}` must be an integer, but got {getattr(self, name)!r}.")
        if not isinstance(self.antithetic, bool):
            raise UsageError(f"`antithetic` must be a bool or None, but got {self.antithetic!r}.")
        rules = {
            "train_steps >= 1": self.train_steps >= 1,
            "valid_steps >= 1": self.valid_steps >= 1,
            "warmup_steps >= 0": self.warmup_steps >= 0,
            "response_every >= 1": self.response_every >= 1,
            "0 < response_fraction <= 1": 0 < self.response_fraction <= 1,
            "0 <= entropy_weight < inf": 0 <= self.entropy_weight < math.inf,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise UsageError(f"`{broken[0]}` must hold, but got {self}.")


@dataclass
class Counters:
    """What has happened so far.

    Attributes:
        training_steps: General steps taken.
        validation_steps: Validation steps taken, skipped ones included.
        skipped: Validation steps whose loss or hypergradient was not finite.
        skipped_responses: Response steps whose loss or gradient was not finite.
    """

    training_steps: int = 0
    validation_steps: int = 0
    skipped: int = 0
    skipped_responses: int = 0
