"""A copy of a module's objects in which stand-ins take the place of some of its parts.

It shares every parameter, buffer and attribute with the originals.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn


@dataclass
class Ambient:
    """The hyperparameters of the pass that is running.

    Attributes:
        constrained: ``(h,)`` or ``(batch, h)``, or None.
    """

    constrained: Tensor | None = None


class NoiseStandIn(nn.Module):
    """Takes a noise module's place with the ambient hyperparameters; registers nothing."""

    def __init__(self, original: nn.Module, added: nn.Module, ambient: Ambient) -> None:
        super().__init__()
        self.__dict__.update(_original=original, _added=added, _ambient=ambient)

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("_original")
        if original is None:
            raise AttributeError(name)
        return getattr(original, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What code that asks for the type of the module is told."""
        return type(self._original)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bare_stand_in, (), self.__dict__

    def forward(self, input: Tensor) -> Tensor:
        """Apply the noise."""
        return cast(Tensor, self._added(input, self._ambient.constrained))


def _bare_stand_in() -> NoiseStandIn:
    """Return a stand-in without attributes: what pickling fills."""
    return object.__new__(NoiseStandIn)


def shadow_of(
    module: nn.Module,
    stand_ins: dict[nn.Module, nn.Module],
    pairs: list[tuple[nn.Module, nn.Module]],
) -> nn.Module:
    """Return ``module`` with stand-ins; modules without any inside are the originals themselves."""
    if module in stand_ins:
        return stand_ins[module]
    if not any(child in stand_ins for child in module.modules()):
        return module
    shadow: nn.Module = object.__new__(type(module))
    stand_ins[module] = shadow  # a module under two names is one shadow
    shadow.__dict__.update(module.__dict__)
    shadow.__dict__["_modules"] = {
        key: None if child is None else shadow_of(child, stand_ins, pairs)
        for key, child in module._modules.items()
    }
    pairs.append((shadow, module))
    return shadow


def copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` every attribute of ``source`` but its children."""
    children = target.__dict__["_modules"]
    target.__dict__.clear()
    target.__dict__.update(source.__dict__)
    target.__dict__["_modules"] = children
