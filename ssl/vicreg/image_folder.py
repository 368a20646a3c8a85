"""Images that lie as files in class folders.

Two layouts: `PATH/SPLIT/CLASS/*.jpg`, and `PATH/CLASS/*.jpg` where nothing was split beforehand.
Files are .jpg, .jpeg, .png, .webp and .bmp, in upper or lower case; names that begin with a dot are
skipped. Classes are numbered in the order of their names.
"""

from __future__ import annotations

import os

import numpy as np

from vicreg import source as sources
from vicreg.source import Source

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def open_folder(path: str, split: str, other: str, canvas: int | None) -> Source:
    """Lists the images of a split; opens no more than one.

    Args:
      path: the folder.
      split: the split that is wanted, or a part of it; see `source.part`.
      other: the other one; the two number their classes alike. If neither is a sub-folder of class
        folders, `train` is 90 % of each class in `path` and `test` the rest.
      canvas: as for `source.decoded`.

    Returns:
      The images in RGB.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there is no such split, there are no classes, or one has no images.
    """
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise FileNotFoundError(f"no folder of images: {path} is not a folder")
    inside = _subfolders(path)
    base, other_base = (text.partition("[")[0] for text in (split, other))
    # A class may be called like a split; it has no folders inside.
    found = [n for n in inside if n in (base, other_base) and _subfolders(os.path.join(path, n))]
    if found and base not in found:
        raise ValueError(
            f"{path} has no split folder {base!r}; it has {_some(inside)}: "
            "--data.train-split and --data.test-split name the two"
        )
    parents = [os.path.join(path, name) for name in found] or [path]
    classes = sorted({name for parent in parents for name in _subfolders(parent)})
    if not classes:
        raise ValueError(
            f"{path} has no class folders: images belong in {path}/CLASS, or in "
            f"{path}/{base}/CLASS and {path}/{other_base}/CLASS"
        )
    folder = os.path.join(path, base) if found else path
    images = [_images(os.path.join(folder, name)) for name in classes]
    files = [file for group in images for file in group]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(group) for group in images])
    order = sources.mixed(labels)
    most = round(0.9 * len(order))
    splits = {base: order} if found else {"train": order[:most], "test": order[most:]}
    at = sources.part(split, splits, path)

    def fetch(positions: np.ndarray) -> tuple[list[str], np.ndarray]:
        return [files[i] for i in at[positions]], labels[at[positions]]

    return sources.decoded(f"folder:{path}/{split}", len(classes), len(at), fetch, 3, canvas)


def _subfolders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: str) -> list[str]:
    """The paths of a class folder's images; none where a split lacks the class."""
    if not os.path.isdir(folder):
        return []
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not images:
        raise ValueError(
            f"class folder {folder} has no images ({', '.join(SUFFIXES)}); it has {_some(names)}"
        )
    return [os.path.join(folder, name) for name in images]


def _some(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return (", ".join(names[:most]) or "nothing") + (f" and {rest} more" if rest > 0 else "")
