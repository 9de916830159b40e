"""Rewrite a module from the inside, where its forward cannot be traced.

The module's own code runs, on a *shadow*: a copy of the module objects that shares every
parameter, buffer and attribute with the originals, but whose layers are stand-ins. The perturbation
reaches the stand-ins through an ``Ambient`` that is set for the time of the call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn


@dataclass
class Ambient:
    """The perturbation of the pass that is running.

    Attributes:
        response_input: ``(batch, h)`` unconstrained, or None.
        constrained: ``(h,)`` or ``(batch, h)``, or None.
        linearized: Whether activations are dual numbers.
    """

    response_input: Tensor | None = None
    constrained: Tensor | None = None
    linearized: bool = False

    def set(self, other: "Ambient") -> None:
        """Become ``other``."""
        vars(self).update(vars(other))


@dataclass(frozen=True)
class _Run:
    """What a swapped module calls, and the originals its parts are kept equal to."""

    ambient: Ambient
    shadow: nn.Module
    pairs: list[tuple[nn.Module, nn.Module]]


class _StandIn(nn.Module):
    """Takes a layer's place and answers for its attributes; registers nothing of its own."""

    def __init__(self, original: nn.Module, added: nn.Module, ambient: Ambient) -> None:
        super().__init__()
        self.__dict__.update(_original=original, _added=added, _ambient=ambient)

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("_original")
        if original is None:
            raise AttributeError(name)
        return getattr(original, name)


class LayerStandIn(_StandIn):
    """Calls a hyper layer with the original's weight and bias."""

    def forward(self, inputs: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer, perturbed as the ambient says; transposed kernels take a size."""
        if output_size is not None:
            self._added.convolve.output_size = output_size
        weight, bias = self._original.weight, getattr(self._original, "bias", None)
        ambient = self._ambient
        output = self._added(inputs, weight, bias, ambient.response_input, ambient.linearized)
        return cast(Tensor, output)


class NoiseStandIn(_StandIn):
    """Calls a noise site with the ambient hyperparameters."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the noise."""
        return cast(Tensor, self._added(inputs, self._ambient.constrained))


class SwappedModule(nn.Module):
    """Runs a module's own forward with stand-ins for some of the modules inside it.

    Args:
        original: The user's module, which stays as it is.
        layers: Hyper layers by their name inside ``original``.
        noises: Noise sites by the name inside ``original`` of what they replace.
    """

    def __init__(
        self,
        original: nn.Module,
        layers: Mapping[str, nn.Module],
        noises: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        ambient = Ambient()
        stand_ins: dict[str, nn.Module] = {}
        kinds: tuple[tuple[Mapping[str, nn.Module], Callable[..., nn.Module]], ...] = (
            (layers, LayerStandIn),
            (noises, NoiseStandIn),
        )
        for added, kind in kinds:
            for name, module in added.items():
                stand_ins[name] = kind(original.get_submodule(name), module, ambient)
        pairs: list[tuple[nn.Module, nn.Module]] = []
        shadow = _shadow(original, stand_ins, "", pairs)
        # Kept out of the registries: the user's own tree holds the parameters already.
        self.__dict__["_run"] = _Run(ambient, shadow, pairs)

    def forward(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        response_input: Tensor | None,
        constrained: Tensor | None,
        linearized: bool,
    ) -> Any:
        """Call the module with ``args`` and ``kwargs`` under this perturbation."""
        run: _Run = self.__dict__["_run"]
        before = replace(run.ambient)
        run.ambient.set(Ambient(response_input, constrained, linearized))
        for shadow, original in run.pairs:
            _copy_attributes(original, shadow)
        try:
            return run.shadow(*args, **kwargs)
        finally:
            run.ambient.set(before)
            for shadow, original in run.pairs:
                _copy_attributes(shadow, original)


def _shadow(
    module: nn.Module,
    stand_ins: Mapping[str, nn.Module],
    name: str,
    pairs: list[tuple[nn.Module, nn.Module]],
) -> nn.Module:
    """Return ``module`` with stand-ins; modules without any inside are the originals themselves."""
    if name in stand_ins:
        return stand_ins[name]
    prefix = f"{name}." if name else ""
    if not any(other.startswith(prefix) for other in stand_ins):
        return module
    shadow: nn.Module = object.__new__(type(module))
    shadow.__dict__.update(module.__dict__)
    shadow.__dict__["_modules"] = {
        key: None if child is None else _shadow(child, stand_ins, f"{prefix}{key}", pairs)
        for key, child in module._modules.items()
    }
    pairs.append((shadow, module))
    return shadow


def _copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` every attribute of ``source`` but its children."""
    children = target.__dict__["_modules"]
    target.__dict__.clear()
    target.__dict__.update(source.__dict__)
    target.__dict__["_modules"] = children
