"""The model a conversion returns: the user's modules, and a graph that can be perturbed.

In eval mode it *is* the user's model: the original ``forward`` runs. In train mode the graph runs
at the current hyperparameters. Perturbed passes run the same graph, under ``running``. All names
are the user's: what a conversion adds is one more submodule, ``_stnify``.
"""

import copy
import inspect
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from stnify.attributes import Attributes, attributes
from stnify.augment import Augment
from stnify.checkpoints import plain_checkpoints
from stnify.delegated import delegated, undelegated
from stnify.errors import ShapeError, UsageError
from stnify.kept import kept_tensors
from stnify.layers import BiasResponse, HyperLayer, WeightResponse
from stnify.penalties import Recorder, ancestors
from stnify.regularizers import weight_factors, weights_scaled
from stnify.space import HyperparameterSpace
from stnify.streams import RandomStream
from stnify.targets import Mixing

PREFIX = "_stnify"
"""Name under which a tunable model keeps everything that is not the user's."""

PASS_INPUTS = {
    "_stnify_response_input": None,
    "_stnify_constrained": None,
    "_stnify_linearized": False,
}
"""Inputs that a graph has besides the model's own, and their defaults."""

MIXING = "_stnify_mixing"
"""Where a prediction, and the node that computed it, say whom its examples were mixed with."""

REACHABLE = {
    "hyperparameters": "space",
    "hyper_layers": "hyper_layers",
    "general_parameters": "general_parameters",
    "response_parameters": "response_parameters",
    "weight_responses": "weight_responses",
    "bias_responses": "bias_responses",
    "computed_weights": "computed_weights",
}
"""Names of a tunable model that are not the user's, unless the user's model has them, too."""

Pass = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""``(graph, args, kwargs) -> prediction``: one way to run the graph."""


class Use(NamedTuple):
    """One call of a hyper layer.

    Attributes:
        node: Name of the call in the plan.
        layer: Name of the hyper layer.
        bias: Name of the bias it is called with, if it is a parameter.
        computed: Whether it is called with a weight computed from the parameter.
    """

    node: str
    layer: str
    bias: str | None
    computed: bool


class Tunables(nn.Module):
    """What a conversion adds: hyperparameters, hyper layers, noise, and the graph they act in.

    Args:
        space: The hyperparameters.
        original: The user's model.
        stream: Where noise is drawn from.

    Attributes:
        space: The hyperparameters.
        layers: Hyper layers, by the qualified name of the layer they serve.
        noises: Noise sites, by their place.
        weight_noises: Noise on weights.
        augment: Augmentations of the model's first input, if there are any.
        mixing: Whom each example of the latest augmented batch was mixed with, if any.
        eager: Whether passes run as they are, although they are compiled.
        followed: What was added, and the user's module whose mode it follows.
        fixed: Noise nobody tunes, as modules that follow ``train()`` and ``eval()``.
        functions: Functions that are called as they are.
        swapped: Modules that are rewritten from the inside.
        constants: Tensors made while tracing.
        own_code: Modules of the graph whose own code runs, which may change attributes.
        original: The user's model, which is registered nowhere in here.
        graph: What train mode runs; it sees the tunable model's own tree.
        stream: Where noise is drawn from.
        uses: Name of each weight that meets hyper layers, to the calls in which it does.
        defaults: Optional arguments of the original's forward, as they were traced.
        training_pass: How train mode runs the graph, if not in the ordinary way.
        evaluation_pass: How eval mode runs the graph, if it is not to be the original.
        inputs: Those of a training pass, kept until they are taken; empty if they are wanted, None
            if not.
        predicted: Whether the model was called since this was last set to False.
    """

    original: nn.Module
    graph: nn.Module

    def __init__(
        self, space: HyperparameterSpace, original: nn.Module, stream: RandomStream
    ) -> None:
        super().__init__()
        self.space = space
        self.own_code: Sequence[str] = ()
        self.layers = nn.ModuleDict()
        self.noises = nn.ModuleDict()
        self.weight_noises = nn.ModuleList()
        self.augment: Augment | None = None
        self.mixing: Mixing | None = None
        self.eager = False
        # The user's modules are registered where they were.
        self.__dict__.update(original=original, followed=[])
        self.fixed = nn.ModuleDict()
        self.functions = nn.ModuleDict()
        self.swapped = nn.ModuleDict()
        self.constants = nn.Module()
        self.stream = stream
        self.uses: dict[str, tuple[Use, ...]] = {}
        self.defaults: dict[str, Any] = {}
        self.training_pass: Pass | None = None
        self.evaluation_pass: Pass | None = None
        self.inputs: tuple[Any, ...] | None = None
        self.predicted = False
        self._through: frozenset[str] = frozenset()
        self._attributes: list[Attributes] | None = None
        self._running: Pass | None = None
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._before_training: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        passing: dict[str, Any] = {
            "inputs": None,
            "_attributes": None,
            "_running": None,
            "_compiled": {},
            "_before_training": None,
        }
        return {**self.__dict__, **passing}

    def serve(
        self,
        graph: nn.Module,
        uses: Mapping[str, Sequence[Use]],
        defaults: Mapping[str, Any],
        through: Collection[str],
    ) -> None:
        """Run ``graph`` from now on.

        Args:
            graph: What train mode runs.
            uses: Name of each weight that meets hyper layers, to the calls in which it does.
            defaults: Optional arguments of the original's forward, as they were traced.
            through: Modules whose code the graph replaces, and those it only reads.
        """
        self.__dict__["graph"] = graph
        self.uses = {weight: tuple(layers) for weight, layers in uses.items()}
        self.defaults = dict(defaults)
        self._through = frozenset(through)
        self._attributes = self._read()

    def _read(self) -> list[Attributes]:
        paths = sorted(self._through)
        return attributes({path: self.original.get_submodule(path) for path in paths})

    @property
    def recorders(self) -> list[Recorder]:
        """Sites that keep activations for a penalty."""
        return [site for site in self.noises.values() if isinstance(site, Recorder)]

    def follow(self, added: nn.Module, followed: nn.Module) -> None:
        """Let what is added be off in training wherever the user puts that module in eval mode."""
        self.__dict__["followed"].append((added, followed))

    def follow_modes(self) -> None:
        """Put everything that was added in the mode of the module it follows."""
        for added, followed in self.__dict__["followed"]:
            added.training = followed.training

    def forget_records(self) -> None:
        """Let go of activations kept."""
        for recorder in self.recorders:
            recorder.records = []

    def weights_disturbed(
        self, graph: nn.Module, constrained: Tensor | None
    ) -> AbstractContextManager[None]:
        """Return a context in which the weights of ``graph`` are under noise."""
        factors = weight_factors(self.weight_noises, graph.get_parameter, constrained)
        return _disturbed(graph, factors) if factors else nullcontext()

    def augmented(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], constrained: Tensor | None
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Return the model's arguments with the first one augmented, in training.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            constrained: ``(h,)``, ``(batch, h)``, or None to leave all as it is.
        """
        if self.augment is None or constrained is None or not self.training:
            return args, kwargs
        name = None if args else next(iter(kwargs), None)
        images = args[0] if name is None else kwargs[name]
        if not torch.compiler.is_compiling():
            self.augment.check(images)
        augment = self.augment.forward if self.eager else self.augment
        mixed = augment(images, constrained)
        self.mixing = None
        if mixed.partner is not None and mixed.share is not None:
            self.mixing = Mixing(mixed.partner, mixed.share)
        if name is None:
            return (mixed.images, *args[1:]), kwargs
        return args, {**kwargs, name: mixed.images}

    @property
    def hyper_layers(self) -> dict[str, HyperLayer]:
        """Hyper layers by name."""
        return cast(dict[str, HyperLayer], dict(self.layers.items()))

    def general_parameters(self) -> dict[str, nn.Parameter]:
        """Return the user's own parameters, by the user's names."""
        prefix = f"{PREFIX}."
        return {n: p for n, p in self.graph.named_parameters() if not n.startswith(prefix)}

    def response_parameters(self) -> dict[str, nn.Parameter]:
        """Return Theta, by name."""
        return dict(self.layers.named_parameters(f"{PREFIX}.layers"))

    def layer_of(self) -> dict[str, str]:
        """Return the name of the hyper layer of each call in the plan, by the call's node."""
        return {use.node: use.layer for uses in self.uses.values() for use in uses}

    def users(self) -> dict[str, list[HyperLayer]]:
        """Return, by the name of each weight, the hyper layers it meets."""
        layers = self.hyper_layers
        return {weight: [layers[use.layer] for use in uses] for weight, uses in self.uses.items()}

    def weight_responses(self) -> dict[str, WeightResponse]:
        """Return the response of each parameter that has one as it is, by its name."""
        found, hyper_layers = {}, self.hyper_layers
        for weight, uses in self.uses.items():
            layers = [hyper_layers[use.layer] for use in uses if not use.computed]
            if layers and layers[0].weight_response is not None:
                found[weight] = layers[0].weight_response
        return found

    def computed_weights(self) -> list[str]:
        """Return the parameters from which the model computes a weight that responds."""
        return [name for name, uses in self.uses.items() if any(use.computed for use in uses)]

    def bias_responses(self) -> dict[str, BiasResponse]:
        """Return the response of each bias that has one, by the bias's name."""
        layers, uses = self.hyper_layers, [use for uses in self.uses.values() for use in uses]
        found = {use.bias: layers[use.layer].bias_response for use in uses if use.bias}
        return {bias: response for bias, response in found.items() if response is not None}

    def mixing_of(self, prediction: Tensor) -> Mixing | None:
        """Return whom the examples of a prediction were mixed with, or of what it is computed from.

        Of others, and where no gradients are taken, the latest's.
        """
        if MIXING in vars(prediction) or self.mixing is None:
            return cast(Mixing | None, vars(prediction).get(MIXING, self.mixing))
        marked = (node.metadata.get(MIXING) for node in ancestors([prediction]))
        return next((mixing for mixing in marked if mixing is not None), self.mixing)

    def call_before_training(self, function: Callable[[], None]) -> None:
        """Call ``function`` before every pass of the user's own that may be differentiated."""
        self._before_training = function

    def remember_inputs(self) -> None:
        """Keep the inputs of the next training pass until they are taken."""
        self.inputs = ()

    def forget_inputs(self) -> None:
        """Let go of inputs kept, if they are wanted, and keep those of the next pass instead."""
        if self.inputs is not None:
            self.remember_inputs()

    def remembered_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the inputs kept, if a pass has been made, and let go of them."""
        inputs = self.inputs or None
        if inputs is not None:
            self.inputs = None
        return cast(tuple[tuple[Any, ...], dict[str, Any]] | None, inputs)

    def refuse_changed_attributes(self) -> None:
        """Raise UsageError if an attribute that traced code reads has changed.

        The graph holds the value it had at the conversion, or when this model was copied. Tensors
        are read anew in every pass; of what cannot be seen see ``attributes``.
        """
        if self._attributes is None:
            self._attributes = self._read()
        for found in self._attributes:
            for name, before, now in found.changed():
                raise UsageError(
                    f"attribute {name!r} of {found.path or 'the model'!r} must stay what it was at "
                    f"the conversion, {before}, because train mode runs the graph made then, but "
                    f"is {now}. Keep a value that changes in a buffer, or name the module in "
                    f"`leaves=`."
                )

    def run_by(self, training: Pass, evaluation: Pass) -> None:
        """Run train and eval mode by these passes instead of the ordinary ones."""
        self.training_pass = training
        self.evaluation_pass = evaluation

    def compile_passes(self) -> None:
        """Compile train and eval mode; names and the user's own modules stay as they are."""
        if self.augment is not None:
            self.augment.compile()
        self._compiled = {
            "general": torch.compile(self.graph),
            "evaluation": torch.compile(self.original),
        }

    @contextmanager
    def running(self, chosen: Pass, constrained: Tensor | None) -> Iterator[None]:
        """Run every forward call of the body by ``chosen``.

        Args:
            chosen: How to run the graph.
            constrained: What ``hyperparameters[name]`` reads meanwhile, ``(batch, h)``.
        """
        before = self._running, self.space.active
        self._running, self.space.active = chosen, constrained
        try:
            yield
        finally:
            self._running, self.space.active = before

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Let the body predict without a trace: on copies of buffers, from stnify's own stream.

        Perturbations are those of the pass before. Compiled code is not used: it cannot be
        differentiated twice.
        """
        repeating = getattr(self.training_pass, "repeating", nullcontext)
        holders = [module for module in self.original.modules() if module._buffers]
        before = [dict(module._buffers) for module in holders]
        for module in holders:
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        self.eager = True
        try:
            with repeating(), nullcontext() if self._running else self.stream.active():
                yield
        finally:
            self.eager = False
            self.forget_records()
            for module, buffers in zip(holders, before, strict=True):
                module._buffers.update(buffers)

    @contextmanager
    def buffers_restored(self) -> Iterator[None]:
        """Undo what the body does to buffers; sparse ones are constants."""
        dense = [buffer for buffer in self.graph.buffers() if buffer.layout is torch.strided]
        before = [(buffer, buffer.clone()) for buffer in dense]
        try:
            yield
        finally:
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            self.space.refresh()  # whose current values are a buffer

    def predict(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool) -> Any:
        """Predict: train at the current hyperparameters, or be the original in eval mode."""
        own = self._running is None and not torch.compiler.is_compiling()
        if not torch.compiler.is_compiling():
            self.predicted = True
        differentiable = own and torch.is_grad_enabled()
        if differentiable and self._before_training is not None:
            self._before_training()
        chosen = self._running or (self.training_pass if training else self.evaluation_pass)
        if chosen is None and not training:
            return self._compiled.get("evaluation", self.original)(*args, **kwargs)
        self._refuse_other_arguments(args, kwargs)
        if training and not torch.compiler.is_compiling():
            self.follow_modes()
        if differentiable and training and self.inputs == ():
            self.inputs = (args, kwargs)
        try:
            outputs = self._run(chosen, args, kwargs)
            if isinstance(outputs, Tensor) and not torch.compiler.is_compiling():
                vars(outputs)[MIXING] = self.mixing
                if outputs.grad_fn is not None and self.mixing is not None:
                    node: Any = outputs.grad_fn
                    node.metadata[MIXING] = self.mixing
            return outputs
        except ValueError as error:
            _refuse_single_value(self.graph, error)
            raise

    def _run(self, chosen: Pass | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if chosen is not None:
            # A step compiles its whole forward; an ordinary pass compiles the graph.
            graph = self.graph if self._running else self._general_graph()
            return chosen(graph, args, kwargs)
        graph = self._general_graph()
        constrained = self.space.current
        with self._noise_stream():
            args, kwargs = self.augmented(args, kwargs, constrained)
            with self.weights_disturbed(self.graph, constrained):
                return graph(*args, **kwargs, **pass_inputs(constrained=constrained))

    def _general_graph(self) -> Callable[..., Any]:
        compiled = None if self.eager else self._compiled.get("general")
        return self.graph if compiled is None else compiled

    def _noise_stream(self) -> Any:
        """Draw noise from stnify's own stream, unless there is none or a compiler is tracing."""
        drawing = self.noises or self.weight_noises or self.augment is not None
        if not drawing or torch.compiler.is_compiling():
            return nullcontext()
        return self.stream.active()

    def _refuse_other_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise UsageError if an optional argument differs from the default it was traced with."""
        fixed = self.defaults
        if not fixed or (not kwargs and len(args) == 1):
            return
        given = inspect.signature(self.original.forward).bind(*args, **kwargs).arguments
        for name in fixed.keys() & given.keys():
            if given[name] is not fixed[name] and given[name] != fixed[name]:
                raise UsageError(
                    f"argument {name!r} of {type(self.original).__name__}.forward must keep its "
                    f"default {fixed[name]!r} in training, because the graph was traced with it, "
                    f"but got {given[name]!r}. Give it in `example_inputs=` of stnify()."
                )


@contextmanager
def _disturbed(graph: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[None]:
    if torch.compiler.is_compiling():
        with weights_scaled(graph, factors):
            yield
    else:
        with plain_checkpoints(), weights_scaled(graph, factors):
            yield


class WholeFunction(nn.Module):
    """Calls a function that cannot be traced through; as a module it is a leaf for any tracer.

    Args:
        function: Importable, so that it can be pickled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        return self.function(*args, **kwargs)


def insert(modules: nn.ModuleDict, name: str, module: nn.Module) -> str:
    """Put ``module`` into ``modules`` under a free name close to ``name``, and return that name."""
    stem = key = name.replace(".", "/") or "root"
    while key in modules or hasattr(modules, key):  # such as a layer called "keys"
        key = f"{stem}:{len(modules)}"
    modules[key] = module
    return key


class TunableModule(nn.Module):
    """Behaves as the user's model, and can be run with perturbed hyperparameters.

    Submodules, parameters, buffers and their names are the user's own objects; other attributes and
    methods are looked up on the user's model, whose calls of itself in them are calls of this one.
    Of its own it has the submodule ``_stnify``, which
    holds everything a conversion adds, and the names in ``REACHABLE`` that the user's model leaves
    free. ``deepcopy`` and pickling work.

    Args:
        tunables: What was added, with the user's model.
    """

    def __init__(self, tunables: Tunables) -> None:
        super().__init__()
        original, state = tunables.original, self.__dict__
        self.training = original.training
        state["_modules"] = {**original._modules, PREFIX: tunables}
        state["_parameters"] = original._parameters
        state["_buffers"] = original._buffers
        state["_non_persistent_buffers_set"] = original._non_persistent_buffers_set
        tunables.train(original.training)

    @property
    def _stnify(self) -> Tunables:
        return cast(Tunables, self._modules[PREFIX])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            tunables = self.__dict__.get("_modules", {}).get(PREFIX)
            if tunables is None:
                raise
            if name in REACHABLE and not hasattr(tunables.original, name):
                return getattr(tunables, REACHABLE[name])
            value = getattr(tunables.original, name)
            return delegated(value, tunables.original, self)

    def _apply(self, fn: Any, recurse: bool = True) -> "TunableModule":
        super()._apply(fn, recurse)
        self._stnify.stream.device = self._stnify.space.unconstrained.device
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            raise UsageError(
                f"a converted model keeps its modules and parameters, but {name!r} would be set. "
                f"Change the model before converting it, or convert `stn.export()` anew."
            )
        tunables = self.__dict__.get("_modules", {}).get(PREFIX)
        if tunables is None or name in self.__dict__ or not hasattr(tunables.original, name):
            super().__setattr__(name, value)
        else:
            setattr(tunables.original, name, value)

    def __getitem__(self, key: Any) -> Any:
        return cast(Any, self._stnify.original)[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> "TunableModule":
        twin = memo[id(self)] = object.__new__(type(self))
        for model in (self, self._stnify.original):
            memo.update(intermediate_results(model))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        share_tree(self, self._stnify.graph)

    def train(self, mode: bool = True) -> "TunableModule":
        """Set the mode as the user's model does, which may keep parts of itself in eval mode."""
        self._stnify.original.train(mode)
        self._stnify.train(mode)
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict: train at the current hyperparameters, or be the original in eval mode."""
        if torch.compiler.is_compiling():
            return self._stnify.predict(args, kwargs, training=self.training)
        with undelegated(self._stnify.original):
            return self._stnify.predict(args, kwargs, training=self.training)


def share_tree(model: nn.Module, graph: nn.Module) -> None:
    """Let ``graph`` see the modules, parameters and buffers of ``model``, and no others."""
    for registry in ("_modules", "_parameters", "_buffers"):
        graph.__dict__[registry] = model.__dict__[registry]


@contextmanager
def evaluating(model: TunableModule) -> Iterator[None]:
    """Put every module in eval mode, then each back in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        model._stnify.original.training = model.training


def pass_inputs(
    response_input: Tensor | None = None,
    constrained: Tensor | None = None,
    linearized: bool = False,
) -> dict[str, Any]:
    """Return what a graph receives behind the model's own inputs, by names no model uses.

    Args:
        response_input: ``(batch, h)`` unconstrained; None for no response.
        constrained: ``(h,)`` or ``(batch, h)``; None for no noise.
        linearized: Whether activations are dual numbers.
    """
    values = (response_input, constrained, linearized)
    return dict(zip(PASS_INPUTS, values, strict=True))


def intermediate_results(model: nn.Module) -> dict[int, Any]:
    """Return copies of tensors that forward code left behind, which cannot be deep-copied.

    On modules, and in the containers and objects that modules keep.

    Args:
        model: One whose code may do so, as the older ``torch.nn.utils.weight_norm`` does.

    Returns:
        A memo for ``copy.deepcopy``.
    """
    values = (value for module in model.modules() for value in vars(module).values())
    left = [tensor for tensor in kept_tensors(values) if not tensor.is_leaf]
    return {id(value): value.detach().clone() for value in left}


def _refuse_single_value(model: nn.Module, error: ValueError) -> None:
    """Raise ShapeError if ``error`` is a BatchNorm's that got one value for each channel."""
    rule, _, found = str(error).partition(", got ")
    if "more than 1 value per channel" not in rule:
        return
    names = {module: name for name, module in model.named_modules()}
    callers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    norms = [c for c in callers if isinstance(c, nn.modules.batchnorm._BatchNorm)]
    name = names.get(norms[-1], "") if norms else ""
    raise ShapeError(
        f"BatchNorm {name!r} needs more than one value per channel in training, but got {found}. "
        f"Use larger batches; if this was the last one of an epoch, pass drop_last=True to the "
        f"DataLoader."
    ) from error
