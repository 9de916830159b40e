"""What augmenting a batch costs, each example with strengths of its own, next to other libraries.

The nine operations of CIFAR runs: brightness, contrast, saturation, hue, translation, scale,
rotation, shear and cutout. torchvision takes no batches with numbers of their own, so it runs image
by image; kornia takes whole batches. Both have one range for the batch, stnify a strength for each
example. Every round runs each library once, one after the other in one process, so that a busy
moment of the machine hits all of them; ratios to stnify are formed round by round. Reported are
medians with quartiles.

    python -m benchmarks.augmentations --threads 1
"""

import argparse
import importlib
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from benchmarks.reports import RESULTS, circumstances, write
from benchmarks.step_cost import seconds, spread
from stnify.augment import Augment

BATCHES = ((128, 3, 32, 32), (64, 3, 224, 224))

STRENGTHS = {
    "Brightness": 0.4,
    "Contrast": 0.4,
    "Saturation": 0.4,
    "Hue": 0.1,
    "Translate": 0.1,
    "Scale": 0.2,
    "Rotate": 15.0,
    "Shear": 10.0,
}
HOLE = 4
"""Cutout's square is as wide as the image divided by this."""

IDLE = 0.3
"""A load average above this before anything is measured is that of other work."""

WARM_UP = 2
"""Rounds before those that count: allocator, compilation."""

Run = Callable[[Tensor], Tensor]


def stnify_run(shape: tuple[int, ...], device: torch.device, compiled: bool) -> Run:
    """Return our augmentation; every example has the same strengths, as theirs have."""
    strengths = {**STRENGTHS, "CutoutLength": shape[-1] / HOLE}
    columns = {name: column for column, name in enumerate(strengths)}
    module = Augment(columns).to(device)
    if compiled:
        module.compile(fullgraph=True)
    rows = torch.tensor(list(strengths.values()), device=device).expand(shape[0], -1)
    return lambda images: module(images, rows).images


def torchvision_run(shape: tuple[int, ...]) -> Run:
    """Return torchvision's augmentation, image by image."""
    color = [STRENGTHS[name] for name in ("Brightness", "Contrast", "Saturation", "Hue")]
    transform = v2.Compose(
        [
            v2.RandomAffine(**affine_ranges(), interpolation=InterpolationMode.BILINEAR),
            v2.ColorJitter(*color),
            v2.RandomErasing(p=1, **square()),
        ]
    )
    return lambda images: torch.stack([transform(image) for image in images])


def kornia_run(shape: tuple[int, ...]) -> Run:
    """Return kornia's augmentation of a whole batch."""
    kornia: Any = importlib.import_module("kornia.augmentation")
    color = [STRENGTHS[name] for name in ("Brightness", "Contrast", "Saturation", "Hue")]
    return kornia.AugmentationSequential(
        kornia.RandomAffine(**affine_ranges(), p=1.0),
        kornia.ColorJitter(*color, p=1.0),
        kornia.RandomErasing(p=1.0, **square()),
    )


def affine_ranges() -> dict[str, Any]:
    """Return the arguments both libraries' ``RandomAffine`` take."""
    names = ("Rotate", "Translate", "Scale", "Shear")
    rotate, translate, scale, shear = (STRENGTHS[name] for name in names)
    return {
        "degrees": rotate,
        "translate": (translate, translate),
        "scale": (1 - scale, 1 + scale),
        "shear": (-shear, shear),
    }


def square() -> dict[str, tuple[float, float]]:
    """Return what makes both libraries' ``RandomErasing`` cut a square."""
    return {"scale": (1 / HOLE**2, 1 / HOLE**2), "ratio": (1.0, 1.0)}


def measure(shape: tuple[int, ...], device: torch.device, rounds: int) -> dict[str, Any]:
    """Return seconds and ratios for one size of batch."""
    runs = {
        "stnify": stnify_run(shape, device, compiled=False),
        "stnify_compiled": stnify_run(shape, device, compiled=True),
        "torchvision": torchvision_run(shape),
        "kornia": kornia_run(shape),
    }
    torch.manual_seed(0)
    images = torch.rand(shape, device=device)
    times: list[dict[str, float]] = []
    for _ in range(WARM_UP + rounds):
        work = {name: (lambda run=run: run(images)) for name, run in runs.items()}
        times.append({name: seconds(call, device) for name, call in work.items()})
    kept = times[WARM_UP:]
    return {
        "batch": list(shape),
        "first_call_compiled_seconds": round(times[0]["stnify_compiled"], 1),
        "seconds": {name: spread([row[name] for row in kept]) for name in runs},
        "ratio_to_stnify": {
            name: spread([row[name] / row["stnify"] for row in kept]) for name in runs
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    report: dict[str, Any] = {
        **circumstances(device),
        "kornia": version("kornia"),
        "rounds": options.rounds,
        "processors": os.cpu_count(),
        "load_at_start": [round(load, 2) for load in os.getloadavg()],
        "other_work_was_running": os.getloadavg()[0] > IDLE,
        "operations": [*STRENGTHS, "Cutout"],
    }
    report["results"] = []
    for shape in BATCHES:
        result = measure(shape, device, options.rounds)
        report["results"].append(result)
        for name, ratio in result["ratio_to_stnify"].items():
            took = result["seconds"][name]["median"]
            print(
                f"{'x'.join(map(str, shape)):14} {name:16} {took:8.4f} s, of stnify's "
                f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                flush=True,
            )
    report["load_at_end"] = [round(load, 2) for load in os.getloadavg()]
    path = options.out / f"augmentations_{device.type}.json"
    write(path, report)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
