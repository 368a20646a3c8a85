"""Two random views of each image, on the device: crop, flip, jitter, grey, blur, solarise.

A view depends on its own key and image alone, whatever the batch or the devices: the functions of
one image are pure, and those of a batch vmap them with a key per image. The configuration is
static, and an operation of probability 0 isn't computed at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from vicreg import color, resample
from vicreg.config import AugmentConfig, ViewConfig

__all__ = ["crop_box", "for_evaluation", "normalize", "two_views", "view", "views"]

Range = tuple[float, float]
Box = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
_BOX_DRAWS = 22  # ten areas, ten aspect ratios, top and left


def views(name: str) -> tuple[ViewConfig, ViewConfig]:
    """Returns the two views of a published recipe, `a` and `b` of `AugmentConfig`.

    Args:
      name: "code" of the authors, "paper", or "cifar", solo-learn's for 32×32 pixels.

    Raises:
      ValueError: where the name is unknown; it names the allowed ones.

    >>> [view.solarize for view in views("code")]
    [0.0, 0.2]
    """
    recipes = {
        "code": (ViewConfig(blur=1.0, solarize=0.0), ViewConfig(blur=0.1, solarize=0.2)),
        "paper": (ViewConfig(blur=0.5, solarize=0.1),) * 2,
        "cifar": (ViewConfig(area=(0.2, 1.0), blur=0.0, solarize=0.1),) * 2,
    }
    if name not in recipes:
        raise ValueError(f"name must be one of {', '.join(recipes)}, found {name!r}")
    return recipes[name]


def two_views(
    keys: jax.Array, images: jax.Array, sizes: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
    """Makes two random views of each image of a batch.

    Args:
      keys: typed PRNG keys `(batch,)`, one per image.
      images: uint8 `(batch, height, width, channels)`, with the channels of `config.mean`; smaller
        ones lie at the top left, and what pads them is never seen.
      sizes: int32 `(batch, 2)`, true height and width of each image, in pixels.
      config: the views.

    Returns:
      `(a, b)`, float32 `(batch, config.size, config.size, channels)` each, normalised.

    Raises:
      ValueError: where a shape, a dtype or the number of channels is wrong.

    >>> images, sizes = jnp.zeros((2, 32, 48, 3), jnp.uint8), jnp.array([[32, 48], [30, 32]])
    >>> a, b = two_views(jax.random.split(jax.random.key(0), 2), images, sizes, AugmentConfig(24))
    >>> a.shape, b.shape
    ((2, 24, 24, 3), (2, 24, 24, 3))
    """
    _check_batch(images, sizes, config)
    shape = (len(images),)
    if keys.shape != shape or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(f"keys must be typed PRNG keys {shape}, found {keys.dtype} {keys.shape}")

    def pair(key: jax.Array, image: jax.Array, size: jax.Array) -> list[jax.Array]:
        return [
            normalize(view(key, image, size, one, config.size), config.mean, config.std)
            for key, one in zip(jax.random.split(key), (config.a, config.b), strict=True)
        ]

    a, b = jax.vmap(pair)(keys, images, sizes)
    return a, b


def view(
    key: jax.Array,
    image: jax.Array,
    size: jax.Array,
    view: ViewConfig,
    out_size: int,
    method: resample.Method = "bicubic",
) -> jax.Array:
    """Makes one random view of one image, not yet normalised.

    Args:
      key: PRNG key, of this view alone.
      image: uint8 `(height, width, 1 or 3)`.
      size: int32 `(2,)`, true height and width of the image at the top left, in pixels.
      view: what to do.
      out_size: height and width of the view, in pixels.
      method: kernel of the crop, "bicubic" as in the authors' pre-training, or "bilinear" as in
        their linear evaluation.

    Returns:
      float32 `(out_size, out_size, 1 or 3)` in [0, 1].

    Raises:
      ValueError: where a shape, a dtype or an argument is wrong.

    Source: Bardes, Ponce and LeCun 2022; torchvision's transforms, but without rounding to 8 bits.
    """
    _check_images(image, ("height", "width", "1 or 3"))
    # Drawn at once, for a draw costs more than its numbers do, and used or not, so that to change
    # one probability changes nothing else.
    draws = jax.random.uniform(key, (_BOX_DRAWS + 14,), jnp.float32)
    box_draws, jitter_draws, (flip, share, *coins) = jnp.split(draws, (_BOX_DRAWS, _BOX_DRAWS + 8))
    box = _box(box_draws, size[0], size[1], view.area, view.aspect)
    sigma = view.blur_sigma[0] + (view.blur_sigma[1] - view.blur_sigma[0]) * share
    jitter = (view.brightness, view.contrast, view.saturation, view.hue)
    result = image.astype(jnp.float32) / 255
    result = resample.crop_and_resize(result, box, out_size, method, mirror=flip < view.flip)
    steps = (
        (view.jitter, lambda image: color.jitter_by(jitter_draws, image, *jitter)),
        (view.gray if image.shape[2] == 3 else 0, color.grayscale),
        (view.blur, lambda image: resample.gaussian_blur(image, sigma)),
        (view.solarize, color.solarize),
    )
    for coin, (probability, change) in zip(coins, steps, strict=True):
        if probability == 1:
            result = change(result)
        elif probability > 0:
            result = jnp.where(coin < probability, change(result), result)
    return result


def crop_box(
    key: jax.Array, height: ArrayLike, width: ArrayLike, area: Range, aspect: Range
) -> Box:
    """Draws the box of a random resized crop of an image.

    Args:
      key: PRNG key.
      height: integer scalar, traced or not, in pixels; below 1 it counts as 1.
      width: the same.
      area: smallest and largest area, as a fraction of the image's; uniform between.
      aspect: smallest and largest ratio of width to height; its logarithm is uniform between.

    Returns:
      `(top, left, height, width)`, int32 scalars. The first of ten boxes that fits into the image
      or, where none does, the largest central one of an aspect ratio in range.

    Source: torchvision's `RandomResizedCrop.get_params`.

    >>> [int(side) for side in crop_box(jax.random.key(0), 32, 32, (1.0, 1.0), (1.0, 1.0))]
    [0, 0, 32, 32]
    """
    return _box(jax.random.uniform(key, (_BOX_DRAWS,), jnp.float32), height, width, area, aspect)


def normalize(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Subtracts the mean and divides by the standard deviation of each channel.

    Args:
      image: float `(..., channels)`.
      mean: one number per channel.
      std: one number per channel, above 0.

    Returns:
      Like `image`.

    Raises:
      ValueError: where the numbers of channels differ.

    >>> normalize(jnp.array([0.5, 1.0]), (0.5, 0.5), (0.5, 0.25)).tolist()
    [0.0, 2.0]
    """
    if not len(mean) == len(std) == image.shape[-1]:
        raise ValueError(f"mean and std must be of {image.shape[-1]} channels, found {mean}, {std}")
    shift, scale = (jnp.broadcast_to(jnp.array(x, image.dtype), image.shape) for x in (mean, std))
    return (image - shift) / scale


def for_evaluation(
    images: jax.Array, sizes: jax.Array, config: AugmentConfig, resize: int | None = None
) -> jax.Array:
    """Scales each image, crops its centre and normalises: what a probe sees, without chance.

    Args:
      images: uint8 `(batch, height, width, channels)`, as for `two_views`.
      sizes: int32 `(batch, 2)`, true height and width of each image, in pixels.
      config: its `size`, `mean` and `std`.
      resize: length to scale the shorter side to, in pixels, at least `config.size`. By default 256
        for a size of 224, and in proportion for others, as on ImageNet; but `config.size` where
        `height` and `width` are that already, so that CIFAR and MNIST stay pixel for pixel.

    Returns:
      float32 `(batch, config.size, config.size, channels)`, normalised.

    Raises:
      ValueError: where a shape, a dtype, the number of channels or `resize` is wrong.

    Source: torchvision's `Resize` (bilinear, antialiased) and `CenterCrop` of PIL images.
    """
    _check_batch(images, sizes, config)
    if resize is None:
        same = images.shape[1:3] == (config.size, config.size)
        resize = config.size if same else round(config.size * 256 / 224)

    def one(image: jax.Array, size: jax.Array) -> jax.Array:
        image = image.astype(jnp.float32) / 255
        image = resample.resize_and_crop(image, jnp.maximum(size, 1), resize, config.size)
        return normalize(image, config.mean, config.std)

    return jax.vmap(one)(images, sizes)


def _box(draws: jax.Array, height: ArrayLike, width: ArrayLike, area: Range, aspect: Range) -> Box:
    """Makes the box of `crop_box` from numbers that are uniform on [0, 1)."""
    height, width = (jnp.maximum(jnp.asarray(x, jnp.float32), 1) for x in (height, width))
    areas, ratios, places = jnp.split(draws, (10, 20))
    areas = (area[0] + (area[1] - area[0]) * areas) * height * width
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratios = jnp.exp(low + (high - low) * ratios)
    heights, widths = jnp.round(jnp.sqrt(areas / ratios)), jnp.round(jnp.sqrt(areas * ratios))
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first, image = jnp.argmax(fits), jnp.stack([height, width])
    found = fits[first]
    largest = jnp.clip(jnp.round(jnp.stack([width / aspect[0], height * aspect[1]])), 1, image)
    box = jnp.where(found, jnp.stack([heights[first], widths[first]]), largest)
    # Uniform on 0, 1, ..., space; the minimum is for a product that float32 rounds up.
    space = image - box
    corner = jnp.where(found, jnp.minimum(places * (space + 1) // 1, space), space // 2)
    top, left, box_height, box_width = jnp.concatenate([corner, box]).astype(jnp.int32)
    return top, left, box_height, box_width


def _check_batch(images: jax.Array, sizes: jax.Array, config: AugmentConfig) -> None:
    _check_images(images, ("batch", "height", "width", str(len(config.mean))))
    shape = (len(images), 2)
    if sizes.shape != shape or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"sizes must be integers {shape}, found {sizes.dtype} {sizes.shape}")


def _check_images(images: jax.Array, axes: tuple[str, ...]) -> None:
    if images.ndim != len(axes) or str(images.shape[-1]) not in axes[-1].split(" or "):
        raise ValueError(f"images must have shape ({', '.join(axes)}), found {images.shape}")
    if images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8, from 0 to 255, found {images.dtype}")
