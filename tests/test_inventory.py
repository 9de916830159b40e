"""What regularises a run is found wherever it is, once, and what acts twice is said."""

import builtins
import functools
import random
import re
import warnings

import pytest
import timm
import timm.data.loader
import timm.data.mixup
import timm.loss
import timm.optim
import torch
import torch.nn.functional as F
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from cases import BranchingNetwork, batches, convert, perceptron
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from stnify import (
    AttentionDropout,
    Brightness,
    DropConnect,
    Dropout,
    DropPath,
    GaussianNoise,
    HorizontalFlip,
    Hyperparameter,
    JacobianPenalty,
    LabelSmoothing,
    Mixup,
    RandAugment,
    RandomErasing,
    Rotate,
    Scale,
    Translate,
    WeightDecay,
    declare,
    stnify,
)
from stnify.inventory import Regularizer, doubled, inventory, repeated, table

KIND_NAMES = {
    name
    for name, kind in vars(declare).items()
    if isinstance(kind, type)
    and issubclass(kind, declare.Declaration)
    and getattr(kind, "__final__", False)
} - {"Hyperparameter"}
DECAY = (WeightDecay(init=0.1),)


def plan_of(model, declared=DECAY):
    return stnify(model, declared).plan


def fixed(model=None, *others, declared=DECAY):
    """What is found fixed, as ``(where, kind, value)``."""
    model = perceptron() if model is None else model
    found = inventory(model, plan_of(model, declared), *others)
    assert all(len(r.where) == 1 and not r.name for r in found if r.status == "fixed")
    return [(r.where[0], r.kind, r.value) for r in found if r.status == "fixed"]


# In the model -------------------------------------------------------------------------------------


class BeitDropPath(nn.Module):
    """Stochastic depth as a library that is not known by name has it."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, inputs):
        return inputs


class WordDrop(BeitDropPath):
    """A kind of noise nobody knows."""


class LSTM(nn.Module):
    """Has its name in common with PyTorch's."""

    def forward(self, inputs):
        return inputs


def with_noise(*noise):
    return nn.Sequential(nn.Linear(6, 6), *noise, nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("module", "kind", "value"),
    [
        (nn.Dropout(0.1), "Dropout", 0.1),
        (nn.Dropout2d(0.2), "Dropout", 0.2),
        (nn.FeatureAlphaDropout(0.3), "AlphaDropout", 0.3),
        (nn.MultiheadAttention(6, 2, dropout=0.4), "AttentionDropout", 0.4),
        (nn.LSTM(6, 6, 2, dropout=0.5), "Dropout", 0.5),
        (timm.layers.DropPath(0.1), "DropPath", 0.1),
        (timm.layers.DropBlock2d(0.2), "DropBlock", 0.2),
        (timm.layers.PatchDropout(0.3), "PatchDropout", 0.3),
        (BeitDropPath(0.4), "DropPath", 0.4),
        (WordDrop(0.5), "WordDrop", 0.5),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, nn.Module) else "",
)
def test_noise_that_is_not_tuned_is_fixed(module, kind, value):
    # It is not called with sensible inputs: a conversion without example inputs runs nothing.
    assert fixed(with_noise(module)) == [("1", kind, value)]


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.0),
        nn.LSTM(6, 6),
        nn.MultiheadAttention(6, 2),
        BeitDropPath(None),
        LSTM(),
        nn.ReLU(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_does_nothing_is_not_found(module):
    assert fixed(with_noise(module)) == []


def test_what_is_tuned_is_not_fixed():
    model = with_noise(nn.Dropout(0.1), nn.Dropout(0.2))
    assert fixed(model, declared=[Dropout()]) == []
    assert fixed(model, declared=[Dropout(exclude="2")]) == [("2", "Dropout", 0.2)]
    # What is put behind a dropout leaves that one as it is.
    assert fixed(model, declared=[Dropout(after="2", init=0.3)]) == [
        ("1", "Dropout", 0.1),
        ("2", "Dropout", 0.2),
    ]


def test_attention_and_modules_that_are_not_traced_can_be_tuned_or_fixed():
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 12, dropout=0.2), nn.Linear(6, 3))
    everything = [(f"0.{name}", "Dropout", 0.2) for name in ("dropout", "dropout1", "dropout2")]
    attention = ("0.self_attn", "AttentionDropout", 0.2)
    assert fixed(model) == [attention, *everything]
    assert fixed(model, declared=[AttentionDropout()]) == everything
    assert fixed(model, declared=[Dropout()]) == [attention]
    branching = BranchingNetwork()
    branching.drop.p = 0.4
    assert fixed(branching) == [("drop", "Dropout", 0.4)]
    assert fixed(branching, declared=[Dropout()]) == []


class Functional(nn.Module):
    """Drops by functions, and holds modules whose numbers it reads or that it never calls."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.attn_drop, self.unused = nn.Dropout(0.3), nn.Dropout(0.4)

    def forward(self, inputs):
        hidden = F.dropout(self.first(inputs), 0.1, self.training)
        hidden = F.dropout(F.dropout(hidden, 0.6, training=False), p=0.0)
        hidden = hidden.unflatten(1, (3, 2))
        hidden = F.scaled_dot_product_attention(
            hidden, hidden, hidden, dropout_p=self.attn_drop.p if self.training else 0.0
        )
        return self.last(hidden.flatten(1))


def test_functions_count_where_they_are_called_and_modules_that_are_not_called_do_not():
    model = nn.Sequential(Functional())
    assert fixed(model) == [
        ("0.dropout", "Dropout", 0.1),
        ("0.scaled_dot_product_attention", "AttentionDropout", 0.3),
    ]
    assert fixed(model, declared=[AttentionDropout()]) == [("0.dropout", "Dropout", 0.1)]
    assert fixed(model, declared=[Dropout(), AttentionDropout()]) == []


def test_a_transformer_of_timm_has_each_of_its_rates_once():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=2,
        num_classes=5,
        proj_drop_rate=0.1,
        attn_drop_rate=0.2,
        drop_path_rate=0.3,
    )
    by_kind: dict[str, list[tuple[str, float]]] = {}
    for where, kind, value in fixed(model):
        by_kind.setdefault(kind, []).append((where, value))
    attention = [(f"blocks.{i}.attn.scaled_dot_product_attention", 0.2) for i in (0, 1)]
    assert by_kind.pop("AttentionDropout") == attention
    assert by_kind.pop("DropPath") == [
        (f"blocks.1.drop_path{i}", pytest.approx(0.3, rel=1e-6))  # timm computes it in float32
        for i in (1, 2)
    ]
    places = ("attn.proj_drop", "mlp.drop1", "mlp.drop2")
    assert by_kind == {"Dropout": [(f"blocks.{i}.{p}", 0.1) for i in (0, 1) for p in places]}


# In the optimizer ---------------------------------------------------------------------------------


def test_each_group_has_a_decay_of_its_own():
    model = perceptron()
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.01},
        {"params": [model[0].bias], "weight_decay": 0.0},
        {"params": [*model[2].parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.02)
    idle = [Hyperparameter("idle", 0.5, (0.0, 1.0))]
    assert fixed(model, optimizer, declared=idle) == [
        ("optimizer.param_groups.0", "WeightDecay", 0.01),
        ("optimizer.param_groups.2", "WeightDecay", 0.02),
    ]


@pytest.mark.parametrize(
    ("kind", "decoupled"),
    [
        (torch.optim.SGD, False),
        (torch.optim.Adam, False),
        (torch.optim.AdamW, True),
        (functools.partial(torch.optim.NAdam, decoupled_weight_decay=True), True),
        (timm.optim.SGDW, True),
        (timm.optim.AdaBelief, True),
    ],
    ids=["SGD", "Adam", "AdamW", "NAdam", "timm SGDW", "timm AdaBelief"],
)
def test_a_decoupled_decay_is_called_one(kind, decoupled):
    model = perceptron()
    ((where, _, value),) = fixed(model, kind(model.parameters(), lr=0.1, weight_decay=0.3))
    assert ("decoupled" in where, value) == (decoupled, 0.3)


def test_a_tuned_decay_takes_the_place_of_the_optimizers_own():
    model = perceptron()
    weights = {"params": [m.weight for m in (model[0], model[2])], "weight_decay": 0.01}
    biases = {"params": [m.bias for m in (model[0], model[2])], "weight_decay": 0.02}
    stn = convert(model, [WeightDecay()], torch.optim.AdamW([weights, biases], lr=0.1))
    decays = [r for r in stn.regularizers() if r.kind == "WeightDecay"]
    assert decays[0].status == "tuned"
    assert decays[0].where == ("0.weight", "2.weight")
    assert decays[0].value == pytest.approx(0.01, rel=1e-6)  # float32
    (left,) = decays[1:]
    expected = ("optimizer.param_groups.1 (decoupled)",)
    assert (left.where, left.value, left.status) == (expected, 0.02, "fixed")


# In the criterion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), [("criterion", "LabelSmoothing", 0.1)]),
        (
            functools.partial(F.cross_entropy, label_smoothing=0.2),
            [("criterion", "LabelSmoothing", 0.2)],
        ),
        (timm.loss.LabelSmoothingCrossEntropy(0.3), [("criterion", "LabelSmoothing", 0.3)]),
        (
            timm.loss.JsdCrossEntropy(smoothing=0.4),
            [("criterion.cross_entropy_loss", "LabelSmoothing", 0.4)],
        ),
        (nn.CrossEntropyLoss(), []),
        (timm.loss.SoftTargetCrossEntropy(), []),
        (functools.partial(F.cross_entropy, reduction="mean"), []),
        (F.cross_entropy, []),
        (None, []),
    ],
)
def test_a_criterion_may_smooth_labels(criterion, expected):
    assert fixed(None, None, criterion) == expected


# In the loader ------------------------------------------------------------------------------------


class Images(Dataset):
    """A dataset that must not be read."""

    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return 6

    def __getitem__(self, index):
        raise AssertionError("an example was drawn")


class RandomImages(Images):
    """Random is part of its name, but it is no transform."""


class Obliging(dict):
    """Has an attribute of any name, a new one each time."""

    def __getattr__(self, name):
        return Obliging()


def loader(*transforms, **options):
    return DataLoader(Images(v1.Compose(transforms)), batch_size=2, **options)


TRANSFORMS = {
    "v1 flip": (v1.RandomHorizontalFlip(0.3), [("HorizontalFlip", 0.3)]),
    "v2 flip": (v2.RandomHorizontalFlip(0.4), [("HorizontalFlip", 0.4)]),
    "v1 crop": (v1.RandomCrop(32, padding=4), [("Translate", 4.0)]),
    "v2 crop": (v2.RandomCrop(32, padding=4), [("Translate", "(4, 4, 4, 4)")]),
    "crop of more": (v1.RandomCrop(32), [("Translate", "(32, 32)")]),
    "v1 resized crop": (v1.RandomResizedCrop(32), [("Scale", "(0.08, 1.0)")]),
    "v1 jitter": (
        v1.ColorJitter(0.5, hue=0.25),
        [("Brightness", "(0.5, 1.5)"), ("Hue", "(-0.25, 0.25)")],
    ),
    "v2 jitter": (v2.ColorJitter(saturation=(0.5, 2)), [("Saturation", "(0.5, 2.0)")]),
    "v1 affine": (
        v1.RandomAffine(30, (0.1, 0.2), shear=10),
        [("Rotate", "(-30.0, 30.0)"), ("Translate", "(0.1, 0.2)"), ("Shear", "(-10.0, 10.0)")],
    ),
    "v2 affine": (v2.RandomAffine(0, scale=(0.5, 1.5)), [("Scale", "(0.5, 1.5)")]),
    "v1 rotation": (v1.RandomRotation(15), [("Rotate", "(-15.0, 15.0)")]),
    "v1 erasing": (v1.RandomErasing(0.2), [("RandomErasing", 0.2)]),
    "v2 erasing": (v2.RandomErasing(0.2), [("RandomErasing", 0.2)]),
    "v1 RandAugment": (v1.RandAugment(magnitude=7), [("RandAugment", 7.0)]),
    "v2 TrivialAugment": (v2.TrivialAugmentWide(), [("RandAugment", None)]),
    "v2 noise": (v2.GaussianNoise(sigma=0.2), [("GaussianNoise", 0.2)]),
    "unknown to stnify": (v1.RandomSolarize(128, p=0.2), [("RandomSolarize", 0.2)]),
    "nought": (v1.RandomHorizontalFlip(0.0), []),
    "empty jitter": (v1.ColorJitter(), []),
    "turned by nothing": (v1.RandomRotation(0), []),
    "preparation": (v1.Normalize(0.5, 0.5), []),
}
"""A transform, and what it is found to do."""


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_known(name):
    transform, expected = TRANSFORMS[name]
    found = fixed(None, None, None, loader(v1.ToTensor(), transform))
    assert [(kind, value) for _, kind, value in found] == expected
    place = f"train_loader.dataset.transform.transforms.1 ({type(transform).__name__})"
    assert {where for where, _, _ in found} <= {place}


OF_MODULES = {
    "nothing": lambda t: t,
    "sequential": lambda t: nn.Sequential(nn.Identity(), t),
    "apply modules": lambda t: v1.RandomApply(nn.ModuleList([t])),
}
WRAPPERS = {
    "v1 compose": lambda t: v1.Compose([v1.ToTensor(), t]),
    "v2 compose": lambda t: v2.Compose([t]),
    "apply": lambda t: v1.RandomApply([t], 0.3),
    "choice": lambda t: v2.RandomChoice([t, v2.Identity()]),
    "lambda": lambda t: v1.Lambda(lambda image: t(image)),
    "partial": lambda t: functools.partial(t),
}
DATASETS = {
    "subset": lambda d: Subset(d, [0, 1]),
    "concatenation": lambda d: ConcatDataset([Images(), d]),
}


@settings(max_examples=40)
@given(
    leaf=st.sampled_from(["v1 flip", "v2 erasing", "v1 jitter", "preparation"]),
    inner=st.sampled_from(sorted(OF_MODULES)),
    around=st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=4),
    datasets=st.lists(st.sampled_from(sorted(DATASETS)), max_size=3),
)
def test_transforms_are_found_through_whatever_holds_them(leaf, inner, around, datasets):
    transform, expected = TRANSFORMS[leaf]
    transform = OF_MODULES[inner](transform)
    for name in around:
        transform = WRAPPERS[name](transform)
    dataset: Dataset = Images(transform)
    for name in datasets:
        dataset = DATASETS[name](dataset)
    found = fixed(None, None, None, DataLoader(dataset))
    assert [(kind, value) for _, kind, value in found] == expected


def test_batches_may_be_mixed_by_the_collate_function():
    mixed = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=3), v2.CutMix(num_classes=3)])

    def collate(examples):
        return mixed(*torch.utils.data.default_collate(examples))

    expected = [("Mixup", 0.2), ("CutMix", 1.0)]
    found = fixed(None, None, None, loader(collate_fn=collate))
    assert [(kind, value) for _, kind, value in found] == expected
    assert found[0][0] == "train_loader.collate_fn.mixed.transforms.0 (MixUp)"
    fast = timm.data.mixup.FastCollateMixup(0.4, label_smoothing=0.1)
    found = fixed(None, None, None, loader(collate_fn=fast))
    place = "train_loader.collate_fn (FastCollateMixup)"
    assert found == [(place, "Mixup", 0.4), (place, "LabelSmoothing", 0.1)]


def test_loaders_of_timm():
    transform = timm.data.create_transform(
        32, is_training=True, auto_augment="rand-m9", re_prob=0.25, color_jitter=0.4
    )
    found = fixed(None, None, None, DataLoader(Images(transform)))
    assert {kind: value for _, kind, value in found} == {
        "Scale": "(0.08, 1.0)",
        "HorizontalFlip": 0.5,
        "RandAugment": None,
        "RandomErasing": 0.25,
    }
    prefetching = timm.data.loader.PrefetchLoader(loader(), device=torch.device("cpu"), re_prob=0.3)
    place = "train_loader.random_erasing (RandomErasing)"
    assert fixed(None, None, None, prefetching) == [(place, "RandomErasing", 0.3)]


@pytest.mark.parametrize(
    "plain",
    [
        [(torch.ones(2, 6), torch.ones(2))],
        DataLoader(RandomImages()),
        DataLoader(Images(Obliging())),
        iter(()),
        None,
    ],
    ids=["list", "random by name", "obliging", "iterator", "none"],
)
def test_a_loader_without_transforms_has_none(plain):
    assert fixed(None, None, None, plain) == []


def test_nothing_is_drawn_imported_or_changed(monkeypatch):
    def refused(name, *rest):
        raise AssertionError(f"{name} was imported")

    model, plan = perceptron(0.2), plan_of(perceptron(0.2))
    optimizer = torch.optim.AdamW(model.parameters())
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    data = loader(v1.RandomCrop(32, padding=4), v1.RandomErasing(), shuffle=True)
    states = torch.get_rng_state(), random.getstate()
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", refused)
        found = inventory(model, plan, optimizer, criterion, data)
    assert len([r for r in found if r.status == "fixed"]) == 5
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# Tuned and absent ---------------------------------------------------------------------------------


def test_what_is_tuned_is_listed_with_its_places():
    model = perceptron(0.2)
    own = Hyperparameter("own", 0.5, (0.0, 1.0))
    declared = [Dropout(), DropConnect(init=0.1), WeightDecay(), Brightness(), own]
    found = inventory(model, plan_of(model, [*declared, JacobianPenalty()]))
    assert [r for r in found if r.status == "tuned"] == [
        Regularizer(("2",), "Dropout", pytest.approx(0.2), "tuned", "dropout"),
        Regularizer(("0.weight", "3.weight"), "DropConnect", 0.1, "tuned", "drop_connect"),
        Regularizer(("0.weight", "3.weight"), "WeightDecay", 5e-4, "tuned", "weight_decay"),
        Regularizer(("input",), "Brightness", 0.05, "tuned", "brightness"),
        Regularizer(("loss",), "Hyperparameter", 0.5, "tuned", "own"),
        Regularizer(("loss",), "JacobianPenalty", 1e-3, "tuned", "jacobian_penalty"),
    ]


def test_every_kind_is_present_or_absent():
    data = loader(v1.RandomHorizontalFlip(), v1.RandomVerticalFlip())
    model = with_noise(nn.Dropout(0.0), nn.AlphaDropout(0.1))
    found = inventory(model, plan_of(model), None, nn.CrossEntropyLoss(), data)
    present = {r.kind for r in found if r.status != "absent"}
    assert present == {"WeightDecay", "AlphaDropout", "HorizontalFlip", "RandomVerticalFlip"}
    absent = [r.kind for r in found if r.status == "absent"]
    assert set(absent) == KIND_NAMES - present
    assert len(absent) == len(set(absent))
    assert all(r.value is None and not r.where for r in found if r.status == "absent")


# Twice --------------------------------------------------------------------------------------------

JITTER = v1.ColorJitter(brightness=0.5)
TWICE = {
    "jitter": (Brightness(), {"train_loader": loader(JITTER)}),
    "flip": (HorizontalFlip(), {"train_loader": loader(v2.RandomHorizontalFlip())}),
    "erasing": (RandomErasing(), {"train_loader": loader(v1.RandomErasing())}),
    "crop": (Translate(), {"train_loader": loader(v1.RandomCrop(32, padding=4))}),
    "resized crop": (Scale(), {"train_loader": loader(v1.RandomResizedCrop(32))}),
    "rotation": (Rotate(), {"train_loader": loader(v1.RandomRotation(10))}),
    "RandAugment": (RandAugment(), {"train_loader": loader(v1.RandAugment())}),
    "noise": (GaussianNoise(), {"train_loader": loader(v2.GaussianNoise())}),
    "mixup": (
        Mixup(),
        {"train_loader": loader(collate_fn=timm.data.mixup.FastCollateMixup(0.2, num_classes=3))},
    ),
    "smoothing": (LabelSmoothing(), {"criterion": nn.CrossEntropyLoss(label_smoothing=0.1)}),
}
"""What is tuned, and arguments that have it fixed as well."""


@pytest.mark.parametrize("name", TWICE)
def test_what_acts_twice_is_said_where_stnify_is_called(name):
    declared, options = TWICE[name]
    (place,) = options
    pattern = rf"{type(declared).__name__} is tuned as '{declared.name}' at .* in {place}"
    with pytest.warns(UserWarning, match=pattern) as caught:
        stnify(perceptron(), [declared], **options)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stnify(perceptron(), [declared])
        stnify(perceptron(), [WeightDecay()], **options)


def test_each_place_has_a_message_of_its_own():
    data = loader(JITTER, v1.RandomHorizontalFlip(0.25))
    declared = [Brightness(), HorizontalFlip(name="mirror")]
    found = inventory(perceptron(), plan_of(perceptron(), declared), None, None, data)
    brightness, mirror = doubled(found)
    assert brightness == (
        "a regulariser should act in one place, but Brightness is tuned as 'brightness' at input "
        "and fixed at (0.5, 1.5) in train_loader.dataset.transform.transforms.0 (ColorJitter): "
        "both act, and no tuned value undoes the fixed one. Take it out there, or do not declare "
        "'brightness'."
    )
    assert re.search("HorizontalFlip is tuned as 'mirror' .* fixed at 0.25 in", mirror)


def test_a_model_may_have_a_kind_tuned_here_and_fixed_there():
    model = with_noise(nn.Dropout(0.1), nn.Dropout(0.2))
    optimizer = torch.optim.AdamW([model[0].bias], weight_decay=0.1)
    declared = [Dropout(exclude="2"), WeightDecay()]
    assert doubled(inventory(model, plan_of(model, declared), optimizer)) == []


def vit(rate):
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=2,
        embed_dim=16,
        num_heads=2,
        num_classes=4,
        drop_path_rate=rate,
    )


def test_a_branch_with_a_drop_path_of_its_own_is_warned_of():
    message = "'drop_path' is put behind blocks.1.drop_path1 and 1 more, fixed noise of its kind"
    with pytest.warns(UserWarning, match=message):
        stnify(vit(0.2), [DropPath(at="residual")])
    for rate, declared in ((0.2, DropPath()), (0.0, DropPath(at="residual"))):
        plan = plan_of(vit(rate), [declared])  # a warning would be an error
        assert repeated(inventory(vit(rate), plan), plan) == []


def test_the_optimizers_decay_is_there_for_what_is_not_tuned():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    optimizer.add_param_group({"params": [extra := nn.Parameter(torch.zeros(2))]})
    model[0].extra = extra
    found = inventory(model, plan_of(model, [WeightDecay(at="1")]), optimizer)
    assert [r.where for r in found if r.kind == "WeightDecay" and r.status == "fixed"] == [
        ("optimizer.param_groups.0 (decoupled, 3 of 4 tensors)",),
        ("optimizer.param_groups.1 (decoupled)",),
    ]
    groups = [{"params": [model[1].weight], "weight_decay": 0.1}]
    tuned = inventory(model, plan_of(model, [WeightDecay(at="1")]), torch.optim.SGD(groups))
    assert [r.status for r in tuned if r.kind == "WeightDecay"] == ["tuned"]


# Report -------------------------------------------------------------------------------------------


def test_the_report_has_a_table_with_the_values_of_now():
    model = with_noise(nn.Dropout(0.1), nn.AlphaDropout(0.25))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.125)
    stn = convert(model, [Dropout(), WeightDecay()], optimizer, criterion=criterion)
    stn.hyperparameters.set_values({"dropout": 0.375})
    assert [r.value for r in stn.regularizers() if r.kind == "Dropout"] == pytest.approx([0.375])
    lines = stn.report().splitlines()
    start = lines.index("regulariser     status  value   where")
    assert lines[start + 1 : start + 5] == [
        "dropout         tuned   0.375   1",
        "weight_decay    tuned   0.0005  0.weight and 1 more",
        "AlphaDropout    fixed   0.25    2",
        "LabelSmoothing  fixed   0.125   criterion",
    ]
    absent = set(lines[start + 5].removeprefix("absent: ").split(", "))
    assert absent == KIND_NAMES - {"Dropout", "WeightDecay", "AlphaDropout", "LabelSmoothing"}


def test_a_table_of_what_cannot_be_told_and_of_nothing_absent():
    found = [Regularizer(("train_loader (AutoAugment)",), "RandAugment", None, "fixed")]
    assert table(found).splitlines() == [
        "regulariser  status  value  where",
        "RandAugment  fixed   ?      train_loader (AutoAugment)",
        "absent: none",
    ]


def test_a_model_has_one_row_for_what_it_has_of_a_kind():
    paths = [timm.layers.DropPath(rate) for rate in (0.1, 0.3, 0.2)]
    model = with_noise(nn.Dropout(0.5), *paths, nn.Dropout(0.5))
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.1},
        {"params": [model[-1].weight], "weight_decay": 0.2},
    ]
    data = loader(v1.RandomErasing(0.25), v1.RandomErasing(0.75))
    idle = [Hyperparameter("idle", 0.5, (0.0, 1.0))]
    found = inventory(model, plan_of(model, idle), torch.optim.SGD(groups, lr=0.1), None, data)
    place = "train_loader.dataset.transform.transforms"
    assert table(found).splitlines()[:-1] == [
        "regulariser    status  value       where",
        "idle           tuned   0.5         loss",
        "Dropout        fixed   0.5         1 and 1 more",
        "DropPath       fixed   0.1 to 0.3  2 and 2 more",
        "WeightDecay    fixed   0.1 to 0.2  optimizer.param_groups.0 and 1 more",
        f"RandomErasing  fixed   0.25        {place}.0 (RandomErasing)",
        f"RandomErasing  fixed   0.75        {place}.1 (RandomErasing)",
    ]


def test_a_module_called_criterion_is_the_models_own():
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 3))
    model.add_module("criterion", nn.Dropout(0.1))
    model.add_module("drop", nn.Dropout(0.2))
    found = inventory(model, plan_of(model, [Dropout(at="drop")]))
    assert [r.where for r in found if r.kind == "Dropout"] == [("drop",), ("criterion",)]
    assert doubled(found) == []


def test_a_run_with_a_loader_of_its_own_reports_as_well():
    stn = convert(perceptron(), [WeightDecay()], train_loader=batches())
    assert "weight_decay  tuned   0.0005  0.weight and 1 more" in stn.report()
