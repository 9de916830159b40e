"""Choose modules by glob on their qualified names, or by type."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from stnify.errors import DeclarationError, nearest


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted ``name`` fits ``pattern``.

    Wildcards of ``fnmatch`` stay within one dotted part; a part ``**`` stands for any number of
    parts, also none.

    Example:
        ``matches("layer*.*", "layer1.0")`` holds, ``matches("layer*.*", "layer1.0.conv1")`` does
        not, ``matches("layer1.**", "layer1.0.conv1")`` does.
    """
    return _fits(pattern.split("."), name.split("."))


def _fits(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(pattern[1:], parts[i:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(pattern[1:], parts[1:])


def choose(
    patterns: str | type[nn.Module] | Sequence[str | type[nn.Module]],
    modules: Mapping[str, nn.Module | None],
) -> list[str]:
    """Return the names of ``modules`` that any of ``patterns`` matches, in their order.

    Args:
        patterns: Globs and module types (subclasses count).
        modules: Name to module; None where a name has no module of its own.
    """
    if isinstance(patterns, str | type):
        patterns = [patterns]

    def chosen(name: str, module: nn.Module | None) -> bool:
        return any(
            matches(pattern, name) if isinstance(pattern, str) else isinstance(module, pattern)
            for pattern in patterns
        )

    return [name for name, module in modules.items() if chosen(name, module)]


def require_each(
    patterns: str | type[nn.Module] | Sequence[str | type[nn.Module]],
    modules: Mapping[str, nn.Module | None],
    purpose: str,
) -> list[str]:
    """Return what ``choose`` does; every single pattern must match something.

    Raises:
        DeclarationError: One matches nothing.
    """
    for pattern in [patterns] if isinstance(patterns, str | type) else patterns:
        require(choose(pattern, modules), pattern, modules, purpose)
    return choose(patterns, modules)


def require(
    chosen: Iterable[str], patterns: object, candidates: Iterable[str], purpose: str
) -> list[str]:
    """Return ``chosen`` as a list; if it is empty, name the candidates nearest to ``patterns``.

    Raises:
        DeclarationError: Nothing was chosen.
    """
    found = list(chosen)
    if not found:
        asked = patterns if isinstance(patterns, str) else str(patterns)
        raise DeclarationError(
            f"{purpose} must match at least one module, but {patterns!r} matches none. "
            f"Nearest: {nearest(asked, candidates)}. ('*' stays within one dotted part, '**' "
            f"crosses dots.)"
        )
    return found
