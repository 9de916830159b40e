"""Tasks small enough to try every value on: data, network, what is tuned, and a run of either.

A *strength* in (0, 1) stands for a start or a grid point: rates take it as it is, other
hyperparameters the matching point of their range.
"""

import gzip
import io
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from stnify import (
    Brightness,
    CutoutHoles,
    CutoutLength,
    Declaration,
    Dropout,
    DropPath,
    History,
    Rotate,
    WeightDecay,
    stnify,
)

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets in three parts that share no example."""

    train: Examples
    valid: Examples
    test: Examples


@dataclass(frozen=True)
class Task:
    """One problem.

    Attributes:
        load: ``(folder, seed) -> Data``; ``folder`` is where data files are.
        build: Makes the network.
        declare: What is tuned, started at a strength.
        optimizer: Of the network's parameters.
        criterion: Training and validation loss.
        epochs: Length of a run.
        batch: Examples of a training batch; validation batches are twice as large.
        seeds: How many the table has.
    """

    load: Callable[[Path, int], Data]
    build: Callable[[], nn.Module]
    declare: Callable[[float], Sequence[Declaration]]
    optimizer: Callable[[Any], Optimizer]
    criterion: nn.Module
    epochs: int
    batch: int = 100
    seeds: int = 5


@dataclass(frozen=True)
class Run:
    """What one run came to.

    Attributes:
        validation: Lowest validation loss of all epochs, eval mode, all examples.
        test: Test loss after that epoch.
        values: Hyperparameters at the end, constrained units.
        seconds: Wall time of the training loop, evaluation left out.
        history: What the hyperparameters were.
    """

    validation: float
    test: float
    values: dict[str, float]
    seconds: float
    history: History


def decay(strength: float) -> float:
    """Return a coefficient between 1e-5 and 1e-1."""
    return float(10 ** (4 * strength - 5))


# Data ---------------------------------------------------------------------------------------------


@cache
def idx(path: Path) -> Tensor:
    """Return an array of the MNIST format, gzipped."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.copy()).reshape(shape)


def mnist(folder: Path, seed: int, name: str = "MNIST", count: int = 5000) -> Data:
    """Return ``count`` + 1,000 training images of 28x28, 5,000 of the test images, in [0, 1]."""
    raw = folder / name / "raw"
    images = idx(raw / "train-images-idx3-ubyte.gz")
    labels = idx(raw / "train-labels-idx1-ubyte.gz").long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, valid = order[:count], order[count : count + 1000]
    tests = idx(raw / "t10k-images-idx3-ubyte.gz")[:5000]
    test_labels = idx(raw / "t10k-labels-idx1-ubyte.gz").long()[:5000]
    return Data(
        (_pixels(images[train]), labels[train]),
        (_pixels(images[valid]), labels[valid]),
        (_pixels(tests), test_labels),
    )


def fashion_mnist(folder: Path, seed: int) -> Data:
    """Return FashionMNIST, split like ``mnist``."""
    return mnist(folder, seed, "FashionMNIST")


def more_of_mnist(folder: Path, seed: int) -> Data:
    """Return 10,000 + 1,000 training images of MNIST, otherwise like ``mnist``."""
    return mnist(folder, seed, count=10_000)


def _pixels(images: Tensor) -> Tensor:
    return images[:, None].float() / 255


@cache
def _cifar(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images of 3x32x32, bytes, and their labels."""
    images: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    names: dict[str, int] = {}
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive if m.isfile()), key=lambda m: m.name)
        for member in members:
            part, name = member.name.split("/")[-3:-1]
            content = archive.extractfile(member)
            assert content is not None
            images[part].append(np.asarray(Image.open(io.BytesIO(content.read()))))
            labels[part].append(names.setdefault(name, len(names)))
    found = []
    for part in ("train", "test"):
        stacked = torch.from_numpy(np.stack(images[part])).permute(0, 3, 1, 2).contiguous()
        found += [stacked, torch.tensor(labels[part])]
    return found[0], found[1], found[2], found[3]


def cifar10(folder: Path, seed: int) -> Data:
    """Return 8,000 + 2,000 training and 2,000 test images in [0, 1]."""
    images, labels, tests, test_labels = _cifar(folder / "cifar10-jpeg.tar.gz")
    generator = torch.Generator().manual_seed(seed)
    train, valid, _ = torch.randperm(len(images), generator=generator).split([8000, 2000, 40000])
    test = torch.randperm(len(tests), generator=torch.Generator().manual_seed(0))[:2000]
    return Data(
        (images[train].float() / 255, labels[train]),
        (images[valid].float() / 255, labels[valid]),
        (tests[test].float() / 255, test_labels[test]),
    )


def uci(name: str, train: int, valid: int) -> Callable[[Path, int], Data]:
    """Return a loader of a table of numbers, standardised by its training part."""

    def load(folder: Path, seed: int) -> Data:
        with np.load(folder / "uci" / f"{name}.npz") as table:
            inputs, targets = torch.from_numpy(table["X"]), torch.from_numpy(table["y"])[:, None]
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        parts = order.split([train, valid, len(order) - train - valid])
        inputs = (inputs - inputs[parts[0]].mean(0)) / inputs[parts[0]].std(0)
        targets = (targets - targets[parts[0]].mean(0)) / targets[parts[0]].std(0)
        return Data(*((inputs[part], targets[part]) for part in parts))

    return load


def digits(folder: Path, seed: int) -> Data:
    """Return scikit-learn's digits, 800 + 400 + 597 images of 8x8; ``folder`` is not read."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    targets = torch.tensor(labels)
    return Data(*((images[part], targets[part]) for part in order.split([800, 400, 597])))


# Networks and what is tuned in them ---------------------------------------------------------------


def image_mlp() -> nn.Module:
    """Return a perceptron of two hidden layers of 400."""
    sizes = [nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)]
    return nn.Sequential(nn.Flatten(), *sizes)


def three_dropouts(strength: float) -> list[Declaration]:
    """Declare dropout at the input and behind both hidden layers."""
    return [
        Dropout("input_dropout", at="input", init=strength, range=(0, 0.95)),
        Dropout(after=("2", "4"), per_layer=True, init=strength, range=(0, 0.95)),
    ]


def simple_cnn() -> nn.Module:
    """Return the network of [DeltaSTN] H.2.2 with a hidden layer of 128."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def six_hyperparameters(strength: float) -> list[Declaration]:
    """Declare four dropouts and Cutout."""
    return [
        Dropout("input_dropout", at="input", init=strength, range=(0, 0.95)),
        Dropout(after=("2", "5", "8"), per_layer=True, init=strength, range=(0, 0.95)),
        CutoutHoles(init=4 * strength),
        CutoutLength(init=24 * strength, range=(0, 24)),
    ]


def narrow_resnet() -> nn.Module:
    """Return timm's ResNet-18, an eighth as wide, for small images."""
    return timm.create_model(
        "resnet18",
        num_classes=10,
        channels=(8, 16, 32, 64),
        stem_type="deep",
        stem_width=8,
        replace_stem_pool=True,
    )


def image_augmentation(strength: float) -> list[Declaration]:
    """Declare a dropout behind each stage, Cutout, decay, brightness and rotation."""
    return [
        Dropout(after="layer*.*", init=strength, range=(0, 0.95)),
        CutoutLength(init=24 * strength, range=(0, 24)),
        WeightDecay(init=decay(strength)),
        Brightness(init=strength),
        Rotate(init=45 * strength),
    ]


def table_mlp() -> nn.Module:
    """Return a perceptron for 8 numbers with two hidden layers of 100."""
    sizes = [nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1)]
    return nn.Sequential(*sizes)


def layers_of_a_table(strength: float) -> list[Declaration]:
    """Declare a dropout behind and a decay in every layer."""
    return [
        Dropout(after=("1", "3"), per_layer=True, init=strength, range=(0, 0.95)),
        WeightDecay(per_layer=True, init=decay(strength)),
    ]


def small_vit() -> nn.Module:
    """Return timm's vision transformer of four blocks for images of 8x8."""
    return timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4
    )


def transformer_regularisers(strength: float) -> list[Declaration]:
    """Declare stochastic depth, dropout in the MLPs, and decay."""
    return [
        DropPath(at="residual", init=strength),
        Dropout(after="blocks.*.mlp", init=strength, range=(0, 0.95)),
        WeightDecay(init=decay(strength)),
    ]


def momentum(lr: float) -> Callable[[Any], Optimizer]:
    """Return a maker of SGD with momentum 0.9."""
    return lambda parameters: SGD(parameters, lr=lr, momentum=0.9)


def adam(lr: float) -> Callable[[Any], Optimizer]:
    """Return a maker of Adam."""
    return lambda parameters: Adam(parameters, lr=lr)


CLASSES, NUMBERS = nn.CrossEntropyLoss(), nn.MSELoss()

TASKS: dict[str, Task] = {
    "mnist_mlp": Task(mnist, image_mlp, three_dropouts, momentum(0.03), CLASSES, 40),
    "mnist_long": Task(
        more_of_mnist, image_mlp, three_dropouts, momentum(0.03), CLASSES, 150, seeds=1
    ),
    "fashion_mlp": Task(fashion_mnist, image_mlp, three_dropouts, momentum(0.03), CLASSES, 40),
    "fashion_cnn": Task(
        fashion_mnist, simple_cnn, six_hyperparameters, momentum(0.03), CLASSES, 20, seeds=3
    ),
    "cifar_resnet18": Task(
        cifar10, narrow_resnet, image_augmentation, momentum(0.03), CLASSES, 30, seeds=3
    ),
    "concrete": Task(
        uci("concrete", 618, 206), table_mlp, layers_of_a_table, adam(3e-3), NUMBERS, 200, 50
    ),
    "kin8nm": Task(
        uci("kin8nm", 2000, 1000), table_mlp, layers_of_a_table, adam(3e-3), NUMBERS, 50, 50
    ),
    "digits_vit": Task(
        digits, small_vit, transformer_regularisers, adam(1e-3), CLASSES, 60, 50, seeds=3
    ),
}
"""Name to task."""


# Running ------------------------------------------------------------------------------------------


def batches(examples: Examples, size: int) -> DataLoader[Any]:
    """Return a loader of shuffled batches, the last one smaller if need be."""
    dataset = TensorDataset(*examples)
    sampler = BatchSampler(RandomSampler(dataset), size, drop_last=False)
    return DataLoader(dataset, sampler=sampler, batch_size=None)


@torch.no_grad()
def loss_of(model: nn.Module, examples: Examples, criterion: nn.Module) -> float:
    """Return the loss in eval mode over all examples."""
    model.eval()
    inputs, targets = examples
    parts = zip(inputs.split(1000), targets.split(1000), strict=True)
    total = sum(float(criterion(model(x), y)) * len(x) for x, y in parts)
    model.train()
    return total / len(inputs)


def run(
    task: Task,
    data: Data,
    seed: int,
    start: float | Sequence[Declaration],
    settings: Mapping[str, Any],
) -> Run:
    """Train once from a start, with ``settings`` for ``stnify``."""
    torch.manual_seed(seed)
    model = task.build()
    loader = batches(data.train, task.batch)
    stn = stnify(
        model,
        task.declare(start) if isinstance(start, float) else start,
        optimizer=task.optimizer(model.parameters()),
        criterion=task.criterion,
        train_loader=loader,
        valid_loader=batches(data.valid, 2 * task.batch),
        total_steps=task.epochs * len(loader),
        seed=seed,
        **settings,
    )
    model, optimizer, loader = stn
    best, test, seconds = float("inf"), float("nan"), 0.0
    for _ in range(task.epochs):
        begin = time.perf_counter()
        for inputs, targets in loader:
            optimizer.zero_grad()
            task.criterion(model(inputs), targets).backward()
            optimizer.step()
        seconds += time.perf_counter() - begin
        validation = loss_of(model, data.valid, task.criterion)
        if validation < best:
            best, test = validation, loss_of(model, data.test, task.criterion)
    return Run(best, test, stn.values(), seconds, stn.history)
