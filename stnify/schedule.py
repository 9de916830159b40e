"""9. History: what the hyperparameters were, saved, plotted, replayed."""

import csv
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stnify.errors import UsageError


@dataclass(frozen=True)
class Record:
    """The state after one validation step.

    Attributes:
        step: Training steps taken so far.
        values: Constrained hyperparameters by name.
        scales: Sigma by name, unconstrained units.
        validation_loss: Loss of the validation batch under perturbation; NaN if it was skipped.
    """

    step: int
    values: dict[str, float]
    scales: dict[str, float]
    validation_loss: float


@dataclass
class History:
    """Every validation step's hyperparameters, perturbation scale and validation loss.

    ``history.records[0]`` is the start, at step 0. A history is a schedule: give it to
    ``stnify(..., method="fixed", schedule=history)`` to train with the same values again.
    """

    records: list[Record] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hyperparameters."""
        return tuple(self.records[0].values) if self.records else ()

    def append(self, record: Record) -> None:
        """Add the next record."""
        self.records.append(record)

    def at(self, step: int) -> dict[str, float]:
        """Return the values in force after ``step`` training steps, constrained units.

        Raises:
            UsageError: The history is empty.
        """
        if not self.records:
            raise UsageError("a schedule must hold at least one record, but this one is empty.")
        index = bisect_right([record.step for record in self.records], step) - 1
        return self.records[max(index, 0)].values

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the records as plain containers."""
        return [asdict(record) for record in self.records]

    @classmethod
    def from_dict(cls, records: Sequence[dict[str, Any]]) -> "History":
        """Rebuild what ``to_dict`` returned."""
        return cls([Record(**record) for record in records])

    def to_json(self, path: str | Path) -> None:
        """Write the records as JSON; NaN becomes null."""
        records = self.to_dict()
        for record in records:
            if not math.isfinite(record["validation_loss"]):
                record["validation_loss"] = None
        Path(path).write_text(json.dumps(records, indent=1))

    @classmethod
    def from_json(cls, path: str | Path) -> "History":
        """Read what ``to_json`` wrote."""
        records = json.loads(Path(path).read_text())
        for record in records:
            if record["validation_loss"] is None:
                record["validation_loss"] = math.nan
        return cls.from_dict(records)

    def to_csv(self, path: str | Path) -> None:
        """Write one row for each record: step, validation loss, values, scales."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            scales = [f"scale.{name}" for name in self.names]
            writer.writerow(["step", "validation_loss", *self.names, *scales])
            for record in self.records:
                numbers = [*record.values.values(), *record.scales.values()]
                writer.writerow([record.step, record.validation_loss, *numbers])

    @classmethod
    def from_csv(cls, path: str | Path) -> "History":
        """Read what ``to_csv`` wrote."""
        with Path(path).open(newline="") as file:
            header, *rows = csv.reader(file)
        names = header[2 : 2 + (len(header) - 2) // 2]  # by position: a name may be "step"
        history = cls()
        for step, loss, *entries in rows:
            numbers = [float(entry) for entry in entries]
            values = dict(zip(names, numbers, strict=False))
            scales = dict(zip(names, numbers[len(names) :], strict=True))
            history.append(Record(int(step), values, scales, float(loss)))
        return history

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw each hyperparameter and the validation loss over training steps.

        Args:
            path: Where to write the picture, if anywhere; the suffix chooses the format.

        Returns:
            The matplotlib figure.

        Raises:
            UsageError: matplotlib is not installed, or there is nothing to plot.
        """
        if not self.records:
            raise UsageError("a plot needs at least one record, but the history is empty.")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UsageError(
                "History.plot needs matplotlib, which is not installed: pip install stnify[plots]."
            ) from error
        steps = [record.step for record in self.records]
        rows = len(self.names) + 1
        figure = Figure(figsize=(7, 1.6 * rows), layout="constrained")
        axes: Any = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axis, name in zip(axes, self.names, strict=False):
            axis.plot(steps, [record.values[name] for record in self.records])
            axis.set_ylabel(name.replace(".", ".\u200b"))
        axes[-1].plot(steps, [record.validation_loss for record in self.records], color="grey")
        axes[-1].set_ylabel("validation loss")
        axes[-1].set_xlabel("training step")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
