"""What the quick start finds over several seeds and two starts: medians for the README.

python -m benchmarks.quickstart_seeds
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch

from benchmarks.reports import RESULTS, write
from recipes.quickstart import Run, load, train

FILE = RESULTS / "quickstart_seeds.json"
METHODS = ("fixed", "delta")


def summarise(pairs: list[dict[str, Run]]) -> dict[str, Any]:
    """Return medians and every seed's losses, by method, and in how many seeds tuning won."""
    summary: dict[str, Any] = {}
    for method in METHODS:
        runs = [pair[method] for pair in pairs]
        losses = [round(run.test_loss, 4) for run in runs]
        accuracy = median(run.test_accuracy for run in runs)
        summary[method] = {
            "test_loss": round(median(losses), 4),
            "test_accuracy": round(accuracy, 4),
            "test_losses": losses,
            "values": [{k: float(f"{v:.3g}") for k, v in run.values.items()} for run in runs],
        }
    wins = sum(pair["delta"].test_loss < pair["fixed"].test_loss for pair in pairs)
    return {**summary, "seeds_where_tuning_is_better": wins}


def main(arguments: list[str] | None = None) -> None:
    """Run the quick start from every start with every seed and write the medians."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--starts", type=float, nargs="+", default=[0.05, 0.3])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = []
    for dropout in options.starts:
        settings: dict[str, Any] = {"dropout": dropout, "epochs": options.epochs}
        pairs = [
            {m: train(load(seed), method=m, seed=seed, **settings) for m in METHODS}
            for seed in range(options.seeds)
        ]
        found.append({**settings, "seeds": options.seeds, **summarise(pairs)})
        print(found[-1])
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    write(options.out, {**versions, "starts": found})
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
