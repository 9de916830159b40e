"""The assertion that every pass compiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.testing.subject import Hparams, Model, Subject, prepared, tensors


def assert_compiles(
    model: Model,
    inputs: Any,
    hparams: Hparams = None,
    *,
    backend: str = "inductor",
    tolerance: float = 1e-6,
) -> None:
    """Assert that the general, response and validation pass each compile as one graph.

    Each agrees with the eager pass, in float64, where no noise makes the passes differ; and none
    compiles again when lambda moves. What was compiled before in this process is forgotten.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        backend: Of ``torch.compile``; ``"aot_eager"`` is quick and checks all but the kernels.
        tolerance: Relative error of the compiled prediction.
    """
    with prepared(model, inputs, hparams, double=True) as subject:
        subject = subject.several()
        subject.shared_sites()
        for name, (training, _) in _passes(subject).items():
            with subject.mode(training), _one_graph(backend) as compiler:
                _check_pass(subject, name, compiler, tolerance)


Compiler = Callable[[Any], Any]
"""Returns a function or module compiled, or as it is."""


def _passes(subject: Subject) -> dict[str, tuple[bool, Callable[[Compiler], Any]]]:
    """Return the mode of each pass, and the pass as a function of a compiler."""
    model, given = subject.model, subject.draw()

    def run(forward: Callable[..., Any], training: bool) -> Any:
        constrained = model._stnify.space.current.expand(len(given), -1) if training else None

        def chosen(*args: Any, **kwargs: Any) -> Any:
            return forward(model._stnify.graph, args, kwargs, Perturbation(given, constrained))

        return subject.call(chosen)

    return {
        "general": (True, lambda compiler: subject.call(compiler(model))),
        "response": (True, lambda compiler: run(compiler(linearized_forward), True)),
        "validation": (False, lambda compiler: run(compiler(perturbed_forward), False)),
    }


def _check_pass(subject: Subject, name: str, compiler: Compiler, tolerance: float) -> None:
    """Compare a pass before and after lambda moved."""
    run = _passes(subject)[name][1]
    for distance in (0.0, 0.25):
        with torch.no_grad():
            subject.model._stnify.space.unconstrained.add_(distance)
        try:
            found = tensors(run(compiler))
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise AssertionError(
                f"the {name} pass of {subject.name} must compile as one graph, once for all values "
                f"of lambda, but {type(error).__name__}: {reason}"
            ) from error
        expected = _eager(subject, name)
        error_size = _relative_error(found, expected)
        noisy = _relative_error(_eager(replace(subject, seed=1), name), expected) > 0
        if not error_size <= tolerance and not noisy:
            raise AssertionError(
                f"the compiled {name} pass of {subject.name} must agree with the eager one up to "
                f"{tolerance:.1g}, but its relative error is {error_size:.3g}."
            )


def _eager(subject: Subject, name: str) -> list[Tensor]:
    return tensors(_passes(subject)[name][1](lambda function: function))


def _relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((one - other).detach().norm()) / (float(other.detach().norm()) + 1e-12)
        for one, other in zip(found, expected, strict=True)
        if one.is_floating_point()
    )


@contextmanager
def _one_graph(backend: str) -> Iterator[Compiler]:
    """Yield a compiler of whole graphs, with which compiling again is an error."""
    compiled: dict[Any, Any] = {}

    def compiler(function: Any) -> Any:
        if function not in compiled:
            compiled[function] = torch.compile(function, fullgraph=True, backend=backend)
        return compiled[function]

    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield compiler
    finally:
        torch._dynamo.reset()
