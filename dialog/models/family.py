"""What a family of checkpoints tells: configuration, model, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from dialog.config import GenerationConfig


class Tensor(NamedTuple):
    """Where a checkpoint's tensor is among the parameters.

    Attributes:
      path: in the tree of parameters, parts joined by "/", such as `encoder/layers_0/fc1/kernel`.
      shape: in the checkpoint.
      transpose: whether the parameter is the transposed matrix, as a Linen kernel is.
      needed: whether a checkpoint must have it; else zeros stand for it.
    """

    path: str
    shape: tuple[int, ...]
    transpose: bool = False
    needed: bool = True


class Family(NamedTuple):
    """A family of checkpoints in Hugging Face's format.

    Attributes:
      name: `model_type` in config.json.
      config: config.json to our configuration.
      to_json: our configuration to config.json, as transformers reads it.
      model: makes the module; a keyword `dtype` sets what it computes in.
      tensors: name in the checkpoint to `Tensor`, of a configuration; each parameter once.
      ignored: prefixes or whole names of tensors that checkpoints have and the model needs not,
        such as copies of tied weights.
      generation: generation_config.json and config.json to our options.
    """

    name: str
    config: Callable[[Mapping[str, Any]], Any]
    to_json: Callable[[Any], dict[str, Any]]
    model: Callable[..., nn.Module]
    tensors: Callable[[Any], Mapping[str, Tensor]]
    ignored: tuple[str, ...]
    generation: Callable[[Mapping[str, Any], Mapping[str, Any]], GenerationConfig]
