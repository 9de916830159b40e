"""Smoothed and mixed targets, against PyTorch's own cross-entropy and the slow loop."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import batches, convert, perceptron
from torch import nn

from stnify import DeclarationError, LabelSmoothing, Mixup, ShapeError, stnify
from stnify.targets import CrossEntropy, Mixing, at_targets, has_classes, smoothed

CLASSES = 4
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
CRITERIA = {
    "plain": {},
    "weighted": {"weight": WEIGHT},
    "ignoring": {"ignore_index": 255},
    "ignoring a class": {"ignore_index": 2},
    "sum": {"reduction": "sum", "weight": WEIGHT},
    "smoothed": {"label_smoothing": 0.2, "weight": WEIGHT, "ignore_index": 1},
}
SHAPES = {"classification": (6,), "segmentation": (6, 3, 5)}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def batch(shape, ignored=None):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, shape, generator=generator)
    if ignored is not None:
        target[1] = ignored
    logits = torch.randn(shape[0], CLASSES, *shape[1:], generator=generator, dtype=torch.float64)
    return logits, target


def built(settings, way):
    if way == "module":
        return nn.CrossEntropyLoss(**settings)
    return partial(F.cross_entropy, **settings)


@every_shape
@pytest.mark.parametrize("way", ["module", "partial"])
@pytest.mark.parametrize("name", CRITERIA)
def test_one_smoothing_is_pytorchs(shape, name, way):
    settings = dict(CRITERIA[name])
    logits, target = batch(shape, settings.get("ignore_index"))
    value = torch.tensor(0.3, dtype=torch.float64)
    found = at_targets(built(settings, way), logits, target, value, None)
    fixed = settings.pop("label_smoothing", 0.0)
    both = fixed + 0.3 * (1 - fixed)  # one after the other
    expected = F.cross_entropy(logits, target, label_smoothing=both, **settings)
    torch.testing.assert_close(found, expected)
    other = F.cross_entropy(logits, target, label_smoothing=fixed, **settings)
    assert not torch.allclose(found, other)


@every_shape
@pytest.mark.parametrize("name", CRITERIA)
def test_each_example_has_a_smoothing_and_a_mixture_of_its_own(shape, name):
    """The slow loop: every example by itself, its own and its partner's target."""
    settings = CRITERIA[name]
    logits, target = batch(shape, settings.get("ignore_index"))
    rows = torch.arange(len(target))
    values, shares = (rows / 10).double(), (1 - rows / 20).double()
    mixing = Mixing(rows.flip(0), shares)
    found = at_targets(nn.CrossEntropyLoss(**settings), logits, target, values, mixing)
    weight, ignored = settings.get("weight"), settings.get("ignore_index", -100)
    fixed, total, count = settings.get("label_smoothing", 0.0), 0.0, 0.0
    for i in range(len(target)):
        for which, share in ((target[i], shares[i]), (target[mixing.partner[i]], 1 - shares[i])):
            one = partial(
                F.cross_entropy,
                logits[i : i + 1],
                which[None],
                weight=weight,
                ignore_index=ignored,
                reduction="sum",
            )
            smoothing = fixed + float(values[i]) * (1 - fixed)
            total = total + share * one(label_smoothing=smoothing)
            kept = which[which != ignored]
            count = count + share * (len(kept) if weight is None else weight[kept].sum())
    expected = total if settings.get("reduction") == "sum" else total / count
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        at_targets(nn.CrossEntropyLoss(**settings), logits, target, None, mixing),
        at_targets(nn.CrossEntropyLoss(**settings), logits, target, 0 * values, mixing),
    )


@every_shape
def test_other_criteria_receive_probabilities(shape):
    logits, target = batch(shape)
    value = torch.linspace(0, 0.5, len(target), dtype=torch.float64)
    found = at_targets(lambda p, t: F.cross_entropy(p, t), logits, target, value, None)
    torch.testing.assert_close(
        found, at_targets(nn.CrossEntropyLoss(), logits, target, value, None)
    )
    probabilities = smoothed(target, logits, value)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(shape, dtype=torch.float64))


@every_shape
def test_targets_must_be_classes(shape):
    logits, target = batch(shape)
    half = torch.tensor(0.5)
    with pytest.raises(ShapeError, match="one for each prediction to be mixed or smoothed"):
        at_targets(nn.CrossEntropyLoss(), logits, target[1:], half, None)
    with pytest.raises(ShapeError, match="needs class indices, or a probability for each logit"):
        smoothed(target.double(), logits, half)
    with pytest.raises(ShapeError, match="of two classes or more"):
        smoothed(target.double(), logits[:, :1], half)


@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss(), F.mse_loss, nn.HuberLoss(delta=2)])
def test_criteria_without_classes_are_refused(criterion):
    assert not has_classes(criterion)
    assert has_classes(nn.CrossEntropyLoss())
    assert CrossEntropy.of(criterion) is None
    with pytest.raises(DeclarationError, match="'label_smoothing' spreads a target over classes"):
        stnify(perceptron(), [LabelSmoothing()], criterion=criterion)


@pytest.mark.parametrize("way", ["module", "partial"])
def test_a_loss_for_each_target_is_no_loss(way):
    stn = convert(perceptron(), [LabelSmoothing()], criterion=built({"reduction": "none"}, way))
    with pytest.raises(ShapeError, match="`criterion` must return one number"):
        stn.step(next(iter(batches())))


def test_several_predictions_keep_their_partners():
    """The criterion of a prediction uses the mixture of that prediction, not the latest's."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    stn = stnify(model, [Mixup(init=0.9)], criterion=F.cross_entropy, seed=0)
    images, target = torch.rand(6, 3, 2, 2), torch.randint(CLASSES, (6,))
    stn.model.train()
    first = stn.model(images)
    alone = stn.criterion(first, target)
    second = stn.model(images)
    assert torch.equal(stn.criterion(first, target), alone)
    assert not torch.equal(stn.criterion(second, target), alone)


def test_ignored_targets_train():
    stn = convert(perceptron(), [LabelSmoothing()], criterion=nn.CrossEntropyLoss(ignore_index=2))
    for inputs, target in batches():
        stn.step((inputs, target))
    assert stn.counters.skipped_responses == 0
