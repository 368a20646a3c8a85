"""Colour operations on one image, and their random sequence.

An image is float `(height, width, channels)` in [0, 1], with 1 or 3 channels; anything else raises
ValueError. One of a single channel is grey: saturation, hue and grey leave it as it is.

The operations are those that torchvision applies to float tensors, but for the weights of grey.
These are Pillow's, in whose 8-bit colours the authors of VICReg work: they sum to 1, so that white
stays white, where torchvision's sum to .9999.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

__all__ = [
    "OPERATIONS",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "apply_jitter",
    "grayscale",
    "jitter",
    "jitter_by",
    "solarize",
    "times_and_factors",
]

OPERATIONS: tuple[str, ...] = ("brightness", "contrast", "saturation", "hue")

# ITU-R 601-2 in Pillow's 16-bit fixed point, which float32 holds exactly.
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


def adjust_brightness(image: jax.Array, factor: ArrayLike) -> jax.Array:
    """Blends an image with black.

    Args:
      image: float `(height, width, 1 or 3)` in [0, 1].
      factor: scalar of at least 0: 0 for black, 1 for the image itself, more for a brighter one.

    Returns:
      Like `image`, clipped to [0, 1].
    """
    _is_color(image)
    return _blend(image, 0.0, factor)


def adjust_contrast(image: jax.Array, factor: ArrayLike) -> jax.Array:
    """Blends an image with the mean of its grey; the arguments are those of `adjust_brightness`."""
    return _blend(image, jnp.mean(_luma(image)), factor)


def adjust_saturation(image: jax.Array, factor: ArrayLike) -> jax.Array:
    """Blends an image with its grey; the arguments are those of `adjust_brightness`."""
    return _blend(image, _luma(image), factor) if _is_color(image) else image


def adjust_hue(image: jax.Array, factor: ArrayLike) -> jax.Array:
    """Turns the hue of an image; its value and saturation, as in HSV, stay.

    Args:
      image: float `(height, width, 1 or 3)` in [0, 1].
      factor: scalar, by how much of the hue circle of length 1.

    Returns:
      Like `image`, in [0, 1].

    >>> red = jnp.array([[[0.9, 0.1, 0.1]]])
    >>> [round(float(x), 4) for x in adjust_hue(red, 1 / 3)[0, 0]]
    [0.1, 0.9, 0.1]
    """
    if not _is_color(image):
        return image
    red, green, blue = (image[:, :, channel] for channel in range(3))
    high = jnp.maximum(jnp.maximum(red, green), blue)
    low = jnp.minimum(jnp.minimum(red, green), blue)
    chroma = high - low
    # In sixths of the circle, counted from the channel that is the highest.
    is_red, is_green = red == high, green == high
    start = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0)).astype(image.dtype)
    rise = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    # A grey pixel has no hue; whichever it gets here is multiplied by its chroma, 0, below.
    hue = start + rise / jnp.where(chroma == 0, 1, chroma) + 6 * jnp.asarray(factor, image.dtype)
    hue = hue - 6 * jnp.floor(hue / 6)
    shares = (jnp.abs(hue - 3) - 1, 2 - jnp.abs(hue - 2), 2 - jnp.abs(hue - 4))
    return jnp.stack([low + chroma * jnp.clip(share, 0, 1) for share in shares], axis=-1)


def grayscale(image: jax.Array) -> jax.Array:
    """Takes the colour out of an image `(height, width, 1 or 3)` and keeps its channels."""
    return jnp.broadcast_to(_luma(image), image.shape)


def solarize(image: jax.Array, threshold: ArrayLike = 128 / 255) -> jax.Array:
    """Inverts the values from a threshold on.

    Args:
      image: float `(height, width, 1 or 3)` in [0, 1].
      threshold: scalar; the default is Pillow's, 128 of 255.

    Returns:
      Like `image`.

    >>> [round(float(x), 2) for x in solarize(jnp.array([[[0.2, 0.5, 0.6]]]))[0, 0]]
    [0.2, 0.5, 0.4]
    """
    _is_color(image)
    return jnp.where(image >= jnp.asarray(threshold, image.dtype), 1 - image, image)


def jitter(
    key: jax.Array,
    image: jax.Array,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue at random and in random order.

    Args:
      key: PRNG key, of this image alone.
      image: float `(height, width, 1 or 3)` in [0, 1].
      brightness: Python number x, for a factor uniform on [max(1 - x, 0), 1 + x].
      contrast: the same.
      saturation: the same.
      hue: Python number x of at most 1/2, for a factor uniform on [-x, x].

    Returns:
      Like `image`, in [0, 1]. An operation whose number is 0 isn't computed.

    Raises:
      ValueError: where a number is out of range.

    Source: torchvision's `ColorJitter`.
    """
    draws = jax.random.uniform(key, (8,), jnp.float32)
    return jitter_by(draws, image, brightness, contrast, saturation, hue)


def jitter_by(
    draws: jax.Array,
    image: jax.Array,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> jax.Array:
    """Does what `jitter` does, by eight numbers `(8,)` that are uniform on [0, 1)."""
    strengths = (brightness, contrast, saturation, hue)
    times, factors = times_and_factors(draws, *strengths)
    used = [name for name, strength in zip(OPERATIONS, strengths, strict=True) if strength > 0]
    return apply_jitter(image, times, factors, used)


def times_and_factors(
    draws: jax.Array, brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[jax.Array, jax.Array]:
    """Turns the draws of `jitter_by` into what `apply_jitter` takes, float32 `(4,)` each.

    Times are uniform on [0, 1), so that every order of them is as likely as any other.
    """
    strengths = (brightness, contrast, saturation, hue)
    for name, strength, limit in zip(OPERATIONS, strengths, (*[math.inf] * 3, 0.5), strict=True):
        if not 0 <= strength <= limit:
            raise ValueError(f"{name} must be in [0, {limit}], found {strength}")
    low = np.array([*(max(1 - x, 0) for x in strengths[:3]), -hue], np.float32)
    high = np.array([*(1 + x for x in strengths[:3]), hue], np.float32)
    return draws[:4], jnp.asarray(low) + jnp.asarray(high - low) * draws[4:]


def apply_jitter(
    image: jax.Array,
    times: jax.Array,
    factors: jax.Array,
    used: Collection[str] = OPERATIONS,
) -> jax.Array:
    """Applies brightness, contrast, saturation and hue in a traced order.

    Under `vmap`, a branch per operation would compute all four in each of four places. The first
    three are of one form, `factor * image + (1 - factor) * target`, so that one slot is any of them
    or, with a factor of 1, none. Three slots before the hue and three after it cover every order.

    Args:
      image: float `(height, width, 1 or 3)` in [0, 1].
      times: float `(4,)`, in the order of `OPERATIONS`: what has the smallest comes first.
      factors: float `(4,)`, what `adjust_brightness` and so on take.
      used: names of the operations to compute; the others do nothing.

    Returns:
      Like `image`, in [0, 1].
    """
    possible = OPERATIONS if _is_color(image) else OPERATIONS[:2]
    index = np.array([i for i, name in enumerate(OPERATIONS) if name in used and name in possible])
    if not index.size:
        return image
    names = [OPERATIONS[i] for i in index]
    place = dict(zip(names, jnp.argsort(jnp.argsort(times[index])), strict=True))
    factor = dict(zip(names, factors[index], strict=True))
    blends = [name for name in names if name != "hue"]

    def slot(i: ArrayLike, image: jax.Array, active: ArrayLike) -> jax.Array:
        here = {name: jnp.where((place[name] == i) & active, factor[name], 1) for name in blends}
        luma = _luma(image)
        result = math.prod(here.values()) * image
        if "contrast" in here:
            result += (1 - here["contrast"]) * jnp.mean(luma)
        if "saturation" in here:
            result += (1 - here["saturation"]) * luma
        return jnp.clip(result, 0, 1)

    # Loops, for unrolled slots XLA would compute again in each of the next one's passes.
    if "hue" not in names:
        return lax.fori_loop(0, len(blends), lambda i, x: slot(i, x, True), image)
    hue = place["hue"]
    image = lax.fori_loop(0, len(blends), lambda i, x: slot(i, x, i < hue), image)
    image = adjust_hue(image, factor["hue"])
    return lax.fori_loop(1, len(names), lambda i, x: slot(i, x, i > hue), image)


def _blend(image: jax.Array, target: ArrayLike, factor: ArrayLike) -> jax.Array:
    factor = jnp.asarray(factor, image.dtype)
    return jnp.clip(factor * image + (1 - factor) * target, 0, 1)


def _luma(image: jax.Array) -> jax.Array:
    """The grey of each pixel, as one channel."""
    if not _is_color(image):
        return image
    red, green, blue = (weight * image[:, :, i] for i, weight in enumerate(_LUMA))
    return (red + green + blue)[:, :, None]


def _is_color(image: jax.Array) -> bool:
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"image must have shape (height, width, 1 or 3), found {image.shape}")
    return image.shape[2] == 3
