"""The views: their laws against numpy and torchvision, their order, and that padding never shows.

What each operation does to a given image is tested in test_resample.py and test_color.py.
"""

import functools
import importlib.util
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from vicreg import augment, color, resample
from vicreg.config import AugmentConfig, ViewConfig

# To compile in half the time; the loops over these small images need not be fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

NOTHING = ViewConfig(
    area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0, blur=0.0, solarize=0.0
)
LUMA = np.array([0.299, 0.587, 0.114])
KEYS = functools.cache(lambda seed, count: jax.random.split(jax.random.key(seed), count))


def changed(**changes):
    return ViewConfig(**{**vars(NOTHING), **changes})


def noise(shape, seed=0):
    # Without 128, of which rounding decides whether it is solarised.
    image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.where(image == 128, np.uint8(129), image)


def batch(sizes, canvas, padding=0, seed=0):
    images = np.full((len(sizes), *canvas), padding, np.uint8)
    for i, (height, width) in enumerate(sizes):
        images[i, :height, :width] = noise((height, width, canvas[2]), seed + i)
    return images, np.array(sizes, np.int32)


def any_sizes(count):
    """Up to 10 × 12, and down to the empty image that fills up a batch."""
    return np.random.default_rng(0).integers(0, (11, 13), (count, 2))


@functools.cache
def viewer(config, out_size):
    """Views of one image, a key for each."""
    return jit(
        jax.vmap(
            lambda key, image, size: augment.view(key, image, size, config, out_size),
            in_axes=(0, None, None),
        )
    )


@functools.cache
def boxer(area, aspect):
    return jit(
        jax.vmap(
            lambda key, height, width: augment.crop_box(key, height, width, area, aspect),
            in_axes=(0, None, None),
        )
    )


# The presets.


def test_recipes():
    assert augment.views("code") == (AugmentConfig().a, AugmentConfig().b)
    code, paper, cifar = (augment.views(name) for name in ("code", "paper", "cifar"))
    assert [(v.blur, v.solarize, v.area) for v in code] == [
        (1.0, 0.0, (0.08, 1.0)),
        (0.1, 0.2, (0.08, 1.0)),
    ]
    assert [(v.blur, v.solarize, v.area) for v in paper] == [(0.5, 0.1, (0.08, 1.0))] * 2
    assert [(v.blur, v.solarize, v.area) for v in cifar] == [(0.0, 0.1, (0.2, 1.0))] * 2
    for v in (*code, *paper, *cifar):
        assert (v.flip, v.jitter, v.gray, v.aspect) == (0.5, 0.8, 0.2, (3 / 4, 4 / 3))
        assert (v.brightness, v.contrast, v.saturation, v.hue) == (0.4, 0.4, 0.2, 0.1)
    with pytest.raises(ValueError, match="code, paper, cifar, found 'imagenet'"):
        augment.views("imagenet")


# The crop.


def same_law(first, second):
    """Whether a test of chi-square lets two samples of integers pass as of one law."""
    top = max(np.max(first), np.max(second)) + 1
    table = np.stack([np.bincount(np.asarray(x), minlength=top) for x in (first, second)])
    rare = table.sum(0) < 20  # and so counted together
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    table = table[:, table.sum(0) > 0]
    return table.shape[1] == 1 or stats.chi2_contingency(table).pvalue > 1e-3


def reference_box(rng, height, width, area, aspect):
    """Torchvision's get_params, one attempt after the other, in float64."""
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    return fallback_box(height, width, aspect)


def fallback_box(height, width, aspect):
    h, w = height, width
    if width / height < aspect[0]:
        h = max(round(width / aspect[0]), 1)
    elif width / height > aspect[1]:
        w = max(round(height * aspect[1]), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def test_crop_is_uniform_in_area_and_position_and_log_uniform_in_aspect():
    # Large, and narrow enough in both ranges for every attempt to fit: the law is plain.
    height, width, area, aspect = 3000, 3300, (0.1, 0.4), (0.6, 1.5)
    top, left, h, w = map(np.asarray, boxer(area, aspect)(KEYS(0, 4000), height, width))
    jitter = np.random.default_rng(0).uniform(size=(4, 4000))  # of the rounding to whole pixels
    log_aspect = np.log((w + jitter[0] - 0.5) / (h + jitter[1] - 0.5))
    low, high = np.log(aspect)
    for values, law in [
        (h * w / (height * width), stats.uniform(area[0], area[1] - area[0])),
        (log_aspect, stats.uniform(low, high - low)),
        ((top + jitter[2]) / (height - h + 1), stats.uniform()),
        ((left + jitter[3]) / (width - w + 1), stats.uniform()),
    ]:
        assert stats.kstest(values, law.cdf).pvalue > 1e-3
    correlation = np.corrcoef([h * w, log_aspect, top / (height - h), left / (width - w)])
    assert np.abs(correlation - np.eye(4)).max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize(("height", "width"), [(40, 25), (7, 7), (5, 30)])
def test_crop_with_rejections(height, width):
    area, aspect = (0.08, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(1)
    expected = [reference_box(rng, height, width, area, aspect) for _ in range(4000)]
    got = boxer(area, aspect)(KEYS(1, 4000), height, width)
    for ours, reference in zip(got, np.transpose(expected), strict=True):
        assert ours.dtype == jnp.int32
        assert same_law(ours, reference)


@pytest.mark.parametrize("aspect", [(1.0, 1.0), (3 / 4, 4 / 3), (2.0, 3.0), (0.2, 0.4)])
def test_fallback_is_central_and_of_the_clamped_aspect(aspect):
    # An image of a fitting ratio is taken whole; otherwise no crop of its whole area fits in.
    for height, width in [(10, 100), (100, 10), (37, 12), (12, 37), (1, 50), (50, 1), (64, 75)]:
        got = boxer((1.0, 1.0), aspect)(KEYS(2, 3), height, width)
        assert {tuple(map(int, box)) for box in zip(*got, strict=True)} == {
            fallback_box(height, width, aspect)
        }


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 700),
    st.integers(0, 700),
    st.integers(0, 10_000),
    st.sampled_from([((0.08, 1.0), (3 / 4, 4 / 3)), ((1e-4, 0.01), (0.1, 10.0))]),
)
def test_a_crop_lies_inside_the_image(height, width, seed, law):
    top, left, h, w = map(int, np.array(boxer(*law)(KEYS(seed, 1), height, width))[:, 0])
    assert 1 <= h <= max(height, 1) and 0 <= top <= max(height, 1) - h
    assert 1 <= w <= max(width, 1) and 0 <= left <= max(width, 1) - w


# One view.


def test_a_view_is_pillows_crop_of_some_box_flipped_or_not():
    height, width, out_size = 6, 9, 7
    # Of too little contrast for Pillow's float32, which isn't clipped; white padding would show.
    canvas = np.full((10, 12, 1), 255, np.uint8)
    canvas[:height, :width] = 90 + noise((height, width, 1)) // 4
    config = changed(area=(0.1, 1.0), aspect=(3 / 4, 4 / 3), flip=0.5)
    got = np.asarray(viewer(config, out_size)(KEYS(3, 64), canvas, np.array([height, width])))
    image = Image.fromarray(canvas[:, :, 0].astype(np.float32) / 255)
    crops = [
        image.crop((left, top, right, bottom)).resize((out_size, out_size), Image.BICUBIC)
        for top, bottom in itertools.combinations(range(height + 1), 2)
        for left, right in itertools.combinations(range(width + 1), 2)
    ]
    crops = np.stack([np.asarray(crop) for crop in crops])
    candidates = np.concatenate([crops, crops[:, :, ::-1]])
    errors = np.stack([np.abs(candidates - one[:, :, 0]).max((1, 2)) for one in got])
    assert errors.min(1).max() < 1e-5
    flipped, box = np.divmod(errors.argmin(1), len(crops))
    assert 15 < flipped.sum() < 49 and len(set(box)) > 20


def test_rates_and_order_of_flip_gray_blur_and_solarize():
    config = changed(flip=0.3, gray=0.2, blur=0.25, blur_sigma=(0.8, 0.8), solarize=0.35)
    image = noise((8, 8, 3))
    got = viewer(config, 8)(KEYS(4, 3000), image, np.array([8, 8]))
    steps = [
        (0.3, lambda x: x[:, ::-1]),
        (0.2, lambda x: np.repeat((x @ LUMA)[:, :, None], 3, 2)),
        (0.25, lambda x: ndimage.gaussian_filter(x, (0.8, 0.8, 0), mode="nearest", truncate=9)),
        (0.35, lambda x: np.where(x >= 128 / 255, 1 - x, x)),
    ]
    outcomes, expected = [image / 255], [1.0]
    for rate, step in steps:
        outcomes += [step(x) for x in outcomes]
        expected = [p * (1 - rate) for p in expected] + [p * rate for p in expected]
    same = np.abs(np.asarray(got)[:, None] - np.stack(outcomes)).max((2, 3, 4)) < 2e-5
    assert (same.sum(1) == 1).all()
    assert stats.chisquare(same.sum(0), 3000 * np.array(expected)).pvalue > 1e-3


def test_rate_and_factor_of_jitter_and_that_gray_comes_after_it():
    config = changed(jitter=0.6, brightness=0.5, contrast=0.0, saturation=0.2, hue=0.5, gray=1.0)
    # Brightness alone changes a grey pixel; hue changes the grey of another.
    image = np.array([[[100, 100, 100], [120, 60, 30]]] * 2, np.uint8)
    got = np.asarray(viewer(config, 2)(KEYS(5, 3000), image, np.array([2, 2])), float)
    np.testing.assert_array_equal(got, np.repeat(got[..., :1], 3, 3))
    factors, other = (got[:, 0] * 255 / (image[0] @ LUMA)[:, None])[..., 0].T
    applied = np.abs(factors - 1) > 1e-5
    assert stats.binomtest(int(applied.sum()), 3000, 0.6).pvalue > 1e-3
    assert stats.kstest(factors[applied], stats.uniform(0.5, 1.0).cdf).pvalue > 1e-3
    np.testing.assert_allclose(other[~applied], 1, rtol=0, atol=1e-5)
    assert np.mean(np.abs(other / factors - 1)[applied] > 0.01) > 0.9


def test_jitter_gets_its_own_strengths(monkeypatch):
    found = []
    monkeypatch.setattr(color, "jitter_by", lambda _, image, *x: found.append(x) or image)
    config = changed(jitter=1.0, brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4)
    jax.eval_shape(
        lambda x: augment.view(jax.random.key(0), x, jnp.array([4, 4]), config, 4),
        jax.ShapeDtypeStruct((4, 4, 3), jnp.uint8),
    )
    assert found == [(0.1, 0.2, 0.3, 0.4)]


def test_sigma_of_the_blur_is_uniform():
    image = np.zeros((21, 21, 1), np.uint8)
    image[10, 10] = 255
    config = changed(blur=1.0, blur_sigma=(0.6, 1.8))
    got = np.asarray(viewer(config, 21)(KEYS(7, 2000), image, np.array([21, 21])), float)
    # Neighbours in an impulse response are a factor of exp(-1 / (2 sigma^2)) apart.
    sigma = np.sqrt(-0.5 / np.log(got[:, 10, 11, 0] / got[:, 10, 10, 0]))
    assert stats.kstest(sigma, stats.uniform(0.6, 1.2).cdf).pvalue > 1e-3


def test_method_of_the_crop_with_and_without_jit():
    image, size = jnp.asarray(90 + noise((9, 9, 1)) // 4), jnp.array([9, 9])
    config = changed(solarize=1.0)
    pillow = Image.fromarray(np.asarray(image[:, :, 0], np.float32) / 255)
    pillow = np.asarray(pillow.resize((5, 5), Image.Resampling.BILINEAR))
    expected = np.where(pillow >= 128 / 255, 1 - pillow, pillow)
    for view in (augment.view, jax.jit(augment.view, static_argnums=(3, 4, 5))):
        got = view(jax.random.key(0), image, size, config, 5, "bilinear")
        np.testing.assert_allclose(got[:, :, 0], expected, rtol=0, atol=2e-6)


def test_an_operation_of_probability_0_or_1_is_decided_while_tracing():
    def trace(channels=3, **changes):
        image, size = jnp.zeros((9, 9, channels), jnp.uint8), jnp.array([9, 9])
        config = changed(**changes)
        make = jax.make_jaxpr(lambda x: augment.view(jax.random.key(0), x, size, config, 9))
        return str(make(image))

    def selections(**changes):
        return trace(**changes).count("name=_where")

    assert trace().count("dot_general") == 2  # of the crop
    assert trace(blur=0.1).count("dot_general") == 4
    for name in ("jitter", "gray", "blur", "solarize"):
        never, sometimes, always = (selections(**{name: p}) for p in (0.0, 0.5, 1.0))
        assert sometimes == always + 1 >= never + 1, name
        assert trace(**{name: 1.0}) != trace(), name
    assert trace(1, gray=0.5) == trace(1) != trace(1, solarize=0.5)


def test_views_of_one_channel_stay_between_0_and_1():
    config = ViewConfig(blur=0.5, solarize=0.5)
    images, sizes = batch(any_sizes(300), (10, 12, 1), padding=255)
    one = jit(jax.vmap(lambda *inputs: augment.view(*inputs, config, 8)))
    got = np.asarray(one(KEYS(9, 300), images, sizes))
    assert got.shape == (300, 8, 8, 1) and got.dtype == np.float32
    assert np.isfinite(got).all() and got.min() >= 0 and got.max() <= 1


# Batches.

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CODE = AugmentConfig(8, *augment.views("code"), MEAN, STD)
two_views = jax.jit(augment.two_views, static_argnums=3)
for_evaluation = jit(augment.for_evaluation, static_argnums=(2, 3))


def test_two_views_depend_on_key_and_image_alone():
    keys, (images, sizes) = KEYS(10, 64), batch(any_sizes(64), (10, 12, 3))
    first = np.stack(two_views(keys, images, sizes, CODE))
    assert first.shape == (2, 64, 8, 8, 3) and first.dtype == np.float32
    values = first * np.array(STD) + np.array(MEAN)
    assert np.isfinite(values).all() and values.min() > -1e-6 and values.max() < 1 + 1e-6
    # The two views of an image differ, and so do those of another key.
    large = sizes.min(1) > 3
    assert large.sum() > 20
    assert np.abs(first[0] - first[1])[large].max((1, 2, 3)).min() > 0.1
    other = np.stack(two_views(KEYS(11, 64), images, sizes, CODE))
    assert np.abs(first - other)[:, large].max((2, 3, 4)).min() > 0.1
    # The same keys give the same views, whatever pads the images and wherever they are.
    white, _ = batch(sizes, (10, 12, 3), padding=255)
    again, real = np.stack(two_views(keys, white, sizes, CODE)), sizes.min(1) > 0
    np.testing.assert_array_equal(first[:, real], again[:, real])
    backwards = two_views(keys[::-1], images[::-1], sizes[::-1], CODE)
    np.testing.assert_allclose(np.stack(backwards)[:, ::-1], first, rtol=0, atol=1e-5)


FLIPS = AugmentConfig(3, changed(flip=0.5), changed(flip=0.25), MEAN, STD)
views_of_flips = jit(functools.partial(augment.two_views, config=FLIPS))


def flippable():
    images, sizes = (np.repeat(x, 2000, 0) for x in batch([(3, 3)], (3, 3, 3)))
    return KEYS(14, 2000), images, sizes


def test_the_two_views_are_independent_normalized_and_of_their_own_configuration():
    keys, images, sizes = flippable()
    got = [np.asarray(x) for x in views_of_flips(keys, images, sizes)]
    plain = (images[0] / 255 - np.array(MEAN)) / np.array(STD)
    is_plain, is_flipped = (
        np.array([np.abs(x - expected).max((1, 2, 3)) < 1e-5 for x in got])
        for expected in (plain, plain[:, ::-1])
    )
    assert (is_plain ^ is_flipped).all()
    counts = np.bincount(2 * is_flipped[0] + is_flipped[1])
    assert stats.chisquare(counts, 2000 * np.array([3, 1, 3, 1]) / 8).pvalue > 1e-3


def test_each_device_makes_the_views_of_its_own_images():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = [jax.device_put(x, sharding) for x in flippable()]
    compiled = views_of_flips.lower(*sharded).compile()
    text = compiled.as_text()
    assert "all-" not in text and "collective" not in text
    expected = views_of_flips(*flippable())
    np.testing.assert_allclose(np.stack(compiled(*sharded)), expected, rtol=0, atol=1e-6)


def evaluated(image, shorter, out_size):
    """Torchvision's Resize and CenterCrop of a PIL image, through Pillow in float32."""
    height, width, channels = image.shape
    scaled = [int(shorter * side / min(height, width)) for side in (height, width)]
    top, left = (int(round((side - out_size) / 2.0)) for side in scaled)
    planes = [
        np.asarray(
            Image.fromarray(image[:, :, channel].astype(np.float32) / 255)
            .resize(scaled[::-1], Image.Resampling.BILINEAR)
            .crop((left, top, left + out_size, top + out_size))
        )
        for channel in range(channels)
    ]
    return np.stack(planes, -1)


@pytest.mark.parametrize(
    ("canvas", "size", "resize", "shorter"),
    [
        ((20, 26, 3), 14, None, 16),  # 256 / 224
        ((14, 14, 3), 14, None, 14),  # of the wanted size already
        ((14, 14, 1), 14, 19, 19),
    ],
)
def test_evaluation(canvas, size, resize, shorter):
    sizes = [(canvas[0], canvas[1]), (canvas[0], 9), (5, canvas[1]), (14, 14), (11, 10)]
    mean, std = MEAN[: canvas[2]], STD[: canvas[2]]
    config = AugmentConfig(size, mean=mean, std=std)
    images, sizes = batch(sizes, canvas, padding=255)
    got = for_evaluation(images, sizes, config, resize)
    assert got.shape == (5, size, size, canvas[2]) and got.dtype == jnp.float32
    for one, image, (height, width) in zip(got, images, sizes, strict=True):
        expected = evaluated(image[:height, :width], shorter, size)
        expected = (expected - np.array(mean)) / np.array(std)
        np.testing.assert_allclose(one, expected, rtol=0, atol=2e-5)
    # The empty image that fills up a batch is finite.
    assert np.isfinite(for_evaluation(images, 0 * sizes, config, resize)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"width, 3\), found \(2, 4, 4\)"),
        ({"images": np.zeros((2, 4, 4, 1), np.uint8)}, r"width, 3\), found \(2, 4, 4, 1\)"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "uint8.*found float32"),
        ({"sizes": np.zeros((3, 2), np.int32)}, r"\(2, 2\), found int32 \(3, 2\)"),
        ({"sizes": np.zeros((2, 2), np.float32)}, "integers.*found float32"),
    ],
)
def test_errors_name_what_was_found(change, message):
    right = {"images": np.zeros((2, 4, 4, 3), np.uint8), "sizes": np.full((2, 2), 4)}
    with pytest.raises(ValueError, match=message):
        augment.two_views(KEYS(0, 2), **(right | change), config=CODE)
    with pytest.raises(ValueError, match=message):
        augment.for_evaluation(**(right | change), config=CODE)


def test_more_errors():
    images, sizes = batch([(4, 4)] * 2, (4, 4, 3))
    with pytest.raises(ValueError, match=r"typed.*\(2,\), found uint32 \(2, 2\)"):
        augment.two_views(jnp.zeros((2, 2), jnp.uint32), images, sizes, CODE)
    with pytest.raises(ValueError, match=r"\(2,\), found key<fry> \(3,\)"):
        augment.two_views(KEYS(0, 3), images, sizes, CODE)
    image, key = jnp.zeros((4, 4, 2), jnp.uint8), jax.random.key(0)
    with pytest.raises(ValueError, match=r"1 or 3\), found \(4, 4, 2\)"):
        augment.view(key, image, jnp.array([4, 4]), NOTHING, 4)
    with pytest.raises(ValueError, match="at least out_size 8, found 7"):
        augment.for_evaluation(*batch([(9, 9)], (9, 9, 3)), CODE, resize=7)
    with pytest.raises(ValueError, match="3 channels"):
        augment.normalize(jnp.zeros((2, 2, 3)), (0.5,), (0.5,))


# Torchvision, where it is installed.


@pytest.fixture(scope="module")
def tv():
    """Its transforms, on tensors and PIL images; Python may have it without its operators."""
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # Built for another torch: its detection operators, which nothing here uses, are missing.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    transforms = importlib.import_module("torchvision.transforms")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return transforms


def tensor(image):
    import torch

    return torch.from_numpy(np.moveaxis(image, -1, 0).astype(np.float32) / 255)


@pytest.mark.parametrize(("height", "width"), [(40, 25), (6, 21)])
def test_crop_is_torchvisions(tv, height, width):
    area, aspect = (0.08, 1.0), (3 / 4, 4 / 3)
    image = Image.new("L", (width, height))
    expected = [tv.RandomResizedCrop.get_params(image, area, aspect) for _ in range(2000)]
    got = boxer(area, aspect)(KEYS(20, 2000), height, width)
    for ours, theirs in zip(got, np.transpose(expected), strict=True):
        assert same_law(ours, theirs)


def test_color_operations_are_torchvisions(tv):
    image = noise((9, 8, 3))
    for name, factor in [
        ("adjust_brightness", 1.3),
        ("adjust_contrast", 0.6),
        ("adjust_saturation", 1.7),
        ("adjust_hue", -0.13),
        ("solarize", 0.4),
    ]:
        theirs = getattr(tv.functional, name)(tensor(image), factor).numpy()
        ours = jit(getattr(color, name))(image.astype(np.float32) / 255, np.float32(factor))
        # Its weights of grey sum to .9999.
        np.testing.assert_allclose(np.moveaxis(ours, -1, 0), theirs, rtol=0, atol=2e-4)


def test_jitter_is_torchvisions(tv):
    # Of one law in the mean and the spread of each channel, and in where the operations clip.
    image = noise((6, 6, 3))
    transform, count = tv.ColorJitter(0.4, 0.4, 0.2, 0.1), 600
    theirs = np.stack([transform(tensor(image)).numpy() for _ in range(count)])
    got = viewer(changed(jitter=1.0, saturation=0.2, hue=0.1), 6)
    ours = np.moveaxis(np.asarray(got(KEYS(21, count), image, np.array([6, 6]))), -1, 1)
    for statistic in (np.mean, np.std, lambda x, axis: ((x == 0) | (x == 1)).mean(axis)):
        for one, other in zip(
            statistic(ours, axis=(2, 3)).T, statistic(theirs, axis=(2, 3)).T, strict=True
        ):
            assert stats.ks_2samp(one, other).pvalue > 1e-3


def test_crop_and_evaluation_are_torchvisions_of_a_pil_image(tv):
    image = noise((23, 31, 3))
    pil = Image.fromarray(image)
    bicubic = tv.InterpolationMode.BICUBIC
    theirs = np.asarray(tv.functional.resized_crop(pil, 3, 5, 17, 20, [12, 12], bicubic))
    crop = jit(lambda x: resample.crop_and_resize(x, (3, 5, 17, 20), 12))
    ours = 255 * np.asarray(crop(image.astype(np.float32) / 255))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1.3)  # it rounds to 8 bits twice

    theirs = np.asarray(tv.CenterCrop(14)(tv.Resize(16)(pil)))
    config = AugmentConfig(14, mean=(0.0,) * 3, std=(1.0,) * 3)
    ours = for_evaluation(image[None], np.array([(23, 31)]), config)
    np.testing.assert_allclose(255 * ours[0], theirs, rtol=0, atol=1.3)
