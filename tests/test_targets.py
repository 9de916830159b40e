"""Smoothed and mixed targets, against PyTorch's own cross-entropy and the slow loop."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import batches, convert, perceptron
from torch import nn

from stnify import (
    ConfidencePenalty,
    CutMix,
    DeclarationError,
    LabelSmoothing,
    Mixup,
    ShapeError,
    stnify,
)
from stnify.perturb import Perturbation
from stnify.step import response_step
from stnify.targets import (
    CrossEntropy,
    Mixing,
    at_targets,
    class_dimension,
    has_classes,
    of_rows,
    smoothed,
)

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
    with pytest.raises(ShapeError, match=rf"got targets \({len(target)}, {CLASSES}\) for"):
        smoothed(torch.eye(CLASSES).long()[torch.zeros(len(target)).long()], logits, half)
    with pytest.raises(ShapeError, match="of two classes or more"):
        smoothed(target.double(), logits[:, :1], half)


@pytest.mark.parametrize("declaration", [LabelSmoothing(), ConfidencePenalty()])
@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss(), F.mse_loss, nn.HuberLoss(delta=2)])
def test_criteria_without_classes_are_refused(criterion, declaration):
    assert not has_classes(criterion)
    assert has_classes(nn.CrossEntropyLoss())
    assert CrossEntropy.of(criterion) is None
    with pytest.raises(DeclarationError, match=f"'{declaration.name}' acts on classes of which"):
        stnify(perceptron(), [declaration], criterion=criterion)


@pytest.mark.parametrize("declaration", [LabelSmoothing(), Mixup(), CutMix()])
@pytest.mark.parametrize("criterion", [nn.NLLLoss(), F.nll_loss, partial(F.nll_loss, weight=None)])
def test_criteria_of_indices_alone_are_refused_where_targets_become_probabilities(
    criterion, declaration
):
    message = f"'{declaration.name}' makes probabilities of targets.*CrossEntropyLoss"
    with pytest.raises(DeclarationError, match=message):
        stnify(perceptron(), [declaration], criterion=criterion)
    assert stnify(perceptron(), [ConfidencePenalty()], criterion=criterion)


@pytest.mark.parametrize("ignored", [-100, CLASSES])
def test_ignored_targets_that_a_criterion_of_ones_own_would_get_are_refused(ignored):
    logits, target = batch((6,), ignored)
    mixing = Mixing(torch.arange(6), torch.full((6,), 0.7).double())
    for smoothing, mixed in ((torch.tensor(0.1), None), (None, mixing)):
        with pytest.raises(ShapeError, match=rf"from 0 to 3, but some are {ignored}.*ignore_index"):
            at_targets(lambda p, t: F.cross_entropy(p, t), logits, target, smoothing, mixed)


# Where classes are --------------------------------------------------------------------------------


def own(prediction, target):
    """A criterion nothing is known of."""
    return F.mse_loss(prediction, target)


@pytest.mark.parametrize(
    ("criterion", "shape", "target", "expected"),
    [
        (F.cross_entropy, (6, 4, 5), (6, 5), 1),
        (F.cross_entropy, (6, 5, 5), (6, 5), 1),
        (nn.NLLLoss(), (6, 5, 5), (6, 5), 1),
        (own, (6, 4), (6,), 1),
        (own, (6, 4, 5), (6, 5), 1),
        (own, (6, 5, 4), (6, 5), 2),
        (own, (6, 4, 3, 5), (6, 3, 5), 1),
        (own, (6, 3, 5, 4), (6, 3, 5), 3),
    ],
)
def test_classes_are_where_the_criterion_has_them(criterion, shape, target, expected):
    found = class_dimension(criterion, torch.zeros(shape), torch.zeros(target, dtype=torch.long))
    assert found == expected


@pytest.mark.parametrize(
    "target", [torch.zeros(6, 5).long(), torch.zeros(30).long(), torch.zeros(6, 5, 5), None]
)
def test_classes_that_may_be_here_or_there_are_refused(target):
    with pytest.raises(ShapeError, match=r"which dimension of predictions \(6, 5, 5\) counts"):
        class_dimension(own, torch.zeros(6, 5, 5), target)


def test_classes_in_the_last_dimension_are_smoothed_there():
    logits, target = batch((6, 5))
    value = torch.linspace(0, 0.5, 6, dtype=torch.float64)

    def last(prediction, target):
        return F.cross_entropy(prediction.movedim(-1, 1), target.movedim(-1, 1))

    found = at_targets(last, logits.movedim(1, -1), target, value, None)
    torch.testing.assert_close(
        found, at_targets(nn.CrossEntropyLoss(), logits, target, value, None)
    )


# Several rows for each example --------------------------------------------------------------------


class Language(nn.Module):
    """Predicts words, as (batch, classes, steps) or flattened, rows (batch * steps, classes)."""

    def __init__(self, flat):
        super().__init__()
        self.flat = flat
        self.words = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, words):
        logits = self.head(self.words(words).tanh())
        return logits.flatten(0, 1) if self.flat else logits.transpose(1, 2)


def own_cross_entropy(prediction, target):
    return F.cross_entropy(prediction, target)


@pytest.mark.parametrize("criterion", [F.cross_entropy, own_cross_entropy])
@pytest.mark.parametrize("kind", [LabelSmoothing, ConfidencePenalty])
def test_rows_of_a_flattened_prediction_have_the_value_of_their_example(
    kind, criterion, monkeypatch
):
    words = torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(0))
    losses = []
    for flat in (True, False):
        torch.manual_seed(0)
        model = Language(flat).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"optimizer": optimizer, "criterion": criterion}
        stn = stnify(model, [kind(init=0.2)], seed=0, **options)
        batch = (words, words.flatten() if flat else words)
        stn.step(batch)
        values = torch.linspace(0.05, 0.45, 4).double()[:, None]
        for order in (values, values.flip(0)):
            drawn = Perturbation(torch.zeros(4, 1).double(), order)
            monkeypatch.setattr("stnify.step.training_perturbation", lambda *_, d=drawn: d)
            losses.append(response_step(stn.model, [batch], stn._tuner.objective).loss)
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(losses[1], losses[3])
    assert not torch.allclose(losses[0], losses[1]), "whose value it is must count"


def test_rows_that_are_no_multiple_of_the_batch_take_the_mean():
    values = torch.tensor([0.1, 0.3])
    assert of_rows(values, 4).tolist() == pytest.approx([0.1, 0.1, 0.3, 0.3])
    assert of_rows(values, 3).tolist() == pytest.approx([0.2])
    assert of_rows(values[0], 3).shape == ()


def test_rows_of_a_mixed_example_are_mixed_with_those_of_its_partner():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, CLASSES, 2, generator=generator).double()
    target = torch.randint(CLASSES, (3, 2), generator=generator)
    mixing = Mixing(torch.tensor([2, 0, 1]), torch.tensor([0.6, 0.9, 0.7]).double())
    whole = at_targets(nn.CrossEntropyLoss(), logits, target, None, mixing)
    flat, classes = logits.transpose(1, 2).flatten(0, 1), target.flatten()
    for criterion in (nn.CrossEntropyLoss(), own_cross_entropy):
        torch.testing.assert_close(at_targets(criterion, flat, classes, None, mixing), whole)
    assert not torch.allclose(F.cross_entropy(flat, classes), whole)
    with pytest.raises(ShapeError, match=r"for each of the 3 examples that were mixed.* are 5"):
        at_targets(own_cross_entropy, flat[:5], classes[:5], None, mixing)


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
