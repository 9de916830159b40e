"""Random modules of `stnify.testing`: each is converted and exact, or refused with a reason.

python -m benchmarks.random_modules --count 50000

It goes block by block and writes the results after each, so that a run which is interrupted, or
asked for more, continues where it was, as long as seed and commit are the same.
"""

import argparse
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from benchmarks.reports import RESULTS, circumstances, write
from stnify.declare import Declaration
from stnify.testing import converts_or_refuses
from stnify.testing.modules import RandomModule
from stnify.testing.strategies import hyperparameter_sets, random_modules

FILE = RESULTS / "random_modules.json"
BLOCK = 250
"""Modules drawn with one seed."""


def draw(seed: int, count: int) -> list[tuple[RandomModule, list[Declaration]]]:
    """Return ``count`` random modules with hyperparameters, the same for the same seed."""
    drawn: list[tuple[RandomModule, list[Declaration]]] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(module=random_modules(), data=st.data())
    def keep(module: RandomModule, data: Any) -> None:
        drawn.append((module, data.draw(hyperparameter_sets(floating=module.entries is None))))

    keep()
    return drawn


def examine(seed: int, count: int = BLOCK) -> dict[str, Any]:
    """Convert the modules of one block; return counts, and every failure with its module."""
    torch.set_num_threads(1)
    refused: Counter[str] = Counter()
    failed: list[dict[str, str]] = []
    modules = draw(seed, count)
    for module, hparams in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reason = converts_or_refuses(*module.build(), hparams)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            failed.append({"module": repr(module), "hparams": repr(hparams), "error": message})
        else:
            if reason is not None:
                refused[reason.partition(", but")[0]] += 1
    exact = len(modules) - len(failed) - refused.total()
    return {"count": len(modules), "exact": exact, "refused": dict(refused), "failed": failed}


def blocks(seed: int, numbers: range, workers: int) -> Iterator[dict[str, Any]]:
    """Examine blocks in order; those of different seeds do not meet."""
    seeds = [1_000_000 * seed + number for number in numbers]
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from pool.map(examine, seeds)
        finally:
            pool.shutdown(cancel_futures=True)


def add(report: dict[str, Any], block: dict[str, Any]) -> None:
    """Add the findings of one block to a report."""
    for key in ("count", "exact"):
        report[key] += block[key]
    report["refused"] = dict(Counter(report["refused"]) + Counter(block["refused"]))
    report["failed"] += block["failed"]
    report["blocks"] += 1


def continued(out: Path, seed: int) -> dict[str, Any]:
    """Return the report in ``out`` if it is of this seed and commit, else an empty one."""
    fresh = {
        **circumstances(torch.device("cpu")),
        "hypothesis": hypothesis.__version__,
        "seed": seed,
        "blocks": 0,
        "count": 0,
        "exact": 0,
        "refused": {},
        "failed": [],
        "seconds": 0.0,
    }
    known: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    same = all(known.get(key) == fresh[key] for key in ("seed", "commit", "torch", "hypothesis"))
    return known if same else fresh


def main(arguments: list[str] | None = None) -> None:
    """Examine random modules and write counts, reasons and failures."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--count", type=int, default=50_000, help=f"rounded up to blocks of {BLOCK}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    report = continued(options.out, options.seed)
    before, start = report["seconds"], time.monotonic()
    numbers = range(report["blocks"], math.ceil(options.count / BLOCK))
    for block in blocks(options.seed, numbers, options.workers):
        add(report, block)
        report["seconds"] = round(before + time.monotonic() - start, 1)
        write(options.out, report)
        print(f"{report['count']}: {report['exact']} exact, {len(report['failed'])} failed")
        if time.monotonic() - start > options.time_limit:
            break


if __name__ == "__main__":
    main()
