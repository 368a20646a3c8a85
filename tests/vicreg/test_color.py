"""Colour operations against numpy, colorsys and Pillow, and their random order."""

import colorsys
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from vicreg import color

# To compile in half the time; the loops over these small images need not be fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FACTORS = [0.0, 0.6, 1.0, 1.4, 2.5]


def noise(shape=(6, 7, 3), seed=0):
    """Uint8 noise with the corner cases of HSV among it: greys, ties, black and white."""
    image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    if shape[2] == 3:
        values = list(itertools.product((0, 90, 255), repeat=3))
        image.reshape(-1, 3)[: len(values)] = values
    return image


def unit(image):
    return image.astype(np.float32) / 255


def gray(x):
    """Rec. 601, rounded to Pillow's weights, in float64."""
    return x @ np.array([0.29899597, 0.58700562, 0.11399841]) if x.shape[-1] == 3 else x[..., 0]


def turned(x, shift):
    """Through the HSV of the standard library."""
    if x.shape[-1] == 1:
        return x
    out = np.empty_like(x)
    for at in np.ndindex(x.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[at])
        out[at] = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
    return out


REFERENCE = {
    "brightness": lambda x, f: np.clip(f * x, 0, 1),
    "contrast": lambda x, f: np.clip(f * x + (1 - f) * gray(x).mean(), 0, 1),
    "saturation": lambda x, f: np.clip(f * x + (1 - f) * gray(x)[..., None], 0, 1),
    "hue": turned,
}
ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def adjust(name):
    return jit(jax.vmap(getattr(color, f"adjust_{name}"), in_axes=(None, 0)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", color.OPERATIONS)
def test_adjustments(name, channels):
    factors = np.float32([-0.5, -0.21, 0.0, 1 / 3, 0.07, 0.5] if name == "hue" else FACTORS)
    image = unit(noise((6, 7, channels)))
    got = adjust(name)(image, factors)
    assert got.dtype == jnp.float32
    for one, factor in zip(got, factors, strict=True):
        expected = REFERENCE[name](image.astype(float), float(factor))
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-6)
        assert one.min() >= 0 and one.max() <= 1


@pytest.mark.parametrize("name", ENHANCE)
def test_adjustments_are_close_to_pillows(name):
    image = noise((40, 31, 3))
    got = 255 * adjust(name)(unit(image), np.float32(FACTORS))
    for one, factor in zip(got, FACTORS, strict=True):
        pillow = np.asarray(ENHANCE[name](Image.fromarray(image)).enhance(factor))
        # Pillow cuts decimals off, of the grey too, which the factor of 2.5 enlarges.
        np.testing.assert_allclose(one, pillow, rtol=0, atol=2)


def test_gray_is_pillows():
    image = noise((40, 31, 3))
    got = jit(color.grayscale)(unit(image))
    pillow = np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    np.testing.assert_allclose(255 * got, np.repeat(pillow, 3, 2), rtol=0, atol=0.501)
    assert color.grayscale(jnp.ones((1, 1, 3))).tolist() == [[[1.0, 1.0, 1.0]]]


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_is_pillows(channels):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, 2)
    pillow = np.asarray(ImageOps.solarize(Image.fromarray(values.squeeze()), 128))
    got = color.solarize(jnp.asarray(unit(values)))
    np.testing.assert_allclose(got, unit(pillow.reshape(values.shape)), rtol=0, atol=1e-6)
    got = color.solarize(jnp.full((1, 1, channels), 0.4), 0.3)
    np.testing.assert_allclose(got, 0.6, rtol=0, atol=1e-6)


def test_one_channel_has_no_color():
    image = jnp.asarray(unit(noise((4, 5, 1))))
    assert color.adjust_saturation(image, 0.0) is image
    assert color.adjust_hue(image, 0.3) is image
    np.testing.assert_array_equal(color.grayscale(image), image)


def in_turn(image, order, factors):
    for i in order:
        image = REFERENCE[color.OPERATIONS[i]](image, factors[i])
    return image


@pytest.mark.parametrize("channels", [1, 3])
def test_every_order(channels):
    orders = np.array(list(itertools.permutations(range(4))))
    times = np.argsort(orders, axis=1).astype(np.float32) / 4
    factors = np.float32([1.4, 0.6, 1.7, 0.08])
    image = unit(noise((6, 7, channels)))
    got = jit(jax.vmap(color.apply_jitter, in_axes=(None, 0, None)))(image, times, factors)
    expected = np.stack([in_turn(image.astype(float), order, factors) for order in orders])
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    # Every order has a result of its own: none can pass for another.
    apart = np.abs(expected[:, None] - expected).max((2, 3, 4)) > 1e-3
    assert len(np.unique(apart, axis=0)) == {1: 2, 3: 24}[channels]


def draw(key, *strengths):
    return color.times_and_factors(jax.random.uniform(key, (8,)), *strengths)


@pytest.mark.parametrize("left_out", [("hue",), ("contrast", "saturation")])
def test_an_operation_of_strength_0_is_left_out(left_out):
    # And what a jitter draws is what it applies.
    strengths = [0.0 if name in left_out else 0.4 for name in color.OPERATIONS]
    image = unit(noise())
    keys = jax.random.split(jax.random.key(0), 12)
    got = jit(jax.vmap(lambda key: color.jitter(key, image, *strengths)))(keys)
    draws = jax.vmap(lambda key: draw(key, *strengths))(keys)
    for one, times, factors in zip(got, *map(np.asarray, draws), strict=True):
        order = [i for i in np.argsort(times) if strengths[i] > 0]
        expected = in_turn(image.astype(float), order, factors)
        np.testing.assert_allclose(one, expected, rtol=0, atol=2e-6)


def test_only_what_is_needed_is_computed():
    def operations(channels, *strengths):
        image, key = jnp.zeros((4, 5, channels)), jax.random.key(0)
        text = str(jax.make_jaxpr(lambda x: color.jitter(key, x, *strengths))(image))
        return text.count("floor"), re.findall(r"length=(\d+)", text)

    # How often the hue, and how many slots in each loop.
    assert operations(3, 0.4, 0.4, 0.2, 0.1) == (1, ["3", "3"])
    assert operations(3, 0.4, 0.4, 0.2, 0.0) == (0, ["3"])
    assert operations(3, 0.0, 0.4, 0.0, 0.1) == (1, ["1", "1"])
    assert operations(1, 0.4, 0.4, 0.2, 0.1) == (0, ["2"])
    image = jnp.zeros((4, 5, 3))
    assert color.jitter(jax.random.key(0), image, 0.0, 0.0, 0.0, 0.0) is image


def test_draws_follow_their_law():
    keys = jax.random.split(jax.random.key(1), 24_000)
    strengths = (0.4, 1.5, 0.2, 0.1)
    times, factors = jit(jax.vmap(lambda key: draw(key, *strengths)))(keys)
    times, factors = np.asarray(times), np.asarray(factors, float)
    _, counts = np.unique(np.argsort(times, axis=1), axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    ranges = [(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]
    for values, (low, high) in zip(factors.T, ranges, strict=True):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    # Eight independent numbers: no correlation beyond five standard deviations.
    correlation = np.corrcoef(np.concatenate([times, factors], 1).T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(times))


JITTER = jit(lambda image, times, factors: color.apply_jitter(image, times, factors))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 999),
    st.tuples(*[st.floats(0, 1, width=32)] * 4),
    st.tuples(*[st.floats(0, 4, width=32)] * 3, st.floats(-0.5, 0.5, width=32)),
)
def test_results_stay_between_0_and_1(seed, times, factors):
    got = np.asarray(JITTER(unit(noise(seed=seed)), np.float32(times), np.float32(factors)))
    assert np.isfinite(got).all() and got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: color.adjust_hue(x[:, :, :2], 0.1), r"1 or 3\), found \(4, 5, 2\)"),
        (lambda x: color.grayscale(x[0]), r"found \(5, 3\)"),
        (lambda x: color.solarize(x[None]), r"found \(1, 4, 5, 3\)"),
        (lambda x: color.jitter(jax.random.key(0), x, 0, 0, 0, 0.6), r"hue.*0.5\], found 0.6"),
        (lambda x: color.jitter(jax.random.key(0), x, 0, -1, 0, 0), r"contrast.*found -1"),
    ],
)
def test_errors_name_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((4, 5, 3)))
