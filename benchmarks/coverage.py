"""Which models of timm and torchvision convert, how, and whether they stay exact.

Models are grouped by structure; of each group the smallest member is built small, with real
weights, and examined in a process of its own. Every row is written as soon as it is known, and a
run skips the rows that are there already, so it can be stopped and started at will. Times are those
of one processor, in seconds.

    python -m benchmarks.coverage                          # everything: some hours on two cores
    python -m benchmarks.coverage --names "vit_*" "swin*"
    python -m benchmarks.coverage --sample 30
    python -m benchmarks.coverage --retry                  # rows that are not fine, once more

A row is *fine* if the conversion succeeded and the graph is the original, bit for bit, in eval
mode and in train mode, with a response of nought up to rounding, rows are independent (unless the
model itself mixes examples, or all its layers share one perturbation), and the response pass gives
finite gradients.

The share is of *weights*: parameters of two or more dimensions that the model's forward multiplies
with activations, or hands to the function of a Linear, Conv, attention or recurrent layer. What is
multiplied with constants and other parameters only, such as a table whose rows are chosen by
products with one-hot positions, is no weight. Each row names such parameters, with their sizes, as
*without activations*. Embeddings count neither way. See ``benchmarks.examine.multiplied``.
"""

import argparse
import csv
import fnmatch
import json
import multiprocessing
import random
import resource
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.examine import Row, examine, judged
from benchmarks.reports import RESULTS, circumstances, write
from benchmarks.structures import NotBuiltError, Structure, small, structures

COLUMNS = (
    *("library", "family", "kind", "name", "models", "family_parameters"),
    *("status", "reason", "stage", "options", "shape", "parameters", "response"),
    *("way", "untraced", "sites", "swapped"),
    *("weights", "weight_parameters", "covered_parameters", "share", "uncovered"),
    "without_activations",
    *("exact", "exact_zero", "exact_train", "finite_outputs"),
    *("rows", "shared_sites", "shared_because", "finite", "moved"),
    *("convert_s", "verify_s", "seconds", "commit"),
)
GIBIBYTE = 2**30
BUILD = "build"

START = "forkserver"
"""How processes start: as forks of one without threads, which autograd cannot be forked with."""


def main(arguments: list[str] | None = None) -> None:
    """Examine what is asked for and write table and summary."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--names", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--sample", type=int, help="only so many structures, drawn at random")
    parser.add_argument("--time-limit", type=float, default=300, help="for one model, in seconds")
    parser.add_argument("--memory", type=float, default=6, help="for one model, in GiB")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--retry", action="store_true", help="examine again what was not fine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Table(options.out / "coverage.csv")
    every = structures(options.out / "coverage_structures.json")
    if options.retry:
        table.forget_failures()
    chosen = [s for s in every if any(fnmatch.fnmatch(s.name, glob) for glob in options.names)]
    chosen = [s for s in _families_first(chosen) if (s.library, s.name) not in table.rows]
    if options.sample is not None:
        chosen = random.Random(0).sample(chosen, min(options.sample, len(chosen)))
    commit = circumstances(torch.device("cpu"))["commit"]
    for number, row in enumerate(_examined(chosen, options), 1):
        table.add({**row, "commit": commit})
        print(f"{number}/{len(chosen)}", _headline(row), flush=True)
    path = options.out / "coverage.json"
    found = summary(table.rows.values(), every)
    write(path, found)
    for name, left_out in found["without_activations"].items():
        print(f"no weights, multiplied without activations: {name}: {left_out}")
    print(f"written: {table.path}, {path}")


def _families_first(chosen: list[Structure]) -> list[Structure]:
    """Order structures so that the first of every family come first, then all second ones."""
    seen: Counter[tuple[str, str]] = Counter()
    ranks = []
    for structure in chosen:
        ranks.append(seen[structure.library, structure.family])
        seen[structure.library, structure.family] += 1
    return [chosen[i] for i in sorted(range(len(chosen)), key=lambda i: ranks[i])]


class Table:
    """The rows found so far, and the file they are appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}
        self.columns: Sequence[str] = ()
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = {(row["library"], row["name"]): row for row in reader}
                self.columns = tuple(reader.fieldnames or ())

    def add(self, row: Row) -> None:
        """Append a row; a file with other columns is written anew."""
        self.rows[row["library"], row["name"]] = {k: str(row.get(k, "")) for k in COLUMNS}
        if self.columns == COLUMNS:
            self._write([row], "a")
        else:
            self._write(self.rows.values(), "w")

    def forget_failures(self) -> None:
        """Drop every row that is not fine."""
        self.rows = {key: row for key, row in self.rows.items() if row["status"] == "fine"}
        self._write(self.rows.values(), "w")

    def _write(self, rows: Iterable[Row], mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.columns = COLUMNS
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="raise", lineterminator="\n")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


# One process for each model -----------------------------------------------------------------------


@dataclass
class _Work:
    structure: Structure
    process: BaseProcess
    channel: Connection
    deadline: float
    found: Row

    def finished(self) -> bool:
        """Read what has arrived; return whether there is nothing more to come."""
        try:
            while self.channel.poll():
                self.found.update(self.channel.recv())
        except EOFError:
            self.process.join()
            return True
        return time.monotonic() > self.deadline

    def row(self) -> Row:
        """Return the row, and end the process if it still runs."""
        late = self.process.is_alive()
        self.process.kill()
        self.process.join()
        row = dict(self.found)
        if "status" not in row:
            why = "took too long" if late else f"its process ended with {self.process.exitcode}"
            row.update(status="failed", reason=f"{why} in stage {row.get('stage', BUILD)}")
        described = asdict(self.structure)
        described["family_parameters"] = described.pop("parameters")
        return {**described, **row}


def _examined(chosen: list[Structure], options: argparse.Namespace) -> Iterator[Row]:
    """Examine all of ``chosen``, a few at a time, and yield each row when it is there."""
    context: Any = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(["benchmarks.examine"])  # libraries are loaded once
    waiting, running = list(reversed(chosen)), list[_Work]()
    while waiting or running:
        while waiting and len(running) < options.jobs:
            structure = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_examine, args=(structure, theirs, options.memory))
            process.start()
            theirs.close()
            deadline = time.monotonic() + options.time_limit
            running.append(_Work(structure, process, ours, deadline, {}))
        wait([work.channel for work in running], timeout=1.0)
        for work in [work for work in running if work.finished()]:
            running.remove(work)
            yield work.row()


def _examine(structure: Structure, channel: Connection, memory: float) -> None:
    """Examine one structure, in a process that may end at any time, and send what is known."""
    limit = int(memory * GIBIBYTE)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    warnings.simplefilter("ignore")
    start = time.process_time()
    row: Row = {"stage": BUILD}
    try:
        built = small(structure)
        row.update(options=json.dumps(built.options, default=str), shape=list(built.shape))
        channel.send(row)
        for stage, found in examine(built):
            row.update(found, stage=stage, seconds=round(time.process_time() - start, 2))
            channel.send(row)
        row.update(judged(row))
    except Exception as error:
        row.update(status=_status(error, row["stage"]), reason=_one_line(error))
    row["seconds"] = round(time.process_time() - start, 2)
    channel.send(row)


def _status(error: Exception, stage: str) -> str:
    words = str(error)
    exhausted = isinstance(error, MemoryError) or "can't allocate memory" in words
    if exhausted or (stage == BUILD and isinstance(error, NotBuiltError)):
        return "skipped"
    return "failed"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _headline(row: Row) -> str:
    words = (row["name"], row["status"], row.get("way", ""), f"share {row.get('share', '?')}")
    return " ".join([*words, f"{row.get('seconds', '?')} s", str(row.get("reason", ""))])


# Summary ------------------------------------------------------------------------------------------


def summary(rows: Iterable[Row], every: Iterable[Structure]) -> dict[str, Any]:
    """Return shares of models, each row standing for all models of its structure."""
    examined, known = list(rows), list(every)
    kinds = sorted({structure.kind for structure in known})
    return {
        **circumstances(torch.device("cpu")),
        "structures": len(known),
        "models": sum(structure.models for structure in known),
        "commits": sorted({row["commit"] for row in examined}),
        "all": _shares(examined, known),
        **{
            kind: _shares(
                [row for row in examined if row["kind"] == kind],
                [structure for structure in known if structure.kind == kind],
            )
            for kind in kinds
        },
        "slowest_conversions": _slowest(examined),
        "not_fine": {
            f"{row['library']} {row['name']}": f"{row['status']}: {row['reason']}"
            for row in examined
            if row["status"] != "fine"
        },
        **{
            column: {
                f"{row['library']} {row['name']}": row[column] for row in examined if row[column]
            }
            for column in ("uncovered", "without_activations")
        },
    }


def _shares(rows: list[Row], known: list[Structure]) -> dict[str, Any]:
    done = [row for row in rows if row["status"] != "skipped"]
    weight = {True: sum(int(row["models"]) for row in done)}

    def share(*conditions: tuple[str, str]) -> float | None:
        models = sum(
            int(row["models"]) for row in done if all(row[key] == v for key, v in conditions)
        )
        return round(models / weight[True], 4) if weight[True] else None

    return {
        "structures": len(known),
        "examined": len(done),
        "skipped": len(rows) - len(done),
        "models": sum(structure.models for structure in known),
        "models_represented": weight[True],
        "share_of_models": {
            "fine": share(("status", "fine")),
            "exact": share(("exact", "True")),
            "exact_with_zero_response": share(("exact_zero", "True")),
            "exact_in_training": share(("exact_train", "True")),
            "rows_independent": share(("rows", "independent")),
            "response_pass": share(("finite", "True")),
            **{way: share(("way", way)) for way in ("graph", "leaves", "whole")},
        },
        "share_of_weights": _covered(done),
    }


def _covered(rows: list[Row]) -> float | None:
    """Return the share of weights that respond, each row standing for its group's parameters."""
    counted = [row for row in rows if row["share"]]
    total = sum(int(row["family_parameters"]) for row in counted)
    covered = sum(int(row["family_parameters"]) * float(row["share"]) for row in counted)
    return round(covered / total, 5) if total else None


def _slowest(rows: list[Row]) -> dict[str, float]:
    timed = sorted((float(row["convert_s"]), row["name"]) for row in rows if row["convert_s"])
    return {name: seconds for seconds, name in reversed(timed[-5:])}


if __name__ == "__main__":
    main()
