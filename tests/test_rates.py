"""What has a rate acts at that rate in a converted model, each example at its own if it has one.

Every model shows in its predictions what was dropped: its weights copy, and its response scales.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from kinds import KINDS
from torch import Tensor, nn

from stnify import STN, stnify
from stnify.declare import (
    AlphaDropout,
    AttentionDropout,
    Declaration,
    DropBlock,
    DropConnect,
    Dropout,
    DropPath,
    EmbeddingDropout,
    HorizontalFlip,
    LockedDropout,
    RandomErasing,
)

RATE = 0.3
FEW, MANY = 400, 2000  # examples: many where each makes one draw only
WIDTH, WORDS, STEPS = 8, 40, 3


def copying(width: int) -> nn.Linear:
    layer = nn.Linear(width, width, bias=False)
    nn.init.eye_(layer.weight)
    return layer


class Attention(nn.Module):
    """Looks everywhere alike; its predictions are the attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = copying(WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        silent = torch.zeros_like(values)
        return self.head(F.scaled_dot_product_attention(silent, silent, values, dropout_p=0.1))


class Residual(nn.Module):
    """Adds to its inputs what it copies of them."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = copying(1)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.branch(inputs)


def vocabulary() -> nn.Module:
    words = nn.Embedding(WORDS, WIDTH)
    nn.init.ones_(words.weight)
    return nn.Sequential(words, copying(WIDTH))


def columns_of_ones() -> nn.Module:
    layer = nn.Linear(WORDS, WORDS, bias=False)
    nn.init.ones_(layer.weight)
    return layer


def behind(module: nn.Module, width: int = WIDTH) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(module, copying(width))


def zero(prediction: Tensor) -> Tensor:
    return prediction == 0


@dataclass(frozen=True)
class Witness:
    """A model that shows what was dropped.

    Attributes:
        declaration: Tunes the rate.
        model: Builds it.
        inputs: A batch for it.
        happened: Prediction to what was drawn, ``(batch, draws)``: true with the rate.
    """

    declaration: Declaration
    model: Callable[[], nn.Module]
    inputs: Tensor
    happened: Callable[[Tensor], Tensor] = zero


def once_for_all_steps(prediction: Tensor) -> Tensor:
    dropped = zero(prediction)
    assert (dropped == dropped[:, :1]).all()
    return dropped[:, 0]


RATES = {
    "Dropout": Witness(Dropout(), behind(nn.Dropout(0.2)), torch.ones(FEW, WIDTH)),
    "AlphaDropout": Witness(
        AlphaDropout(), behind(nn.AlphaDropout(0.2)), torch.ones(FEW, WIDTH), lambda p: p < 0
    ),
    "AttentionDropout": Witness(
        AttentionDropout(),
        Attention,
        torch.eye(WIDTH).expand(FEW, -1, -1),
        lambda p: zero(p).flatten(1),
    ),
    "EmbeddingDropout": Witness(
        EmbeddingDropout(),
        vocabulary,
        torch.arange(WORDS).expand(FEW, -1),
        lambda p: zero(p).all(-1),
    ),
    "LockedDropout": Witness(
        LockedDropout(after="0"),
        behind(nn.Identity()),
        torch.ones(FEW, STEPS, WIDTH),
        once_for_all_steps,
    ),
    "DropPath": Witness(DropPath(), Residual, torch.ones(MANY, 1), lambda p: p == 1),
    "DropBlock": Witness(  # a block as large as the image, so that either all of it goes or none
        DropBlock(after="0", block_size=3),
        behind(nn.Identity(), 3),
        torch.ones(FEW, WIDTH, 3, 3),
        lambda p: zero(p).flatten(2).all(-1),
    ),
    "DropConnect": Witness(DropConnect(), columns_of_ones, torch.eye(WORDS)),
    "RandomErasing": Witness(
        RandomErasing(),
        behind(nn.Flatten(), 64),
        torch.ones(MANY, 1, 8, 8),
        lambda p: zero(p).any(1, keepdim=True),
    ),
    "HorizontalFlip": Witness(
        HorizontalFlip(),
        behind(nn.Flatten(), 2),
        torch.tensor([0.0, 1.0]).expand(MANY, 1, 1, 2),
        lambda p: p[:, :1] != 0,
    ),
}
"""Every kind whose value is a probability."""

every_rate = pytest.mark.parametrize("name", RATES)


def test_every_rate_has_a_witness():
    declared = {name: kind.declaration for name, kind in KINDS.items()}
    assert {n for n, d in declared.items() if d.meaning == "probability"} == set(RATES)
    assert all(type(w.declaration).__name__ == name for name, w in RATES.items())


class Recorder:
    """Keeps the predictions of all passes, and the rate, or rates, each pass was at."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stn: STN | None = None
        self.passes: list[tuple[Tensor, Tensor]] = []

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.passes.append((prediction.detach(), self.stn.hyperparameters[self.name].detach()))
        return prediction.mean()


def converted(witness: Witness, recorder: Recorder) -> STN:
    """A conversion that trains nothing, whose response has an effect."""
    model = witness.model()
    stn = stnify(
        model,
        [witness.declaration],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=recorder,
        response="gate",
        verify=False,
        seed=1,
    )
    stn.hyperparameters.set_values({witness.declaration.name: RATE})
    with torch.no_grad():
        for gate in stn.model.response_parameters().values():
            gate.fill_(0.1)
    return stn


def step(witness: Witness) -> list[tuple[Tensor, Tensor]]:
    """Take a training step; return what happened, ``(batch, draws)``, and the rates, by pass."""
    recorder = Recorder(witness.declaration.name)
    recorder.stn = converted(witness, recorder)
    recorder.stn.step((witness.inputs, torch.zeros(len(witness.inputs))))
    return [(witness.happened(prediction), rates) for prediction, rates in recorder.passes]


BOUND = 4.0
"""Standard deviations: once in 16,000 runs a right rate is further off."""


def deviation(happened: Tensor, rates: Tensor | float) -> float:
    """How far a count is from its mean, in standard deviations: draws of different rates add up."""
    rates = torch.as_tensor(rates).expand(happened.shape)
    return abs(float((happened.sum() - rates.sum()) / (rates * (1 - rates)).sum().sqrt()))


@every_rate
def test_the_general_step_acts_at_the_rate(name):
    happened, rate = step(RATES[name])[0]
    assert happened.numel() >= 800
    assert rate == pytest.approx(RATE)
    assert deviation(happened, RATE) < BOUND
    assert deviation(happened, 0.7 * RATE) > BOUND
    assert deviation(happened, 1.3 * RATE) > BOUND


@every_rate
def test_the_response_step_acts_at_the_rates_drawn(name):
    """Examples of lower rates and those of higher ones, each half by itself."""
    happened, rates = step(RATES[name])[-1]
    assert rates.shape == happened.shape[:1]
    assert (rates.unique().numel() > 1) is RATES[name].declaration.per_example
    for half in rates.argsort().chunk(2):
        assert deviation(happened[half], rates[half, None]) < BOUND
        assert deviation(happened[half], RATE) > BOUND, "lambda + epsilon counts, not lambda"
