"""All augmentations in one module: order, units, kinds of numbers, compilation, refusals."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stnify.augment import (
    AUGMENTATIONS,
    Augment,
    adjust_brightness,
    brightness,
    cutout,
    horizontal_flip,
    hue,
    mixup,
    rand_augment,
    random_erasing,
    saturation,
    warp,
)
from stnify.errors import DeclarationError, ShapeError

STRENGTHS = {
    "HorizontalFlip": 0.5,
    "Translate": 0.2,
    "Scale": 0.2,
    "Rotate": 20.0,
    "Shear": 10.0,
    "RandAugment": 9.0,
    "Brightness": 0.4,
    "Contrast": 0.4,
    "Saturation": 0.4,
    "Hue": 0.2,
    "CutoutHoles": 2.0,
    "CutoutLength": 3.0,
    "RandomErasing": 0.5,
    "Mixup": 1.0,
    "CutMix": 1.0,
}
"""A strength at which each augmentation shows."""

NEEDED = {"CutoutHoles": {"most_holes": 3, "CutoutLength": 3.0}}
"""Settings without which an augmentation does nothing, or is refused."""

STATS = ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))

pytestmark = pytest.mark.filterwarnings(
    # The compiler asks every tensor for its gradient, and silences the warning only by a filter.
    "ignore:The .grad attribute of a Tensor:UserWarning"
)


def augment(*names: str, stats=None, **settings) -> tuple[Augment, Tensor]:
    """A module with these augmentations, all if none is named, and their strengths."""
    names = names or AUGMENTATIONS
    for name in names:
        settings = {**NEEDED.get(name, {}), **settings}
    if "CutoutLength" in names:
        settings.pop("CutoutLength", None)
    columns = {name: column for column, name in enumerate(names)}
    return Augment(columns, settings, stats), torch.tensor([STRENGTHS[name] for name in names])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=images.dtype)[:, None, None] for values in STATS)
    return (images - mean) / std


def run(module: Augment, images: Tensor, strength: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return module(images, strength).images


def test_every_augmentation_is_listed():
    assert tuple(STRENGTHS) == AUGMENTATIONS


# One at a time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("units", ["floats", "normalised", "bytes"])
def test_each_column_reaches_its_operation(name, units):
    module, strength = augment(name, stats=STATS if units == "normalised" else None)
    images = draw(8, 3, 7, 10)
    images = {
        "floats": images,
        "normalised": normalised(images),
        "bytes": (255 * images).round().to(torch.uint8),
    }[units]
    result = run(module, images, strength)
    assert result.dtype == images.dtype
    assert result.shape == images.shape
    assert not torch.equal(result, images)
    assert torch.equal(run(module, images, 0 * strength), images)


ALONE = {
    "HorizontalFlip": horizontal_flip,
    "Rotate": lambda images, strength: warp(images, rotate=strength),
    "RandAugment": lambda images, strength: rand_augment(images, strength),
    "Brightness": brightness,
    "Saturation": saturation,
    "Hue": hue,
    "CutoutHoles": lambda images, strength: cutout(
        images, strength, torch.full_like(strength, 3), most=3
    ),
    "RandomErasing": random_erasing,
    "Mixup": lambda images, strength: mixup(images, strength).images,
}


@pytest.mark.parametrize("name", ALONE)
def test_alone_it_is_the_operation(name):
    module, strength = augment(name)
    images = draw(8, 3, 7, 10)
    result = run(module, images, strength)
    torch.manual_seed(0)
    assert torch.equal(result, ALONE[name](images, strength.expand(8)))


def test_the_order_is_fixed():
    names = ("CutoutLength", "Brightness", "HorizontalFlip", "Rotate")
    module, strength = augment(*names)
    length, bright, flip, rotate = strength.expand(8, 4).T
    images = draw(8, 3, 7, 10)
    torch.manual_seed(0)
    expected = warp(horizontal_flip(images, flip), rotate=rotate)
    expected = brightness(expected, bright)
    expected = cutout(expected, torch.ones(8), length, most=1)
    assert torch.equal(run(module, images, strength), expected)


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", [None, STATS])
def test_zero_strength_changes_no_bit(stats):
    module, strength = augment(stats=stats)
    for images in (draw(8, 3, 7, 10), draw(1, 3, 1, 9), draw(2, 3, 5, 3, dtype=torch.bfloat16)):
        given_images = images if stats is None else normalised(images)
        assert torch.equal(run(module, given_images, 0 * strength), given_images)


def test_each_row_has_its_own_strength():
    names = [name for name in AUGMENTATIONS if name not in ("Mixup", "CutMix")]
    module, strength = augment(*names, stats=STATS)
    images = normalised(draw(8, 3, 7, 10))
    share = torch.tensor([1, 0, 0.5, 0, 1, 0.5, 0, 1])
    result = run(module, images, share[:, None] * strength)
    for value in share.unique():
        rows = share == value
        assert torch.equal(result[rows], run(module, images, value * strength)[rows])
    assert torch.equal(result[share == 0], images[share == 0])
    assert (result[share > 0] != images[share > 0]).flatten(1).any(1).all()


def test_mixes_tell_partner_and_share():
    images = draw(8, 3, 7, 10)
    module, strength = augment("Brightness")
    assert module(images, strength)[1:] == (None, None)
    for names in (("Mixup",), ("CutMix",), ("Mixup", "CutMix")):
        module, strength = augment(*names)
        mixed = module(images, strength)
        assert mixed.partner.sort().values.tolist() == list(range(8))
        assert (mixed.share < 1).any()


def test_one_of_two_mixes_is_drawn_for_the_batch():
    module, strength = augment("Mixup", "CutMix")
    images = torch.arange(16.0)[:, None, None, None].expand(16, 3, 8, 8) / 16
    torch.manual_seed(0)
    pasted = []
    for _ in range(40):
        result, partner, share = module(images, strength)
        whole = (result == images) | (result == images[partner])
        pasted.append(bool(whole.all()))
        own = share[:, None, None, None]
        linear = own * images + (1 - own) * images[partner]
        if not pasted[-1]:
            torch.testing.assert_close(result, linear)
    # Five standard deviations of 40 fair coins.
    assert 20 - 16 < sum(pasted) < 20 + 16


# Units --------------------------------------------------------------------------------------------


def test_colours_act_on_pixels_and_the_rest_on_what_came():
    images = draw(8, 3, 7, 10, dtype=torch.float64)
    bright, strength = augment("Brightness", stats=STATS)
    plain, _ = augment("Brightness")
    strength = strength.double()
    expected = normalised(run(plain, images, strength))
    # The module keeps the statistics in float32.
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(run(bright, normalised(images), strength), expected, **close)
    assert not torch.allclose(run(plain, images, strength), expected, **close)
    for name in ("Rotate", "CutoutLength", "RandomErasing"):
        with_stats, strength = augment(name, stats=STATS)
        without, _ = augment(name)
        found = run(with_stats, normalised(images), strength)
        assert torch.equal(found, run(without, normalised(images), strength))


def test_pixels_are_clamped_before_colours():
    module, strength = augment("Hue", stats=((0.5,), (0.5,)))
    images = torch.full((4, 3, 5, 5), 3.0)
    assert torch.equal(run(module, images, strength), torch.ones_like(images))


def test_bytes_are_rounded():
    module, strength = augment("Brightness")
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    torch.manual_seed(0)
    factor = 1 - strength + 2 * strength * torch.rand(2)
    expected = (255 * adjust_brightness(images / 255, factor)).round().to(torch.uint8)
    assert torch.equal(run(module, images, strength), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_augmented_in_float32(dtype):
    module, strength = augment(stats=STATS)
    images = normalised(draw(8, 3, 7, 10)).to(dtype)
    expected = run(module, images.float(), strength).to(dtype)
    assert torch.equal(run(module, images, strength), expected)


def test_settings_reach_the_operations():
    ones = torch.ones(200, 3, 12, 12)
    module, strength = augment("CutoutLength", CutoutHoles=4)
    assert (run(module, ones, strength)[:, 0] == 0).sum(dim=(1, 2)).max() > 2 * 9
    module, strength = augment("RandAugment", operations=("Solarize",), count=1)
    assert torch.equal(run(module, ones, strength), torch.zeros_like(ones))
    module, strength = augment("RandAugment", operations=None, count=2)
    assert not torch.equal(run(module, draw(8, 3, 7, 10), strength), draw(8, 3, 7, 10))


def test_tuned_holes_are_cut_up_to_the_end():
    module, _ = augment("CutoutHoles", CutoutLength=1.0, most_holes=3)
    result = run(module, torch.ones(50, 1, 80, 80), torch.tensor([9.0]))
    assert (result == 0).sum(dim=(1, 2, 3)).max() == 3


@given(
    shape=st.tuples(
        st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)
    ),
    per_example=st.booleans(),
)
def test_any_batch_of_images_is_augmented(shape, per_example):
    module, strength = augment()
    images = draw(*shape)
    result = run(module, images, strength.expand(shape[0], -1) if per_example else strength)
    assert result.shape == shape
    assert result.isfinite().all()


# As a module --------------------------------------------------------------------------------------


def test_eval_mode_leaves_images_alone():
    module, strength = augment("Brightness", "Mixup")
    images = draw(4, 3, 5, 5)
    state = torch.get_rng_state()
    mixed = module.eval()(images, strength)
    assert mixed.images is images
    assert mixed[1:] == (None, None)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_reaches_the_hyperparameters():
    module, strength = augment(stats=STATS)
    strength.requires_grad_()
    result = run(module, normalised(draw(4, 3, 5, 5)), strength)
    assert not result.requires_grad


def test_it_has_no_state_and_can_be_copied():
    module, strength = augment(stats=STATS)
    images = normalised(draw(4, 3, 7, 7))
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    again = copy.deepcopy(module)
    assert torch.equal(run(again, images, strength), run(module, images, strength))


def test_it_says_what_it_holds():
    module, _ = augment("Brightness", "CutoutLength", stats=STATS, CutoutHoles=2)
    assert repr(module) == (
        "Augment(Brightness=0, CutoutLength=1, CutoutHoles=2, "
        "stats=((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))"
    )


@pytest.fixture(name="one_graph")
def _one_graph():
    """Compile as one graph; compiling again for other values raises."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda module, backend: torch.compile(module, fullgraph=True, backend=backend)
    torch._dynamo.reset()


@pytest.mark.parametrize("per_example", [False, True])
def test_one_graph_serves_all_strengths(one_graph, per_example):
    module, strength = augment(stats=STATS)
    images = normalised(draw(8, 3, 7, 10))
    compiled = one_graph(module, "eager")
    for share in torch.linspace(0, 1, 10):
        strengths = share * strength
        if per_example:
            strengths = strengths * torch.linspace(0.5, 1, 8)[:, None]
        found = run(compiled, images, strengths)
        torch.testing.assert_close(found, run(module, images, strengths))


def test_compiled_kernels_draw_again_and_keep_rows_apart(one_graph):
    module, strength = augment("Rotate", "Brightness", "CutoutLength", "Mixup")
    images, rows = draw(64, 1, 6, 7), strength.expand(64, 4)
    compiled = one_graph(module, "inductor")
    for share in torch.linspace(0, 1, 10):
        found = run(compiled, images, share * rows)
        assert found.isfinite().all()
        assert torch.equal(found, run(compiled, images, share * rows))
        assert torch.equal(found, images) == (share == 0)
        assert torch.equal(found, run(compiled, images, share * rows, seed=1)) == (share == 0)
    first = torch.arange(64)[:, None] < 32
    result = run(compiled, images, first * rows)
    assert torch.equal(result[32:], images[32:])
    assert (result[:32] != images[:32]).flatten(1).any(1).all()


# Refusals -----------------------------------------------------------------------------------------

IMAGES = torch.full((2, 3, 4, 4), 0.5)

REFUSED_CALLS = {
    "an image": (("Rotate",), None, IMAGES[0], 1, r"must get images of shape .*\(3, 4, 4\)"),
    "rows": (("Rotate",), None, IMAGES, (3, 1), r"one row \(h,\) or one for each .*\(3, 1\)"),
    "a number": (("Rotate",), None, IMAGES, (), r"one row \(h,\) or one for each .* got \(\)"),
    "range": (("Hue",), None, 2 * IMAGES - 3, 1, r"in \[0, 1\] .* -2 to -2.*`input_stats="),
    "magnitude": (("RandAugment",), None, 3 * IMAGES, 1, r"in \[0, 1\] .* 1.5 to 1.5"),
    "nan": (("Hue",), None, IMAGES * torch.nan, 1, r"in \[0, 1\] .* nan to nan"),
    "integers": (("Rotate",), None, IMAGES.long(), 1, "floating or of 8 bits, .* torch.int64"),
    "bytes": (("Hue",), STATS, IMAGES.byte(), 1, "images of 8 bits must not have `input_stats`"),
    "channels": (("Hue",), STATS, IMAGES[:, :1], 1, "`input_stats` must have 1 .* 3 .* 1 channels"),
    "colours": (("Hue",), None, IMAGES[:, :2], 1, "hue must get images of 1 or 3 channels"),
}


@pytest.mark.parametrize("case", REFUSED_CALLS)
def test_calls_are_refused(case):
    names, stats, images, shape, message = REFUSED_CALLS[case]
    module, _ = augment(*names, stats=stats)
    with pytest.raises(ShapeError, match=message):
        module(images, torch.ones(shape))


def test_the_range_is_looked_at_once_and_with_slack():
    module, strength = augment("Brightness")
    module(IMAGES + 0.5009, strength)
    module(IMAGES + 7, strength)
    other, strength = augment("Rotate")
    other(IMAGES + 7, strength)


STAND = {"CutoutLength": 4.0}
REFUSED = {
    "name": ({"Brigtness": 0}, {}, None, "must be one of .* 'Brigtness'.*Nearest: 'Brightness'"),
    "setting": ({"Hue": 0}, {"cuont": 0}, None, "each setting .* must be one of .*'count'"),
    "operation": ({"RandAugment": 0}, {"operations": ["Turn"]}, None, "must be among .* 'Turn'"),
    "length": (
        {"CutoutHoles": 0},
        {"most_holes": 2},
        None,
        "must have a CutoutLength, but .* none",
    ),
    "most": ({"CutoutHoles": 0}, STAND, None, r"must have an end, but `settings\['most_holes'\]`"),
    "std": (
        {"Hue": 0},
        {},
        ((0.5,), (0.0,)),
        r"positive standard deviation .*\(\(0.5,\), \(0.0,\)",
    ),
    "stats": ({"Hue": 0}, {}, ((0.5, 0.5), (1.0,)), "positive standard deviation for each channel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_declarations_are_refused(case):
    columns, settings, stats, message = REFUSED[case]
    with pytest.raises(DeclarationError, match=message):
        Augment(columns, settings, stats)
