"""Models, data and loops the tests share."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stnify import STN, Hyperparameter, stnify

FEATURES, CLASSES = 6, 3


def perceptron(dropout: float | None = None) -> nn.Sequential:
    """A small classifier of ``(batch, 6)``, with a dropout if a rate is given."""
    hidden: list[nn.Module] = [nn.Linear(FEATURES, 8), nn.Tanh()]
    if dropout is not None:
        hidden.append(nn.Dropout(dropout))
    return nn.Sequential(*hidden, nn.Linear(8, CLASSES))


def convolutional_network() -> nn.Sequential:
    """A small classifier of ``(batch, 6)`` as 1x2x3 images, with BatchNorm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


class BranchingNetwork(nn.Module):
    """A classifier of ``(batch, 6)`` whose forward looks at its data, so that it is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.0)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Predict, the other way about if the batch is negative on the whole."""
        hidden = self.drop(self.norm(self.first(inputs)))
        return self.last(hidden.tanh() if inputs.sum() > 0 else hidden.relu())


def examples(count: int, seed: int = 0) -> TensorDataset:
    """Gaussian features whose class is the largest of three noisy sums."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    noise = torch.randn(count, CLASSES, generator=generator)
    return TensorDataset(inputs, (inputs[:, :3] + inputs[:, 3:] + noise).argmax(1))


def batches(count: int = 40, batch_size: int = 8, seed: int = 0, **options: Any) -> DataLoader[Any]:
    """A loader of ``examples``."""
    return DataLoader(examples(count, seed), batch_size=batch_size, **options)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Any],
    steps: int,
    *,
    criterion: Any = F.cross_entropy,
    scheduler: Any = None,
) -> None:
    """The loop of every user: ``steps`` optimizer steps, epoch after epoch."""
    taken = 0
    while taken < steps:
        for inputs, target in loader:
            optimizer.zero_grad()
            criterion(model(inputs), target).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            taken += 1
            if taken == steps:
                return


def no_penalty(model: nn.Module, batch: Any, value: Tensor) -> Tensor:
    """A penalty that is nought at every value."""
    return 0.0 * value


IDLE = Hyperparameter("idle", 0.5, (0.0, 1.0), penalty=no_penalty)
"""A hyperparameter without any effect."""


def convert(model: nn.Module, hparams: Any, optimizer: Any = None, **options: Any) -> STN:
    """Call ``stnify`` with settings that reach every kind of step at once.

    The response step is the papers', in which noise moves also what has no effect.
    """
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    defaults: dict[str, Any] = {
        "criterion": F.cross_entropy,
        "train_loader": batches(),
        "valid_loader": batches(seed=1, shuffle=True),
        "warmup_steps": 0,
        "train_steps": 1,
        "seed": 0,
        "antithetic": False,
        "response_every": 1,
        "response_fraction": 1.0,
        "scale": 1.0,
    }
    if "response_optimizer" not in options:
        defaults["response_lr"] = 1.0
    return stnify(model, hparams, optimizer=optimizer, **{**defaults, **options})
