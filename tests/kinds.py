"""Every kind of hyperparameter, declared on a small model where it acts.

A kind is one row of ``KINDS``; ``test_catalogue.py`` holds each row to the same promises.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stnify import STN, stnify
from stnify.declare import (
    ActivationPenalty,
    AlphaDropout,
    AttentionDropout,
    Brightness,
    ConfidencePenalty,
    Contrast,
    CutMix,
    CutoutHoles,
    CutoutLength,
    Declaration,
    DropBlock,
    DropConnect,
    Dropout,
    DropPath,
    EmbeddingDropout,
    GaussianNoise,
    HorizontalFlip,
    Hue,
    Hyperparameter,
    JacobianPenalty,
    L1Penalty,
    LabelSmoothing,
    LockedDropout,
    Mixup,
    RandAugment,
    RandomErasing,
    Rotate,
    Saturation,
    Scale,
    ScalingNoise,
    Shear,
    TemporalActivationPenalty,
    Translate,
    WeightDecay,
)

CLASSES, WORDS, STEPS, SIDE = 4, 11, 6, 16
BATCH = 6

Batch = tuple[Tensor, Tensor]


class ConvolutionalNetwork(nn.Module):
    """Classifies images, with BatchNorm and a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.stem(images)).relu()
        features = features + self.branch(features)
        return self.head(features.mean((2, 3)))


class SentenceClassifier(nn.Module):
    """Classifies sequences of words by an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5)
        self.recurrence = nn.LSTM(5, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.recurrence(self.words(words))[0][:, -1])


class WordMixer(nn.Module):
    """Classifies sequences of words without a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5)
        self.mixing = nn.Linear(5, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.mixing(self.words(words)).tanh().mean(1))


def transformer() -> nn.Module:
    """One block, of two branches, of timm's vision transformer."""
    size = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 1}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **size)


def perceptron(*hidden: nn.Module) -> nn.Module:
    """A classifier of vectors, with further modules behind the hidden layer."""
    return nn.Sequential(nn.Linear(5, 8), nn.SELU(), *hidden, nn.Linear(8, CLASSES))


def images(generator: torch.Generator) -> Tensor:
    """Draw images in [0, 1]."""
    return torch.rand(BATCH, 3, SIDE, SIDE, generator=generator)


def sentences(generator: torch.Generator) -> Tensor:
    """Draw sequences of words."""
    return torch.randint(WORDS, (BATCH, STEPS), generator=generator)


def vectors(generator: torch.Generator) -> Tensor:
    """Draw vectors."""
    return torch.randn(BATCH, 5, generator=generator)


@dataclass(frozen=True)
class Kind:
    """A declaration, a model it fits, and a strength at which it shows.

    Attributes:
        declaration: With the place it acts at.
        model: Builds the model afresh.
        inputs: Draws its inputs.
        strong: Constrained units.
        eager: Passes that do not compile as one graph: they run eagerly, with a warning.
    """

    declaration: Declaration
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    strong: float
    eager: tuple[str, ...] = ()

    def convert(
        self, *others: Declaration, dtype: torch.dtype = torch.float32, **options: Any
    ) -> STN:
        """Convert a model that is the same in every call; all kinds of steps run at once.

        Args:
            others: Declared behind this kind's own.
            dtype: Of parameters and real inputs.
            options: Of ``stnify``.
        """
        model = self.fresh().to(dtype)
        defaults = {
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            "criterion": F.cross_entropy,
            "valid_loader": [self.batch(1, dtype)],
            "warmup_steps": 0,
            "train_steps": 1,
            "antithetic": False,
            "response_lr": 1.0,
            "response_every": 1,
            "verify": False,
            "seed": 0,
        }
        return stnify(model, [self.declaration, *others], **{**defaults, **options})

    def fresh(self) -> nn.Module:
        """Build the model with the same weights in every call; the global generator stays."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.model()

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """Make inputs, real ones in ``dtype``, and targets from a seed."""
        generator = torch.Generator().manual_seed(seed)
        inputs = self.inputs(generator)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        return inputs, torch.randint(CLASSES, (BATCH,), generator=generator)


def square(model: nn.Module, batch: Batch, value: Tensor) -> Tensor:
    """A penalty of a user's own, ``(batch,)``."""
    return value * model(batch[0]).square().mean(-1)


on_images = partial(Kind, model=ConvolutionalNetwork, inputs=images)
# PyTorch's compiler does not take recurrent modules.
on_sentences = partial(
    Kind, model=SentenceClassifier, inputs=sentences, eager=("response", "validation")
)
on_mixed_words = partial(Kind, model=WordMixer, inputs=sentences)
on_vectors = partial(Kind, model=perceptron, inputs=vectors)
on_patches = partial(Kind, model=transformer, inputs=images)

_TABLE = (
    # Noise inside the network.
    Kind(Dropout(), partial(perceptron, nn.Dropout(0.2)), vectors, strong=0.5),
    Kind(AlphaDropout(), partial(perceptron, nn.AlphaDropout(0.2)), vectors, strong=0.5),
    on_patches(AttentionDropout(), strong=0.8),
    on_sentences(EmbeddingDropout(), strong=0.5),
    on_sentences(LockedDropout(after="words"), strong=0.5),
    on_patches(DropPath(by_depth=True), strong=0.5),
    on_images(DropBlock(after="stem", block_size=3), strong=0.5),
    on_images(GaussianNoise(), strong=0.5),
    on_images(ScalingNoise(after="norm"), strong=0.5),
    on_sentences(DropConnect(at="recurrence.weight_hh*"), strong=0.5),
    # Augmentations.
    on_images(Brightness(), strong=0.8),
    on_images(Contrast(), strong=0.8),
    on_images(Saturation(), strong=0.8),
    on_images(Hue(), strong=0.4),
    on_images(Translate(), strong=0.4),
    on_images(Scale(), strong=0.4),
    on_images(Rotate(), strong=40.0),
    on_images(Shear(), strong=40.0),
    on_images(CutoutHoles(), strong=3.0),
    on_images(CutoutLength(), strong=8.0),
    on_images(RandomErasing(), strong=0.95),
    on_images(HorizontalFlip(), strong=0.9),
    on_images(Mixup(), strong=0.9),
    on_images(CutMix(), strong=0.9),
    on_patches(RandAugment(), strong=20.0),
    # Penalties on weights.
    on_images(WeightDecay(), strong=0.5),
    on_images(L1Penalty(), strong=0.5),
    # Terms of the loss.
    on_vectors(Hyperparameter("square", 0.1, (0.0, 1.0), penalty=square), strong=0.9),
    on_images(LabelSmoothing(), strong=0.4),
    on_patches(ConfidencePenalty(), strong=0.9),
    on_images(JacobianPenalty(), strong=0.9),
    on_images(ActivationPenalty(after="stem"), strong=0.9),
    on_sentences(TemporalActivationPenalty(after="recurrence"), strong=0.9),
)

KINDS: dict[str, Kind] = {type(kind.declaration).__name__: kind for kind in _TABLE}
"""Class name of every kind to its row."""

_both = partial(perceptron, nn.Dropout(0.2), nn.AlphaDropout(0.2))
_FOR_THE_COMPILER = (
    Kind(Dropout(), _both, vectors, strong=0.5),
    Kind(AlphaDropout(), _both, vectors, strong=0.5),
    Kind(KINDS["Hyperparameter"].declaration, _both, vectors, strong=0.9),
    on_images(RandAugment(operations=("Rotate", "Posterize", "Sharpness")), strong=20.0),
    on_mixed_words(EmbeddingDropout(), strong=0.5),
    on_mixed_words(LockedDropout(after="words"), strong=0.5),
    on_mixed_words(DropConnect(at="mixing"), strong=0.5),
    on_mixed_words(TemporalActivationPenalty(after="mixing"), strong=0.9),
)

COMPILED = {
    **KINDS,
    **{type(kind.declaration).__name__: kind for kind in _FOR_THE_COMPILER},
}
"""Every kind on a model whose passes all compile, with as many kinds on one model as can be."""


def final_kinds() -> set[str]:
    """Return the class names of all kinds that can be declared."""
    return set(_concrete(Declaration))


def _concrete(kind: type[Declaration]) -> Iterator[str]:
    children = [child for child in kind.__subclasses__() if child.__module__.startswith("stnify.")]
    for child in children:
        yield from _concrete(child)
    if not children and not inspect.isabstract(kind):
        yield kind.__name__


def declared_of(base: type[Declaration]) -> list[str]:
    """Return the names of the rows whose declaration is a ``base``."""
    return [name for name, kind in KINDS.items() if isinstance(kind.declaration, base)]
