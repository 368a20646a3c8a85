"""Checkpoints of a run: a pytree through Orbax beside large host arrays, all or nothing.

A checkpoint is a folder `step_000000012000` with

    tree/            the pytree (Orbax, written by all processes)
    extra/PROCESS/   host arrays as .npy and JSON values of each process
    manifest.json    the leaves' shapes and dtypes, and the size of every file

It is written under a temporary name, flushed to disk and renamed, so that under its own name it
is whole; `manifest.json` is how a reader makes sure. The folder must be shared by all processes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fourfold.runtime import host_arrays, mesh, pytree_io
from fourfold.runtime.host_arrays import DiskFullError

__all__ = ["Checkpoints", "DiskFullError"]

_FORMAT = 1
_MANIFEST = "manifest.json"
_UNFINISHED = "unfinished."  # a checkpoint being written, or being removed
_MARGIN = 1 << 20  # bytes for metadata and the file system's own bookkeeping


class Checkpoints:
    """The checkpoints in one folder.

    Reading never changes the folder, so an evaluation may watch the folder of a run in progress.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 2) -> None:
        """Opens the folder, which need not exist yet.

        Args:
          path: the folder.
          keep: how many checkpoints to keep; older ones are removed once a newer one is whole.

        Raises:
          ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, found {keep}")
        self.path = Path(path).absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, oldest first; broken folders are left out."""
        if not self.path.is_dir():
            return []
        steps = []
        for folder in self.path.glob("step_*"):
            number = folder.name.removeprefix("step_")
            if number.isdecimal() and _manifest(folder) is not None:
                steps.append(int(number))
        return sorted(steps)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return max(self.steps(), default=None)

    def start(self, resume: bool) -> int:
        """The step that a run goes on from, 0 for its beginning.

        Where a resumed run has no whole checkpoint, that is said on standard error.

        Args:
          resume: whether the run was begun earlier.
        """
        newest = self.latest() if resume else 0
        if newest is None and mesh.is_lead():
            broken = sorted(path.name for path in self.path.glob("step_*"))
            what = f", only damaged ones ({', '.join(broken)})" if broken else ""
            print(f"no whole checkpoint in {self.path}{what}: from the beginning", file=sys.stderr)
        return newest or 0

    def save(self, step: int, tree: Any, extra: Mapping[str, Any] | None = None) -> Path:
        """Saves a checkpoint; when it returns, the checkpoint is on disk.

        All processes call it with the same `step` and structure. The same step saved twice is the
        same state, so a second save of a step that is there writes nothing.

        Args:
          step: the step, at least 0 and no older than the newest checkpoint.
          tree: a pytree of JAX arrays, typed PRNG keys, NumPy arrays and numbers. With several
            processes, arrays that span them are written by all, and everything else by process 0.
          extra: names to NumPy arrays or JSON values that belong to this process, such as its
            replay. Arrays are written from their own memory, not copied.

        Returns:
          The checkpoint's folder.

        Raises:
          ValueError: a step, leaf or extra value that can't be saved; nothing was written.
          DiskFullError: no room; earlier checkpoints are intact.
          RuntimeError: another process failed to save.
        """
        extra = {} if extra is None else extra
        leaves = pytree_io.named_leaves(tree)
        size = host_arrays.check_extra(extra) + pytree_io.num_bytes(leaves)
        newest = self.latest()
        if step < 0 or (newest is not None and step < newest):
            raise ValueError(f"step must be at least {newest or 0}, the newest here, found {step}")
        folder = self.path / f"step_{step:012d}"
        draft = self.path / f"{_UNFINISHED}{folder.name}"
        if not mesh.all_agree(step != newest):
            return folder
        need = sum(mesh.gather(size)) + _MARGIN

        def open_draft() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._clear()
            self._make_room(need)
            draft.mkdir()

        def write_own() -> None:
            pytree_io.write_tree(draft / "tree", leaves)
            host_arrays.write_extra(draft / "extra" / str(jax.process_index()), extra)

        def seal_draft() -> None:
            _seal(draft, step, leaves)
            if folder.exists():  # broken, since it is not among the steps
                shutil.rmtree(folder)
            draft.rename(folder)
            host_arrays.sync(self.path)
            self._retire(self.keep)

        for phase, lead_only in ((open_draft, True), (write_own, False), (seal_draft, True)):
            failure = None
            try:
                if mesh.is_lead() or not lead_only:
                    phase()
            except BaseException as error:  # KeyboardInterrupt too: the draft must go either way
                failure = error
            # Every process learns of a failure on one, instead of waiting for it in vain.
            if not mesh.all_agree(failure is None):
                if mesh.is_lead():
                    shutil.rmtree(draft, ignore_errors=True)
                raise self._explain(failure, step, need) from failure
        return folder

    def restore(self, step: int, like: Any, *, partial: bool = False) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          step: one of `steps()`.
          like: a pytree of the saved structure that says what each leaf becomes: a `jax.Array` or
            `jax.ShapeDtypeStruct` gives a `jax.Array` with its sharding (uncommitted, on the
            default device, where it has none), a `np.ndarray` a host array, a number a number.
          partial: allow `like` to name only some of the saved leaves; the others are not read.

        Returns:
          The tree, and this process's `extra`. Large arrays of `extra` are memory maps that
          outlive the checkpoint: copy them into place, or use them as they are.

        Raises:
          FileNotFoundError: no whole checkpoint of that step; the message lists those there are.
          ValueError: `like` has other leaves, shapes or dtypes than the checkpoint, or it was
            saved by another number of processes; the message names the first few.
        """
        folder = self.path / f"step_{step:012d}"
        manifest = _manifest(folder)
        if manifest is None:
            there = ", ".join(map(str, self.steps())) or "none"
            raise FileNotFoundError(f"no whole checkpoint of step {step} in {self.path}: {there}")
        saved = {name: pytree_io.Leaf(*leaf) for name, leaf in manifest["leaves"].items()}
        _compare(folder, saved, pytree_io.named_leaves(like), partial)
        if manifest["processes"] != jax.process_count() and not partial:
            raise ValueError(
                f"{folder} was saved by {manifest['processes']} processes and holds the state of "
                f"each; this run has {jax.process_count()}"
            )
        tree = pytree_io.read_tree(folder / "tree", saved, like)
        own = folder / "extra" / str(jax.process_index())
        return tree, host_arrays.read_extra(own) if own.is_dir() else {}

    def _clear(self) -> None:
        """Removes what a killed process left."""
        for path in self.path.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path)

    def _retire(self, keep: int) -> None:
        for step in self.steps()[:-keep]:
            folder = self.path / f"step_{step:012d}"
            # Renamed first, so that a kill half-way leaves no folder that looks whole.
            gone = folder.rename(self.path / f"{_UNFINISHED}{folder.name}")
            shutil.rmtree(gone)

    def _make_room(self, need: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < need and self.keep > 1:
            # Those that this save would remove anyway; at least one always stays.
            self._retire(self.keep - 1)
            free = shutil.disk_usage(self.path).free
        if free < need:
            raise DiskFullError(f"needs up to {need:,} bytes, free are {free:,}")

    def _explain(self, failure: BaseException | None, step: int, need: int) -> BaseException:
        newest = self.latest()
        kept = f"; the checkpoint of step {newest} is intact" if newest is not None else ""
        if failure is None:
            return RuntimeError(f"another process failed to save step {step}{kept}")
        if isinstance(failure, DiskFullError):
            return DiskFullError(f"cannot save step {step} in {self.path}: {failure}{kept}")
        if host_arrays.is_disk_full(failure):
            free = shutil.disk_usage(self.path).free
            return DiskFullError(
                f"cannot save step {step} in {self.path}: the disk filled up while writing "
                f"up to {need:,} bytes, free are {free:,}{kept} ({failure})"
            )
        return failure


def _seal(draft: Path, step: int, leaves: dict[str, Any]) -> None:
    manifest = {
        "format": _FORMAT,
        "step": step,
        "processes": jax.process_count(),
        "leaves": {name: pytree_io.describe(leaf) for name, leaf in leaves.items()},
        "files": host_arrays.sync_tree(draft),
    }
    host_arrays.write_text(draft / _MANIFEST, json.dumps(manifest, indent=1))
    host_arrays.sync(draft)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole checkpoint, or None where something is missing or cut short."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            return None
        for name, size in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def _compare(
    folder: Path, saved: dict[str, pytree_io.Leaf], like: dict[str, Any], partial: bool
) -> None:
    lines = []
    for name, leaf in like.items():
        given = pytree_io.describe(leaf)
        if name not in saved:
            lines.append(f"{name}: not in the checkpoint")
        elif given[:2] != saved[name][:2]:
            lines.append(f"{name}: saved {saved[name]}, expected {given}")
    if not partial:
        lines += [f"{name}: in the checkpoint only" for name in saved if name not in like]
    if lines:
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ValueError(f"{folder} holds another tree: {'; '.join(lines[:8])}{more}")
