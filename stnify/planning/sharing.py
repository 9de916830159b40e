"""Say which hyperparameter each place of a declaration belongs to."""

from collections.abc import Callable, Mapping

from torch import nn

from stnify.declare import Decay, Pattern, Site, WeightNoise
from stnify.errors import DeclarationError

Choose = Callable[[Pattern, Mapping[str, nn.Module | None]], list[str]]


def columns_of(
    declaration: Site | Decay | WeightNoise,
    places: Mapping[str, nn.Module | None],
    choose: Choose,
    own_name: Callable[[str], str] = str,
) -> dict[str, str]:
    """Return the name of the hyperparameter of each place.

    Args:
        declaration: With ``per_layer`` and ``tie``.
        places: Name of each place to the module there, if there is one.
        choose: Patterns and places to the names they match.
        own_name: Place to what its own hyperparameter is called after.

    Raises:
        DeclarationError: A group matches nothing, or two groups match one place.
    """
    name = declaration.name
    found = {p: f"{name}.{own_name(p)}" if declaration.per_layer else name for p in places}
    tied: dict[str, str] = {}
    for group, patterns in declaration.tie.items():
        members = choose(patterns, places)
        if not members:
            raise DeclarationError(
                f"a group of `tie` must match at least one place of {name!r}, but {group!r} "
                f"({patterns!r}) matches none of {list(places)[:8]}."
            )
        for member in members:
            if member in tied:
                raise DeclarationError(
                    f"a place can be in one group of `tie`, but {member!r} is in {tied[member]!r} "
                    f"and {group!r} of {name!r}. Narrow their patterns."
                )
            tied[member] = group
    return {**found, **{member: f"{name}.{group}" for member, group in tied.items()}}
