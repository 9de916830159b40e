"""The contract of a hyper layer, as tests that pytest collects from a subclass."""

import copy
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

from stnify.layers import BiasResponse, HyperLayer, ResponseKind, WeightResponse, fan_in_bound
from stnify.rows import RowLayout
from stnify.streams import RandomStream

HYPERPARAMETERS = 3
BATCH = 4
STEPS = 3


class Case(NamedTuple):
    """A layer with open gates, and a batch for it.

    Attributes:
        kind: Of its response.
        original: The module whose weights it is called with.
        layer: The hyper layer.
        inputs: ``(batch, ...)``.
        response_input: ``(batch, h)``.
    """

    kind: ResponseKind
    original: nn.Module
    layer: HyperLayer
    inputs: Tensor
    response_input: Tensor

    def run(
        self, response_input: Tensor | None, inputs: Tensor | None = None, linearized: bool = False
    ) -> Tensor:
        """Call the layer with the original's weights."""
        inputs = self.inputs if inputs is None else inputs
        weight, bias = self.original.weight, getattr(self.original, "bias", None)
        outputs: Tensor = self.layer(inputs, weight, bias, response_input, linearized)
        return outputs


class HyperLayerContract(ABC):
    """Tests that a hyper layer is what it says; subclass it in a test file, one for each layer.

    Everything is in float64, for a full and a gate response, and in every layout of rows that the
    layer's ``row_dims`` allow. The judge is the slow way: the original, called for one example
    after another with the weights that example should meet.

    Attributes:
        axis: Dimension of the weight whose units are gated.
        units: Size of the gate, if not that of this dimension.

    Example:
        ``class TestConditional(HyperLayerContract)`` with ``original``, ``inputs`` and ``build``.
    """

    axis: ClassVar[int] = 0
    units: ClassVar[int | None] = None

    @abstractmethod
    def original(self) -> nn.Module:
        """Return the ordinary module, with a ``weight`` and perhaps a ``bias``."""

    @abstractmethod
    def inputs(self, batch: int) -> Tensor:
        """Return a batch for it, examples first."""

    @abstractmethod
    def build(
        self, original: nn.Module, weight: WeightResponse | None, bias: BiasResponse | None
    ) -> HyperLayer:
        """Return the hyper layer of ``original`` with these responses."""

    def time_major(self, batch: int) -> Tensor:
        """Return a batch for it whose second dimension counts examples.

        Asked for if ``row_dims`` of the layer name that dimension; batches in a row by default.
        """
        return torch.stack([self.inputs(batch) for _ in range(STEPS)])

    def cases(self) -> Iterator[Case]:
        """Yield the layer with each kind of response, gates open."""
        kinds: tuple[ResponseKind, ...] = ("full", "gate")
        for kind in kinds:
            with RandomStream(0, torch.device("cpu")).active():
                original = self.original().double()
                weight, bias = original.weight, getattr(original, "bias", None)
                assert isinstance(weight, Tensor)
                of_weight = WeightResponse(weight, HYPERPARAMETERS, self.axis, kind, self.units)
                nn.init.normal_(of_weight.gate)
                of_bias = None
                if bias is not None:
                    of_bias = BiasResponse(bias, HYPERPARAMETERS, fan_in_bound(weight), kind)
                    nn.init.normal_(of_bias.gate)
                layer = self.build(original, of_weight, of_bias)
                inputs = _double(self.inputs(BATCH))
                drawn = torch.randn(BATCH, HYPERPARAMETERS, dtype=torch.float64)
                yield Case(kind, original, layer, inputs, drawn)

    # Exactness ------------------------------------------------------------------------------------

    def test_without_a_response_input_it_is_the_original_bit_for_bit(self) -> None:
        """Also after the weights have moved, which the layer is given and must not keep."""
        for case in self.cases():
            for _ in range(2):
                found, expected = case.run(None), case.original(case.inputs)
                assert torch.equal(found, expected), _by("the plain layer", found, expected, case)
                with torch.no_grad():
                    for parameter in case.original.parameters():
                        parameter.mul_(1.5)

    def test_a_response_input_of_zeros_changes_nothing(self) -> None:
        """The layer with zeros is the original, bit for bit."""
        for case in self.cases():
            found, expected = case.run(0 * case.response_input), case.original(case.inputs)
            assert torch.equal(found, expected), _by("the layer at zero", found, expected, case)

    # Rows -----------------------------------------------------------------------------------------

    def test_each_example_meets_its_own_weights(self) -> None:
        """Row by row it is the original with that example's weights."""
        for case in self.cases():
            found = case.run(case.response_input)
            expected = _slowly(case, case.response_input, case.inputs)
            assert _close(found, expected), _by("a row", found, expected, case)
            plain = case.original(case.inputs)
            assert not _close(plain, expected), "the response must have an effect"

    def test_blocks_of_rows_meet_the_weights_of_their_example(self) -> None:
        """Folded into the batch, consecutive rows belong to one example."""
        for case in self.cases():
            each = case.response_input[:2].repeat_interleave(BATCH // 2, 0)
            _check_layout(case, RowLayout.BATCH, case.response_input[:2], each)

    def test_interleaved_rows_meet_the_weights_of_their_example(self) -> None:
        """Folded into the batch with time first, every second row belongs to one example."""
        for case in self.cases():
            each = case.response_input[:2].repeat(BATCH // 2, 1)
            _check_layout(case, RowLayout.INTERLEAVED, case.response_input[:2], each)

    def test_rows_in_the_second_dimension_meet_the_weights_of_their_example(self) -> None:
        """With time first, the second dimension counts examples, if ``row_dims`` say it may."""
        for case in self.cases():
            if RowLayout.SECOND.dim in case.layer.row_dims:
                with RandomStream(1, torch.device("cpu")).active():
                    inputs = _double(self.time_major(BATCH))
                given = case.response_input
                _check_layout(case._replace(inputs=inputs), RowLayout.SECOND, given, given)

    def test_shared_rows_meet_the_mean_perturbation(self) -> None:
        """Where rows belong to no example, one perturbation serves all."""
        for case in self.cases():
            mean = case.response_input.mean(0, keepdim=True).expand(BATCH, -1)
            _check_layout(case, RowLayout.SHARED, case.response_input, mean)

    # Derivatives ----------------------------------------------------------------------------------

    def test_the_tangent_is_the_derivative(self) -> None:
        """Along the perturbation and, for real inputs, along a tangent of the inputs too."""
        for case in self.cases():
            directions: list[Tensor | None] = [None]
            if case.inputs.is_floating_point():
                directions.append(torch.linspace(-1, 1, case.inputs.numel()).to(case.inputs))
            for direction in directions:
                _check_tangent(case, direction)

    def test_the_response_is_differentiable_and_the_weights_are_left_alone(self) -> None:
        """Gradients of the response are those of the slow way; none reaches captured weights."""
        for case in self.cases():
            constant = copy.deepcopy(case.original).requires_grad_(False)
            run = case._replace(original=constant).run(case.response_input)
            parameters = list(case.layer.parameters())
            captured = _gradients(run, list(case.original.parameters()))
            assert all(gradient is None for gradient in captured), (
                "the layer must use the weights it is given, but a gradient leaks into others"
            )
            slow = _slowly(case, case.response_input, case.inputs)
            for found, expected in zip(
                _gradients(run, parameters), _gradients(slow, parameters), strict=True
            ):
                assert found is not None, "every response parameter must be reached"
                assert expected is not None
                assert _close(found, expected), _by("a gradient", found, expected, case)

    # State ----------------------------------------------------------------------------------------

    def test_copies_and_saved_states_are_whole(self) -> None:
        """A deepcopy, and a scrambled copy that loads the saved state, compute the same."""
        for case in self.cases():
            expected = case.run(case.response_input)
            twin = copy.deepcopy(case.layer)
            assert torch.equal(case._replace(layer=twin).run(case.response_input), expected)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.add_(1.0)
            assert not torch.equal(case._replace(layer=twin).run(case.response_input), expected)
            file = io.BytesIO()
            torch.save(case.layer.state_dict(), file)
            file.seek(0)
            twin.load_state_dict(torch.load(file, weights_only=True))
            assert torch.equal(case._replace(layer=twin).run(case.response_input), expected)


def _double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def _check_layout(case: Case, layout: RowLayout, response_input: Tensor, each: Tensor) -> None:
    """Compare rows of this layout with the slow way, which gives each row ``each`` of its own."""
    case.layer.layout = layout
    try:
        expected, plain = _slowly(case, each, case.inputs, layout.dim), case.original(case.inputs)
        found = case.run(response_input)
        with forward_ad.dual_level():
            linear = forward_ad.unpack_dual(case.run(response_input, linearized=True))
    except RuntimeError as error:
        raise AssertionError(
            f"{type(case.layer).__name__} with a {case.kind} response must take rows laid out as "
            f"{layout!s}, in inputs of shape {tuple(case.inputs.shape)}, but: {error}. Its "
            f"`row_dims` say which dimensions may count rows; `time_major` gives a batch with rows "
            f"in the second."
        ) from error
    tangent = linear.tangent if linear.tangent is not None else 0 * plain
    kinds = {"a row": (found, expected), "the tangent of a row": (tangent, expected - plain)}
    for what, (value, wanted) in kinds.items():
        assert _close(value, wanted), _by(f"{what} laid out as {layout!s}", value, wanted, case)
    assert not _close(plain, expected), "the response must have an effect"


def _slowly(case: Case, response_input: Tensor, inputs: Tensor, dim: int = 0) -> Tensor:
    """Call the original on one example after another, each with its own weights."""
    outputs = []
    parameters = dict(case.original.named_parameters())
    for example, own in zip(inputs.split(1, dim), response_input, strict=True):
        weights: dict[str, Tensor] = dict(parameters)
        if case.layer.weight_response is not None:
            change = case.layer.weight_response.materialise(parameters["weight"], own)
            weights["weight"] = parameters["weight"] + change
        if case.layer.bias_response is not None:
            shift = case.layer.bias_response(parameters["bias"], own[None])[0]
            weights["bias"] = parameters["bias"] + shift
        outputs.append(functional_call(case.original, weights, (example,)))
    return torch.cat(outputs, dim)


def _check_tangent(case: Case, direction: Tensor | None) -> None:
    """Compare with a central difference, exact for any step since the layer is bilinear."""
    step = 0 if direction is None else direction.reshape(case.inputs.shape)
    with torch.no_grad(), forward_ad.dual_level():
        inputs = case.inputs if direction is None else forward_ad.make_dual(case.inputs, step)
        dual = case.run(case.response_input, inputs, linearized=True)
        primal, tangent = forward_ad.unpack_dual(dual)
        assert tangent is not None, "a linearised pass must return a dual tensor"
        plain = case.original(case.inputs)
        assert torch.equal(primal, plain), _by("the primal", primal, plain, case)
        ahead = _slowly(case, case.response_input, case.inputs + step)
        behind = _slowly(case, -case.response_input, case.inputs - step)
        expected = (ahead - behind) / 2
        assert _close(tangent, expected), _by("the tangent", tangent, expected, case)


def _gradients(outputs: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    weights = torch.linspace(1, 2, outputs.numel(), dtype=outputs.dtype).reshape(outputs.shape)
    return list(torch.autograd.grad((outputs * weights).sum(), parameters, allow_unused=True))


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-9, atol=1e-10)


def _by(what: str, found: Tensor, expected: Tensor, case: Case) -> str:
    distance = float((found - expected).detach().abs().max())
    return (
        f"{what} of {type(case.layer).__name__} with a {case.kind} response differs by "
        f"{distance:.3g} from the original's"
    )
