"""What a module keeps. Code that changes it is not traced: a graph would not do it again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from stnify.kept import PASSIVE, contents, kept_values, put_back, same_content

CONSTANT = "_tensor_constant"
"""How fx names the tensors made while tracing, which it keeps on the root."""


class ChangedAttributeError(RuntimeError):
    """Code changes attributes of a module, which a graph would not do again.

    Args:
        module: Whose attributes.
        names: The attributes.
        label: What to call the first.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], label: str) -> None:
        super().__init__(f"it changes its attribute {label!r}")
        self.module = module
        self.names = names

    def forget_values(self) -> None:
        """Let code that reads these attributes while tracing goes on fail."""
        own = [name for name in self.names if name in vars(self.module)]
        vars(self.module).update(dict.fromkeys(own, UnknownWhileTracing()))


class UnknownWhileTracing:
    """Stands for an attribute that only a real pass sets, so that code that reads it fails."""


class Snapshot:
    """What a module and all modules inside it keep, now.

    What containers, objects and generators among the attributes hold, and which buffers there are,
    counts in train mode only: in eval mode the model's own code runs, and caches.

    Args:
        module: Whose, with all modules inside it.
        training: Whether it is traced as it trains.
    """

    def __init__(self, module: nn.Module, *, training: bool) -> None:
        self._parts = [_Part(name, part, training) for name, part in module.named_modules()]

    def refuse_changes(self) -> None:
        """Raise ChangedAttributeError if any attribute is another, or holds something else."""
        for part in self._parts:
            changed = list(part.changed())
            if changed:
                label = f"{part.name}.{changed[0]}" if part.name else changed[0]
                raise ChangedAttributeError(part.module, changed, label)

    def restore(self) -> None:
        """Put attributes back, and what they held, except those known to be unknown."""
        for part in self._parts:
            part.restore()


class _Part:
    """One module's attributes, and what they hold."""

    def __init__(self, name: str, module: nn.Module, training: bool) -> None:
        self.name, self.module, self.training = name, module, training
        self._values = dict(module.__dict__)
        self._registered = {name: dict(self._values[name]) for name in REGISTERED}
        self._contents = {
            name: contents([value])
            for name, value in kept_values(module).items()
            if training and type(value) not in PASSIVE
        }
        self._made = _made_by_hooks(module)

    def changed(self) -> Iterator[str]:
        """Yield the names of attributes that are others, or hold something else."""
        yield from self._others(self._values, self.module.__dict__)
        for name, held in self._contents.items():
            if not all(same_content(*entry) for entry in held):
                yield name
        if self.training:
            for name, before in self._registered.items():
                yield from self._others(before, self.module.__dict__[name])

    def _others(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
        for name, value in now.items():
            if name in before and before[name] is value:
                continue
            ignored = name.startswith(CONSTANT) or name in self._made
            if not (ignored or isinstance(value, UnknownWhileTracing)):
                yield name

    def restore(self) -> None:
        attributes = self.module.__dict__
        unknown = {n: v for n, v in attributes.items() if isinstance(v, UnknownWhileTracing)}
        attributes.clear()
        attributes.update(self._values)
        attributes.update(unknown)
        for name, before in self._registered.items():
            put_back(attributes[name], before)
        for held in self._contents.values():
            for entry in held:
                if not same_content(*entry):
                    put_back(*entry)


REGISTERED = ("_parameters", "_buffers", "_modules")


def _made_by_hooks(module: nn.Module) -> set[str]:
    """Return the weights that hooks of ``torch.nn.utils`` compute anew before each call."""
    found = set()
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found.add(hook.name)
        if isinstance(hook, BasePruningMethod):
            found.add(hook._tensor_name)
    return found
