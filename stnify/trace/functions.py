"""Functions that cannot be traced through, called as they are.

fx traces by running code on proxies. A free function that looks at a proxy's value fails; called as
a whole, it becomes one node. Such functions are found by the error they cause.
"""

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType, TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn

from stnify.kept import holders, kept_values

Scope = dict[str, Any]


class TracedFunctions:
    """Stand-ins for functions in the code of a model, taken out again at the end.

    ``len`` of a proxy is traced from the start; other functions are added by ``leave_whole``. Code
    that asks for the type of a proxy is told what it stands for. Code that asks in which context it
    runs is not traced, because the answer would stay the same.

    Args:
        model: Its modules' code is where ``len`` is replaced.

    Attributes:
        whole: Functions that are called as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        scopes = [getattr(type(module).forward, "__globals__", {}) for module in model.modules()]
        self._scopes: list[Scope] = list({id(scope): scope for scope in scopes}.values())
        values = [value for module in model.modules() for value in kept_values(module).values()]
        self._kept = {id(holder) for holder in holders(values)}
        self._undo: list[Callable[[], Any]] = []
        self.whole: set[Callable[..., Any]] = {len}

    def __enter__(self) -> Self:
        for scope in self._scopes:
            if "len" not in scope:
                scope["len"] = _node_for(len)
                self._undo.append(functools.partial(scope.pop, "len"))
            if "isinstance" not in scope and not str(scope.get("__name__")).startswith("torch."):
                scope["isinstance"] = self._is_instance
                self._undo.append(functools.partial(scope.pop, "isinstance"))
        stand_ins = {id(function): _unanswered(function) for function in QUESTIONS}
        stand_ins[id(torch.is_tensor)] = functools.partial(self._is_instance, kinds=Tensor)
        for function in (*QUESTIONS, torch.is_tensor):
            self._replace(vars(torch), function.__name__, stand_ins[id(function)])
        for scope in self._scopes:
            for name in [name for name, value in scope.items() if id(value) in stand_ins]:
                self._replace(scope, name, stand_ins[id(scope[name])])
        entering = torch.autocast.__enter__
        setattr(torch.autocast, "__enter__", _refuse_autocast)  # noqa: B010 - a method, for mypy
        self._undo.append(functools.partial(setattr, torch.autocast, "__enter__", entering))
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def _is_instance(self, value: Any, kinds: Any) -> bool:
        """Answer as for what a proxy will be: a tensor, unless it stands for a number.

        Raises:
            RuntimeError: It is what a module or a function called as a whole returns.
        """
        if not isinstance(value, fx.Proxy):
            return isinstance(value, kinds)
        node, tracer = value.node, cast(Any, value.tracer)
        if node.op == "call_module":
            name = str(node.target)
            whole = name in tracer.leaves or name in tracer.opaque
            if whole or isinstance(tracer.root.get_submodule(name), SEVERAL):
                raise RuntimeError("it asks for the type of what a module returns")
        if node.target in self.whole - {len}:
            raise RuntimeError("it asks for the type of what a function returns")
        return not _is_number(node) and isinstance(A_TENSOR, kinds)

    def leave_whole(self, error: Exception) -> bool:
        """Replace the free function in which ``error`` arose, so that it becomes one node.

        Returns:
            Whether there is such a function, and it was not replaced before. A function that
            receives a weight or a module is none: its node would hide what responds in there. Nor
            is one that receives a container or an object that a module keeps: a node would be
            given a copy, and what the function changes in that would be lost.
        """
        found = _failing_function(error.__traceback__)
        if found is None or found[0] in self.whole:
            return False
        function, calling, called = found
        arguments = _arguments(called)
        kept = any(id(value) in self._kept for value in arguments)
        if kept or _holds_module(arguments) or any(map(_is_weight, _proxies(arguments))):
            return False
        self.whole.add(function)
        for scope in (calling.f_globals, function.__globals__):
            for name in [name for name, value in scope.items() if value is function]:
                self._replace(scope, name, _node_for(function))
        return True

    def _replace(self, scope: Scope, name: str, stand_in: Callable[..., Any]) -> None:
        self._undo.append(functools.partial(scope.__setitem__, name, scope[name]))
        scope[name] = stand_in


QUESTIONS = (torch.is_autocast_enabled, torch.is_autocast_cpu_enabled, torch.is_grad_enabled)
"""Functions of ``torch`` that say in which context code runs."""


def _unanswered(question: Callable[..., bool]) -> Callable[..., bool]:
    """Return ``question``, which raises if it is not PyTorch's own code that asks."""

    @functools.wraps(question)
    def stand_in(*args: Any) -> bool:
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] != "torch":
            raise RuntimeError(f"it asks torch.{question.__name__}, which depends on the call")
        return question(*args)

    return stand_in


def _refuse_autocast(context: torch.autocast) -> None:
    raise RuntimeError("it computes under autocast, which a graph cannot hold")


SEVERAL = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)
"""Modules of PyTorch that return several values."""

A_TENSOR = torch.empty(0)

NUMBERS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "shape", "ndim"}
"""Methods and attributes of a tensor that are numbers, or tuples of them."""


def _is_number(node: fx.Node) -> bool:
    """Whether a node stands for a size, or is computed from sizes alone."""
    if node.op == "call_method":
        return node.target in NUMBERS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in NUMBERS
    computed = getattr(node.target, "__module__", "") == "_operator"
    return node.target is len or (computed and all(map(_is_number, node.all_input_nodes)))


def _node_for(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, recorded as one node when an argument is a proxy."""

    @functools.wraps(function)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        proxy = next(_proxies((args, kwargs)), None)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return stand_in


def _failing_function(
    traceback: TracebackType | None,
) -> tuple[FunctionType, FrameType, FrameType] | None:
    """Return the innermost free function on the way to an error, its caller's frame and its own."""
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    for calling, called in reversed(list(itertools.pairwise(frames))):
        function = called.f_globals.get(called.f_code.co_name)
        if (
            isinstance(function, FunctionType)
            and function.__code__ is called.f_code
            and function.__module__.split(".")[0] not in {"torch", "stnify"}
        ):
            return function, calling, called
    return None


def _arguments(frame: FrameType) -> list[Any]:
    code = frame.f_code
    flags = inspect.CO_VARARGS, inspect.CO_VARKEYWORDS
    count = code.co_argcount + code.co_kwonlyargcount
    count += sum(bool(code.co_flags & flag) for flag in flags)
    return [frame.f_locals.get(name) for name in code.co_varnames[:count]]


def _is_weight(proxy: fx.Proxy) -> bool:
    """Whether a proxy is a layer's weight (not a table of positions, say)."""
    return proxy.node.op == "get_attr" and str(proxy.node.target).endswith("weight")


def _holds_module(value: Any) -> bool:
    """Whether a value is a module, or a list, tuple or dictionary of some, or a method of one."""
    match value:
        case nn.Module():
            return True
        case list() | tuple():
            return any(map(_holds_module, value))
        case dict():
            return any(map(_holds_module, value.values()))
    return isinstance(getattr(value, "__self__", None), nn.Module)


def _proxies(value: Any) -> Iterator[fx.Proxy]:
    match value:
        case fx.Proxy():
            yield value
        case list() | tuple():
            for entry in value:
                yield from _proxies(entry)
        case dict():
            yield from _proxies(list(value.values()))
