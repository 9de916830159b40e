"""1a. The papers' experiments: their hyperparameters as lists of declarations, and their settings.

Pass a list as it is or with declarations of your own added, as in
``stnify(model, [*presets.cifar_resnet18(), WeightDecay()], ...)``. Ranges and starts are those of
[DeltaSTN] H.2 and H.3: everything starts at 0.05 in its own units, except Cutout, which starts at
one hole of four pixels.

For CIFAR the text of [DeltaSTN] H.2.3 names scaling noise at the input as well, but 18, 26 and 19
hyperparameters are what there is without it: dropout at the input, at the 7 places of AlexNet, 15
of VGG16 or 8 of ResNet18, and ten for the images. The authors' code counts so too.
``scaling_noise=True`` adds it. As in that code, dropout behind convolutions drops whole channels;
at the input it drops single numbers here and whole colours there.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import RMSprop

from stnify.declare import (
    ActivationPenalty,
    Affine,
    ColorJitter,
    Cutout,
    Declaration,
    DropConnect,
    Dropout,
    EmbeddingDropout,
    Group,
    LockedDropout,
    Pattern,
    ScalingNoise,
    TemporalActivationPenalty,
)

__all__ = [
    "cifar_alexnet",
    "cifar_resnet18",
    "cifar_vgg16",
    "fashion_mnist_cnn",
    "mnist_mlp",
    "paper",
    "penn_treebank_lstm",
]

START = 0.05
"""[DeltaSTN] H.2 and H.3, constrained units."""

HOLES, LENGTH = 1.0, 4.0
"""[DeltaSTN] H.2.2: how many squares Cutout starts with, and their side in pixels."""

ALEXNET = tuple(f"features.{i}" for i in (1, 4, 7, 9, 11))
VGG16 = tuple(f"features.{i}" for i in (1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29))
"""Activations behind convolutions; torchvision and timm number them alike."""

Declarations = list[Declaration | Group]


def paper() -> dict[str, Any]:
    """Return the settings of [DeltaSTN] for ``stnify``, where its defaults differ or may change.

    A response step after every general step, with the same kind of optimizer and the same learning
    rate; sigma has its own gradient; lambda moves by RMSprop with learning rate 0.01. They are made
    for runs of 100,000 steps. The papers' warm-up, five epochs, depends on the data: say it by
    ``warmup_steps``.

    Example:
        ``stnify(model, hparams, optimizer=optimizer, ..., **presets.paper())``

    Source: [DeltaSTN] Algorithm 1, H.2.
    """
    return {
        "method": "delta",
        "response": "full",
        "response_fraction": 1.0,
        "antithetic": False,
        "response_every": 1,
        "response_lr": 1.0,
        "train_steps": 5,
        "valid_steps": 1,
        "scale": 1.0,
        "tune_scale": True,
        "entropy_weight": 1e-3,
        "hyper_optimizer": _paper_hyper_optimizer,
    }


def _paper_hyper_optimizer(parameters: list[Tensor]) -> RMSprop:
    return RMSprop(parameters, lr=0.01)


def mnist_mlp(hidden: Pattern = ("2", "4")) -> Declarations:
    """Return the 3 hyperparameters of the multilayer perceptron on MNIST.

    They are dropout rates at the input and behind the first two of three hidden layers; the third
    has none in the authors' code.

    Args:
        hidden: Modules that get a dropout behind them.

    Example:
        The default fits ``nn.Sequential(nn.Flatten(), nn.Linear(784, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10))``.

    Source: [DeltaSTN] H.2.1.
    """
    return [_input_dropout(), Dropout(after=hidden, per_layer=True, init=START)]


def fashion_mnist_cnn(convolutions: Pattern = ("2", "5"), hidden: Pattern = "8") -> Declarations:
    """Return the 6 hyperparameters of the small convolutional network on FashionMNIST.

    They are dropout rates at the input, behind two convolutions and behind one hidden layer, and
    the number and length of Cutout's holes.

    Args:
        convolutions: Modules that get a dropout of whole channels behind them.
        hidden: Modules that get a dropout of single units behind them.

    Example:
        The defaults fit ``nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1568, 1568), nn.ReLU(), nn.Linear(1568, 10))``.

    Source: [DeltaSTN] H.2.2.
    """
    return [
        _input_dropout(),
        _channel_dropout(after=convolutions),
        Dropout("hidden_dropout", after=hidden, per_layer=True, init=START),
        Cutout(holes=HOLES, length=LENGTH),
    ]


def cifar_alexnet(
    convolutions: Pattern = ALEXNET,
    classifier: Pattern = "classifier.*",
    *,
    scaling_noise: bool = False,
) -> Declarations:
    """Return the 18 hyperparameters of AlexNet on CIFAR-10.

    They are dropout rates at the input, behind 5 convolutions and at 2 places of the classifier,
    and ten for the images.

    Args:
        convolutions: Modules that get a dropout of whole channels behind them.
        classifier: Modules among which the model's own dropouts are taken over. The defaults fit
            torchvision's AlexNet, which needs images of 63 pixels or more.
        scaling_noise: Tune that as well.

    Source: [DeltaSTN] H.2.3, and [STN] 4.2 for the places in the classifier.
    """
    return [*_dropouts(convolutions, classifier), *_images(scaling_noise)]


def cifar_vgg16(
    convolutions: Pattern = VGG16,
    classifier: Pattern = "classifier.*",
    *,
    scaling_noise: bool = False,
) -> Declarations:
    """Return the 26 hyperparameters of VGG16 on CIFAR-10.

    They are dropout rates at the input, behind 13 convolutions and at 2 places of the classifier,
    and ten for the images.

    Args:
        convolutions: Modules that get a dropout of whole channels behind them.
        classifier: Modules among which the model's own dropouts are taken over. The defaults fit
            torchvision's VGG16; ``classifier=("pre_logits.*", "head.*")`` fits timm's.
        scaling_noise: Tune that as well.

    Source: [DeltaSTN] H.2.3.
    """
    return [*_dropouts(convolutions, classifier), *_images(scaling_noise)]


def cifar_resnet18(blocks: Pattern = "layer*.*", *, scaling_noise: bool = False) -> Declarations:
    """Return the 19 hyperparameters of ResNet18 on CIFAR-10.

    They are dropout rates at the input and behind each of the 8 blocks, and ten for the images.

    Args:
        blocks: Modules that get a dropout of whole channels behind them. The default fits timm's
            and torchvision's ResNets.
        scaling_noise: Tune that as well.

    Source: [DeltaSTN] H.2.3.
    """
    return [_input_dropout(), _channel_dropout(after=blocks), *_images(scaling_noise)]


def penn_treebank_lstm(
    embedding: str = "encoder", layers: Sequence[str] = ("rnns.0", "rnns.1")
) -> Declarations:
    """Return the 7 hyperparameters of the LSTM language model on Penn Treebank.

    They are rates of embedding dropout, of variational dropout at the input, between layers and at
    the output, and of DropConnect on hidden-to-hidden weights, and the coefficients of the
    penalties on activations (AR, of the output behind its dropout) and on their change (TAR, of
    the output before it). The penalties need ``stn.criterion`` in the loop.

    Args:
        embedding: Name of the ``nn.Embedding``.
        layers: Names of the recurrent layers from first to last, at least two, each an
            ``nn.LSTM(batch_first=True)`` of its own, or another recurrent module of PyTorch.

    Example:
        The defaults fit ::

            class LanguageModel(nn.Module):
                def __init__(self, words=10_000, width=650):
                    super().__init__()
                    self.encoder = nn.Embedding(words, width)
                    self.rnns = nn.ModuleList(
                        nn.LSTM(width, width, batch_first=True) for _ in range(2)
                    )
                    self.decoder = nn.Linear(width, words)

                def forward(self, tokens):
                    hidden = self.encoder(tokens)
                    for rnn in self.rnns:
                        hidden, _ = rnn(hidden)
                    return self.decoder(hidden).transpose(1, 2)  # as F.cross_entropy has it

    Source: [STN] D, [DeltaSTN] H.3, Merity et al. 2017.
    """
    last = layers[-1]
    recurrent = tuple(f"{layer}.weight_hh_l*" for layer in layers)
    return [
        EmbeddingDropout(at=embedding, init=START),
        LockedDropout("input_dropout", after=embedding, init=START),
        LockedDropout("hidden_dropout", after=tuple(layers[:-1]), init=START),
        TemporalActivationPenalty(after=last, init=START),
        LockedDropout("output_dropout", after=last, init=START),
        ActivationPenalty(after=last, init=START),
        DropConnect(at=recurrent, init=START),
    ]


# Shared -------------------------------------------------------------------------------------------


def _input_dropout() -> Dropout:
    return Dropout("input_dropout", at="input", init=START)


def _channel_dropout(after: Pattern) -> Dropout:
    return Dropout(after=after, per_layer=True, channel_dims=2, init=START)


def _dropouts(convolutions: Pattern, classifier: Pattern) -> Declarations:
    """Return dropout at the input, behind convolutions, and in the classifier as it stands."""
    return [
        _input_dropout(),
        _channel_dropout(after=convolutions),
        Dropout("hidden_dropout", at=classifier, per_layer=True, init=START),
    ]


def _images(scaling_noise: bool) -> Declarations:
    """Return what changes CIFAR's images."""
    noise = [ScalingNoise(init=START)] if scaling_noise else []
    return [
        *noise,
        Cutout(holes=HOLES, length=LENGTH),
        ColorJitter(init=START),
        Affine(init=START),
    ]
