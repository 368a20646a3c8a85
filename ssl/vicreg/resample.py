"""Crop, resize and blur of one image, each as two small matrix products.

Both axes are filtered one after the other, by a matrix of weights that a traced box or a traced
standard deviation makes: no gather and no dynamic shape, so that a batch with another box per image
is one batched product. Images are float32 `(height, width, channels)` in [0, 1].
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

__all__ = ["Method", "crop_and_resize", "gaussian_blur", "resize_and_crop"]

Method = Literal["bicubic", "bilinear"]
Box = tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]

# By default TPUs multiply in bfloat16 and GPUs in TF32: too coarse for 8-bit colours.
_PRECISION = lax.Precision.HIGHEST


def crop_and_resize(
    image: jax.Array,
    box: Box,
    out_size: int,
    method: Method = "bicubic",
    *,
    mirror: ArrayLike = False,
) -> jax.Array:
    """Cuts a box out of an image and scales it to a square, as Pillow does.

    The kernel is as wide as the reduction is large (antialiasing), and its weights are cut off at
    the edge of the box and made to sum to 1, as if nothing lay outside: what a padded canvas holds
    beside the image can't leak in. `jax.image.scale_and_translate` samples around the box. Pillow
    rounds to 8 bits after either axis; here only the overshoot is clipped.

    Args:
      image: float `(height, width, channels)` in [0, 1].
      box: `(top, left, height, width)` in pixels, integers, traced or not; it must lie inside the
        image and be of at least one pixel, which can't be checked under `jit`.
      out_size: height and width of the result, in pixels.
      method: kernel, "bicubic" (with Pillow's a = -1/2) or "bilinear".
      mirror: boolean scalar, traced or not: whether to flip the result left to right.

    Returns:
      float `(out_size, out_size, channels)` in [0, 1].

    Raises:
      ValueError: where the rank of `image`, `out_size` or `method` is wrong.

    Source: torchvision's `resized_crop` of a PIL image; Pillow's `ImagingResample`.

    >>> image = jnp.array([[0.0, 0.2, 0.4, 0.6], [1.0, 1.0, 1.0, 1.0]])[:, :, None]
    >>> small = crop_and_resize(image, (0, 0, 1, 4), 2, "bilinear")
    >>> [round(float(x), 4) for x in small[0, :, 0]]
    [0.1429, 0.4571]
    """
    top, left, height, width = (jnp.asarray(side, jnp.float32) for side in box)
    vertical = _weights(image.shape, 0, top, height, out_size, out_size, 0, method)
    horizontal = _weights(image.shape, 1, left, width, out_size, out_size, 0, method)
    horizontal = jnp.where(jnp.asarray(mirror), horizontal[::-1], horizontal)
    return _filter(image, vertical, horizontal)


def resize_and_crop(
    image: jax.Array,
    size: jax.Array,
    shorter: int,
    out_size: int,
    method: Method = "bilinear",
) -> jax.Array:
    """Scales the shorter side to so many pixels, then cuts the centre out.

    Args:
      image: float `(height, width, channels)` in [0, 1], padded at the bottom and the right.
      size: int32 `(2,)`, height and width of the image inside its padding, at least 1.
      shorter: wanted length of the shorter side, in pixels; the longer keeps the aspect ratio.
      out_size: height and width of the result, in pixels, at most `shorter`.
      method: kernel, "bilinear" or "bicubic".

    Returns:
      float `(out_size, out_size, channels)` in [0, 1].

    Raises:
      ValueError: where the rank of `image`, `shorter`, `out_size` or `method` is wrong.

    Source: torchvision's `Resize` and `CenterCrop` of a PIL image, with their rounding.
    """
    if shorter < out_size:
        raise ValueError(f"shorter must be at least out_size {out_size}, found {shorter}")
    resized = shorter * size // jnp.min(size)
    margin = resized - out_size
    # Half the margin, and a half is rounded to even, as Python's `round` does.
    first = margin // 2 + (margin & (margin // 2) & 1)
    vertical, horizontal = (
        _weights(image.shape, axis, 0.0, size[axis], resized[axis], out_size, first[axis], method)
        for axis in (0, 1)
    )
    return _filter(image, vertical, horizontal)


def gaussian_blur(image: jax.Array, sigma: ArrayLike) -> jax.Array:
    """Blurs an image with a Gaussian; beyond an edge, the edge's pixels repeat.

    The weights are the Gaussian itself at whole pixels, normalised. Pillow approximates it by
    three box filters of fractional width and the same variance. On a photograph the two differ by
    half a level of 255 on average at a standard deviation of 1 or 2, and most at 0.3, by 1.6
    levels: a Gaussian at whole pixels hardly blurs there, and boxes do.

    Args:
      image: float `(height, width, channels)` in [0, 1].
      sigma: scalar above 0, traced or not, the standard deviation in pixels. From a third of a
        side on, the far tail of the Gaussian is cut off.

    Returns:
      float `(height, width, channels)` in [0, 1].

    Raises:
      ValueError: where the rank of `image` is wrong, or `sigma` is a Python number not above 0.

    >>> line = jnp.array([1.0, 0.0, 0.0])[None, :, None]
    >>> [round(float(x), 4) for x in gaussian_blur(line, 0.5)[0, :, 0]]
    [0.8933, 0.1067, 0.0003]
    """
    if isinstance(sigma, (int, float)) and not sigma > 0:
        raise ValueError(f"sigma must be above 0, found {sigma}")
    _check_image(image.shape)
    sigma = jnp.asarray(sigma, jnp.float32)
    height, width, _ = image.shape
    vertical = _blur_weights(height, sigma)
    horizontal = vertical if width == height else _blur_weights(width, sigma)
    return _filter(image, vertical, horizontal)


def _filter(image: jax.Array, vertical: jax.Array, horizontal: jax.Array) -> jax.Array:
    """Applies `(out, in)` weights along either axis, in Pillow's order, and clips after each."""
    # A plane per channel: both products are then over the last two axes, without an odd axis of 3.
    planes = jnp.moveaxis(image, -1, 0)
    planes = jnp.einsum("chw,ow->cho", planes, horizontal, precision=_PRECISION)
    planes = jnp.clip(planes, 0, 1)
    planes = jnp.einsum("oh,chw->cow", vertical, planes, precision=_PRECISION)
    return jnp.moveaxis(jnp.clip(planes, 0, 1), 0, -1)


def _weights(
    shape: tuple[int, ...],
    axis: int,
    start: ArrayLike,
    length: ArrayLike,
    resized: ArrayLike,
    out_size: int,
    first: ArrayLike,
    method: Method,
) -> jax.Array:
    """Weights of the pixels of an axis in each pixel of the result, `(out_size, shape[axis])`.

    The segment of `length` pixels from `start` on becomes `resized` pixels, of which `out_size`
    from `first` on are wanted.
    """
    _check_image(shape)
    if out_size < 1:
        raise ValueError(f"out_size must be at least 1, found {out_size}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, found {method!r}")
    start, length, resized, first = (
        jnp.asarray(number, jnp.float32) for number in (start, length, resized, first)
    )
    scale = length / resized
    center = (jnp.arange(out_size, dtype=jnp.float32) + first + 0.5) * scale
    pixel = jnp.arange(shape[axis], dtype=jnp.float32) - start + 0.5
    distance = jnp.abs(pixel[None, :] - center[:, None]) / jnp.maximum(scale, 1)
    kernel = _cubic(distance) if method == "bicubic" else jnp.maximum(1 - distance, 0)
    kernel = jnp.where((pixel > 0) & (pixel < length), kernel, 0)
    return kernel / jnp.sum(kernel, axis=1, keepdims=True)


def _cubic(x: jax.Array) -> jax.Array:
    """Keys' cubic convolution kernel with a = -1/2, for x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _blur_weights(length: int, sigma: jax.Array) -> jax.Array:
    """Weights of the pixels of an axis in each blurred one, `(length, length)`."""
    index = jnp.arange(length, dtype=jnp.float32)
    target, source = index[:, None], index[None, :]

    def gaussian(distance: jax.Array) -> jax.Array:
        return jnp.exp(-0.5 * jnp.square(distance / sigma))

    # What belongs to the pixels before the first one, at -1, -2, ..., comes from the first.
    before = jnp.sum(gaussian(target + source + 1), axis=1, keepdims=True)
    weights = gaussian(target - source)
    weights += jnp.where(source == 0, before, 0)
    weights += jnp.where(source == length - 1, before[::-1], 0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _check_image(shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise ValueError(f"image must have shape (height, width, channels), found {shape}")
