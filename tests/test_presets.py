"""The papers' sets of hyperparameters: how many, which, their starts and ranges; they train."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from cases import convert, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stnify import DeclarationError, WeightDecay, presets
from stnify.declare import declarations
from stnify.planning import make_plan
from stnify.trace import trace

TIMM_CLASSIFIER = ("pre_logits.*", "head.*")
WORDS, WIDTH = 11, 6

IMAGES = {
    "cutout_holes": (1.0, (0.0, 4.0)),
    "cutout_length": (4.0, (0.0, 24.0)),
    "brightness": (0.05, (0.0, 1.0)),
    "contrast": (0.05, (0.0, 1.0)),
    "saturation": (0.05, (0.0, 1.0)),
    "hue": (0.05, (0.0, 0.5)),
    "translate": (0.05, (0.0, 0.5)),
    "scale": (0.05, (0.0, 0.5)),
    "rotate": (0.05, (0.0, 45.0)),
    "shear": (0.05, (0.0, 45.0)),
}
"""Name to start and range, as [DeltaSTN] H.2.3 has them."""

RATE = (0.05, (0.0, 0.95))
BLOCKS = [f"dropout.layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
CONVOLUTIONS = [1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29]


def rates(*names: str) -> dict[str, tuple[float, tuple[float, float]]]:
    return dict.fromkeys(("input_dropout", *names), RATE)


RESNET18 = {**rates(*BLOCKS), **IMAGES}
VGG16 = rates(*(f"dropout.features.{i}" for i in CONVOLUTIONS))
ALEXNET = rates(*(f"dropout.features.{i}" for i in (1, 4, 7, 9, 11)))
CLASSIFIER = "hidden_dropout.classifier"


# The papers' models -------------------------------------------------------------------------------


class ForImages(nn.Module):
    """Features and a classifier, called as torchvision calls them."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


def vgg16_for_cifar() -> nn.Module:
    """VGG16 with an eighth of its channels, and the paper's classifier for 32 pixels."""
    widths = [8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"]
    classifier = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout()
    )
    features = torchvision.models.vgg.make_layers(widths)
    # Without a norm, the default start of 13 convolutions lets next to nothing through.
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return ForImages(features, classifier.append(nn.Linear(64, 10)))


def narrow_resnet18() -> nn.Module:
    """timm's ResNet18 with an eighth of its channels."""
    return timm.create_model("resnet18", num_classes=10, channels=(8, 16, 32, 64))


def alexnet_for_cifar() -> nn.Module:
    """The AlexNet of [STN] 4.2 for 32 pixels with an eighth of its channels."""
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(nn.Dropout(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout())
    return ForImages(features, classifier.extend([nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]))


def perceptron() -> nn.Module:
    """The multilayer perceptron of [DeltaSTN] H.2.1 with 12 units in place of 1200."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784, 12), nn.ReLU()]
    layers += [nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 10)]
    return nn.Sequential(*layers)


def simple_cnn() -> nn.Module:
    """The network of [DeltaSTN] H.2.2 with a quarter of its channels."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(392, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class LanguageModel(nn.Module):
    """Two LSTMs, each a module of its own; as wide as there are words."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.encoder = nn.Embedding(WORDS, width)
        layers = [nn.LSTM(width, width, batch_first=True) for _ in range(2)]
        self.rnns = nn.ModuleList(layers)
        self.decoder = nn.Linear(width, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(batch, steps)`` to ``(batch, words, steps)``."""
        hidden = self.encoder(tokens)
        for rnn in self.rnns:
            hidden, _ = rnn(hidden)
        return self.decoder(hidden).transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """A preset, the papers' model in small, and the hyperparameters there must be.

    Attributes:
        expected: Name to start and range.
        shape: Of an example; a shape of one dimension is a sequence of words.
    """

    preset: Callable[[], presets.Declarations]
    build: Callable[[], nn.Module]
    expected: dict[str, tuple[float, tuple[float, float]]]
    shape: tuple[int, ...] = (3, 32, 32)


LANGUAGE = {
    **rates("embedding_dropout", "hidden_dropout", "output_dropout", "drop_connect"),
    "activation_penalty": (0.05, (0.0, 4.0)),
    "temporal_activation_penalty": (0.05, (0.0, 4.0)),
}
CASES = {
    "mnist": Case(
        presets.mnist_mlp, perceptron, rates("dropout.2", "dropout.4"), shape=(1, 28, 28)
    ),
    "fashion mnist": Case(
        presets.fashion_mnist_cnn,
        simple_cnn,
        {
            **rates("dropout.2", "dropout.5", "hidden_dropout.8"),
            "cutout_holes": IMAGES["cutout_holes"],
            "cutout_length": IMAGES["cutout_length"],
        },
        shape=(1, 28, 28),
    ),
    "alexnet": Case(
        presets.cifar_alexnet,
        alexnet_for_cifar,
        {**ALEXNET, f"{CLASSIFIER}.0": RATE, f"{CLASSIFIER}.3": RATE, **IMAGES},
    ),
    "vgg16": Case(
        presets.cifar_vgg16,
        vgg16_for_cifar,
        {**VGG16, f"{CLASSIFIER}.2": RATE, f"{CLASSIFIER}.5": RATE, **IMAGES},
    ),
    "timm resnet18": Case(presets.cifar_resnet18, narrow_resnet18, RESNET18),
    "torchvision resnet18": Case(
        presets.cifar_resnet18, lambda: torchvision.models.resnet18(num_classes=10), RESNET18
    ),
    "language": Case(presets.penn_treebank_lstm, LanguageModel, LANGUAGE, shape=(7,)),
}
COUNTS = {"mnist": 3, "fashion mnist": 6, "alexnet": 18, "vgg16": 26, "language": 7}
"""As [DeltaSTN] H.2 and H.3 have them; ResNet18 has 19."""


def loader(shape: tuple[int, ...], seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        words = torch.randint(WORDS, (12, shape[0] + 1), generator=generator)
        return DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), batch_size=4)
    inputs = torch.rand(12, *shape, generator=generator)
    return DataLoader(
        TensorDataset(inputs, torch.randint(10, (12,), generator=generator)), batch_size=4
    )


def converted(case: Case):
    torch.manual_seed(0)
    model = case.build()
    return convert(
        model,
        case.preset(),
        torch.optim.SGD(model.parameters(), lr=0.01),
        train_loader=loader(case.shape),
        valid_loader=loader(case.shape, seed=1),
    )


# Which --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_hyperparameters_are_the_papers(name):
    case = CASES[name]
    stn = converted(case)
    found = {column.name: (column.init, column.range) for column in stn.plan.columns}
    assert found == case.expected
    assert len(found) == COUNTS.get(name, 19)
    starts = {name: start for name, (start, _) in case.expected.items()}
    # Values are held in float32.
    assert stn.values() == pytest.approx(starts, rel=1e-6)


def planned(model: nn.Module, declared: presets.Declarations):
    """The plan for a model of any size, without its numbers."""
    return make_plan(
        model,
        trace(model, (), set()),
        declarations(declared),
        response="full",
        exclude=(),
        affine=False,
        scale=1.0,
        responds=True,
        decays={},
    )


@pytest.mark.parametrize(
    ("build", "declared", "expected"),
    [
        (
            torchvision.models.alexnet,
            presets.cifar_alexnet(),
            {**ALEXNET, f"{CLASSIFIER}.0": RATE, f"{CLASSIFIER}.3": RATE, **IMAGES},
        ),
        (
            torchvision.models.vgg16,
            presets.cifar_vgg16(),
            {**VGG16, f"{CLASSIFIER}.2": RATE, f"{CLASSIFIER}.5": RATE, **IMAGES},
        ),
        (
            lambda: timm.create_model("vgg16"),
            presets.cifar_vgg16(classifier=TIMM_CLASSIFIER),
            {
                **VGG16,
                "hidden_dropout.pre_logits.drop": RATE,
                "hidden_dropout.head.drop": RATE,
                **IMAGES,
            },
        ),
    ],
    ids=["torchvision alexnet", "torchvision vgg16", "timm vgg16"],
)
def test_large_models_of_the_libraries_have_the_same(build, declared, expected):
    with torch.device("meta"):
        model = build()
    plan = planned(model, declared)
    assert {column.name: (column.init, column.range) for column in plan.columns} == expected
    behind = [site.name for site in plan.noises if site.column.startswith("dropout.")]
    assert all(isinstance(model.get_submodule(name), nn.ReLU) for name in behind)
    assert len(behind) == sum(isinstance(m, nn.Conv2d) for m in model.features)


def test_channels_behind_convolutions_and_single_numbers_elsewhere():
    plan = planned(vgg16_for_cifar(), presets.cifar_vgg16())
    found = {site.column.partition(".")[0]: site.granularity for site in plan.noises}
    assert found == {
        "input_dropout": ("element", 0),
        "dropout": ("channel", 2),
        "hidden_dropout": ("element", 0),
    }


@pytest.mark.parametrize(
    "preset", [presets.cifar_alexnet, presets.cifar_vgg16, presets.cifar_resnet18]
)
def test_scaling_noise_is_there_if_asked(preset):
    without = [declared.name for declared in declarations(preset())]
    (noise,) = [d for d in declarations(preset(scaling_noise=True)) if d.name not in without]
    assert (type(noise).__name__, noise.init, noise.range) == ("ScalingNoise", 0.05, (0.0, 1.0))


def test_a_preset_takes_others_beside_it():
    stn = convert(perceptron(), [*presets.mnist_mlp(), WeightDecay()])
    assert list(stn.values()) == ["input_dropout", "dropout.2", "dropout.4", "weight_decay"]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (presets.mnist_mlp("hidden.*"), "`after` of 'dropout' .*'hidden.\\*' matches none"),
        (presets.cifar_resnet18(), "`after` of 'dropout' .*'layer\\*.\\*' matches none"),
        (presets.penn_treebank_lstm("table"), "`at` of 'embedding_dropout' .*'table' matches none"),
    ],
    ids=["mnist", "resnet18", "language"],
)
def test_a_model_of_another_layout_is_refused(declared, message):
    with pytest.raises(DeclarationError, match=message):
        convert(perceptron() if len(declared) != 7 else LanguageModel(), declared)


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_three_steps_move_every_hyperparameter(name):
    stn = converted(CASES[name])
    before = stn.values()
    weights = {n: p.detach().clone() for n, p in stn.model.named_parameters()}
    train(*stn, 3, criterion=stn.criterion)
    after = stn.values()
    assert all(math.isfinite(value) for value in (*after.values(), *stn.scales().values()))
    assert [name for name in before if after[name] == before[name]] == []
    assert all(bool(p.isfinite().all()) for p in stn.model.parameters())
    assert any(not torch.equal(p, weights[n]) for n, p in stn.model.named_parameters())


# Language -----------------------------------------------------------------------------------------


def language_model_that_shows_its_output():
    """A language model whose predictions are the last LSTM's outputs behind their dropout."""
    model = LanguageModel(width=WORDS)
    with torch.no_grad():
        model.decoder.weight.copy_(torch.eye(WORDS))
        model.decoder.bias.zero_()
    stn = convert(
        model,
        presets.penn_treebank_lstm(),
        train_loader=loader((7,)),
        valid_loader=loader((7,), seed=1),
    )
    nearly_none = dict.fromkeys(stn.values(), 1e-9)
    stn.hyperparameters.set_values({**nearly_none, "output_dropout": 0.6})
    return model, stn


@pytest.mark.parametrize("name", ["activation_penalty", "temporal_activation_penalty"])
def test_activations_are_penalised_behind_dropout_and_their_change_before_it(name):
    torch.manual_seed(0)
    model, stn = language_model_that_shows_its_output()
    stn.hyperparameters.set_values({name: 2.0})
    tokens, target = next(iter(loader((7,))))
    prediction = stn.model.train()(tokens)
    found = stn.criterion(prediction, target) - F.cross_entropy(prediction, target)
    dropped = prediction.transpose(1, 2)
    raw = model.eval()(tokens).transpose(1, 2)
    by_place = {
        "activation_penalty": [2 * h.square().mean() for h in (dropped, raw)],
        "temporal_activation_penalty": [2 * h.diff(dim=1).square().mean() for h in (raw, dropped)],
    }
    right, wrong = by_place[name]
    # A difference of losses near 2.5 in float32; the idle penalty adds 1e-9.
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert bool((found - wrong).abs() > 1e-2 * right)
    mask = (dropped != 0).any(1)
    assert torch.equal((dropped != 0).all(1), mask)  # one mask for all steps
    assert 0 < int(mask.sum()) < mask.numel()


def test_weights_from_hidden_to_hidden_alone_are_dropped():
    _, stn = language_model_that_shows_its_output()
    (site,) = stn.plan.weight_noises
    assert site.parameters == ("rnns.0.weight_hh_l0", "rnns.1.weight_hh_l0")
    (column,) = [c for c in stn.plan.columns if c.name == "drop_connect"]
    assert not column.per_example  # [STN] D
