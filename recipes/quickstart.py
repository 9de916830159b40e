"""Let a small ResNet tune its own dropout and weight decay on scikit-learn's handwritten digits.

Trains twice on 300 examples, with the same loop and the same start: once with the starting values
held fixed, once tuning them. The start is a guess, as it is for anyone who has not searched yet.

    python recipes/quickstart.py --seed 0 --epochs 60 --out .

[DeltaSTN]: https://arxiv.org/abs/2010.13514
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from stnify import Dropout, History, WeightDecay, stnify

TRAIN, VALID = 300, 300  # of 1,797; the rest is for the test
BATCH = 50


@dataclass(frozen=True)
class Data:
    """Standardised 8x8 images and their digits, in three parts that share no example."""

    train: TensorDataset
    valid: TensorDataset
    test: TensorDataset


@dataclass(frozen=True)
class Run:
    """What one training run came to; losses are cross-entropies in nats."""

    test_loss: float
    test_accuracy: float
    valid_loss: float
    values: dict[str, float]
    history: History


def load(seed: int) -> Data:
    """Return the digits in a random split."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, valid, test = order.split([TRAIN, VALID, len(order) - TRAIN - VALID])
    images = (images - images[train].mean()) / images[train].std()
    targets = torch.tensor(digits)
    return Data(*(TensorDataset(images[part], targets[part]) for part in (train, valid, test)))


def build() -> nn.Module:
    """Return a ResNet with one narrow block in each of its four stages, for small images."""
    return timm.create_model(
        "resnet18",
        in_chans=1,
        num_classes=10,
        layers=(1, 1, 1, 1),
        channels=(16, 32, 64, 128),
        stem_type="deep",
        stem_width=16,
        replace_stem_pool=True,
    )


def train(
    data: Data, *, method: str, dropout: float, epochs: int, seed: int, lr: float = 0.03
) -> Run:
    """Train one network; ``method`` is "delta" to tune, "fixed" to hold the start.

    Args:
        data: From ``load``.
        method: As for ``stnify``.
        dropout: Start of every dropout rate, a probability.
        epochs: Passes over the training examples.
        seed: Of the weights, the order of the examples and the perturbations.
        lr: Learning rate of the weights.
    """
    torch.manual_seed(seed)
    model = build()
    train_loader = DataLoader(data.train, BATCH, shuffle=True)
    valid_loader = DataLoader(data.valid, 2 * BATCH, shuffle=True)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    stn = stnify(
        model,
        [
            Dropout("input_dropout", at="input", init=dropout),
            Dropout(after="layer*.*", per_layer=True, init=dropout),
            WeightDecay(init=5e-4),
        ],
        optimizer=optimizer,
        criterion=criterion,
        train_loader=train_loader,
        valid_loader=valid_loader,
        method=method,
        total_steps=epochs * len(train_loader),
        seed=seed,
    )
    model, optimizer, train_loader = stn  # from here on an ordinary loop

    for _ in tqdm(range(epochs), desc=f"{method:5}", unit="epoch"):
        model.train()
        for images, targets in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(images), targets)
            loss.backward()
            optimizer.step()
        scheduler.step()

    plain = stn.export()
    test_loss, test_accuracy = evaluate(plain, data.test)
    valid_loss, _ = evaluate(plain, data.valid)
    return Run(test_loss, test_accuracy, valid_loss, stn.values(), stn.history)


@torch.no_grad()
def evaluate(model: nn.Module, dataset: TensorDataset) -> tuple[float, float]:
    """Return cross-entropy and accuracy."""
    images, targets = dataset.tensors
    logits: Tensor = model.eval()(images)
    loss = nn.functional.cross_entropy(logits, targets)
    return loss.item(), (logits.argmax(1) == targets).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Train with fixed and with tuned values, print both, write the schedule that was found."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--dropout", type=float, default=0.3, help="where every rate starts")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for PNG and CSV")
    options = parser.parse_args(arguments)
    settings = {"dropout": options.dropout, "epochs": options.epochs, "seed": options.seed}
    data = load(options.seed)
    fixed = train(data, method="fixed", **settings)
    tuned = train(data, method="delta", **settings)

    print(f"\n{'':24}{'start, held fixed':>20}{'self-tuned':>14}")
    print(f"{'test loss':24}{fixed.test_loss:20.4f}{tuned.test_loss:14.4f}")
    print(f"{'test accuracy':24}{fixed.test_accuracy:20.4f}{tuned.test_accuracy:14.4f}")
    for name, start in fixed.values.items():
        print(f"{name:24}{start:20.4g}{tuned.values[name]:14.4g}")
    better = "lower" if tuned.test_loss < fixed.test_loss else "NOT lower"
    print(
        f"\nWith seed {options.seed} the self-tuned test loss is {better} than that of the start."
    )
    if tuned.test_loss >= fixed.test_loss:
        print("One run proves little either way; README.md has medians over seeds.")

    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / "quickstart_schedule"
    tuned.history.to_csv(stem.with_suffix(".csv"))
    tuned.history.plot(stem.with_suffix(".png"))
    print(f"schedule: {stem.with_suffix('.png')}, {stem.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
