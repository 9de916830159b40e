"""2d. All that regularises a run: what is tuned, what is fixed, and what there is none of.

It reads the model, the plan, the optimizer, the criterion and the train loader as they are: no data
is drawn, and other libraries' classes are known by name, so that none is imported.
"""

import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

from torch import nn

from stnify.declare import (
    KINDS,
    ActivationPenalty,
    Declaration,
    LockedDropout,
    TemporalActivationPenalty,
)
from stnify.plan import Plan
from stnify.trace import caller

Status = Literal["tuned", "fixed", "absent"]

WITHOUT_SHORTHAND: tuple[type[Declaration], ...] = (
    LockedDropout,
    ActivationPenalty,
    TemporalActivationPenalty,
)
"""Kinds that must say where they act."""

NAMES = tuple(kind.__name__ for kind in (*KINDS.values(), *WITHOUT_SHORTHAND))
"""Names of all kinds that stnify can tune."""


@dataclass(frozen=True)
class Regularizer:
    """Something that regularises, or could.

    Attributes:
        where: Modules, weights or objects at which it acts.
        kind: Name of the declaration's class where there is one, else of the class found.
        value: Constrained units; words for several numbers, None if it cannot be told.
        status: ``"tuned"`` by stnify, ``"fixed"`` as the user has it, or ``"absent"``.
        name: Of the hyperparameter, if it is tuned.
        outside: Whether the train loader or the criterion does it.
    """

    where: tuple[str, ...]
    kind: str
    value: float | str | None
    status: Status
    name: str = ""
    outside: bool = False


Strengths = Mapping[str, tuple[str, ...]]
"""Kind of regulariser to the attributes one of which holds its strength."""

MODULES: dict[str, Strengths] = {
    "Dropout": {"Dropout": ("p",)},
    "Dropout1d": {"Dropout": ("p",)},
    "Dropout2d": {"Dropout": ("p",)},
    "Dropout3d": {"Dropout": ("p",)},
    "AlphaDropout": {"AlphaDropout": ("p",)},
    "FeatureAlphaDropout": {"AlphaDropout": ("p",)},
    "MultiheadAttention": {"AttentionDropout": ("dropout",)},
    "LSTM": {"Dropout": ("dropout",)},
    "GRU": {"Dropout": ("dropout",)},
    "RNN": {"Dropout": ("dropout",)},
    "StochasticDepth": {"DropPath": ("p",)},
    "DropPath": {"DropPath": ("drop_prob",)},
    "DropBlock2d": {"DropBlock": ("drop_prob", "p")},
    "DropBlock3d": {"DropBlock": ("p",)},
    "PatchDropout": {"PatchDropout": ("prob",)},
}
"""Class of a module, or of one it inherits from, to what it does."""

RATES = ("p", "drop_prob", "prob", "rate", "dropout")
"""What modules that drop something call their rate; any with "drop" in its name may be one."""

FUNCTIONS: dict[str, tuple[str, str]] = {
    "dropout": ("Dropout", "p"),
    "dropout1d": ("Dropout", "p"),
    "dropout2d": ("Dropout", "p"),
    "dropout3d": ("Dropout", "p"),
    "alpha_dropout": ("AlphaDropout", "p"),
    "feature_alpha_dropout": ("AlphaDropout", "p"),
    "scaled_dot_product_attention": ("AttentionDropout", "dropout_p"),
    "drop_path": ("DropPath", "drop_prob"),
    "stochastic_depth": ("DropPath", "p"),
}
"""Function in a traced graph to what it does and the argument with its rate."""

COLORS = ("brightness", "contrast", "saturation", "hue")
JITTER: Strengths = {color.title(): (color,) for color in COLORS}
POLICY: Strengths = {"RandAugment": ("magnitude",)}
MIXUP: Strengths = {
    "Mixup": ("mixup_alpha",),
    "CutMix": ("cutmix_alpha",),
    "LabelSmoothing": ("label_smoothing",),
}

TRANSFORMS: dict[str, Strengths] = {
    "ColorJitter": JITTER,
    "RandomPhotometricDistort": JITTER,
    "RandomAffine": {
        "Rotate": ("degrees",),
        "Translate": ("translate",),
        "Scale": ("scale",),
        "Shear": ("shear",),
    },
    "RandomRotation": {"Rotate": ("degrees",)},
    "RandomCrop": {"Translate": ("padding", "size")},
    "RandomResizedCrop": {"Scale": ("scale",)},
    "RandomResizedCropAndInterpolation": {"Scale": ("scale",)},
    "ScaleJitter": {"Scale": ("scale_range",)},
    "RandomZoomOut": {"Scale": ("side_range",)},
    "HorizontalFlip": {"HorizontalFlip": ("p",)},
    "RandomHorizontalFlip": {"HorizontalFlip": ("p",)},
    "RandomErasing": {"RandomErasing": ("p", "probability")},
    "Cutout": {"CutoutHoles": ("n_holes", "num_holes"), "CutoutLength": ("length",)},
    "RandAugment": POLICY,
    "AutoAugment": POLICY,
    "TrivialAugmentWide": POLICY,
    "AugMix": {"RandAugment": ("severity",)},
    "AugMixAugment": POLICY,
    "GaussianNoise": {"GaussianNoise": ("sigma",)},
    "GaussianBlur": {"GaussianBlur": ("sigma",)},
    "ElasticTransform": {"ElasticTransform": ("alpha",)},
    "MixUp": {"Mixup": ("alpha",)},
    "CutMix": {"CutMix": ("alpha",)},
    "Mixup": MIXUP,
    "FastCollateMixup": MIXUP,
}
"""Class of a transform of torchvision or timm to what it does."""

CRITERIA: Strengths = {"LabelSmoothing": ("label_smoothing", "smoothing")}
"""What a loss of PyTorch or timm may do."""

INSIDE = (
    "loader",
    "dataset",
    "datasets",
    "subset",
    "collate_fn",
    "random_erasing",
    "transform",
    "transforms",
    "lambd",
    "func",
)
"""Attributes through which one gets from a loader to transforms."""

DECOUPLED = {"AdamW", "NAdamW", "SGDW", "SGDP", "AdamP", "Lion", "Adafactor", "Muon", "Adan"}
"""Classes of optimizers that decay weights beside the gradient; others say so in their groups."""


def inventory(
    model: nn.Module,
    plan: Plan,
    optimizer: object = None,
    criterion: object = None,
    train_loader: object = None,
) -> list[Regularizer]:
    """Return all regularisers of a run: tuned ones, fixed ones, and absent ones.

    A fixed one whose strength is nought counts as absent, and so does what no object shows:
    functions called in modules that cannot be traced through or in a dataset's ``__getitem__``, and
    what the loop does itself.

    Args:
        model: The user's model, as it was converted.
        plan: What was converted.
        optimizer: Of the general parameters, after a tuned decay has taken its own one's place.
        criterion: The plain one.
        train_loader: Nothing is drawn from it.
    """
    found = [
        *_tuned(plan),
        *_in_modules(model, plan),
        *_in_functions(plan),
        *_in_optimizer(model, plan, optimizer),
        *_in_criterion(criterion),
        *_in_loader(train_loader, "train_loader", {}),
    ]
    present = {regularizer.kind for regularizer in found}
    return found + [Regularizer((), k, None, "absent") for k in NAMES if k not in present]


def with_values(found: Iterable[Regularizer], values: Mapping[str, float]) -> list[Regularizer]:
    """Return the list with what is tuned at ``values``, by name, constrained units."""
    return [replace(r, value=values[r.name]) if r.name else r for r in found]


def doubled(found: Sequence[Regularizer]) -> list[str]:
    """Return a message for each regulariser that is tuned and acts outside the model as well.

    The optimizer's own weight decay is none of them: a tuned one takes its place for the weights it
    covers.
    """
    tuned = {r.kind: r for r in found if r.status == "tuned"}
    return [
        f"a regulariser should act in one place, but {r.kind} is tuned as {tuned[r.kind].name!r} "
        f"at {_brief(tuned[r.kind].where)} and fixed at {_worded(r.value)} in {r.where[0]}: both "
        f"act, and no tuned value undoes the fixed one. Take it out there, or do not declare "
        f"{tuned[r.kind].name!r}."
        for r in found
        if r.outside and r.kind in tuned
    ]


def repeated(found: Sequence[Regularizer], plan: Plan) -> list[str]:
    """Return a message for each hyperparameter on residual branches that have fixed noise too."""
    fixed = {(r.kind, place) for r in found if r.status == "fixed" for place in r.where}
    targets = {node.name: str(node.target) for node in plan.traced.graph.nodes}
    places: dict[str, list[str]] = {}
    for site in plan.noises:
        place = targets.get(site.node, "")
        if site.place == "operand" and (site.kind, place) in fixed:
            places.setdefault(site.column, []).append(place)
    return [
        f"a regulariser should act once in a place, but {name!r} is put behind {_brief(where)}, "
        f"fixed noise of its kind: both act, and no tuned value undoes the fixed one. Let it take "
        f"over what the model has by leaving `at` out, or set the rates there to 0."
        for name, where in places.items()
    ]


def table(found: Sequence[Regularizer]) -> str:
    """Return what there is as a table, and what is absent in one line below.

    What a model has of one kind that is fixed stands in one row.
    """
    groups: dict[object, list[Regularizer]] = {}
    for i, r in enumerate(found):
        if r.status != "absent":
            groups.setdefault(i if r.name or r.outside else r.kind, []).append(r)
    rows = [("regulariser", "status", "value", "where"), *map(_row, groups.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    absent = [r.kind for r in found if r.status == "absent"]
    return "\n".join([*lines, f"absent: {', '.join(absent) or 'none'}"])


# Sources ------------------------------------------------------------------------------------------


def _tuned(plan: Plan) -> Iterator[Regularizer]:
    """Yield the hyperparameters, at their start."""
    for column in plan.columns:
        where = [site.name for site in plan.noises if site.column == column.name]
        for noise in plan.weight_noises:
            where += noise.parameters if noise.column == column.name else ()
        for decay in plan.decays:
            where += decay.parameters if decay.column == column.name else ()
        where += ["input" for images in plan.augmentations if images.column == column.name]
        where += ["loss" for loss in plan.losses if loss.column == column.name]
        yield Regularizer(tuple(where), column.kind, column.init, "tuned", column.name)


def _in_modules(model: nn.Module, plan: Plan) -> Iterator[Regularizer]:
    """Yield what the model's modules do, unless it is tuned or they are never called."""
    tuned = {site.name for site in plan.noises if site.place in {"replace", "swap"}}
    called = {str(node.target) for node in plan.traced.graph.nodes if node.op == "call_module"}
    for name, module in model.named_modules():
        unused = name not in called and name.rpartition(".")[0] in plan.traced.through
        if name in tuned or (unused and name):
            continue
        if isinstance(module, nn.RNNBase) and module.num_layers == 1:
            continue
        yield from _of(module, name or type(module).__name__, _strengths_of_module(module))


def _strengths_of_module(module: nn.Module) -> Strengths:
    """Return what a module does by its class or one it inherits from."""
    names = [kind.__name__ for kind in type(module).__mro__]
    rates = [rate for rate in RATES if isinstance(getattr(module, rate, None), Real)]
    for name in names:
        if name in MODULES:
            return MODULES[name] if rates else {}
    own = names[0]
    if "drop" not in own.lower() or not rates or next(module.children(), None) is not None:
        return {}
    matching = [kind for kind in NAMES if own.endswith(kind)]
    return {max(matching, key=len, default=own): tuple(rates)}


def _in_functions(plan: Plan) -> Iterator[Regularizer]:
    """Yield the calls of functions in the graph that drop something and are not tuned."""
    tuned = {site.node for site in plan.noises if site.place == "replace"}
    for node in plan.traced.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in FUNCTIONS or node.name in tuned:
            continue
        if node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is False:
            continue
        kind, argument = FUNCTIONS[name]
        rate = node.kwargs.get(argument)
        if rate is None and argument != "dropout_p":
            rate = node.args[1] if len(node.args) > 1 else None
        if isinstance(rate, Real) and not _idle(rate):
            where = ".".join(filter(None, (caller(node), name)))
            yield Regularizer((where,), kind, _value(rate), "fixed")


def _in_optimizer(model: nn.Module, plan: Plan, optimizer: object) -> Iterator[Regularizer]:
    """Yield the weight decay of each group that has one for parameters whose decay is not tuned."""
    sites = [site for site in plan.decays if site.kind == "WeightDecay"]
    tuned = {id(model.get_parameter(name)) for site in sites for name in site.parameters}
    for i, group in enumerate(getattr(optimizer, "param_groups", ())):
        decay, held = group.get("weight_decay"), group["params"]
        fixed = [parameter for parameter in held if id(parameter) not in tuned]
        if isinstance(decay, Real) and not _idle(decay) and fixed:
            flags = [group.get(f"decoupled_{word}") for word in ("weight_decay", "decay")]
            decoupled = any(flags) or type(optimizer).__name__ in DECOUPLED
            part = f"{len(fixed)} of {len(held)} tensors" if len(fixed) < len(held) else ""
            notes = ", ".join(filter(None, ("decoupled" if decoupled else "", part)))
            where = f"optimizer.param_groups.{i}{f' ({notes})' if notes else ''}"
            yield Regularizer((where,), "WeightDecay", _value(decay), "fixed")


def _in_criterion(criterion: object) -> Iterator[Regularizer]:
    """Yield what a loss does to its targets."""
    parts: Iterable[tuple[str, object]] = [("", criterion)]
    if isinstance(criterion, functools.partial):
        parts = [("", types.SimpleNamespace(**criterion.keywords))]
    elif isinstance(criterion, nn.Module):
        parts = criterion.named_modules()
    for name, part in parts:
        if any(hasattr(part, attribute) for attribute in CRITERIA["LabelSmoothing"]):
            where = ".".join(filter(None, ("criterion", name)))
            yield from _of(part, where, CRITERIA, outside=True)


def _in_loader(found: object, where: str, seen: dict[int, object]) -> Iterator[Regularizer]:
    """Yield what is done to examples on their way, as far as transforms are kept as objects."""
    if found is None or isinstance(found, Mapping) or id(found) in seen:
        return
    seen[id(found)] = found
    name = type(found).__name__
    if name in TRANSFORMS or (name.startswith("Random") and _is_single(found)):
        strengths = TRANSFORMS.get(name, {name: ("p",)})
        yield from _of(found, f"{where} ({name})", strengths, outside=True)
        return
    for step, inside in _inside(found):
        yield from _in_loader(inside, f"{where}.{step}", seen)


def _is_single(found: object) -> bool:
    """Whether something is no dataset and holds no transforms."""
    return not any(hasattr(found, name) for name in ("transforms", "__getitem__", "__iter__"))


def _inside(found: object) -> Iterator[tuple[str, object]]:
    """Yield what may hold transforms, by the attribute or variable it is reached through."""
    if isinstance(found, types.FunctionType):
        variables = inspect.getclosurevars(found)
        for name, value in {**variables.nonlocals, **variables.globals}.items():
            if not isinstance(value, types.ModuleType | type):
                yield name, value
    if isinstance(found, nn.Sequential | nn.ModuleList):
        yield from found.named_children()
    for attribute in INSIDE:
        value = getattr(found, attribute, None)
        if isinstance(value, list | tuple):
            yield from ((f"{attribute}.{i}", part) for i, part in enumerate(value))
        else:
            yield attribute, value


# Values -------------------------------------------------------------------------------------------


def _of(
    found: object, where: str, strengths: Strengths, *, outside: bool = False
) -> Iterator[Regularizer]:
    """Yield what an object does, if its strength is not nought."""
    for kind, attributes in strengths.items():
        known = [getattr(found, a) for a in attributes if hasattr(found, a)]
        active = [value for value in known if not _idle(value)]
        if active or not known:
            value = _value(active[0]) if active else None
            yield Regularizer((where,), kind, value, "fixed", outside=outside)


def _idle(value: object) -> bool:
    """Whether a strength is none, or nought throughout."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return all(_idle(part) for part in value)
    return value is None or (isinstance(value, Real) and float(value) == 0)


def _value(value: Any) -> float | str:
    if isinstance(value, Real):
        return float(value)
    return str(tuple(value)) if isinstance(value, Sequence) else str(value)


def _row(group: Sequence[Regularizer]) -> tuple[str, ...]:
    """Return a row of the table for regularisers of one kind."""
    values = [r.value for r in group]
    ends = list(dict.fromkeys(values))
    numbers = [value for value in values if isinstance(value, float)]
    if len(ends) > 1 and len(numbers) == len(values):
        ends = [min(numbers), max(numbers)]
    where = [place for r in group for place in r.where]
    first = group[0]
    return (first.name or first.kind, first.status, " to ".join(map(_worded, ends)), _brief(where))


def _worded(value: float | str | None) -> str:
    return "?" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _brief(where: Sequence[str]) -> str:
    more = f" and {len(where) - 1} more" if len(where) > 1 else ""
    return f"{where[0]}{more}" if where else ""
