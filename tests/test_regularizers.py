"""Noise inside the network keeps its promises and is that of PyTorch, torchvision and timm."""

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm.layers
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torchvision.ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stnify import regularizers
from stnify.errors import ShapeError
from stnify.regularizers import (
    Noise,
    TunedAlphaDropout,
    TunedAttentionDropout,
    TunedDropBlock,
    TunedDropout,
    TunedEmbeddingDropout,
    TunedGaussianNoise,
    TunedScalingNoise,
)
from stnify.rows import RowLayout

WORDS = 7
EXAMPLE = (3, 4, 5)
"""Shape of a row: channels of images, heads of attention, or sequences of vectors."""


def call(noise: Noise, inputs: Tensor, constrained: Tensor | None) -> Tensor:
    """Call noise with what else it needs, made from the inputs row by row."""
    if isinstance(noise, TunedEmbeddingDropout):
        return noise(inputs, constrained, words_of(inputs))
    if isinstance(noise, TunedAttentionDropout):
        return noise(inputs, inputs.roll(1, -1), inputs.cos(), constrained)
    return noise(inputs, constrained)


def words_of(outputs: Tensor) -> Tensor:
    shape = outputs.shape[:-1]
    return (torch.arange(math.prod(shape)) % WORDS).reshape(shape)


def original(noise: Noise, inputs: Tensor) -> Tensor:
    """What there is without noise."""
    if isinstance(noise, TunedAttentionDropout):
        return F.scaled_dot_product_attention(inputs, inputs.roll(1, -1), inputs.cos())
    return inputs


@dataclass(frozen=True)
class Kind:
    """A kind of noise.

    Attributes:
        build: From column, place and factor.
        rounding: Whether zero strength gives the original only up to rounding.
        shares_rows: Whether one draw is for all rows.
        second: Whether rows may be the second dimension.
    """

    build: Callable[..., Noise]
    rounding: bool = False
    shares_rows: bool = False
    second: bool = True

    def assert_original(self, noise: Noise, found: Tensor, inputs: Tensor) -> None:
        expected = original(noise, inputs)
        if self.rounding:  # of means of numbers below one: scores, weights and sums are rounded
            error = 2 * torch.finfo(inputs.dtype).eps
            torch.testing.assert_close(found, expected, rtol=0, atol=error)
        else:
            assert torch.equal(found, expected)
            assert found.dtype is expected.dtype


KINDS = {
    "dropout": Kind(lambda column, **rest: TunedDropout(column, "element", **rest)),
    "dropout by channel": Kind(lambda column, **rest: TunedDropout(column, "channel", 2, **rest)),
    "drop path": Kind(lambda column, **rest: TunedDropout(column, "row", **rest)),
    "locked dropout": Kind(lambda column, **rest: TunedDropout(column, "time", **rest)),
    "stochastic depth": Kind(
        lambda column, **rest: TunedDropout(column, "batch", **rest), shares_rows=True
    ),
    "alpha dropout": Kind(lambda column, **rest: TunedAlphaDropout(column, "element", **rest)),
    "alpha dropout by channel": Kind(
        lambda column, **rest: TunedAlphaDropout(column, "channel", **rest)
    ),
    "drop block": Kind(lambda column, **rest: TunedDropBlock(column, 2, **rest), second=False),
    "gaussian": Kind(TunedGaussianNoise),
    "scaling": Kind(TunedScalingNoise),
    "embedding dropout": Kind(lambda column, **rest: TunedEmbeddingDropout(column, WORDS, **rest)),
    "attention dropout": Kind(TunedAttentionDropout, rounding=True),
}
OWN_ROWS = sorted(name for name, kind in KINDS.items() if not kind.shares_rows)

every_kind = pytest.mark.parametrize("name", KINDS)


def seeded(noise: Noise, inputs: Tensor, constrained: Tensor | None, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return call(noise, inputs, constrained)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def strengths(*values: float) -> Tensor:
    """Two hyperparameters, of which the second counts: one row for each value."""
    return torch.tensor([[0.9, value] for value in values])


def one_strength(value: float) -> Tensor:
    return strengths(value)[0]


# Every kind ---------------------------------------------------------------------------------------


def test_the_table_has_every_kind():
    names = {name: getattr(regularizers, name) for name in regularizers.__all__}
    classes = [kind for kind in names.values() if isinstance(kind, type)]
    kinds = {kind for kind in classes if issubclass(kind, Noise)} - {Noise}
    assert {type(kind.build(0)) for kind in KINDS.values()} == kinds


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("constrained", [one_strength(0.0), strengths(0.0, 0.0)], ids=["1", "n"])
def test_no_strength_changes_nothing(name, dtype, constrained):
    noise, inputs = KINDS[name].build(1), normal(4, *EXAMPLE, dtype=dtype)
    KINDS[name].assert_original(noise, seeded(noise, inputs, constrained), inputs)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strength_acts_in_the_type_of_the_inputs(name, dtype):
    noise, inputs = KINDS[name].build(1), normal(4, *EXAMPLE, dtype=dtype)
    found = seeded(noise, inputs, strengths(0.5, 0.8))
    assert found.dtype is dtype
    assert found.shape == inputs.shape
    assert found.isfinite().all()
    assert (found - original(noise, inputs)).abs().max() > 0.1


@every_kind
def test_off_in_eval_mode_and_without_hyperparameters(name):
    noise, inputs = KINDS[name].build(1), normal(4, *EXAMPLE)
    assert torch.equal(call(noise, inputs, None), original(noise, inputs))
    noise.eval()
    assert torch.equal(call(noise, inputs, one_strength(0.5)), original(noise, inputs))


@every_kind
def test_the_global_generator_replays_it(name):
    noise, inputs = KINDS[name].build(1), normal(40, *EXAMPLE)
    once, again, other = (seeded(noise, inputs, strengths(0.5, 0.6), seed) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    if not KINDS[name].shares_rows:  # one draw may be the same by chance
        assert not torch.equal(once, other)


@every_kind
def test_strength_is_factor_times_the_hyperparameter(name):
    inputs = normal(4, *EXAMPLE)
    half, whole = (KINDS[name].build(1, factor=factor) for factor in (0.5, 1.0))
    found = seeded(half, inputs, strengths(0.5, 0.75))
    assert torch.equal(found, seeded(whole, inputs, strengths(0.25, 0.375)))
    assert not torch.equal(found, seeded(whole, inputs, strengths(0.5, 0.75)))


@every_kind
def test_rows_do_not_depend_on_each_other(name):
    noise, inputs = KINDS[name].build(1), normal(4, *EXAMPLE)
    changed = inputs.clone()
    changed[2] += 1
    rates = strengths(0.5, 0.5, 0.5, 0.5)
    one, other = seeded(noise, inputs, rates), seeded(noise, changed, rates)
    assert torch.equal(one[[0, 1, 3]], other[[0, 1, 3]])
    assert not torch.equal(one[2], other[2])


OWNERS: dict[RowLayout, Callable[[int], int]] = {
    RowLayout.BATCH: lambda row: row // 3,
    RowLayout.INTERLEAVED: lambda row: row % 2,
    RowLayout.SECOND: lambda row: row // 3,
}
"""The example a row belongs to, of two examples with three rows each."""


@pytest.mark.parametrize("layout", OWNERS)
@pytest.mark.parametrize("name", OWN_ROWS)
def test_every_row_has_the_strength_of_its_example(name, layout):
    if layout is RowLayout.SECOND and not KINDS[name].second:
        name = "dropout"
    noise = KINDS[name].build(1)
    noise.layout = layout
    inputs = normal(6, *EXAMPLE)
    if layout is RowLayout.SECOND:
        inputs = inputs.transpose(0, 1)
    change = seeded(noise, inputs, strengths(0.0, 0.9)) - original(noise, inputs)
    for row in range(6):
        size = change.select(layout.dim, row).abs().max()
        assert (size > 1e-2) == (OWNERS[layout](row) == 1)


@every_kind
def test_shared_rows_have_the_mean_strength(name):
    noise, inputs = KINDS[name].build(1), normal(6, *EXAMPLE)
    noise.layout = RowLayout.SHARED
    found = seeded(noise, inputs, strengths(0.25, 0.75))
    assert torch.equal(found, seeded(noise, inputs, one_strength(0.5)))


def tangents(noise: Callable[[Tensor], Tensor], inputs: Tensor, direction: Tensor):
    """The tangent by forward mode and by central differences, at the same draw."""
    with forward_ad.dual_level():
        torch.manual_seed(0)
        outputs = forward_ad.unpack_dual(noise(forward_ad.make_dual(inputs, direction)))
    ends = []
    for step in (1e-5, -1e-5):
        torch.manual_seed(0)
        ends.append(noise(inputs + step * direction))
    torch.manual_seed(0)
    assert torch.equal(outputs.primal, noise(inputs))
    return outputs.tangent, (ends[0] - ends[1]) / 2e-5


DIFFERENCES = {"rtol": 1e-6, "atol": 1e-8}
"""Central differences err by the square of the step, 1e-10, and by rounding, 1e-16 / 1e-5."""


@every_kind
@pytest.mark.parametrize("constrained", [one_strength(0.5), strengths(0.3, 0.6)], ids=["1", "n"])
def test_primal_and_tangent_share_the_draw(name, constrained):
    noise, inputs = KINDS[name].build(1), normal(4, *EXAMPLE)
    found, expected = tangents(lambda x: call(noise, x, constrained), inputs, inputs.sin())
    torch.testing.assert_close(found, expected, **DIFFERENCES)


def test_a_mask_drawn_twice_is_caught():
    noise, inputs = KINDS["dropout"].build(1), normal(4, *EXAMPLE)

    def twice(inputs: Tensor) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(inputs)
        if tangent is None:
            return call(noise, primal, one_strength(0.5))
        return forward_ad.make_dual(*(call(noise, x, one_strength(0.5)) for x in (primal, tangent)))

    found, expected = tangents(twice, inputs, inputs.sin())
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(found, expected, **DIFFERENCES)


@every_kind
def test_compiles_as_one_graph_for_all_rates(name):
    torch._dynamo.reset()
    noise, inputs = KINDS[name].build(1), normal(4, *EXAMPLE)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rate in torch.linspace(0, 0.9, 10):
            constrained = strengths(float(rate), 0.5)
            torch.manual_seed(0)
            found = compiled(noise, inputs, constrained)
            # The compiler takes operators apart, which may round otherwise.
            torch.testing.assert_close(found, seeded(noise, inputs, constrained))


@every_kind
def test_copies_act_alike(name):
    noise, inputs = KINDS[name].build(1, place="there", factor=0.5), normal(4, *EXAMPLE)
    noise.layout = RowLayout.INTERLEAVED
    saved = io.BytesIO()
    torch.save(noise, saved)
    saved.seek(0)
    expected = seeded(noise, inputs, strengths(0.5, 0.8))
    for other in (copy.deepcopy(noise), torch.load(saved, weights_only=False)):
        assert (other.place, other.layout) == ("there", RowLayout.INTERLEAVED)
        assert torch.equal(seeded(other, inputs, strengths(0.5, 0.8)), expected)


@every_kind
def test_it_says_what_it_is(name):
    noise = KINDS[name].build(3, factor=0.5)
    text = repr(noise)
    assert text.startswith(f"{type(noise).__name__}(column=3, ")
    assert text.endswith("factor=0.5)")


@every_kind
@pytest.mark.parametrize(
    ("inputs", "found"), [(torch.ones(2, 3, 4, 5).long(), "torch.int64"), ((1, 2), "tuple")]
)
def test_what_is_no_tensor_of_real_numbers_is_refused(name, inputs, found):
    noise = KINDS[name].build(1, place="layer1")
    others = [None] * OTHERS.get(type(noise), 1)
    message = rf"real numbers, but at 'layer1' there is {found}. Choose another place by `at`"
    with pytest.raises(ShapeError, match=message):
        noise(inputs, *others)


OTHERS = {TunedAttentionDropout: 2, TunedEmbeddingDropout: 2}
"""Arguments a call needs besides the inputs."""


# Dropout ------------------------------------------------------------------------------------------


def shares_of_dropped(outputs: Tensor) -> float:
    return (outputs == 0).double().mean().item()


GROUPS = {
    ("element", 0): (),
    ("channel", 2): (2, 3),
    ("channel", 0): (2, 3),
    ("channel", 1): (3,),
    ("row", 0): (1, 2, 3),
    ("time", 1): (1,),
    ("time", 0): (0,),
    ("batch", 0): (0, 1, 2, 3),
}
"""Dimensions whose entries share a draw, by granularity."""


def groups(outputs: Tensor, dims: tuple[int, ...]) -> Tensor:
    """One entry for each draw; all entries of a draw must be alike."""
    for dim in dims:
        first = outputs.narrow(dim, 0, 1)
        assert torch.equal(outputs, first.expand_as(outputs))
        outputs = first
    return outputs


@pytest.mark.parametrize(("granularity", "dims"), GROUPS.items(), ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_dropped_is_the_rate(granularity, dims, rate):
    noise, inputs = TunedDropout(1, *granularity), torch.ones(20, 10, 6, 5)
    torch.manual_seed(0)
    calls = [groups(noise(inputs, one_strength(rate)), dims).flatten() for _ in range(200)]
    draws = torch.cat(calls)
    spread = math.sqrt(rate * (1 - rate) / len(draws))
    # Six standard deviations of a binomial share: a right one fails once in 10^9 runs.
    assert abs(shares_of_dropped(draws) - rate) < 6 * spread
    torch.testing.assert_close(draws.unique(), torch.tensor([0, 1 / (1 - rate)]))


def test_entries_that_differ_are_no_group():
    outputs = TunedDropout(1, "element")(torch.ones(20, 10, 6, 5), one_strength(0.5))
    with pytest.raises(AssertionError, match="equal"):
        groups(outputs, (1,))


IMAGES, SERIES = (6, 4, 3, 3), (6, 4, 3)
LIBRARIES = {
    "F.dropout": (TunedDropout(1, "element"), IMAGES, (), F.dropout),
    "F.dropout1d": (TunedDropout(1, "channel", 1), SERIES, (2,), F.dropout1d),
    "F.dropout2d": (TunedDropout(1, "channel", 2), IMAGES, (2, 3), F.dropout2d),
    "torch.feature_dropout": (
        TunedDropout(1, "channel"),
        SERIES,
        (2,),
        lambda inputs, p: torch.feature_dropout(inputs, p, True),
    ),
    "timm DropPath": (
        TunedDropout(1, "row"),
        IMAGES,
        (1, 2, 3),
        lambda inputs, p: timm.layers.drop_path(inputs, p, training=True),
    ),
    "torchvision row": (
        TunedDropout(1, "row"),
        IMAGES,
        (1, 2, 3),
        lambda inputs, p: torchvision.ops.stochastic_depth(inputs, p, "row"),
    ),
    "torchvision batch": (
        TunedDropout(1, "batch"),
        IMAGES,
        (0, 1, 2, 3),
        lambda inputs, p: torchvision.ops.stochastic_depth(inputs, p, "batch"),
    ),
    "F.alpha_dropout": (
        TunedAlphaDropout(1, "element"),
        IMAGES,
        (),
        lambda inputs, p: F.alpha_dropout(inputs, p, training=True),
    ),
    "F.feature_alpha_dropout": (
        TunedAlphaDropout(1, "channel"),
        IMAGES,
        (2, 3),
        lambda inputs, p: F.feature_alpha_dropout(inputs, p, training=True),
    ),
}
"""Ours, the shape of its inputs, the dimensions that share a draw, and the library's."""


@pytest.mark.parametrize("library", LIBRARIES)
def test_values_and_groups_are_those_of_the_library(library):
    """Every entry has one of two values, that of one that stays or that of one dropped."""
    noise, shape, dims, theirs = LIBRARIES[library]
    inputs = torch.full(shape, 0.7, dtype=torch.float64)
    rate = one_strength(0.3).double()
    torch.manual_seed(0)
    found = torch.stack([groups(noise(inputs, rate), dims) for _ in range(60)])
    expected = torch.stack([groups(theirs(inputs, 0.3), dims) for _ in range(60)])
    for outputs in (found, expected):
        for dim, size in enumerate(outputs.shape):
            assert size == 1 or (outputs.amax(dim) > outputs.amin(dim)).any()  # not one draw
        # The rate is the single-precision 0.3, off by 1e-8.
        assert (outputs.amin() - expected.amin()).abs() < 1e-7
        assert (outputs.amax() - expected.amax()).abs() < 1e-7
        between = (outputs > outputs.amin() + 1e-7) & (outputs < outputs.amax() - 1e-7)
        assert not between.any()
    assert found.amax() - found.amin() > 0.1


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_alpha_dropout_keeps_mean_and_variance(granularity):
    """Of numbers with mean zero and variance one."""
    inputs = normal(400, 100, 5, 5)
    for rate in (0.1, 0.5):
        outputs = seeded(TunedAlphaDropout(1, granularity), inputs, one_strength(rate))
        # 40,000 channels at least: errors near 1 / sqrt(40000) = 0.005, four of them.
        assert abs(outputs.mean()) < 0.02
        assert abs(outputs.var() - 1) < 0.03
    dropped = seeded(TunedDropout(1, granularity), inputs, one_strength(0.5))
    assert dropped.var() > 1.9


@pytest.mark.parametrize("granularity", [("channel", 3), ("time", 2)])
def test_a_dimension_that_is_not_there_is_refused(granularity):
    noise = TunedDropout(1, *granularity, place="layer1")
    with pytest.raises(ShapeError, match=r"dimensions, but at 'layer1' the shape is \(3, 4\)"):
        noise(torch.ones(3, 4), one_strength(0.5))


def test_a_rate_of_one_leaves_nothing():
    assert not TunedDropout(1, "element")(torch.ones(9), one_strength(1.0)).any()


def test_a_small_rate_drops_in_half_precision_too():
    """0.999 is one in bfloat16."""
    inputs = torch.ones(100_000, dtype=torch.bfloat16)
    outputs = seeded(TunedDropout(1, "element"), inputs, one_strength(0.001))
    # Binomial: 100 dropped on average, standard deviation 10.
    assert 40 < (outputs == 0).sum() < 160


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["dropout", "drop path", "stochastic depth", "alpha dropout", "gaussian"]),
    shape=st.lists(st.integers(1, 4), max_size=4),
    batch=st.integers(1, 4),
    layout=st.sampled_from(RowLayout),
)
def test_any_shape(kind, shape, batch, layout):
    noise, inputs = KINDS[kind].build(1), normal(*shape)
    noise.layout = layout
    assert torch.equal(noise(inputs, strengths(*[0.0] * batch)), inputs)
    found = noise(inputs, strengths(*[0.5] * batch))
    assert found.shape == inputs.shape
    assert found.isfinite().all()
    assert torch.equal(
        seeded(noise, inputs, strengths(*[0.5] * batch)),
        seeded(noise, inputs, one_strength(0.5)),
    )


# DropBlock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 5])
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_as_much_is_dropped_as_by_torchvision(block_size, rate):
    inputs = torch.ones(300, 8, 12, 12)
    found = seeded(TunedDropBlock(1, block_size), inputs, one_strength(rate))
    expected = torchvision.ops.drop_block2d(inputs, rate, block_size)
    by_map = (expected == 0).double().mean(dim=(2, 3))
    spread = by_map.std().item() * math.sqrt(2 / by_map.numel())  # of the difference of two means
    difference = abs(shares_of_dropped(found) - shares_of_dropped(expected))
    assert difference < 6 * spread
    other = seeded(TunedDropBlock(1, block_size), inputs, one_strength(rate + 0.1))
    assert abs(shares_of_dropped(other) - shares_of_dropped(expected)) > 6 * spread


@settings(max_examples=40)
@given(
    block_size=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_what_is_dropped_is_made_of_blocks_and_the_rest_makes_up_for_it(
    block_size, height, width, seed
):
    inputs = torch.ones(3, 2, height, width, dtype=torch.float64)
    outputs = seeded(TunedDropBlock(1, block_size), inputs, strengths(0.0, 0.3, 0.6), seed)
    tall, wide = min(block_size, height), min(block_size, width)
    covered = torch.zeros_like(outputs, dtype=torch.bool)
    zero = outputs == 0
    for top in range(height - tall + 1):
        for left in range(width - wide + 1):
            block = (..., slice(top, top + tall), slice(left, left + wide))
            covered[block] |= zero[block].all(-1).all(-1)[..., None, None]
    assert torch.equal(covered, zero)
    assert not zero[0].any()
    for outcome in outputs:
        # Sums of at most 200 numbers in double precision.
        assert not outcome.any() or abs(outcome.mean() - 1) < 1e-12


def test_drop_block_takes_images():
    with pytest.raises(ShapeError, match=r"images .* but at 'stem' the shape is \(3, 4, 5\)"):
        TunedDropBlock(1, 3, place="stem")(torch.ones(3, 4, 5), one_strength(0.5))


# Gaussian -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TunedGaussianNoise, TunedScalingNoise])
def test_the_strength_is_the_standard_deviation(kind):
    inputs = torch.full((2, 100_000), 3.0)
    outputs = seeded(kind(1), inputs, strengths(0.2, 0.5))
    size = 3.0 if kind is TunedScalingNoise else 1.0
    for outcome, strength in zip(outputs, (0.2, 0.5), strict=True):
        # Standard errors are 1 / sqrt(100,000) = 0.003 of the deviation, and less.
        assert abs(outcome.mean() - 3) < 0.02 * size * strength
        assert abs(outcome.std() / (size * strength) - 1) < 0.02


# Embedding dropout --------------------------------------------------------------------------------


def fates(outputs: Tensor, indices: Tensor) -> list[dict[int, set[float]]]:
    """What happened to each word, row by row; outputs of an embedding of ones."""
    found = []
    for row, words in zip(outputs, indices, strict=True):
        fate: dict[int, set[float]] = {}
        for values, word in zip(row.flatten(0, -2), words.flatten().tolist(), strict=True):
            fate.setdefault(word, set()).update(values.tolist())
        found.append(fate)
    return found


@pytest.mark.parametrize("constrained", [one_strength(0.5), strengths(0.5, 0.5)], ids=["1", "n"])
@pytest.mark.parametrize("layout", [RowLayout.BATCH, RowLayout.SECOND])
def test_a_word_goes_or_stays_in_a_whole_row(constrained, layout):
    indices = torch.randint(WORDS, (4, 3, 20), generator=torch.Generator().manual_seed(0))
    noise, outputs = TunedEmbeddingDropout(1, WORDS), torch.ones(4, 3, 20, 2)
    noise.layout = layout
    if layout is RowLayout.SECOND:
        indices, outputs = indices.transpose(0, 1), outputs.transpose(0, 1)
    torch.manual_seed(0)
    dropped = noise(outputs, constrained, indices)
    found = fates(dropped.movedim(layout.dim, 0), indices.movedim(layout.dim, 0))
    assert all(len(fate) == 1 for row in found for fate in row.values())
    assert {value for row in found for fate in row.values() for value in fate} == {0.0, 2.0}
    assert len({str(sorted(row.items())) for row in found}) > 1  # rows draw their own


def test_single_elements_are_no_words():
    indices = torch.randint(WORDS, (4, 20), generator=torch.Generator().manual_seed(0))
    outputs = seeded(TunedDropout(1, "element"), torch.ones(4, 20, 2), one_strength(0.5))
    assert any(len(fate) > 1 for row in fates(outputs, indices) for fate in row.values())


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_the_share_of_words_dropped_is_the_rate(rate):
    rows, words = 300, 40
    indices = torch.arange(words).expand(rows, -1).int()
    outputs = seeded_words(TunedEmbeddingDropout(1, words), indices, one_strength(rate))
    spread = math.sqrt(rate * (1 - rate) / (rows * words))
    assert abs(shares_of_dropped(outputs) - rate) < 6 * spread  # once in 10^9 runs


def seeded_words(noise: Noise, indices: Tensor, constrained: Tensor) -> Tensor:
    torch.manual_seed(0)
    return noise(torch.ones(*indices.shape, 2), constrained, indices)


@pytest.mark.parametrize("shape", [(), (6,)])
def test_single_words(shape):
    noise, indices = TunedEmbeddingDropout(1, WORDS), torch.zeros(shape).long()
    outputs = seeded_words(noise, indices, strengths(0.5, 0.5))
    assert outputs.shape == (*shape, 2)
    assert torch.equal(outputs[..., 0], outputs[..., 1])
    kept = seeded_words(noise, indices, strengths(0.0, 0.0))
    assert torch.equal(kept, torch.ones(*shape, 2))


def test_outputs_without_their_words_are_refused():
    noise = TunedEmbeddingDropout(1, WORDS, place="embed")
    with pytest.raises(ShapeError, match=r"'embed' there are indices \(2, 4\) and outputs \(2, 3"):
        noise(torch.ones(2, 3, 5), one_strength(0.5), torch.zeros(2, 4).long())


# Attention dropout --------------------------------------------------------------------------------

BLOCKED = torch.ones(4, 4, dtype=torch.bool).triu(1)  # the last query may look nowhere
ATTENTION = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "truth": {"attn_mask": ~torch.eye(4, dtype=torch.bool)},
    "truth, blocked row": {"attn_mask": BLOCKED},
    "added": {"attn_mask": torch.linspace(-2, 2, 16, dtype=torch.float64).view(4, 4)},
    "added, blocked row": {
        "attn_mask": torch.zeros(4, 4, dtype=torch.float64).masked_fill(~BLOCKED, -torch.inf)
    },
    "mask of each example": {"attn_mask": normal(3, 1, 1, 4)},
    "shared keys": {"enable_gqa": True},
}
"""Arguments of the function, for three examples, four heads, four queries and keys."""


def sides(groups_of_heads: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads = 2 if groups_of_heads else 4
    query, key, value = normal(3, 4, 4, 5), normal(4, 4, 4, 5)[:3].sin(), normal(3, 4, 4, 6)
    return query, key[:, :heads], value[:, :heads]


@pytest.mark.parametrize("arguments", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("constrained", [one_strength(0.0), strengths(0, 0, 0)], ids=["1", "n"])
def test_attention_is_the_functions(arguments, constrained):
    inputs = sides("enable_gqa" in arguments)
    found = TunedAttentionDropout(1)(*inputs, constrained=constrained, **arguments)
    expected = F.scaled_dot_product_attention(*inputs, **arguments)
    torch.testing.assert_close(found, expected)
    if arguments and "enable_gqa" not in arguments:
        assert not torch.allclose(found, F.scaled_dot_product_attention(*inputs))
    off = TunedAttentionDropout(1).eval()(*inputs, constrained=constrained, **arguments)
    assert torch.equal(off, expected)


@pytest.mark.parametrize("arguments", ATTENTION.values(), ids=ATTENTION)
def test_gradients_and_tangents_of_attention(arguments):
    """Also where a query may look nowhere."""
    inputs = sides("enable_gqa" in arguments)
    noise = TunedAttentionDropout(1)
    for position in range(3):

        def attend(side: Tensor, position=position) -> Tensor:
            others = [*inputs[:position], side, *inputs[position + 1 :]]
            return noise(*others, constrained=strengths(0.2, 0.5, 0.8), **arguments)

        direction = inputs[position].cos()
        found, expected = tangents(attend, inputs[position], direction)
        torch.testing.assert_close(found, expected, **DIFFERENCES)
        leaf = inputs[position].clone().requires_grad_()
        torch.manual_seed(0)
        (slope,) = torch.autograd.grad(attend(leaf).sum(), leaf)
        torch.testing.assert_close((slope * direction).sum(), expected.sum(), **DIFFERENCES)


@pytest.mark.parametrize("dims", [2, 3])
def test_attention_weights_are_dropped_at_the_rate(dims):
    """With the identity as values the outputs are the weights, all alike for a query of zeros."""
    keys = 400
    query = torch.zeros(*(2, 100, 5)[3 - dims :]) if dims == 3 else torch.zeros(100, 5)
    key, value = torch.zeros(*query.shape[:-2], keys, 5), torch.eye(keys)
    torch.manual_seed(0)
    found = TunedAttentionDropout(1)(query, key, value, constrained=strengths(0.2, 0.6))
    expected = (0.2, 0.6) if dims == 3 else (0.4,)  # one matrix: the mean
    for weights, rate in zip(found.view(-1, 100, keys), expected, strict=True):
        spread = math.sqrt(rate * (1 - rate) / weights.numel())
        assert abs(shares_of_dropped(weights) - rate) < 6 * spread  # once in 10^9 runs
        torch.testing.assert_close(weights.max(), torch.tensor(1 / keys / (1 - rate)))
