"""The records and states of an ensemble in a folder, from which what is dropped is gone.

Both have generations: a new one is written beside the old one, named as current in one atomic step,
and only then the old one is removed. So a kill at any point leaves a folder that opens, and nothing
outlives its removal but what a disk or a backup keeps by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fourfold.runtime.host_arrays import replacing, sync, sync_tree, write_array, write_text
from unlearn.programs import digest
from unlearn.sisa import ShardState

_CURRENT, _DRAFT = "current.json", "draft"


class RecordStore:
    """The records of an ensemble: arrays of one length, by name.

    Attributes:
      folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder that has records, or is to have some."""
        self.folder = folder

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replaces all records, whole or not at all, and removes those before.

        Raises:
          OSError: as the operating system says; what was there is intact.
        """
        generation = (_read(self.folder) or {"generation": 0})["generation"] + 1
        draft = self.folder / _DRAFT
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            for name, array in arrays.items():
                write_array(draft / f"{name}.npy", array)
            _adopt(self.folder, draft, {"generation": generation})
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        purge(self.folder)

    def read(self) -> dict[str, np.ndarray]:
        """Returns all arrays; large ones are mapped.

        Raises:
          FileNotFoundError: there are none.
        """
        folder = _generation(self.folder)
        found = {}
        for path in sorted(folder.glob("*.npy")):
            found[path.stem] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found

    def drop(self, gone: np.ndarray) -> None:
        """Removes records for good.

        Args:
          gone: bool `(N,)`.
        """
        if gone.any():
            self.write({name: array[~gone] for name, array in self.read().items()})


class ShardStore:
    """The states of one shard: before its first slice nothing, and one after each.

    Attributes:
      folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder that has states, or is to have some."""
        self.folder = folder

    @property
    def hash(self) -> str | None:
        """The digest of the state that serves; None before there is one."""
        return (_read(self.folder) or {}).get("hash")

    @property
    def purpose(self) -> str | None:
        """What the current states were trained for, as given to `begin`."""
        return (_read(self.folder) or {}).get("purpose")

    def begin(self, purpose: str) -> int:
        """Prepares for new states; goes on with earlier work for the very same purpose.

        Args:
          purpose: a digest of the records and of all else that the states depend on.

        Returns:
          The slice to train next, if any is there from before; else 0.
        """
        draft = self.folder / _DRAFT
        note = draft / "purpose.txt"
        if not note.exists() or note.read_text() != purpose:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            with replacing(note) as part:
                write_text(part, purpose)
        done = (int(path.stem.removeprefix("slice_")) for path in draft.glob("slice_*.npz"))
        return max(done, default=-1) + 1

    def save(self, slice_: int, state: ShardState) -> None:
        """Keeps the state after a slice, whole or not at all."""
        draft = self.folder / _DRAFT
        path = draft / f"slice_{slice_:03d}.npz"
        leaves = jax.tree_util.tree_leaves_with_path(state)
        arrays: dict[str, Any] = {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in leaves}
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)

    def load(self, slice_: int, like: ShardState, draft: bool = False) -> ShardState:
        """Returns the state after a slice.

        Args:
          slice_: its number.
          like: a state of the same structure; its leaves may be shapes alone.
          draft: of the states in the making.

        Raises:
          FileNotFoundError: there is none.
          ValueError: the file has other names, shapes or dtypes.
        """
        folder = self.folder / _DRAFT if draft else _generation(self.folder)
        path = folder / f"slice_{slice_:03d}.npz"
        leaves, tree = jax.tree_util.tree_flatten_with_path(like)
        found = []
        with np.load(path, allow_pickle=False) as file:
            for at, leaf in leaves:
                name = jax.tree_util.keystr(at)
                if name not in file.files:
                    raise ValueError(f"{path} has no {name}: it is of another network or optimiser")
                array = file[name]
                if array.shape != leaf.shape or array.dtype != leaf.dtype:
                    raise ValueError(
                        f"{path}: {name} is {array.dtype} {array.shape}, expected {leaf.dtype} "
                        f"{leaf.shape}: it is of another network or optimiser"
                    )
                found.append(array)
        return jax.tree_util.tree_unflatten(tree, found)

    def publish(
        self, slices: int, kept: int, like: ShardState, expected: str | None = None
    ) -> None:
        """Makes the new states current; the old ones stay until `purge`.

        Args:
          slices: R.
          kept: number of the first slices whose states are those of before.
          like: as for `load`.
          expected: the digest that there has to be, if it is known.

        Raises:
          ValueError: the state after the last slice has another one; the old states stay current.
        """
        draft = self.folder / _DRAFT
        current = _read(self.folder) or {"generation": 0}
        for slice_ in range(kept):
            name = f"slice_{slice_:03d}.npz"
            if not (draft / name).exists():
                with replacing(draft / name) as part:
                    shutil.copyfile(_generation(self.folder) / name, part)
        found = digest(self.load(slices - 1, like, draft=True))
        if expected not in (None, found):
            raise ValueError(
                f"{self.folder} was trained anew and came to {found}, but {expected} is on record: "
                "the records there are not those that were left, as after restoring a backup from "
                "before a request that can no longer be repeated; or the software or hardware is "
                "another. Train a new ensemble on the records that may be used"
            )
        note = {
            "generation": current["generation"] + 1,
            "hash": found,
            "purpose": (draft / "purpose.txt").read_text(),
        }
        _adopt(self.folder, draft, note)


def purge(folder: Path) -> None:
    """Removes all but the current generation."""
    current = _read(folder)
    keep = {_CURRENT} | ({_name(current["generation"])} if current else set())
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if folder.is_dir():
        sync(folder)


def _adopt(folder: Path, draft: Path, note: dict[str, Any]) -> None:
    """Makes a draft the current generation. A kill in between leaves it without a name."""
    sync_tree(draft)
    target = folder / _name(note["generation"])
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    with replacing(folder / _CURRENT) as part:
        write_text(part, json.dumps(note))
    sync(folder)


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / _CURRENT
    return json.loads(path.read_text()) if path.exists() else None


def _generation(folder: Path) -> Path:
    current = _read(folder)
    if current is None:
        raise FileNotFoundError(f"{folder} has nothing that was finished")
    return folder / _name(current["generation"])


def _name(generation: int) -> str:
    return f"g{generation:06d}"
