"""Augmentations: nothing at zero strength, rows that know nothing of each other, and the draws."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from stnify.augment import (
    Mixed,
    brightness,
    contrast,
    cutmix,
    cutout,
    horizontal_flip,
    hue,
    mixed_targets,
    mixup,
    rand_augment,
    random_erasing,
    saturation,
    warp,
)
from stnify.errors import DeclarationError, ShapeError

Operation = Callable[[Tensor, Tensor], Tensor | Mixed]

OPERATIONS: dict[str, tuple[Operation, float]] = {
    "brightness": (brightness, 0.5),
    "contrast": (contrast, 0.5),
    "saturation": (saturation, 0.5),
    "hue": (hue, 0.3),
    "translate": (lambda images, strength: warp(images, translate=strength), 0.4),
    "scale": (lambda images, strength: warp(images, scale=strength), 0.4),
    "rotate": (lambda images, strength: warp(images, rotate=strength), 40.0),
    "shear": (lambda images, strength: warp(images, shear=strength), 30.0),
    "warp": (lambda images, strength: warp(images, strength, strength, strength, strength), 0.4),
    "horizontal_flip": (horizontal_flip, 0.9),
    "cutout_holes": (lambda images, s: cutout(images, s, torch.full_like(s, 3), most=3), 3.0),
    "cutout_length": (lambda images, s: cutout(images, torch.ones_like(s), s, most=1), 4.0),
    "random_erasing": (random_erasing, 0.9),
    "mixup": (mixup, 1.0),
    "cutmix": (cutmix, 2.0),
    "rand_augment": (rand_augment, 20.0),
}
"""Name to the operation and a strength at which it shows."""

STEPS = ("rand_augment",)
"""Operations that round: where halves round otherwise, a pixel jumps."""

COUNT = 4000
"""Images in the tests of frequencies and means, whose bounds are five standard deviations."""

every_operation = pytest.mark.parametrize("name", OPERATIONS)


def run(name: str, images: Tensor, strength: Tensor | float, seed: int = 0) -> Tensor:
    result = run_raw(name, images, strength, seed)
    return result.images if isinstance(result, Mixed) else result


def run_raw(name: str, images: Tensor, strength: Tensor | float, seed: int) -> Tensor | Mixed:
    if not isinstance(strength, Tensor):
        strength = torch.full((len(images),), strength)
    torch.manual_seed(seed)
    return OPERATIONS[name][0](images, strength)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# Every operation ----------------------------------------------------------------------------------


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_strength_changes_no_bit(name, dtype):
    images = draw(8, 3, 7, 10, dtype=dtype)
    images[0] = 1  # and the ends of the range
    images[1] = 0
    result = run(name, images, 0.0)
    assert result.dtype == dtype
    assert torch.equal(result, images)


@every_operation
def test_a_strength_changes_something(name):
    images = draw(8, 3, 7, 10)
    assert not torch.equal(run(name, images, OPERATIONS[name][1]), images)


@every_operation
def test_a_row_knows_nothing_of_the_others(name):
    images, changed = draw(8, 3, 7, 10), 3
    strength = OPERATIONS[name][1] * torch.linspace(0.5, 1, 8)
    before = run_raw(name, images, strength, seed=0)
    others = torch.arange(8) != changed
    if isinstance(before, Mixed):
        others &= before.partner != changed
        before = before.images
    other_strength = torch.where(torch.arange(8) == changed, 0.1, strength)
    assert torch.equal(run(name, images, other_strength)[others], before[others])
    other_images = torch.where(others[:, None, None, None], images, 1 - images)
    other_images[others] = images[others]
    if name not in ("mixup", "cutmix"):
        assert torch.equal(run(name, other_images, strength)[others], before[others])
        assert not torch.equal(run(name, other_images, strength)[changed], before[changed])
    assert others.sum() >= 6


@every_operation
def test_each_row_has_its_own_strength(name):
    images, strong = draw(8, 3, 7, 10), OPERATIONS[name][1]
    strength = strong * torch.tensor([1, 0, 0.5, 0, 1, 0.5, 0, 1])
    result = run(name, images, strength)
    for value in strength.unique():
        rows = strength == value
        assert torch.equal(result[rows], run(name, images, value.item())[rows])
    assert torch.equal(result[strength == 0], images[strength == 0])


@every_operation
def test_the_same_seed_draws_the_same(name):
    images, strong = draw(8, 3, 7, 10), OPERATIONS[name][1]
    assert torch.equal(run(name, images, strong, seed=5), run(name, images, strong, seed=5))
    assert not torch.equal(run(name, images, strong, seed=5), run(name, images, strong, seed=6))


@every_operation
@settings(max_examples=50)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)
    ),
    share=st.floats(0, 1),
)
def test_any_shape_keeps_shape_and_range(name, shape, share):
    images = draw(*shape)
    result = run(name, images, share * OPERATIONS[name][1])
    assert result.shape == images.shape
    assert result.isfinite().all()
    # Bilinear weights add up to 1 within rounding.
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-6
    assert torch.equal(run(name, images, 0.0), images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in STEPS])
def test_halves_agree_with_float32(name, dtype):
    images, strong = draw(8, 3, 7, 10, dtype=dtype), OPERATIONS[name][1]
    result = run(name, images, strong)
    assert result.dtype == dtype
    # Values up to 1, factors up to 1.5, three roundings.
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        result.float(), run(name, images.float(), strong), rtol=0, atol=bound
    )


@every_operation
def test_no_gradient_reaches_the_strength(name):
    images, strong = draw(8, 3, 7, 10), OPERATIONS[name][1]
    strength = torch.full((8,), strong, requires_grad=True)
    assert not run(name, images, strength).requires_grad
    result = run(name, images.requires_grad_(), strength)
    result.sum().backward()
    assert images.grad is not None
    assert strength.grad is None


@every_operation
def test_one_graph_serves_all_strengths(name):
    images, strong = draw(8, 3, 7, 10), OPERATIONS[name][1]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(OPERATIONS[name][0], fullgraph=True, backend="eager")
        for share in torch.linspace(0, 1, 10):
            strength = share * strong * torch.linspace(0.5, 1, 8)
            torch.manual_seed(0)
            result = compiled(images, strength)
            found = result.images if isinstance(result, Mixed) else result
            torch.testing.assert_close(found, run(name, images, strength))
    torch._dynamo.reset()


@every_operation
def test_a_strength_for_each_example_is_asked_for(name):
    with pytest.raises(ShapeError, match=r"must get one value for each example.*\(3,\)"):
        run(name, draw(8, 3, 7, 10), torch.ones(3))
    with pytest.raises(ShapeError, match=r"must get one value for each example.*\(\)"):
        run(name, draw(8, 3, 7, 10), torch.tensor(0.5))


@pytest.mark.parametrize("name", OPERATIONS)
def test_images_are_asked_for(name):
    with pytest.raises(ShapeError, match=r"must get images of shape .* but got \(3, 7, 10\)"):
        run(name, draw(3, 7, 10), torch.ones(3))


# Colour -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_brightness_draws_factors_around_one(strength):
    pixel = 0.25
    images = torch.full((COUNT, 1, 1, 1), pixel, dtype=torch.float64)
    factor = run("brightness", images, strength).flatten() / pixel
    low, high = max(0.0, 1 - strength), 1 + strength
    assert stats.kstest(factor.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-4
    assert stats.kstest(factor.numpy(), stats.uniform(low, high - low + 0.3).cdf).pvalue < 1e-4


@pytest.mark.parametrize("name", ["saturation", "hue"])
def test_gray_images_have_no_colour(name):
    images = draw(8, 1, 7, 10)
    assert torch.equal(run(name, images, 0.5), images)


@pytest.mark.parametrize("name", ["contrast", "saturation", "hue"])
@pytest.mark.parametrize("channels", [2, 4])
def test_colour_operations_need_one_or_three_channels(name, channels):
    with pytest.raises(ShapeError, match=f"{name} must get images of 1 or 3 .* got {channels}"):
        run(name, draw(8, channels, 7, 10), 0.5)


# Geometry -----------------------------------------------------------------------------------------


def drawn_matrices(strengths: dict[str, float]) -> Tensor:
    """Read the map of each image off two ramps, on which bilinear sampling is exact inside."""
    height, width = 40, 60
    down, across = torch.meshgrid(
        torch.arange(height).double() - (height - 1) / 2,
        torch.arange(width).double() - (width - 1) / 2,
        indexing="ij",
    )
    ramps = torch.stack([across, down]).expand(500, -1, -1, -1)
    torch.manual_seed(0)
    rows = {name: torch.full((500,), s, dtype=torch.float64) for name, s in strengths.items()}
    warped = warp(ramps, **rows)
    here = warped[:, :, 19, 29]  # half a pixel up and left of the centre
    right, below = warped[:, :, 19, 30] - here, warped[:, :, 20, 29] - here
    return torch.stack([right, below, here + (right + below) / 2], dim=-1)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=1e-9)  # float64, coordinates up to 30


def test_translation_is_by_whole_pixels_of_each_side():
    matrices = drawn_matrices({"translate": 0.2})
    shift = -matrices[..., 2]
    assert close(matrices[..., :2], torch.eye(2).double().expand(500, 2, 2))
    assert close(shift, shift.round())
    assert shift.round().abs().amax(0).tolist() == [12, 8]
    assert shift.std(0) == pytest.approx([24 / 12**0.5, 16 / 12**0.5], rel=0.15)


def test_scale_is_uniform_around_one():
    matrices = drawn_matrices({"scale": 0.3})
    factor = 1 / matrices[:, 0, 0]
    assert close(matrices[:, 1, 1], 1 / factor)
    assert stats.kstest(factor.numpy(), stats.uniform(0.7, 0.6).cdf).pvalue > 1e-4
    assert close(matrices[..., 2], torch.zeros(500, 2).double())


def test_rotation_is_uniform_both_ways():
    matrices = drawn_matrices({"rotate": 25.0})
    angle = torch.rad2deg(torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    assert stats.kstest(angle.numpy(), stats.uniform(-25, 50).cdf).pvalue > 1e-4
    square = matrices[..., :2] @ matrices[..., :2].mT
    assert close(square, torch.eye(2).double().expand(500, 2, 2))


def test_shear_is_along_the_width():
    matrices = drawn_matrices({"shear": 20.0})
    angle = torch.rad2deg(torch.atan(matrices[:, 0, 1]))
    assert stats.kstest(angle.numpy(), stats.uniform(-20, 40).cdf).pvalue > 1e-4
    unchanged = torch.tensor([0, 1, 0]).double().expand(500, 3)
    assert close(matrices[:, 1], unchanged)


def test_no_image_is_turned_inside_out():
    # Where the image shrinks to a dot, both pixels read lie outside of the ramp, on zeros.
    slopes = drawn_matrices({"scale": 1.5})[:, 0, 0]
    assert slopes.min() >= 0
    assert slopes.max() > 5


def test_flips_mirror_with_their_probability():
    images = torch.arange(3.0).expand(COUNT, 1, 1, 3)
    probability = torch.tensor([0.2, 0.9]).repeat_interleave(COUNT // 2)
    flipped = run("horizontal_flip", images, probability)[:, 0, 0]
    mirrored = (flipped == torch.tensor([2.0, 1, 0])).all(1)
    assert (mirrored | (flipped == torch.arange(3.0)).all(1)).all()
    check_frequencies(mirrored, (0.2, 0.9))


def check_frequencies(events: Tensor, probabilities: tuple[float, float]) -> None:
    for half, probability in zip(events.float().chunk(2), probabilities, strict=True):
        deviation = math.sqrt(probability * (1 - probability) / len(half))
        assert abs(half.mean().item() - probability) < 5 * deviation


# Erasing ------------------------------------------------------------------------------------------


def test_cutout_cuts_as_many_holes_as_asked():
    holes = torch.tensor([0.0, 0.4, 0.6, 1, 2, 2.6, 3, 9]).repeat_interleave(50)
    cut = cutout(torch.ones(400, 1, 99, 101), holes, torch.ones(400), most=4)
    count = (cut == 0).sum(dim=(1, 2, 3)).reshape(8, 50)
    # Two of four single pixels among 10,000 meet in one image of 1,700: the most common count.
    assert count.mode(1).values.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert count.amax(1).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("length", [0.0, 1.0, 4.0, 5.4])
def test_cutout_squares_are_centred_on_any_pixel(length):
    height, width, side = 9, 12, round(length)
    images = torch.ones(COUNT, 3, height, width)
    cut = run("cutout_length", images, length) == 0
    assert torch.equal(cut.any(1), cut.all(1))
    area = cut[:, 0].sum(dim=(1, 2)).double()
    assert area.max() == side**2

    def visible(pixels: int) -> list[int]:
        starts = [centre - side // 2 for centre in range(pixels)]
        return [min(start + side, pixels) - max(start, 0) for start in starts]

    every = torch.outer(torch.tensor(visible(height)), torch.tensor(visible(width))).double()
    assert abs(area.mean() - every.mean()) <= 5 * every.std() / COUNT**0.5
    if side > 1:
        assert area.min() == every.min() < side**2


def test_cutout_fills_each_channel():
    fill = torch.tensor([0.1, 0.2, 0.3])
    ones, strength = torch.ones(4, 3, 5, 5), torch.full((4,), 20.0)
    cut = cutout(ones, torch.ones(4), strength, most=1, fill=fill)
    assert torch.equal(cut, fill[:, None, None].expand(4, 3, 5, 5))
    assert torch.equal(cutout(ones, torch.ones(4), strength, 1, fill=0.7), ones * 0.7)


def test_random_erasing_erases_rectangles_of_the_right_area():
    height, width = 60, 90
    probability = torch.tensor([0.3, 0.8]).repeat_interleave(COUNT // 2)
    torch.manual_seed(0)
    area, aspect = (0.05, 0.15), (0.5, 2.0)
    erased = random_erasing(torch.ones(COUNT, 1, height, width), probability, area, aspect) == 0
    check_frequencies(erased.flatten(1).any(1), (0.3, 0.8))
    erased = erased[erased.flatten(1).any(1), 0]
    rows, columns = erased.any(2), erased.any(1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None, :])
    tall, wide = rows.sum(1), columns.sum(1)
    share = (tall * wide).double() / (height * width)
    # Sides are rounded: the shortest is 12, so half a pixel is 4 percent.
    assert share.min() > 0.05 * 0.96**2
    assert share.max() < 0.15 * 1.04**2
    assert share.mean() == pytest.approx(0.1, rel=0.03)
    ratio = tall / wide
    assert ratio.min() > 0.5 * 0.92
    assert ratio.max() < 2 * 1.08
    assert ratio.log().mean().abs() < 0.05


def test_random_erasing_reaches_every_place():
    torch.manual_seed(0)
    square = (16 / 120, 16 / 120)
    images = torch.ones(COUNT, 1, 10, 12)
    erased = random_erasing(images, torch.ones(COUNT), area=square, aspect=(1.0, 1.0))[:, 0] == 0
    top, left = erased.any(2).int().argmax(1), erased.any(1).int().argmax(1)
    assert erased.sum(dim=(1, 2)).unique().tolist() == [16]
    for first, places in ((top, 7), (left, 9)):
        count = first.bincount()
        assert len(count) == places
        deviation = (COUNT / places * (1 - 1 / places)) ** 0.5
        assert ((count - COUNT / places).abs() < 5 * deviation).all()


def test_random_erasing_leaves_a_pixel_along_each_side():
    torch.manual_seed(0)
    images = torch.ones(500, 1, 4, 30)
    erased = random_erasing(images, torch.ones(500), area=(0.5, 1.0)) == 0
    assert erased.any(3).sum(2).max() == 3
    assert erased.flatten(1).any(1).all()


# Mixing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0, 4.0])
def test_shares_are_the_larger_part_of_a_beta_distribution(strength):
    # In float64: nearer to 1 than float32 can tell from 1, Beta(0.2, 0.2) has two percent.
    rows = torch.full((COUNT,), strength, dtype=torch.float64)
    torch.manual_seed(0)
    share = mixup(torch.zeros(COUNT, 1, 1, 1), rows).share.numpy()
    expected, other = stats.beta(strength, strength), stats.beta(1.3 * strength, 1.3 * strength)
    assert share.min() >= 0.5
    assert stats.kstest(share, lambda x: 2 * expected.cdf(x) - 1).pvalue > 1e-4
    assert stats.kstest(share, lambda x: 2 * other.cdf(x) - 1).pvalue < 1e-4


@pytest.mark.parametrize("strength", [1e-45, 1e-30, 1e-8, 1e-3])
@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_a_tiny_strength_mixes_next_to_nothing(mix, strength):
    images = draw(200, 1, 5, 5)
    torch.manual_seed(0)
    mixed = mix(images, torch.full((200,), strength))
    assert (mixed.share > 1 - 1e-2).float().mean() > 0.97
    assert torch.isclose(mixed.images, images, atol=1e-2).float().mean() > 0.97
    assert mix(images, torch.ones(200)).share.min() < 0.9


def test_the_rarest_draw_is_a_share_too(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    shares = mixup(draw(3, 1, 5, 5), torch.tensor([0.0, 1e-6, 1.0])).share
    assert shares.tolist() == [1, 0.5, 0.5]


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_partners_are_a_permutation(mix):
    torch.manual_seed(0)
    mixed = mix(draw(20, 1, 5, 5), torch.zeros(20))
    assert mixed.partner.sort().values.tolist() == list(range(20))
    assert mixed.partner.tolist() != list(range(20))
    assert torch.equal(mixed.share, torch.ones(20))


def test_mixup_is_linear_in_images():
    images = draw(8, 3, 7, 10, dtype=torch.float64)
    mixed = run_raw("mixup", images, torch.ones(8).double(), seed=0)
    for row, (partner, share) in enumerate(zip(mixed.partner, mixed.share, strict=True)):
        expected = share * images[row] + (1 - share) * images[partner]
        torch.testing.assert_close(mixed.images[row], expected, rtol=0, atol=1e-15)


def test_cutmix_pastes_a_rectangle_and_tells_its_share():
    rows = torch.arange(64.0)
    images = rows[:, None, None, None].expand(64, 2, 9, 14)
    mixed = run_raw("cutmix", images, 1.0, seed=0)
    own = mixed.images == images
    assert (own | (mixed.images == images[mixed.partner])).all()
    elsewhere = mixed.partner != rows
    pasted = ~own[elsewhere, 0]
    filled = pasted.any(2)[:, :, None] & pasted.any(1)[:, None, :]
    assert torch.equal(pasted, filled)
    share = 1 - pasted.double().mean(dim=(1, 2))
    torch.testing.assert_close(mixed.share[elsewhere].double(), share, rtol=0, atol=1e-6)
    assert share.unique().numel() > 10
    # Where nothing was cut off, the rectangle has the image's proportions.
    tall, wide = pasted.any(2).sum(1), pasted.any(1).sum(1)
    inside = (pasted[:, 1:-1, 1:-1].sum(dim=(1, 2)) == pasted.sum(dim=(1, 2))) & (tall > 2)
    assert ((wide[inside] / tall[inside] - 14 / 9).abs() < 0.7).all()
    assert inside.sum() > 5


def test_targets_are_mixed_in_their_shares():
    partner, share = torch.tensor([2, 0, 1]), torch.tensor([1.0, 0.25, 0.5])
    target = torch.tensor([3, 1, 0])
    expected = torch.tensor([[0, 0, 0, 1.0], [0, 0.25, 0, 0.75], [0.5, 0.5, 0, 0]])
    assert torch.equal(mixed_targets(target, partner, share, 4), expected)
    probabilities = torch.eye(4)[target].to(torch.bfloat16)
    mixed = mixed_targets(probabilities, partner, share, 4)
    assert torch.equal(mixed, expected.to(torch.bfloat16))
    values = draw(3, 2, 5)
    mixed = mixed_targets(values, partner, share, 0)
    assert torch.equal(mixed[0], values[0])
    torch.testing.assert_close(mixed[1], 0.25 * values[1] + 0.75 * values[0])


def test_an_ignored_index_has_no_probability():
    target, whole = torch.tensor([-100, 1]), torch.ones(2)
    mixed = mixed_targets(target, torch.tensor([1, 0]), whole, 3)
    assert mixed.tolist() == [[0, 0, 0], [0, 1, 0]]


def test_class_indices_must_be_a_vector():
    with pytest.raises(ShapeError, match=r"class indices must be a vector .*\(2, 3\)"):
        mixed_targets(torch.ones(2, 3, dtype=torch.long), torch.arange(2), torch.ones(2), 3)


# RandAugment --------------------------------------------------------------------------------------


def test_each_example_draws_its_own_operations():
    images = torch.full((COUNT, 1, 1, 1), 0.75)
    strength = torch.full((COUNT,), 30.0)
    torch.manual_seed(0)
    result = rand_augment(images, strength, ["Solarize", "Identity"], count=2).flatten()
    # Solarize everything an even number of times, or once: 1, 2, 1 of four draws.
    assert (result == 0.25).float().mean() == pytest.approx(0.5, abs=5 * 0.5 / COUNT**0.5)
    assert ((result == 0.75) | (result == 0.25)).all()


def test_unknown_operations_are_refused():
    images, magnitude = draw(2, 3, 5, 5), torch.ones(2)
    with pytest.raises(DeclarationError, match=r"must be among .*'Solarise'.*'Solarize'"):
        rand_augment(images, magnitude, ["Identity", "Solarise"])
    with pytest.raises(DeclarationError, match="must have operations to draw from"):
        rand_augment(images, magnitude, [])
