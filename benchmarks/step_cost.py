"""What a self-tuning step costs: its parts, over a plain training step, in time and memory.

Every round runs the plain step and each part once, one after the other in one process, so that a
busy moment of the machine hits all of them; ratios are formed round by round. Reported are medians
with quartiles. The plain model has the same regularisers at fixed values.

    python -m benchmarks.step_cost --threads 1             # eager
    python -m benchmarks.step_cost --threads 1 --compile   # torch.compile, plain model included
"""

import argparse
import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.profiler import ProfilerActivity, profile

from benchmarks.ingredients import INGREDIENTS
from benchmarks.reports import RESULTS, circumstances, write
from stnify import STN, Dropout, WeightDecay, presets, stnify

TRAIN_STEPS = 5
PERIOD = 15
"""Iterations after which response and validation steps fall together again, by default."""

DECAY = 5e-4
PARTS = ("plain", "general", "response", "validation", "whole")
"""``response`` and ``whole`` are means over the iterations of a period, in which validation steps
are among ``whole`` alone; by default a third of the iterations has a response step."""

SETTINGS: dict[str, dict[str, Any]] = {
    "full": presets.paper(),
    "gate": {**presets.paper(), "response": "gate"},
    "default": {},
    **INGREDIENTS,
}
"""Name of a row to what ``stnify`` is called with."""

USUAL = ("full", "gate", "default")

BARS = (  # model, response, part, limit of the median ratio to the plain step, eager on a CPU
    *((model, "full", "general", 1.05) for model in ("mlp", "resnet18", "vit_tiny")),
    ("resnet18", "full", "response", 2.1),
    ("vit_tiny", "full", "response", 2.6),
    ("resnet18", "full", "whole", 3.3),
    *((model, "default", "whole", 2.2) for model in ("mlp", "resnet18", "vit_tiny")),
)


def mlp() -> tuple[nn.Module, Tensor]:
    """Return the MNIST network of [DeltaSTN] H.2 and a batch."""
    layers = torchvision.ops.MLP(784, [1200, 1200, 1200, 10], dropout=0.1, inplace=False)
    return layers, torch.randn(128, 784)


def resnet18() -> tuple[nn.Module, Tensor]:
    """Return a ResNet-18 with a dropout before its classifier, and a batch of 32x32 images."""
    model = timm.create_model("resnet18", num_classes=10)
    model.fc = nn.Sequential(nn.Dropout(0.1), model.fc)
    return model, torch.randn(32, 3, 32, 32)


def vit_tiny() -> tuple[nn.Module, Tensor]:
    """Return a ViT-tiny with dropout in every block, and a batch of 64x64 images."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, num_classes=10, drop_rate=0.1, proj_drop_rate=0.1
    )
    return model, torch.randn(32, 3, 64, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "vit_tiny": vit_tiny,
}


@dataclass
class Loop:
    """One training loop: a model, its optimizer, and a batch to repeat."""

    model: nn.Module
    optimizer: Optimizer
    batch: tuple[Tensor, Tensor]
    stn: STN | None = None

    def backward(self) -> None:
        """Compute the gradients of one training step."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.batch[0]), self.batch[1]).backward()

    def update(self) -> None:
        """Take the optimizer step, and all that stnify does in it."""
        if self.stn is not None:
            self.stn.observe(self.batch)
        self.optimizer.step()

    def step(self) -> None:
        """Take one training step."""
        self.backward()
        self.update()

    def resident_bytes(self) -> int:
        """Return what stays between steps: parameters, buffers, optimizer state."""
        states = [v for entry in self.optimizer.state.values() for v in entry.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *states]
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def loops(name: str, response: str, device: torch.device, compiled: bool) -> dict[str, Loop]:
    """Return the loops to compare: plain, stnify with fixed values, stnify that tunes."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    batch = inputs.to(device), torch.randint(0, 10, (len(inputs),), device=device)
    model = model.to(device)
    plain = copy.deepcopy(model)
    optimizer = SGD(plain.parameters(), lr=1e-3, momentum=0.9, weight_decay=DECAY)
    if compiled:
        plain.compile()
    found = {"plain": Loop(plain, optimizer, batch)}
    for method in ("fixed", "delta"):
        own = copy.deepcopy(model)
        stn = stnify(
            own,
            [Dropout(), WeightDecay(init=DECAY)],
            optimizer=SGD(own.parameters(), lr=1e-3, momentum=0.9),
            criterion=nn.functional.cross_entropy,
            valid_loader=[batch],
            warmup_steps=0,
            compile=compiled,
            seed=0,
            **{**SETTINGS[response], "method": method, "train_steps": TRAIN_STEPS},
        )
        assert stn.optimizer is not None
        found[method] = Loop(stn.model, stn.optimizer, batch, stn)
    return found


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return how long ``work`` takes, everything it queued on the device included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_round(found: dict[str, Loop], device: torch.device) -> dict[str, float]:
    """Time every part once; the response step is what tuning adds to ``optimizer.step()``."""
    plain, fixed, delta = (found[name] for name in ("plain", "fixed", "delta"))
    assert delta.stn is not None
    times = {"plain": seconds(plain.step, device)}
    backward, update = seconds(fixed.backward, device), seconds(fixed.update, device)
    times["general"] = backward + update
    backwards, updates = [], []
    for _ in range(PERIOD):  # each fifth of them takes a validation step too
        backwards.append(seconds(delta.backward, device))
        updates.append(seconds(delta.update, device))
    validate = delta.stn.validation_step
    times["validation"] = seconds(lambda: validate(delta.batch), device)
    validations = PERIOD / TRAIN_STEPS * times["validation"]
    times["response"] = (sum(updates) - validations) / PERIOD - update
    times["whole"] = (sum(backwards) + sum(updates)) / PERIOD
    return times


def peak_bytes(loop: Loop, device: torch.device) -> int:
    """Return the peak of memory in ``TRAIN_STEPS`` iterations, resident memory included."""
    loop.optimizer.zero_grad()
    gc.collect()
    with transient_peak(device) as peak:
        for _ in range(TRAIN_STEPS):
            loop.step()
        synchronise(device)
    return loop.resident_bytes() + peak[0]


@contextmanager
def transient_peak(device: torch.device) -> Iterator[list[int]]:
    """Give a list that holds, afterwards, the peak of bytes allocated beyond those at the start."""
    peak: list[int] = []
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - start)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    recorded: Any = profiler.profiler
    changes = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    peak.append(highest)


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles, to four digits."""
    low, median, high = quantiles(values, n=4, method="inclusive")
    return {key: float(f"{v:.4g}") for key, v in (("median", median), ("q1", low), ("q3", high))}


def measure(
    name: str, response: str, device: torch.device, compiled: bool, rounds: int
) -> dict[str, Any]:
    """Return times, ratios and memory of one model."""
    found = loops(name, response, device, compiled)
    for _ in range(2):  # warm-up: allocator, compilation, verification of the conversion
        one_round(found, device)
    times = [one_round(found, device) for _ in range(rounds)]
    memory = {method: peak_bytes(loop, device) for method, loop in found.items()}
    ratios = {part: spread([t[part] / t["plain"] for t in times]) for part in PARTS}
    return {
        "model": name,
        "response": response,
        "batch": list(found["plain"].batch[0].shape),
        "seconds": {part: spread([t[part] for t in times]) for part in PARTS},
        "ratio": ratios,
        "peak_bytes": memory,
        "peak_ratio": round(memory["delta"] / memory["plain"], 3),
    }


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the median ratios against the bars that apply."""
    verdicts = []
    for model, response, part, limit in BARS:
        for result in results:
            if (result["model"], result["response"]) == (model, response):
                ratio = result["ratio"][part]["median"]
                bar = {"model": model, "response": response, "part": part, "limit": limit}
                verdicts.append({**bar, "measured": ratio, "met": ratio <= limit})
    return verdicts


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--responses", nargs="+", choices=SETTINGS, default=list(USUAL))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile all passes")
    parser.add_argument("--label", help="added to the name of the results file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    report: dict[str, Any] = {"compiled": options.compile, **circumstances(device)}
    results = []
    for name in options.models:
        for response in options.responses:
            result = measure(name, response, device, options.compile, options.rounds)
            results.append(result)
            ratios = (
                f"{part} {r['median']:.2f} [{r['q1']:.2f}, {r['q3']:.2f}]"
                for part, r in result["ratio"].items()
                if part != "plain"
            )
            plain = result["seconds"]["plain"]["median"]
            memory = f"memory {result['peak_ratio']:.2f}"
            print(f"{name:9} {response:20} plain {plain:.4f} s |", *ratios, memory, flush=True)
    report["results"] = results
    if device.type == "cpu" and not options.compile:
        report["bars"] = judge(results)
        for bar in report["bars"]:
            verdict = "met" if bar["met"] else "MISSED"
            print("{model} {response} {part}: {measured} <= {limit}".format(**bar), verdict)
    suffix = "_compiled" if options.compile else ""
    suffix += f"_{options.label}" if options.label else ""
    path = options.out / f"step_cost_{device.type}{suffix}.json"
    write(path, report)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
