"""A folder of tensors in Hugging Face's layout, read by name and written whole or not at all."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fourfold.runtime.host_arrays import sync, write_text

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DRAFT = ".saving"
# safetensors' names of what a parameter may be stored as.
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written; the message says which, why and what to do."""


class Found(NamedTuple):
    """A tensor's shape, and its type by NumPy's name; or, for other types, as the file says."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(NamedTuple):
    """An opened checkpoint, of which nothing but the headers has been read.

    Attributes:
      config: config.json.
      generation: generation_config.json; empty where there is none.
      tensors: what is in it, by name.
      read: names to pairs of name and array, one at a time and in any order.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tensors: Mapping[str, Found]
    read: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]


def open_folder(folder: Path) -> Checkpoint:
    """Opens config.json with model.safetensors, or with the shards that an index names.

    Raises:
      CheckpointError: a file is missing, truncated, no JSON, or pickle.
    """
    config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    tensors: dict[str, Found] = {}
    shard_of: dict[str, Path] = {}
    for shard in _shards(folder):
        with _safe_open(shard) as file:
            for name in file.keys():
                header = file.get_slice(name)
                dtype = str(header.get_dtype())
                tensors[name] = Found(tuple(header.get_shape()), _FLOATS.get(dtype, dtype))
                shard_of[name] = shard

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            by_shard.setdefault(shard_of[name], []).append(name)
        for shard, wanted in by_shard.items():
            with _safe_open(shard) as file:
                for name in wanted:
                    yield name, file.get_tensor(name)

    return Checkpoint(config, _read_json(generation) if generation.exists() else {}, tensors, read)


def write_folder(
    folder: Path,
    texts: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Found],
    make: Callable[[str], np.ndarray],
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    """Writes JSON files and tensors, in shards where they take more than `max_shard_bytes`.

    All is written to a draft inside the folder and moved into place, config.json last (an old one
    goes first), so that a folder whose writing was cut off has none and is not taken for a model.

    Args:
      folder: made where it doesn't exist.
      texts: file names to what goes into them; config.json among them.
      tensors: what will be written, in this order.
      make: a name to its array, contiguous; one shard's are held at a time.
      max_shard_bytes: of a file's tensors; one that is larger has a file of its own.
      overwrite: whether a model there may be replaced; files that are no part of one are left.

    Raises:
      CheckpointError: the folder is a file, or is not empty and `overwrite` is false.
    """
    safetensors = import_extra("safetensors.numpy")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a model is saved into a folder")
    if folder.exists() and not overwrite and any(p.name != _DRAFT for p in folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; overwrite=True replaces the model in it")
    draft = folder / _DRAFT
    shutil.rmtree(draft, ignore_errors=True)  # of a save that was killed
    draft.mkdir(parents=True)
    try:
        shards = _plan(tensors, max_shard_bytes)
        files = {}
        for i, names in enumerate(shards, 1):
            file = _WEIGHTS
            if len(shards) > 1:
                file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            files |= dict.fromkeys(names, file)
            arrays = {name: make(name) for name in names}
            safetensors.save_file(arrays, draft / file, metadata={"format": "pt"})
            sync(draft / file)
        if len(shards) > 1:
            total = sum(map(_nbytes, tensors.values()))
            index = {"metadata": {"total_size": total}, "weight_map": files}
            texts = {**texts, _INDEX: index}
        for name, text in texts.items():
            write_text(draft / name, json.dumps(text, indent=2, sort_keys=True) + "\n")
        for name in ("config.json", "generation_config.json", _INDEX, _WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        for old in folder.glob("model-*-of-*.safetensors"):
            old.unlink()
        for new in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):
            new.rename(folder / new.name)
    finally:
        shutil.rmtree(draft)
    sync(folder)


def match_names(
    found: Iterable[str], wanted: Iterable[str], ignored: tuple[str, ...]
) -> tuple[dict[str, str], list[str]]:
    """Names in the checkpoint to the model's, and those in it that are left over.

    Equal names go together. Of the others, a prefix of whole parts is dropped, or one is added:
    the same for all, the one by which most of them become names that the model lacks.
    """
    found, wanted = dict.fromkeys(found), dict.fromkeys(wanted)
    pairs = {name: name for name in found if name in wanted}
    rest = dict.fromkeys(name for name in found if name not in pairs)
    lacking = dict.fromkeys(name for name in wanted if name not in pairs)
    votes = Counter((head, "") for name in rest for head, tail in _cuts(name) if tail in lacking)
    votes += Counter(("", head) for name in lacking for head, tail in _cuts(name) if tail in rest)
    dropped, added = max(votes, key=votes.__getitem__, default=("", ""))
    extra = []
    for name in rest:
        renamed = added + name.removeprefix(dropped)
        if renamed in lacking:
            pairs[name] = renamed
            del lacking[renamed]
        elif not (name.startswith(ignored) or renamed.startswith(ignored)):
            extra.append(name)
    return pairs, extra


def listed(names: list[str]) -> str:
    """The first ten, and how many more there are."""
    more = f" and {len(names) - 10} others" if len(names) > 10 else ""
    return "; ".join(names[:10]) + more


def import_extra(name: str) -> Any:
    """Imports a package that the extra `dialog` brings."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"checkpoints need {name}: pip install 'fourfold[dialog]'") from error


def _plan(tensors: Mapping[str, Found], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, found in tensors.items():
        if shards[-1] and size + _nbytes(found) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(found)
    return shards


def _nbytes(found: Found) -> int:
    return math.prod(found.shape) * np.dtype(found.dtype).itemsize


def _shards(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        raise CheckpointError(
            f"{folder} has no {_WEIGHTS}. A pytorch_model.bin is not read, for it is pickle: "
            f"loading it runs whatever code its author put there. Convert it once, where you trust "
            f"it: with torch, from_pretrained and save_pretrained of transformers' class that "
            f"config.json names under architectures. On the hub, many repositories have the "
            f"safetensors in a pull request: revision='refs/pr/N'"
        )
    names = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{folder / _INDEX} has no weight_map of tensors to files")
    names = sorted(set(names.values()))
    # A file elsewhere is no shard of this model, whatever the index says.
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {_INDEX} names: "
            f"{', '.join(missing[:10])}"
        )
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object, found {type(value).__name__}")
    return value


def _safe_open(path: Path) -> Any:
    safetensors = import_extra("safetensors")
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """`a.b.c` in two, at each point: `a.` and `b.c`, `a.b.` and `c`."""
    for i, letter in enumerate(name):
        if letter == ".":
            yield name[: i + 1], name[i + 1 :]
