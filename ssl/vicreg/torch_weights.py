"""Backbones' weights in and out of PyTorch's state dicts, under torchvision's names and layouts.

Only NumPy arrays cross this border: `{k: v.numpy() for k, v in module.state_dict().items()}` on the
one side, `module.load_state_dict({k: torch.from_numpy(v) for k, v in ...})` on the other. The
authors' published ResNet-50 and the backbones of solo-learn have these names; lightly's numbered
ones, of an `nn.Sequential`, must be renamed first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vicreg import models
from vicreg.config import ModelConfig

_FIRST = "conv1.weight"
_PREFIXED_FIRST = re.compile(r"((?:(?:module|model|backbone|encoder)\.)*)" + re.escape(_FIRST))
_IGNORED = re.compile(r"fc\..*|.*\.num_batches_tracked")
# What a path's last part is called in PyTorch.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_SHOWN = 5  # names of each kind in an error


def from_torch(state_dict: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns the variables of `models.make_backbone(config)` that hold a state dict's weights.

    Args:
      state_dict: arrays by name. A prefix of `module.`, `model.`, `backbone.` and `encoder.`, in
        any combination, is taken off; what doesn't share it (a projector) is left out, as are the
        classifier `fc` and BatchNorm's `num_batches_tracked`.
      config: the architecture, which must be the state dict's; the number of input channels is the
        state dict's.

    Returns:
      `{"params": ..., "batch_stats": ...}`, float32 NumPy arrays.

    Raises:
      ValueError: weights of another architecture, listing what is missing, unexpected or of another
        shape; or of two backbones.
    """
    state = _without_prefix(state_dict)
    channels = np.shape(state[_FIRST])[1:2] if _FIRST in state else ()
    expected = _expected(config, *channels)
    names = {_torch_name(path): path for path in expected}
    shapes = {name: _torch_shape(expected[path]) for name, path in names.items()}
    _check(shapes, {name: np.shape(array) for name, array in state.items()}, config)
    flat = {path: _from_torch_layout(np.asarray(state[name])) for name, path in names.items()}
    return flax.traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns a backbone's weights under torchvision's names; the inverse of `from_torch`.

    Args:
      variables: `params` and `batch_stats` of `models.make_backbone(config)`.
      config: the architecture.

    Returns:
      float32 arrays by name, without `fc` and `num_batches_tracked`: load them with `strict=False`.

    Raises:
      ValueError: variables of another architecture.
    """
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(dict(variables))
    first = flat.get(("params", "conv1", "kernel"))
    channels = np.shape(first)[2:3] if first is not None else ()
    expected = _expected(config, *channels)
    shapes = {".".join(path): shape for path, shape in expected.items()}
    _check(shapes, {".".join(path): np.shape(array) for path, array in flat.items()}, config)
    return {_torch_name(path): _to_torch_layout(np.asarray(flat[path])) for path in expected}


def _without_prefix(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    found = filter(None, map(_PREFIXED_FIRST.fullmatch, state_dict))
    prefixes = sorted(match.group(1) for match in found)
    if len(prefixes) > 1:
        raise ValueError(f"the state dict holds several backbones, under {prefixes}; pass one")
    prefix = prefixes[0] if prefixes else ""
    stripped = {
        name.removeprefix(prefix): array
        for name, array in state_dict.items()
        if name.startswith(prefix)
    }
    return {name: array for name, array in stripped.items() if not _IGNORED.fullmatch(name)}


def _expected(config: ModelConfig, channels: int = 3) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path in the variables → shape."""
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    backbone = models.make_backbone(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda key, x: backbone.init(key, x, train=False), key, images)
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(dict(variables))
    return {path: leaf.shape for path, leaf in flat.items()}


def _torch_name(path: tuple[str, ...]) -> str:
    """`("params", "layer1_0", "downsample_0", "kernel")` → `layer1.0.downsample.0.weight`."""
    _, *modules, leaf = path
    return ".".join([*(name.replace("_", ".") for name in modules), _LEAVES[leaf]])


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    """OIHW → HWIO."""
    array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return np.array(array, np.float32, order="C")


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    """HWIO → OIHW."""
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    return np.array(array, np.float32, order="C")


def _check(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
) -> None:
    shapes = [
        f"{name} (expected {shape}, found {found[name]})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    told = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
        for kind, names in problems.items()
        if names
    ]
    if told:
        what = f"{config.backbone} of width {config.width} with the {config.stem} stem"
        raise ValueError(f"these weights are not of a {what}: {'; '.join(told)}")
