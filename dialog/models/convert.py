"""Checkpoints in Hugging Face's format to parameters, and parameters to such checkpoints.

Use:

    family, config, params, generation, path = load_pretrained("models/blenderbot")
    logits = family.model(config).apply({"params": params}, ...)
    save_pretrained("models/mine", family, config, params, generation)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dialog.config import GenerationConfig
from dialog.models.bart_family import BART, BLENDERBOT, BLENDERBOT_SMALL
from dialog.models.bert_family import BERT, DPR_CONTEXT, dpr_family
from dialog.models.family import Family, Tensor
from dialog.models.gguf_weights import open_gguf
from dialog.models.llama_family import LLAMA
from dialog.models.safetensors_folder import (
    CheckpointError,
    Found,
    import_extra,
    listed,
    match_names,
    open_folder,
    write_folder,
)

_FAMILIES = {f.name: f for f in (BART, BLENDERBOT, BLENDERBOT_SMALL, BERT, DPR_CONTEXT, LLAMA)}
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# What is fetched: nothing that runs code when it is read.
_FETCHED = ["*.json", "*.jinja", "*.txt", "*.model", "model.safetensors", "model-*.safetensors"]


class Pretrained(NamedTuple):
    """A model from a checkpoint.

    Attributes:
      family: makes the module: `family.model(config)`.
      config: of the family's dataclass.
      params: nested dict of NumPy arrays on the host, for the caller to place on devices.
      generation: how the checkpoint says that tokens are chosen.
      path: the folder or file it was read from, which has the tokenizer too.
    """

    family: Family
    config: Any
    params: dict[str, Any]
    generation: GenerationConfig
    path: Path


def load_pretrained(
    path_or_repo: str | Path, *, dtype: Any = jnp.float32, revision: str | None = None
) -> Pretrained:
    """Reads a checkpoint from a folder, a GGUF file or the Hugging Face hub.

    Tensors are read one at a time: the host holds the parameters and a copy or two of the one in
    work. A checkpoint may lack the prefix that the names of its model have (`model.`, `bert.`), or
    have one more: one such prefix, the same for all, is added or dropped where names differ.

    Args:
      path_or_repo: a folder with config.json and model.safetensors (or shards and their index); a
        .gguf file of a Llama-shaped model; or a repository's name, `owner/name`.
      dtype: of all parameters, whatever the checkpoint's.
      revision: of the repository: a branch, a tag, a commit or `refs/pr/N`.

    Raises:
      CheckpointError: it isn't there, can't be fetched, has no config.json, is pickle, truncated or
        of no supported family; tensors are missing, too many or misshapen (all in one message), or
        not finite: one NaN in the weights makes every output NaN, and nothing later says why.
      ValueError: `dtype` is no float type.
      ImportError: safetensors, huggingface_hub or gguf is not installed.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in _FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(_FLOATS)}, found {dtype}")
    path = _local(path_or_repo, revision)
    checkpoint = open_gguf(path) if path.is_file() else open_folder(path)
    try:
        name = checkpoint.config.get("model_type")
        if name not in _FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(_FAMILIES)}; found {name!r}")
        family = dpr_family(checkpoint.config) if name == "dpr" else _FAMILIES[name]
        config = family.config(checkpoint.config)
        generation = family.generation(checkpoint.generation, checkpoint.config)
    except (KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} has a configuration that can't be used: {reason}") from error
    tensors = family.tensors(config)
    names, extra = match_names(checkpoint.tensors, tensors, family.ignored)
    found = {wanted: checkpoint.tensors[name] for name, wanted in names.items()}
    _check(found, tensors, extra, f"{path} is not the {family.name} that its configuration tells")
    params = {
        tensor.path: np.zeros(_parameter_shape(tensor), dtype)
        for wanted, tensor in tensors.items()
        if wanted not in found
    }
    path_of = {name: tensors[wanted].path for name, wanted in names.items()}
    for name, array in checkpoint.read(names):
        params[path_of[name]] = _parameter(array, tensors[names[name]], dtype)
    if bad := [name for name, at in path_of.items() if not np.isfinite(params[at]).all()]:
        raise CheckpointError(f"{path} has numbers that aren't finite as {dtype}: {listed(bad)}")
    return Pretrained(family, config, unflatten_dict(params, sep="/"), generation, path)


def save_pretrained(
    folder: str | Path,
    family: Family,
    config: Any,
    params: Mapping[str, Any],
    generation: GenerationConfig | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers and `load_pretrained` read.

    Parameters keep their types; the host holds one shard at a time. Where the writing is cut off,
    the folder has no config.json, and nothing takes it for a model.

    Args:
      folder: made where it doesn't exist.
      family: such as `Pretrained.family`.
      config: of the family's dataclass.
      params: the module's, nested; NumPy or JAX arrays, the latter on any devices of this process.
      generation: how tokens are chosen; temperature, top_k and top_p are kept where it samples.
      max_shard_bytes: the most that one file's tensors take.
      overwrite: replace the model in a folder that is not empty; other files stay.

    Raises:
      CheckpointError: the folder is not empty, or parameters are missing, too many, misshapen or
        no floats, all listed in one message; nothing has been written then.
      ValueError: `max_shard_bytes` is below 1.
      ImportError: safetensors is not installed.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, found {max_shard_bytes}")
    leaves: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
    tensors = family.tensors(config)
    wanted = {t.path: Tensor(t.path, _parameter_shape(t)) for t in tensors.values()}
    headers = {path: Found(leaf.shape, leaf.dtype.name) for path, leaf in leaves.items()}
    _check(
        {path: header for path, header in headers.items() if path in wanted},
        wanted,
        [path for path in headers if path not in wanted],
        f"the parameters are not those of {family.name} with {config}",
    )
    found = {name: Found(t.shape, headers[t.path].dtype) for name, t in tensors.items()}

    def make(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = np.asarray(leaves[tensor.path])
        return np.ascontiguousarray(array.T if tensor.transpose else array.reshape(tensor.shape))

    types = {header.dtype for header in headers.values()}
    dtype = types.pop() if len(types) == 1 else "float32"
    # transformers 5 reads dtype, and 4 torch_dtype.
    texts = {"config.json": {**family.to_json(config), "dtype": dtype, "torch_dtype": dtype}}
    if generation is not None:
        texts["generation_config.json"] = _generation_json(generation, texts["config.json"])
    write_folder(Path(folder), texts, found, make, max_shard_bytes, overwrite)


def _generation_json(generation: GenerationConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    text = {name: config.get(name) for name in ids} | {
        "max_new_tokens": generation.max_new_tokens,
        "min_new_tokens": generation.min_new_tokens or None,
        "num_beams": generation.num_beams,
        "length_penalty": generation.length_penalty,
        "early_stopping": generation.early_stopping,
        "no_repeat_ngram_size": generation.no_repeat_ngram,
        "encoder_no_repeat_ngram_size": generation.encoder_no_repeat_ngram or None,
        "forced_bos_token_id": generation.forced_bos_id,
        "forced_eos_token_id": generation.forced_eos_id,
        "do_sample": generation.sample,
    }
    if generation.sample:  # a top_k of 0 too: transformers takes 50 where none is said
        text |= {name: getattr(generation, name) for name in ("temperature", "top_k", "top_p")}
    return {name: value for name, value in text.items() if value is not None}


def _local(path_or_repo: str | Path, revision: str | None) -> Path:
    """The folder or GGUF file, fetched first where the name is a repository's."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir() or path.suffix == ".gguf" and path.is_file():
        return path
    name = str(path_or_repo)
    if path.exists() or not _REPOSITORY.fullmatch(name):
        raise CheckpointError(
            f"a checkpoint is a folder, a .gguf file or a repository's name, owner/name; found "
            f"{name}, which is none of them"
        )
    hub = import_extra("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_FETCHED))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no folder here, and fetching it from the hub failed: {str(error)[:200]!r}. "
            f"Without a network, fetch it where there is one (hf download {name} --local-dir "
            f"FOLDER), copy the folder here and give its path"
        ) from error


def _check(
    found: Mapping[str, Found], wanted: Mapping[str, Tensor], extra: list[str], what: str
) -> None:
    """Raises CheckpointError that lists all that is wrong; shapes may differ by axes of size 1."""
    shapes = [(name, header.shape, wanted[name].shape) for name, header in found.items()]
    problems = {
        "missing": [n for n, tensor in wanted.items() if n not in found and tensor.needed],
        "not of the model": extra,
        "misshapen": [
            f"{name} {have}, wanted {want}"
            for name, have, want in shapes
            if [n for n in have if n != 1] != [n for n in want if n != 1]
        ],
        "no floats": [f"{n} {h.dtype}" for n, h in found.items() if h.dtype not in _FLOATS],
    }
    lines = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if lines:
        raise CheckpointError("\n  ".join([f"{what}:", *lines]))


def _parameter_shape(tensor: Tensor) -> tuple[int, ...]:
    """Linen's kernels and embeddings are matrices; every other parameter here is a vector."""
    if tensor.path.endswith(("/kernel", "/embedding")):
        return tensor.shape[::-1] if tensor.transpose else tensor.shape
    return (math.prod(tensor.shape),)


def _parameter(array: np.ndarray, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """The parameter in memory of its own, for `array` may be a file's."""
    array = array.reshape(tensor.shape).T if tensor.transpose else array
    array = array.reshape(_parameter_shape(tensor))
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is reported
        return np.require(array, dtype, ["C", "W", "E"])
