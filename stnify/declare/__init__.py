"""1. Declare what is tuned: names, ranges, start and perturbation scale.

Units: *constrained* is what a person reads (a probability, a coefficient, pixels); *unconstrained*
is what the optimizer moves (any real number). [DeltaSTN] F.1 calls the map between them ``s``.

A kind of hyperparameter is one final dataclass here, under one of five abstract targets: a ``Site``
acts inside the graph, ``WeightNoise`` and ``Decay`` on weights, an ``Augmentation`` on images, a
``LossTerm`` in the loss.
"""

from collections.abc import Iterable, Mapping

from stnify.declare.augmentations import (
    Affine,
    Brightness,
    ColorJitter,
    Contrast,
    CutMix,
    Cutout,
    CutoutHoles,
    CutoutLength,
    HorizontalFlip,
    Hue,
    Mixup,
    RandAugment,
    RandomErasing,
    Rotate,
    Saturation,
    Scale,
    Shear,
    Translate,
)
from stnify.declare.base import (
    Augmentation,
    Decay,
    Declaration,
    Group,
    LossTerm,
    Pattern,
    Penalty,
    Site,
    WeightNoise,
)
from stnify.declare.decays import L1Penalty, WeightDecay
from stnify.declare.loss import (
    ActivationPenalty,
    ActivationTerm,
    ConfidencePenalty,
    Hyperparameter,
    JacobianPenalty,
    LabelSmoothing,
    TemporalActivationPenalty,
)
from stnify.declare.noise import (
    AlphaDropout,
    AttentionDropout,
    DropBlock,
    DropConnect,
    Dropout,
    DropPath,
    EmbeddingDropout,
    GaussianNoise,
    LockedDropout,
    ScalingNoise,
)
from stnify.errors import DeclarationError, nearest

__all__ = [
    "KINDS",
    "ActivationPenalty",
    "ActivationTerm",
    "Affine",
    "AlphaDropout",
    "AttentionDropout",
    "Augmentation",
    "Brightness",
    "ColorJitter",
    "ConfidencePenalty",
    "Contrast",
    "CutMix",
    "Cutout",
    "CutoutHoles",
    "CutoutLength",
    "Decay",
    "Declaration",
    "DropBlock",
    "DropConnect",
    "DropPath",
    "Dropout",
    "EmbeddingDropout",
    "GaussianNoise",
    "Group",
    "HorizontalFlip",
    "Hue",
    "Hyperparameter",
    "Hyperparameters",
    "JacobianPenalty",
    "L1Penalty",
    "LabelSmoothing",
    "LockedDropout",
    "LossTerm",
    "Mixup",
    "Pattern",
    "Penalty",
    "RandAugment",
    "RandomErasing",
    "Rotate",
    "Saturation",
    "Scale",
    "ScalingNoise",
    "Shear",
    "Site",
    "TemporalActivationPenalty",
    "Translate",
    "WeightDecay",
    "WeightNoise",
    "declarations",
    "refuse_duplicates",
]

KINDS: dict[str, type[Declaration]] = {
    "dropout": Dropout,
    "alpha_dropout": AlphaDropout,
    "attention_dropout": AttentionDropout,
    "embedding_dropout": EmbeddingDropout,
    "drop_path": DropPath,
    "drop_block": DropBlock,
    "drop_connect": DropConnect,
    "gaussian_noise": GaussianNoise,
    "scaling_noise": ScalingNoise,
    "brightness": Brightness,
    "contrast": Contrast,
    "saturation": Saturation,
    "hue": Hue,
    "translate": Translate,
    "scale": Scale,
    "rotate": Rotate,
    "shear": Shear,
    "cutout_holes": CutoutHoles,
    "cutout_length": CutoutLength,
    "random_erasing": RandomErasing,
    "horizontal_flip": HorizontalFlip,
    "mixup": Mixup,
    "cutmix": CutMix,
    "rand_augment": RandAugment,
    "weight_decay": WeightDecay,
    "l1_penalty": L1Penalty,
    "label_smoothing": LabelSmoothing,
    "confidence_penalty": ConfidencePenalty,
    "jacobian_penalty": JacobianPenalty,
}
"""The dict shorthand: ``{"dropout": 0.1}`` means ``Dropout(init=0.1)``."""

OUTER = {"lr", "learning_rate", "momentum", "beta1", "beta2", "betas", "batch_size", "epochs"}
"""Names, and last parts of names, of what belongs to the optimization, not to the training loss."""


Hyperparameters = Iterable[Declaration | Group] | Declaration | Group | Mapping[str, float]
"""What can be declared: several, one, or the dict shorthand."""


def declarations(hparams: Hyperparameters) -> tuple[Declaration, ...]:
    """Read a list of declarations and groups of them, or the dict shorthand.

    Raises:
        DeclarationError: An unknown shorthand, something that is no declaration, a name used
            twice, nothing declared, or a hyperparameter of the optimization.
    """
    if isinstance(hparams, Declaration | Group):
        hparams = [hparams]
    if isinstance(hparams, Mapping):
        hparams = [_from_shorthand(name, init) for name, init in hparams.items()]
    if not isinstance(hparams, Iterable):
        raise DeclarationError(
            f"hyperparameters must be a list of declarations or a dict, but got {hparams!r} of "
            f"type {type(hparams).__name__}."
        )
    declared = tuple(
        member
        for entry in hparams
        for member in (entry.members() if isinstance(entry, Group) else (entry,))
    )
    if not declared:
        raise DeclarationError("at least one hyperparameter must be declared, but got none.")
    for declaration in declared:
        if not isinstance(declaration, Declaration):
            raise DeclarationError(
                f"hyperparameters must be declarations such as Dropout() or WeightDecay(), but "
                f"got {declaration!r} of type {type(declaration).__name__}."
            )
        _refuse_outer(declaration.name)
    refuse_duplicates(declaration.name for declaration in declared)
    return declared


def refuse_duplicates(names: Iterable[str]) -> None:
    """Raise DeclarationError if a name occurs twice."""
    names = list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DeclarationError(
            f"names of hyperparameters must be unique, but {twice} occur more than once. "
            f"Pass `name=` to tell them apart."
        )


def _refuse_outer(name: str) -> None:
    """Raise DeclarationError if a name is that of a number of the optimization."""
    plain = name.lower().replace("-", "_")
    meant = [outer for outer in OUTER if plain == outer or plain.endswith(f"_{outer}")]
    if meant:
        raise DeclarationError(
            f"a hyperparameter must change the training loss whose minimum the weights follow, but "
            f"{name!r} only changes how the minimum is reached: the best response to it is the "
            f"same for every value, so its gradient would be nought. Choose it in an outer loop "
            f"(recipes/outer_loop.py has one by Optuna) or by a scheduler. If it is a number of "
            f"your loss, pass a `name=` that does not end in {max(meant, key=len)!r}."
        )


def _from_shorthand(name: str, init: float) -> Declaration:
    _refuse_outer(name)
    if name not in KINDS:
        raise DeclarationError(
            f"{name!r} is no hyperparameter kind with a shorthand; known are {sorted(KINDS)}, "
            f"nearest {nearest(name, KINDS)}. Use a declaration for anything else."
        )
    return KINDS[name](name=name, init=init)
