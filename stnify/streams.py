"""stnify's own random numbers: everything it draws leaves the global generators untouched.

A ``RandomStream`` keeps a private state of the CPU generator and of one accelerator's. While it is
active the global generators run from that state, so that any operation (dropout, ``rand_like``, a
data loader's shuffle, compiled kernels) draws from it; afterwards the global state is put back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class RandomStream:
    """A private sequence of random numbers for the CPU and one device.

    Args:
        seed: Two streams with the same seed draw the same numbers.
        device: Where the model lives; a second state is kept if it is an accelerator.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._seed = seed
        self._states: dict[str, Tensor] = {"cpu": _seeded(torch.device("cpu"), seed)}
        self._is_active = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "RandomStream":
        twin = RandomStream(self._seed, self.device)
        twin.load_state_dict(self.state_dict())
        return twin

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the body on this stream, then restore the global generators, also after an error.

        A body inside a body goes on where the outer one is.
        """
        if self._is_active:
            yield
            return
        devices = self._devices()
        before = {device: _get_state(device) for device in devices}
        for device in devices:
            if str(device) not in self._states:
                self._states[str(device)] = _seeded(device, self._seed)
            _set_state(device, self._states[str(device)])
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False
            for device in devices:
                self._states[str(device)] = _get_state(device)
                _set_state(device, before[device])

    def rewinder(self) -> Callable[[], None]:
        """Return a function after which the same numbers are drawn as from now on.

        For use while the stream is active.
        """
        now = {device: _get_state(device) for device in self._devices()}

        def rewind() -> None:
            for device, state in now.items():
                _set_state(device, state)

        return rewind

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the generator states, by device name."""
        return {name: state.clone() for name, state in self._states.items()}

    def load_state_dict(self, states: dict[str, Tensor]) -> None:
        """Continue from states that ``state_dict`` returned."""
        self._states = {name: state.cpu().clone() for name, state in states.items()}

    def _devices(self) -> list[torch.device]:
        cpu = torch.device("cpu")
        return [cpu] if self.device.type == "cpu" else [cpu, self.device]


def _get_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _seeded(device: torch.device, seed: int) -> Tensor:
    return torch.Generator(device).manual_seed(seed).get_state()
