"""Labelled images by position, decoded as they are read, and the splits of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """Images by position: `source[i]` for one, `source.take(positions)` for k at once.

    Either is a dict of `image`, uint8 `(H, W, C)`, black below and to the right of its true extent;
    `size`, int32 `(2,)`, the true height and width; `label`, int32; `index`, int32, its position.
    `take` puts an axis of k in front.

    Attributes:
      name: data set and split, for people.
      num_classes: labels are below it.
      image_shape: `(H, W, C)`, the same for all images.
      length: number of images.
      read: from positions `(k,)` to images, sizes and labels, each with an axis of k in front.
      read_labels: from positions `(k,)` to int32 labels `(k,)`, without decoding images.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    length: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    read_labels: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        position = range(self.length)[index]  # heeds negative ones and raises IndexError
        return {key: value[0] for key, value in self.take(np.array([position])).items()}

    def take(self, positions: np.ndarray) -> Batch:
        """The images at integer positions `(k,)`, each in 0..length-1."""
        image, size, label = self.read(positions)
        return {"image": image, "size": size, "label": label, "index": positions.astype(np.int32)}


def decoded(
    name: str,
    num_classes: int,
    length: int,
    fetch: Callable[[np.ndarray], tuple[Any, np.ndarray]],
    channels: int,
    canvas: int | None,
) -> Source:
    """A source that decodes images as they are read.

    Args:
      name: of the source.
      num_classes: of the source.
      length: of the source.
      fetch: from positions `(k,)` to k times what `decode` takes, and int32 labels `(k,)`.
      channels: as for `decode`.
      canvas: as for `decode`, and then the height and width of all, filled up with black; None
        takes those of the first image.

    Returns:
      The source. Reading raises ValueError, as `decode` does, and without a canvas for an image of
      another size than the first.
    """

    def decode_at(position: int, file: Any) -> tuple[np.ndarray, str]:
        label = file if isinstance(file, str) else f"{name}[{position}]"
        return decode(file, channels, canvas, label), label

    first, first_name = decode_at(0, fetch(np.array([0]))[0][0])
    height, width = (canvas, canvas) if canvas else first.shape[:2]

    def read(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        files, labels = fetch(positions)
        images = np.zeros((len(positions), height, width, channels), np.uint8)
        sizes = np.zeros((len(positions), 2), np.int32)
        for row, (position, file) in enumerate(zip(positions, files, strict=True)):
            image, image_name = decode_at(position, file)
            h, w, _ = image.shape
            if not canvas and (h, w) != (height, width):
                raise ValueError(
                    "images of different sizes need a canvas: height and width of "
                    f"{first_name} are {height}x{width}, those of {image_name} {h}x{w}"
                )
            images[row, :h, :w] = image
            sizes[row] = h, w
        return images, sizes, labels

    shape = (height, width, channels)
    return Source(name, num_classes, shape, length, read, lambda at: fetch(at)[1])


def decode(
    file: str | BinaryIO | np.ndarray, channels: int, canvas: int | None, name: str
) -> np.ndarray:
    """The pixels of an image file, upright as its EXIF orientation says.

    Args:
      file: path or open file of an encoded image, or its pixels, uint8 `(H, W)` or `(H, W, 3)`.
      channels: 1 for grey, 3 for RGB; transparency is dropped.
      canvas: the longer side is scaled down to at most so many pixels, never up, by PIL's bicubic
        filter with antialiasing; None keeps the size.
      name: what an error calls the file.

    Returns:
      uint8 `(h, w, channels)`.

    Raises:
      ImportError: pillow is not installed.
      ValueError: not an image, a damaged one, or one of more than 8 bits a channel.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need pillow: pip install 'fourfold[ssl]'") from error
    try:
        opened = Image.fromarray(file) if isinstance(file, np.ndarray) else Image.open(file)
        with opened as image:
            pixels = np.asarray(_upright(image, canvas).convert(MODES[channels]))
    # Damaged files make PIL raise OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _upright(image: Image.Image, canvas: int | None) -> Image.Image:
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
    # A palette can't be interpolated. By way of RGBA, since PIL warns of transparency otherwise.
    if image.mode not in MODES.values():
        image = image.convert("RGBA").convert("RGB")
    if canvas is not None:
        # A JPEG is decoded at a fraction of its size where that is still twice the thumbnail's.
        image.thumbnail((canvas, canvas), reducing_gap=2.0)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def mixed(labels: np.ndarray) -> np.ndarray:
    """An order of integer labels `(N,)`, every stretch of which has the classes in proportion.

    >>> mixed(np.array([0, 0, 0, 0, 1, 1]))
    array([0, 4, 1, 2, 5, 3])
    """
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort((rank + 0.5) / np.repeat(counts, counts), kind="stable")]


def part(split: str, splits: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """What a split such as `train` or `train[10%:50%]` has, by the rules of Python's slices.

    Args:
      split: name of a split, and bounds, which count images, or percent of them if either has %.
      splits: what each split has.
      name: of the data, for the error.

    Raises:
      ValueError: there is no such split, or it is empty.

    >>> part("train[25%:]", {"train": np.arange(8)}, "example")
    array([2, 3, 4, 5, 6, 7])
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[(?:(-?\d+)%?)?:(?:(-?\d+)%?)?\])?", split)
    if match is None or match[1] not in splits:
        raise ValueError(
            f"{name} has no split {split!r}; it has {', '.join(splits)}, and parts of them such as "
            "train[:90%]"
        )
    whole = splits[match[1]]
    unit = len(whole) / 100 if "%" in split[len(match[1]) :] else 1
    bounds = (None if text is None else round(int(text) * unit) for text in match.groups()[1:])
    found = whole[slice(*bounds)]
    if not len(found):
        raise ValueError(f"{name}: split {split!r} has no images, of {len(whole)} in {match[1]}")
    return found
