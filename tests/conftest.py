"""Settings of every test."""

import gc
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tests' models are so small that threads only wait for each other

# A full collection looks at all of PyTorch, some tenths of a second each time.
gc.set_threshold(10_000, 20, 100)

settings.register_profile("stnify", deadline=None)  # the first call of an operation takes long
settings.load_profile("stnify")

HUGGING_FACE = find_spec("transformers") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs transformers where it is not installed; ``.ci/install`` installs it."""
    if HUGGING_FACE:
        return
    left = [item for item in items if item.get_closest_marker("hf")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say so."""
    if not HUGGING_FACE:
        terminalreporter.write_line(
            "LEFT OUT: every test marked hf, because transformers is not installed "
            "(pip install -e '.[test-hf]')",
            yellow=True,
        )
