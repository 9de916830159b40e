"""Models of timm and torchvision, grouped by structure, and the smallest build of each.

Two models have the same structure if they come from one file and hold the same classes of modules,
nested alike, with the same parameters and buffers and the same switches and words among their
attributes. Sizes and counts do not matter.
"""

import hashlib
import inspect
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.video import mvit

from benchmarks.reports import write

RATE = 0.1
RATES: tuple[dict[str, float], ...] = (
    {"drop_rate": RATE, "drop_path_rate": RATE},
    {"drop_rate": RATE},
    {},
)
"""Dropout rates to build with, the first a model accepts: at rate nought many have no dropout."""

SIZES = (64, 96, 128, 160, 192, 224, 256, 299)
"""Image sizes to try, in pixels; the first at which the structure stays the same and works."""

DEPTHS = ("depth", "depths", "layers", "num_blocks")
"""Names of arguments that say how many blocks there are."""

BLOCKS = 2
"""Blocks of a kind that are kept, so that shifted windows and the like occur."""

MVIT_SIZES: tuple[str, ...] = ("spatial_size", "temporal_size")
"""What torchvision's builders of MViTs set themselves."""

LARGEST_ON_META = 10**9
CLASSES = 5


@dataclass(frozen=True)
class Structure:
    """Models that differ in sizes only.

    Attributes:
        library: ``"timm"`` or ``"torchvision"``.
        family: Module file.
        kind: What the models are for.
        name: The smallest of them.
        models: How many there are.
        parameters: Of all of them together.
    """

    library: str
    family: str
    kind: str
    name: str
    models: int
    parameters: int


@dataclass(frozen=True)
class Built:
    """A small model and how to call it.

    Attributes:
        model: With weights that are all different from nought.
        options: What it was built with.
        shape: Of one input.
        call: Batch size to positional arguments in eval mode.
        train_call: The same in train mode, where detection models want targets too.
    """

    model: nn.Module
    options: dict[str, Any]
    shape: tuple[int, ...]
    call: Callable[[int], tuple[Any, ...]]
    train_call: Callable[[int], tuple[Any, ...]]


class NotBuiltError(Exception):
    """No small build of a model works; the message is the last reason."""


# What there is ------------------------------------------------------------------------------------


def structures(cache: Path) -> list[Structure]:
    """Return every structure, from ``cache`` if it was made with the same libraries."""
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__}
    if cache.exists():
        known = json.loads(cache.read_text())
        if known["versions"] == versions:
            return [Structure(**entry) for entry in known["structures"]]
    found = list(_grouped())
    entries = [asdict(structure) for structure in found]
    write(cache, {"versions": versions, "structures": entries})
    return found


def _grouped() -> Iterator[Structure]:
    groups: dict[tuple[str, str], list[tuple[int, str, str, str]]] = defaultdict(list)
    for library, family, kind, name in entry_points():
        model = plain_build(library, name)
        size = sum(parameter.numel() for parameter in model.parameters())
        groups[library, f"{family} {signature(model)}"].append((size, name, family, kind))
    for (library, _), members in groups.items():
        _, name, family, kind = min(members)
        yield Structure(library, family, kind, name, len(members), sum(m[0] for m in members))


def entry_points() -> Iterator[tuple[str, str, str, str]]:
    """Yield library, family, kind and name of every model."""
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__
        yield "timm", module.removeprefix("timm.models."), "image", name
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        family = builder.__module__.removeprefix("torchvision.models.")
        kind = family.split(".")[0] if "." in family else "image"
        yield "torchvision", family, kind, name


def plain_build(library: str, name: str, **options: Any) -> nn.Module:
    """Build a model without memory for its weights, or with it where it cannot be otherwise."""
    try:
        with torch.device("meta"):
            return build(library, name, **options)
    except NotImplementedError:  # it computes with tensors while it is built
        return build(library, name, **options)


def build(library: str, name: str, **options: Any) -> nn.Module:
    """Build a model with fresh weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            return timm.create_model(name, pretrained=False, **options)
        builder = torchvision.models.get_model_builder(name)
        if "weights_backbone" in inspect.signature(builder).parameters:
            options = {"weights_backbone": None, **options}
        sizes = {name: options.pop(name) for name in MVIT_SIZES if name in options}
        with _mvits_of(sizes):
            return builder(weights=None, **options)


@contextmanager
def _mvits_of(sizes: dict[str, Any]) -> Iterator[None]:
    """Let torchvision's MViTs have other sizes than those that stand in their code."""
    original = mvit._mvit

    def sized(*args: Any, **kwargs: Any) -> nn.Module:
        return original(*args, **{**kwargs, **sizes})

    mvit._mvit = sized
    try:
        yield
    finally:
        mvit._mvit = original


def signature(model: nn.Module) -> str:
    """Return a digest of what makes a model's structure; see the module docstring."""
    facts = set()
    for module in model.modules():
        switches = {k: v for k, v in vars(module).items() if isinstance(v, bool | str | NoneType)}
        tensors = {**module._parameters, **module._buffers}
        present = {name: tensor is not None for name, tensor in tensors.items()}
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        facts.add(f"{kind} {sorted(switches.items())} {sorted(present.items())}")
        facts.update(f"{kind} > {type(child).__qualname__}" for child in module.children())
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:16]


# Small builds -------------------------------------------------------------------------------------


def small(structure: Structure) -> Built:
    """Build the structure as small as it can be with its signature unchanged.

    Raises:
        NotBuiltError: Nothing that was tried could be built and run.
    """
    trials = _timm_trials if structure.library == "timm" else _torchvision_trials
    reason = "nothing was tried"
    for options, shape in trials(structure):
        try:
            built = assembled(structure.library, structure.kind, structure.name, options, shape)
            _try(built)
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        return built
    raise NotBuiltError(reason)


def assembled(
    library: str, kind: str, name: str, options: dict[str, Any], shape: tuple[int, ...]
) -> Built:
    """Build a model with these options, to be called with inputs of ``shape``."""
    model = build(library, name, **options)
    shake(model)
    return Built(model, options, shape, *_calls(kind, shape))


@torch.no_grad()
def _try(built: Built) -> None:
    built.model.eval()(*built.call(2))
    built.model.train()(*built.train_call(2))


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move everything that starts at nought or one, so that no part of the model is idle."""
    for parameter in model.parameters():
        spread = 0.1 if parameter.ndim <= 1 else 0.02
        if parameter.ndim <= 1 or parameter.numel() < 2 or not parameter.std() > 0:
            parameter.add_(spread * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def _timm_trials(structure: Structure) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Yield options and input shape, the cheapest first."""
    name = structure.name
    rates = next((rates for rates in RATES if _builds(name, rates)), {})
    wanted = signature(plain_build("timm", name, **rates))
    configuration = timm.get_pretrained_cfg(name)
    channels, *_, own = configuration.input_size if configuration else (3, 224, 224)
    fewer: list[dict[str, Any]] = [{"depth": BLOCKS}, {"depths": (BLOCKS,) * 4}, {}]
    fewer = [found for found in [_fewer_blocks(name)] if found] + fewer
    options = next(rates | some for some in fewer if _builds(name, rates | some, wanted))
    for size in (*(size for size in SIZES if size < own), own):
        for sized in (dict(options, img_size=size), options):
            if _builds(name, sized, wanted):
                yield sized, (channels, size, size)
                break


def _builds(name: str, options: dict[str, Any], wanted: str | None = None) -> bool:
    """Whether timm accepts these options, and the structure is the wanted one."""
    try:
        model = plain_build("timm", name, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, IndexError):
        return False
    return wanted is None or signature(model) == wanted


class _RecordedError(Exception):
    """Carries the arguments a model would have been built with."""


def _fewer_blocks(name: str) -> dict[str, Any]:
    """Return the arguments that leave ``BLOCKS`` blocks of a kind, as far as they are arguments."""
    module: Any = sys.modules[timm.models.model_entrypoint(name).__module__]
    original = module.build_model_with_cfg

    def record(*args: Any, **kwargs: Any) -> None:
        raise _RecordedError(kwargs)

    module.build_model_with_cfg = record
    try:
        timm.create_model(name, pretrained=False)
    except _RecordedError as recorded:
        arguments = recorded.args[0]
    else:
        arguments = {}
    finally:
        module.build_model_with_cfg = original
    return {k: _at_most(v) for k, v in arguments.items() if k in DEPTHS and _at_most(v) != v}


def _at_most(blocks: Any) -> Any:
    if isinstance(blocks, int):
        return min(blocks, BLOCKS)
    if isinstance(blocks, list | tuple):
        return type(blocks)(_at_most(count) for count in blocks)
    return blocks


def _torchvision_trials(
    structure: Structure,
) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    name, family = structure.name, structure.family
    classes = {} if structure.kind == "optical_flow" else {"num_classes": CLASSES}
    if structure.kind == "video":
        for frames, size in ((4, 64), (8, 64), (16, 112), (14, 224), (16, 224)):
            yield classes, (3, frames, size, size)
            if "mvit" in family:
                sized = {"spatial_size": (size, size), "temporal_size": frames}
                yield classes | sized, (3, frames, size, size)
    elif structure.kind == "detection":
        for size in (64, 128, 320):
            sized = {} if "ssd" in name else {"min_size": size, "max_size": size}
            yield classes | sized, (3, size, size)
    elif structure.kind == "optical_flow":
        yield {}, (3, 128, 128)
    else:
        plain = classes | ({"init_weights": True} if "inception" in family else {})
        for size in SIZES:
            if "vision_transformer" in family:
                yield classes | {"image_size": size}, (3, size, size)
            elif family == "maxvit":
                yield classes | {"input_size": (size, size)}, (3, size, size)
            else:
                yield plain, (3, size, size)


# Inputs -------------------------------------------------------------------------------------------


def _calls(kind: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the functions that make inputs for eval and for train mode."""
    match kind:
        case "detection":
            return (
                lambda batch: (_pictures(batch, shape),),
                lambda batch: (_pictures(batch, shape), _targets(batch, shape)),
            )
        case "optical_flow":
            return (lambda batch: (_noise(batch, shape), _noise(batch, shape, 1)),) * 2
    return (lambda batch: (_noise(batch, shape),),) * 2


def _noise(batch: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch + 100 * seed))


def _pictures(batch: int, shape: tuple[int, ...]) -> list[Tensor]:
    return list(_noise(batch, shape).sigmoid())


def _targets(batch: int, shape: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Return two objects for each picture, with boxes, masks and key points."""
    height, width = shape[1:]
    corners = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.8]])
    boxes = corners * torch.tensor([width, height, width, height])
    points = torch.rand(2, 17, 3, generator=torch.Generator().manual_seed(0))
    keypoints = torch.cat([points[..., :2] * min(height, width), torch.ones(2, 17, 1)], -1)
    masks = torch.ones(2, height, width, dtype=torch.uint8)
    labels = torch.tensor([1, 1])
    target = {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints}
    return [{name: value.clone() for name, value in target.items()} for _ in range(batch)]
