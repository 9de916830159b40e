"""What a step costs with 1, 19, 100 and 1,000 hyperparameters.

One is weight decay; the others have no effect, so that nothing grows but their number: in the
gates of every layer, in the perturbations, in the maps between units. Every iteration is taken
with each number in turn, in one process, so that a busy moment of the machine hits all of them;
ratios to one hyperparameter are formed round by round. Reported are medians with quartiles, of time
and of the processor's time, in which other work on the machine hardly counts.

    python -m benchmarks.hyperparameter_count --threads 1
"""

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torch.optim import SGD

from benchmarks.reports import RESULTS, circumstances, write
from benchmarks.step_cost import DECAY, PERIOD, TRAIN_STEPS, Loop, seconds, spread
from stnify import Hyperparameter, WeightDecay, stnify

COUNTS = (1, 19, 100, 1000)  # 19 is what [DeltaSTN] tunes of a ResNet-18
LIMITS = {100: 1.15}
"""Number of hyperparameters to the limit of the median ratio to one, eager on a CPU."""


def loop(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], count: int) -> Loop:
    """Return a loop that tunes ``count`` hyperparameters of a copy of ``model``."""
    own = copy.deepcopy(model)
    idle = [Hyperparameter(f"idle_{i}", 0.5, (0.0, 1.0)) for i in range(1, count)]
    stn = stnify(
        own,
        [WeightDecay(init=DECAY), *idle],
        optimizer=SGD(own.parameters(), lr=1e-3, momentum=0.9),
        criterion=nn.functional.cross_entropy,
        valid_loader=[batch],
        train_steps=TRAIN_STEPS,
        warmup_steps=0,
        compile=False,
        seed=0,
    )
    for declaration in idle:
        stn.hyperparameters[declaration.name]  # read once, as a criterion would
    assert stn.optimizer is not None
    return Loop(stn.model, stn.optimizer, batch, stn)


class Taken(NamedTuple):
    """What one iteration takes, in seconds.

    Attributes:
        seconds: By the clock.
        processor_seconds: Of this process, all its threads together.
    """

    seconds: float
    processor_seconds: float


def one_round(loops: dict[int, Loop], device: torch.device) -> dict[int, Taken]:
    """Return what the mean of ``PERIOD`` iterations takes, all kinds of steps among them."""
    totals = dict.fromkeys(loops, Taken(0.0, 0.0))
    for _ in range(PERIOD):
        for count, one in loops.items():
            start = time.process_time()
            took = seconds(one.step, device)
            worked = time.process_time() - start
            totals[count] = Taken(totals[count][0] + took, totals[count][1] + worked)
    return {count: Taken(*(total / PERIOD for total in totals[count])) for count in totals}


def measure(
    counts: list[int], batch_size: int, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Return time and ratio to the first count, by count."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).to(device)
    inputs = torch.randn(batch_size, 3, 32, 32, device=device)
    batch = inputs, torch.randint(0, 10, (batch_size,), device=device)
    loops = {count: loop(model, batch, count) for count in counts}
    one_round(loops, device)  # warm-up: allocator, verification of the conversion
    times = [one_round(loops, device) for _ in range(rounds)]
    return [
        {
            "hyperparameters": count,
            "seconds": spread([taken[count].seconds for taken in times]),
            "ratio": spread([taken[count].seconds / taken[counts[0]].seconds for taken in times]),
            "processor_ratio": spread(
                [
                    taken[count].processor_seconds / taken[counts[0]].processor_seconds
                    for taken in times
                ]
            ),
        }
        for count in counts
    ]


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the median ratios against the limits that apply."""
    verdicts = []
    for result in results:
        count, ratio = result["hyperparameters"], result["ratio"]["median"]
        if count in LIMITS:
            limit = {"hyperparameters": count, "limit": LIMITS[count]}
            verdicts.append({**limit, "measured": ratio, "met": ratio <= LIMITS[count]})
    return verdicts


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    report: dict[str, Any] = {
        "model": "resnet18",
        "batch": [options.batch_size, 3, 32, 32],
        "rounds": options.rounds,
        "processors": os.cpu_count(),
        "load_at_start": [round(load, 2) for load in os.getloadavg()],
        **circumstances(device),
    }
    report["results"] = measure(options.counts, options.batch_size, device, options.rounds)
    for result in report["results"]:
        ratios = (
            "{median:.3f} [{q1:.3f}, {q3:.3f}]".format(**result[ratio])
            for ratio in ("ratio", "processor_ratio")
        )
        count, took = result["hyperparameters"], result["seconds"]["median"]
        print(f"{count:5} {took:.4f} s, ratio", ", of processor time ".join(ratios))
    report["load_at_end"] = [round(load, 2) for load in os.getloadavg()]
    if device.type == "cpu":
        report["bars"] = judge(report["results"])
    path = options.out / f"hyperparameter_count_{device.type}.json"
    write(path, report)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
