"""Networks read back from run folders, which may still be in use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from fourfold.runtime.checkpoint import Checkpoints
from fourfold.runtime.config_io import from_json
from fourfold.runtime.run_dir import RunDir
from vicreg import models
from vicreg.config import PretrainConfig


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds of the backbone.

    Attributes:
      config: of the run.
      variables: `params` and `batch_stats` of `models.make_backbone(config.model)`.
      step: updates so far; 0 for a random initialisation.
    """

    config: PretrainConfig
    variables: dict
    step: int


def load(path: str | Path, step: int | None = None) -> Loaded:
    """Reads a run's backbone.

    Args:
      path: the run's folder.
      step: which checkpoint, in updates; None for the newest; 0 for the network as a run of the
        same configuration starts with it, untrained.

    Raises:
      FileNotFoundError: no run or no checkpoint; the message lists what there is.
      ValueError: the checkpoint is of another architecture than the run's configuration.
    """
    run = RunDir.open(path)
    config = from_json(PretrainConfig, run.saved_config())
    backbone = models.make_backbone(config.model)
    size, channels = config.augment.size, len(config.augment.mean)

    def init(key: jax.Array) -> dict:
        return backbone.init(key, jax.numpy.zeros((2, size, size, channels)), train=False)  # pyright: ignore[reportReturnType]

    # As in learner.init, so that step 0 is the very network that the run starts from.
    key = jax.random.split(jax.random.key(config.seed), 3)[0]
    if step == 0:
        return Loaded(config, jax.jit(init)(key), 0)
    checkpoints = Checkpoints(run.checkpoints)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise FileNotFoundError(f"no checkpoint yet in {run.checkpoints}")
    like = jax.eval_shape(init, key)
    wanted = {
        "params": {"backbone": like["params"]},
        "batch_stats": {"backbone": like["batch_stats"]},
    }
    try:
        tree, _ = checkpoints.restore(step, wanted, partial=True)
    except ValueError as error:
        what = f"{config.model.backbone} of width {config.model.width}"
        raise ValueError(f"not a checkpoint of the {what} in config.json: {error}") from error
    return Loaded(config, {name: part["backbone"] for name, part in tree.items()}, step)
