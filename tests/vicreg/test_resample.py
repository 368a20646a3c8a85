"""Crop, resize and blur against Pillow's and scipy's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import ndimage

from vicreg import resample

# To compile in half the time; the loops over these small images need not be fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# (height, width) of a canvas, size of the result, boxes (top, left, height, width) in the canvas.
CASES = [
    ((13, 17), 8, [(0, 0, 13, 17), (1, 2, 11, 13), (5, 4, 8, 8), (3, 9, 2, 7), (12, 16, 1, 1)]),
    ((9, 6), 23, [(0, 0, 9, 6), (2, 1, 5, 4), (0, 5, 9, 1), (8, 0, 1, 6)]),
    ((40, 31), 5, [(0, 0, 40, 31), (7, 3, 33, 28), (1, 0, 6, 30), (30, 20, 3, 11)]),
]


def images(shape, low=0, high=1, seed=0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def pillow_resize(image, height, width, method):
    """In float32, channel by channel, without rounding or clipping."""
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((width, height), method))
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack(planes, -1)


@functools.cache
def cropper(out_size, method):
    return jit(
        jax.vmap(
            lambda image, box: resample.crop_and_resize(image, tuple(box), out_size, method),
            in_axes=(None, 0),
        )
    )


@pytest.mark.parametrize("method", PILLOW)
@pytest.mark.parametrize(("canvas", "out_size", "boxes"), CASES)
def test_crop_is_pillows(canvas, out_size, boxes, method):
    # Of too little contrast for the overshoot to be clipped, which Pillow's float32 isn't.
    image = images((*canvas, 3), 0.35, 0.65)
    got = cropper(out_size, method)(image, np.array(boxes))
    for one, (top, left, height, width) in zip(got, boxes, strict=True):
        cut = image[top : top + height, left : left + width]
        expected = pillow_resize(cut, out_size, out_size, PILLOW[method])
        np.testing.assert_allclose(one, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("canvas", "out_size", "boxes"), CASES)
def test_overshoot_is_clipped_as_in_8_bits(canvas, out_size, boxes):
    # Black and white overshoots along either axis; Pillow clips after each.
    image = np.random.default_rng(1).integers(0, 2, (*canvas, 3), np.uint8) * 255
    got = cropper(out_size, "bicubic")(image.astype(np.float32) / 255, np.array(boxes))
    for one, (top, left, height, width) in zip(got, boxes, strict=True):
        cut = Image.fromarray(image[top : top + height, left : left + width])
        expected = np.asarray(cut.resize((out_size, out_size), PILLOW["bicubic"]))
        # Half a level from either rounding, the first of which the second axis enlarges.
        np.testing.assert_allclose(255 * one, expected, rtol=0, atol=1.3)
    assert got.min() == 0 and got.max() == 1


def test_a_box_of_the_wanted_size_is_copied():
    image = images((9, 11, 1))
    got = cropper(7, "bicubic")(image, np.array([(2, 3, 7, 7)]))[0]
    np.testing.assert_allclose(got, image[2:9, 3:10], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", PILLOW)
def test_nothing_outside_the_box_leaks_in(method):
    top, left, height, width = box = (2, 1, 5, 6)
    image = images((9, 11, 1))
    other = images((9, 11, 1), seed=1)
    other[top : top + height, left : left + width] = image[top : top + height, left : left + width]
    first, second = (cropper(7, method)(x, np.array([box])) for x in (image, other))
    np.testing.assert_array_equal(first, second)


def test_mirror_flips_left_to_right():
    image = images((9, 12, 3))

    @jit
    @jax.vmap
    def crop(mirror):
        return resample.crop_and_resize(image, (1, 2, 7, 9), 5, mirror=mirror)

    plain, mirrored = crop(np.array([False, True]))
    np.testing.assert_allclose(mirrored, plain[:, ::-1], rtol=0, atol=1e-6)
    cut = pillow_resize(image[1:8, 2:11], 5, 5, PILLOW["bicubic"]).clip(0, 1)
    np.testing.assert_allclose(plain, cut, rtol=0, atol=0.02)


def center_crop(image, size, shorter, out_size):
    """Torchvision's Resize and CenterCrop in Python's numbers, on float32."""
    height, width = size
    scaled = [int(shorter * side / min(size)) for side in size]
    whole = pillow_resize(image[:height, :width], *scaled, PILLOW["bilinear"])
    top, left = (int(round((side - out_size) / 2.0)) for side in scaled)
    return whole[top : top + out_size, left : left + out_size]


@pytest.mark.parametrize(("shorter", "out_size"), [(9, 6), (29, 24)])
def test_resize_and_center_crop_is_pillows(shorter, out_size):
    # Margins of every remainder by 4, as their halves are rounded to even.
    sizes = [(16, 20), (16, 16), (9, 16), (13, 7), (16, 5), (3, 19), (1, 1), (11, 20), (7, 8)]
    image = images((16, 20, 1))
    one = functools.partial(resample.resize_and_crop, shorter=shorter, out_size=out_size)
    got = jit(jax.vmap(one, in_axes=(None, 0)))(image, np.array(sizes))
    for size, result in zip(sizes, got, strict=True):
        expected = center_crop(image, size, shorter, out_size)
        np.testing.assert_allclose(result, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", [(20, 13, 3), (8, 8, 1), (31, 1, 1)])
def test_blur_is_scipys(shape):
    image = images(shape)
    sigmas = np.float32([0.1, 0.3, 0.5, 0.77, 1.0, 1.5, 2.0])
    got = jit(jax.vmap(resample.gaussian_blur, in_axes=(None, 0)))(image, sigmas)
    for one, sigma in zip(got, sigmas, strict=True):
        expected = ndimage.gaussian_filter(
            image.astype(float), (sigma, sigma, 0), mode="nearest", truncate=20
        )
        # The tail that is cut off is of four standard deviations at a side of 8.
        atol = 1e-4 if sigma == 2 and min(shape[:2]) == 8 else 1e-6
        np.testing.assert_allclose(one, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("sigma", "mean"), [(0.5, 1.5), (1.0, 1.2), (2.0, 1.2)])
def test_blur_is_close_to_pillows(sigma, mean):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    boxes = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(sigma)))
    got = jit(resample.gaussian_blur)(noise.astype(np.float32) / 255, np.float32(sigma))
    assert (
        np.abs(255 * np.asarray(got) - boxes).mean() < mean
    )  # in levels; 26 to 62 for no blur at all


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_results_stay_between_0_and_1(data):
    canvas = (12, 15)
    height, width = (data.draw(st.integers(1, side)) for side in canvas)
    top = data.draw(st.integers(0, canvas[0] - height))
    left = data.draw(st.integers(0, canvas[1] - width))
    image = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2, (*canvas, 1))
    box = np.array([(top, left, height, width)])
    got = np.asarray(cropper(7, "bicubic")(image.astype(np.float32), box))
    assert np.isfinite(got).all() and got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: resample.crop_and_resize(x[0], (0, 0, 4, 4), 2), r"channels\), found \(5, 3\)"),
        (lambda x: resample.crop_and_resize(x, (0, 0, 4, 4), 0), "at least 1, found 0"),
        (lambda x: resample.crop_and_resize(x, (0, 0, 4, 4), 2, "cubic"), "bicubic.*'cubic'"),
        (lambda x: resample.resize_and_crop(x, jnp.array([4, 5]), 3, 4), "size 4, found 3"),
        (lambda x: resample.gaussian_blur(x[None], 1.0), r"found \(1, 4, 5, 3\)"),
        (lambda x: resample.gaussian_blur(x, 0.0), "above 0, found 0.0"),
    ],
)
def test_errors_name_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((4, 5, 3)))
