"""Mixup and CutMix in a converted model: images and targets are mixed alike, row by row."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stnify import STN, stnify
from stnify.augment import Augment
from stnify.declare import (
    Augmentation,
    Brightness,
    CutMix,
    Declaration,
    HorizontalFlip,
    Hue,
    LabelSmoothing,
    Mixup,
    RandAugment,
)
from stnify.errors import DeclarationError, ShapeError, UsageError
from stnify.linearize import linearized_forward
from stnify.perturb import Perturbation
from stnify.step import response_step

BATCH, SIDE, CLASSES = 8, 6, 3
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
"""The same numbers in float64, summed in another order."""

MIXES: dict[str, Augmentation] = {"mixup": Mixup(init=0.9), "cutmix": CutMix(init=0.9)}

every_mix = pytest.mark.parametrize("name", MIXES)


class Classifier(nn.Module):
    """Classifies small images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(BATCH, 2, SIDE, SIDE, dtype=torch.float64, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def converted(*declared: Declaration, **options: Any) -> STN:
    """A converted model whose response has an effect."""
    torch.manual_seed(0)
    model = Classifier().double()
    defaults: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": F.cross_entropy,
        "verify": False,
        "seed": 0,
    }
    stn = stnify(model, declared, **{**defaults, **options})
    with torch.no_grad():
        for name, parameter in stn.model.response_parameters().items():
            if name.endswith("gate"):
                parameter.normal_(0, 0.5)
    return stn


@pytest.fixture
def mixed(monkeypatch) -> list[Any]:
    """What the augmentations returned, pass by pass."""
    seen: list[Any] = []
    forward = Augment.forward

    def watched(self, images, constrained):
        seen.append(forward(self, images, constrained))
        return seen[-1]

    monkeypatch.setattr(Augment, "forward", watched)
    return seen


def mixed_loss(prediction: Tensor, target: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """The mean over examples of the losses of both targets, in their shares."""
    losses = []
    for i in range(BATCH):
        own = F.cross_entropy(prediction[i], target[i])
        other = F.cross_entropy(prediction[i], target[partner[i]])
        losses.append(share[i] * own + (1 - share[i]) * other)
    return torch.stack(losses).mean()


def assert_mixed(name: str, found: Any, images: Tensor) -> None:
    """Images must be what partner and share say."""
    for i in range(BATCH):
        own, other, share = images[i], images[found.partner[i]], found.share[i]
        if name == "mixup":
            torch.testing.assert_close(found.images[i], share * own + (1 - share) * other)
        else:
            kept = (found.images[i] == own).all(0)
            pasted = (found.images[i] == other).all(0)
            assert (kept | pasted).all()
            if found.partner[i] != i:
                torch.testing.assert_close(kept.to(share).mean(), share)


# The general step ---------------------------------------------------------------------------------


@every_mix
@pytest.mark.parametrize("probabilities", [False, True])
def test_the_general_step_mixes_images_and_targets_alike(name, probabilities, mixed):
    stn = converted(MIXES[name])
    images, target = batch()
    stn.observe((images, target))
    prediction = stn.model(images)
    given = F.one_hot(target, CLASSES).double() if probabilities else target
    found = stn.criterion(prediction, given)
    (what,) = mixed
    assert_mixed(name, what, images)
    expected = mixed_loss(stn.model._stnify.original(what.images), target, what.partner, what.share)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert not torch.allclose(found, F.cross_entropy(prediction, target))
    assert (what.share < 0.99).any()
    parameters = list(stn.model.general_parameters().values())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@every_mix
def test_smoothing_acts_on_mixed_targets(name, mixed):
    stn = converted(MIXES[name], LabelSmoothing(init=0.2))
    images, target = batch()
    prediction = stn.model(images)
    found = stn.criterion(prediction, target)
    plain = mixed_loss(prediction, target, mixed[0].partner, mixed[0].share)
    spread = -prediction.log_softmax(1).mean()
    torch.testing.assert_close(found, 0.8 * plain + 0.2 * spread, **TOLERANCE)
    assert not torch.allclose(found, plain)


def test_the_latest_batch_is_what_targets_are_mixed_by(mixed):
    stn = converted(MIXES["mixup"])
    first, second = batch(0), batch(1)
    stn.model(first[0])
    prediction = stn.model(second[0])
    found = stn.criterion(prediction, second[1])
    losses = [mixed_loss(prediction, second[1], what.partner, what.share) for what in mixed]
    assert torch.allclose(found, losses[1])
    assert not torch.allclose(found, losses[0])


@pytest.mark.parametrize("compute", [lambda p: p, lambda p: 2.0 * p.float(), lambda p: p.clone()])
def test_each_prediction_has_the_mixing_of_its_pass_whatever_is_computed_from_it(compute, mixed):
    stn = converted(MIXES["mixup"])
    batches = batch(0), batch(1)
    predictions = [compute(stn.model(images)) for images, _ in batches]
    for what, other, prediction, (_, target) in zip(
        mixed, mixed[::-1], predictions, batches, strict=True
    ):
        found = stn.criterion(prediction, target)
        losses = [mixed_loss(prediction, target, m.partner, m.share) for m in (what, other)]
        torch.testing.assert_close(found, losses[0].to(found), rtol=1e-5, atol=1e-5)  # float32
        assert not torch.allclose(found, losses[1].to(found), rtol=1e-3)


def test_evaluation_neither_mixes_nor_forgets(mixed):
    stn = converted(MIXES["mixup"])
    images, target = batch()
    prediction = stn.model(images)
    before = stn.criterion(prediction, target)
    stn.model.eval()
    evaluated = stn.model(images)
    assert torch.equal(stn.criterion(evaluated, target), F.cross_entropy(evaluated, target))
    stn.model.train()
    assert torch.equal(stn.criterion(prediction, target), before)
    assert len(mixed) == 1


# The response step --------------------------------------------------------------------------------


@every_mix
def test_the_response_step_mixes_each_example_at_its_own_strength(name, mixed, monkeypatch):
    stn = converted(MIXES[name])
    epsilon = torch.linspace(-3, 3, BATCH, dtype=torch.float64)[:, None]
    space = stn.hyperparameters
    strengths = space.constrain(space.unconstrained.detach() + epsilon)
    drawn = Perturbation(epsilon, strengths)
    monkeypatch.setattr("stnify.step.training_perturbation", lambda space, size: drawn)
    images, target = batch()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = response_step(stn.model, [(images, target)], stn._tuner.objective)
        (what,) = mixed
        torch.manual_seed(0)
        alone = stn.model._stnify.augment(images, strengths)
    assert torch.equal(what.images, alone.images)
    assert_mixed(name, what, images)
    prediction = linearized_forward(stn.model._stnify.graph, (what.images,), {}, drawn)
    loss = mixed_loss(prediction, target, what.partner, what.share)
    torch.testing.assert_close(found.loss, loss.detach(), **TOLERANCE)
    parameters = list(stn.model.response_parameters().values())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    for one, other in zip(found.gradients.values(), expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    unmixed = torch.autograd.grad(F.cross_entropy(prediction, target), parameters)
    pairs = zip(expected, unmixed, strict=True)
    assert not any(torch.allclose(*pair, rtol=1e-3) for pair in pairs), "targets must count"


def test_a_part_of_the_batch_is_mixed_within_itself(mixed):
    stn = converted(MIXES["mixup"], response_fraction=0.5)
    stn.step(batch())
    general, *response = mixed
    assert len(general.partner) == BATCH
    assert {len(what.partner) for what in response} == {BATCH // 2}


def test_validation_is_not_mixed(mixed):
    stn = converted(MIXES["mixup"])
    images, target = batch()
    result = stn.validation_step((images, target))
    assert mixed == []
    assert result.loss > 0


def test_stronger_mixing_leaves_less_of_ones_own(mixed):
    stn = converted(MIXES["mixup"])
    images, _ = batch()
    kept = {}
    for strength in (0.01, 0.9):
        stn.hyperparameters.set_values({"mixup": strength})
        mixed.clear()
        for _ in range(50):
            stn.model(images)
        kept[strength] = float(torch.stack([what.share.mean() for what in mixed]).mean())
    # E max(s, 1 - s) is about 1 - 0.01 * ln 2 and 0.76; 400 draws of standard deviation < 0.15.
    assert kept[0.01] > 0.97
    assert 0.7 < kept[0.9] < 0.82


# Refusals -----------------------------------------------------------------------------------------


@every_mix
def test_a_loop_that_does_not_mix_targets_is_refused_before_anything_moves(name):
    stn = converted(MIXES[name])
    images, target = batch()
    before = [parameter.clone() for parameter in stn.model.parameters()]
    stn.observe((images, target))
    F.cross_entropy(stn.model(images), target).backward()
    with pytest.raises(UsageError, match=f"hyperparameter '{name}' was declared but the training"):
        stn.optimizer.step()
    assert all(map(torch.equal, stn.model.parameters(), before))


@every_mix
def test_mixing_and_forward_loss_are_refused(name):
    with pytest.raises(DeclarationError, match=rf"'{name}' acts in `stn.criterion`"):
        converted(MIXES[name], criterion=None, forward_loss=lambda model, b: model(b[0]).sum())


@every_mix
def test_predictions_that_are_no_tensor_are_refused(name):
    class Pair(Classifier):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(images), images

    stn = stnify(Pair().double(), [MIXES[name]], criterion=lambda pair, target: pair[0].sum())
    prediction = stn.model(batch()[0])
    with pytest.raises(ShapeError, match="must return one tensor for"):
        stn.criterion(prediction, batch()[1])


@every_mix
def test_targets_that_cannot_be_mixed_are_refused(name):
    stn = converted(MIXES[name])
    prediction = stn.model(batch()[0])
    with pytest.raises(ShapeError, match="class indices must be one for each prediction"):
        stn.criterion(prediction, torch.zeros(BATCH, 2, dtype=torch.long))


@pytest.mark.parametrize("kind", [Mixup, CutMix, HorizontalFlip, Hue])
def test_two_augmentations_of_a_kind_are_refused(kind):
    declared = [kind(), kind(name="again")]
    with pytest.raises(DeclarationError, match="one augmentation of"):
        converted(*declared)


@pytest.mark.parametrize("declaration", [Brightness(), Hue(), RandAugment()])
def test_colours_need_images_between_nought_and_one_or_their_statistics(declaration):
    images = 4 * torch.rand(BATCH, 3, SIDE, SIDE) - 2
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 3))
    stn = stnify(model, [declaration], seed=0)
    with pytest.raises(ShapeError, match=r"must be in \[0, 1\] for colour operations"):
        stn.model(images)
    stats = ((0.5,) * 3, (0.25,) * 3)
    told = stnify(model, [declaration], seed=0, input_stats=stats)
    assert told.model(images).isfinite().all()


def test_augmentations_need_images():
    stn = stnify(nn.Linear(3, 3), [HorizontalFlip()], seed=0)
    with pytest.raises(ShapeError, match="augmentation must get images of shape"):
        stn.model(torch.rand(2, 3))
