"""What can go wrong, sorted by what the user should do next.

Messages state the rule, then the values, then the way out.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class StnifyError(Exception):
    """Base of every error stnify raises on purpose."""


class DeclarationError(StnifyError, ValueError):
    """A declared hyperparameter cannot be used: change its numbers, name or target."""


class ShapeError(StnifyError, ValueError):
    """A tensor or batch has the wrong shape: look at the call that passed it."""


class UnsupportedModuleError(StnifyError, TypeError):
    """A module cannot be converted: change it, exclude it or register a layer for it."""


class TraceError(StnifyError, RuntimeError):
    """The model could not be traced faithfully: mark the named module as a leaf."""


class UsageError(StnifyError, RuntimeError):
    """The training loop misses an argument or a call: the message says which and where."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return the choices closest to ``name`` as text, or the first few if none is close."""
    choices = list(choices)
    close = get_close_matches(name, choices, n=count, cutoff=0.3) or choices[:count]
    return ", ".join(repr(choice) for choice in close) if close else "nothing"
