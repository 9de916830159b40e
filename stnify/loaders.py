"""Data loaders: one that remembers what it gave, one that never ends and can be resumed."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from stnify.errors import UsageError
from stnify.streams import RandomStream


class ObservedLoader:
    """Yields the batches of a loader and reports each one; all else is the loader's own.

    Args:
        loader: Any iterable of batches.
        observe: Called with each batch before it is given out.
    """

    def __init__(self, loader: Iterable[Any], observe: Callable[[Any], None]) -> None:
        self._loader = loader
        self._observe = observe

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in self._loader:
            empty = False
            self._observe(batch)
            yield batch
        if empty:
            raise UsageError(
                "train_loader must yield at least one batch, but it yielded none. Check the "
                "dataset's length against batch_size and drop_last; a generator can be used once."
            )

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


class EndlessLoader:
    """Yields batches for ever, epoch after epoch, from a private random stream.

    It can be resumed exactly: the state is the random state at the start of the epoch and the
    number of batches given since.

    Args:
        loader: Re-iterable loader, such as a ``DataLoader``.
        stream: Random numbers for shuffling and augmentation.
    """

    def __init__(self, loader: Iterable[Any], stream: RandomStream) -> None:
        self.loader = loader
        self._stream = stream
        self._iterator: Iterator[Any] | None = None
        self._given = 0
        self._epoch_start: dict[str, Tensor] = {}
        self._generator_start: Tensor | None = None

    def next(self) -> Any:
        """Return the next batch.

        Raises:
            UsageError: The loader yields nothing, or cannot be iterated again.
        """
        with self._stream.active():
            if self._iterator is None:
                self._start_epoch()
            assert self._iterator is not None
            batch = next(self._iterator, _END)
            if batch is _END:
                self._start_epoch()
                batch = next(self._iterator, _END)
        if batch is _END:
            raise UsageError(
                "valid_loader must yield batches epoch after epoch, but it is empty or exhausted. "
                "Pass a DataLoader (not an iterator) over a dataset that is not empty."
            )
        self._given += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is, or that it has not begun."""
        generator, start = self._generator(), self._generator_start
        if generator is not None and not self._epoch_start:
            start = generator.get_state()
        return {
            "stream": self._stream.state_dict(),
            "epoch_start": dict(self._epoch_start),
            "generator_start": start,
            "given": self._given,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state_dict`` was taken, by drawing the epoch's batches again."""
        self._iterator, self._epoch_start, self._given = None, {}, 0
        generator = self._generator()
        if generator is not None and state["generator_start"] is not None:
            generator.set_state(state["generator_start"])
        if state["epoch_start"]:
            self._stream.load_state_dict(state["epoch_start"])
            for _ in range(state["given"]):
                self.next()
        self._stream.load_state_dict(state["stream"])

    def _start_epoch(self) -> None:
        # The stream is active: its state is the global one.
        self._epoch_start = {"cpu": torch.get_rng_state()}
        generator = self._generator()
        self._generator_start = None if generator is None else generator.get_state()
        self._iterator = iter(self.loader)
        self._given = 0

    def _generator(self) -> torch.Generator | None:
        for owner in (getattr(self.loader, "sampler", None), self.loader):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                return generator
        return None


_END = object()
