"""How long a conversion takes: the graph alone, and with its proof on example inputs.

python -m benchmarks.conversion_time

Processor time, which other work on the machine disturbs less than the clock.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.reports import RESULTS, circumstances, write
from stnify import Dropout, WeightDecay, stnify

FILE = RESULTS / "conversion_time.json"

MODELS: dict[str, float] = {"resnet50": 2.0, "vit_base_patch16_224": 4.0}
"""timm's name to the most seconds a conversion may take."""


def seconds(function: Callable[[], Any]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def convert(model: nn.Module, images: Tensor | None) -> None:
    """Convert a model; with images, also prove the conversion on them."""
    stnify(model, [Dropout(at="input"), WeightDecay()], example_inputs=images)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return median and extremes over fresh models, after one that warms up."""
    images = torch.randn(2, 3, 224, 224)
    found: dict[str, list[float]] = {"plain": [], "proven": []}
    for _ in range(rounds + 1):
        for way, given in (("plain", None), ("proven", images)):
            found[way].append(seconds(partial(convert, timm.create_model(name), given)))
    return {
        "model": name,
        "limit": MODELS[name],
        **{
            way: {
                "median": round(statistics.median(times[1:]), 3),
                "least": round(min(times[1:]), 3),
                "most": round(max(times[1:]), 3),
            }
            for way, times in found.items()
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure every model and write what was found."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    results = [measure(name, options.rounds) for name in MODELS]
    report = {**circumstances(torch.device("cpu")), "rounds": options.rounds, "results": results}
    write(options.out, report)
    for result in results:
        print(result)


if __name__ == "__main__":
    main()
