"""A classifier on a backbone, trained from images: the backbone frozen, or fine-tuned with it.

The authors' evaluation: SGD with momentum, random crops and flips, a cosine from epoch to epoch,
the test split scored after each. It keeps a folder, and goes on in it after a kill.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from fourfold.runtime import mesh as meshes
from fourfold.runtime.checkpoint import Checkpoints
from fourfold.runtime.hardware import cpu_options
from fourfold.runtime.host_arrays import replacing, write_text
from fourfold.runtime.progress import Progress
from fourfold.runtime.run_dir import RunDir
from vicreg import augment, data, heads, models
from vicreg.config import AugmentConfig, ModelConfig, ViewConfig
from vicreg.data import Source
from vicreg.load import Loaded

History = list[dict[str, float]]
_RESULT = "history.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
      epochs: passes over the training images.
      batch_size: images per update, over all devices.
      lr: of the head.
      lr_backbone: of the backbone; 0 freezes it, in evaluation mode.
      weight_decay: of whatever learns.
      seed: of everything.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_backbone: float
    weight_decay: float
    seed: int


def crops(view: ViewConfig) -> ViewConfig:
    """Returns the crop and flip of a view, and nothing else of it."""
    return dataclasses.replace(view, jitter=0.0, gray=0.0, blur=0.0, solarize=0.0)


def fit(
    loaded: Loaded,
    train: Source,
    test: Source,
    recipe: Recipe,
    folder: Path,
    *,
    quiet: bool = False,
) -> History:
    """Trains a classifier, or goes on with it, or returns what it came to.

    Args:
      loaded: the backbone.
      train: images to learn from; a batch of them all where they are fewer than a batch.
      test: images to score on.
      recipe: how.
      folder: of this very classifier; it is made.
      quiet: no progress on the terminal.

    Returns:
      Per epoch `epoch` (from 1), `loss` (its last batch's), and `top1` and `top5` on `test`.

    Raises:
      ValueError: `folder` is of another recipe, or a batch isn't divisible by the devices.
    """
    if (folder / _RESULT).exists():
        return json.loads((folder / _RESULT).read_text())
    mesh = _mesh_for(min(recipe.batch_size, len(train)))
    batch_size = min(recipe.batch_size, len(train) // mesh.size * mesh.size)
    steps = len(train) // batch_size
    functions = _Functions(loaded, recipe, steps, train.num_classes, mesh)
    opened = (folder / "config.json").exists()
    run = RunDir.open(folder, recipe) if opened else RunDir.create(folder, recipe)
    checkpoints = Checkpoints(run.checkpoints, keep=1)
    state, history, start = functions.state, [], checkpoints.latest() or 0
    batches = data.batches(
        train,
        batch_size,
        seed=recipe.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if start:
        state, extra = checkpoints.restore(start, state)
        history = extra["history"]
        batches.set_state(extra["batches"])
    total = recipe.epochs * steps
    quiet = quiet or not meshes.is_lead()
    bar = Progress(total, "steps", start=start, quiet=quiet)
    try:
        for at in range(start, total):
            state, loss = functions.update(state, meshes.global_batch(mesh, next(batches)), at)
            if (at + 1) % steps == 0:
                top1, top5 = functions.score(state, test, batch_size)
                epoch = (at + 1) // steps
                history.append({"epoch": epoch, "loss": float(loss), "top1": top1, "top5": top5})
                checkpoints.save(
                    at + 1, state, {"history": history, "batches": batches.get_state()}
                )
                bar.update(at + 1, {"epoch": epoch, "test/top1": top1, "loss": float(loss)})
    finally:
        bar.close()
    if meshes.is_lead():
        with replacing(folder / _RESULT) as draft:
            write_text(draft, json.dumps(history))
    return history


def _mesh_for(batch_size: int) -> jax.sharding.Mesh:
    """A mesh over as many devices as divide a batch, the same number from each process."""
    processes = jax.process_count()
    count = max(
        n for n in range(1, jax.device_count() + 1) if batch_size >= n and n % processes == 0
    )
    return meshes.make_mesh(count)


class _Functions:
    """The compiled step and scores of one classifier, and its state at the beginning."""

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        steps: int,
        num_classes: int,
        mesh: jax.sharding.Mesh,
    ) -> None:
        config: AugmentConfig = loaded.config.augment
        backbone: Any = models.make_backbone(loaded.config.model)
        frozen = recipe.lr_backbone == 0
        whole = meshes.replicated(mesh)
        options: Any = {"out_shardings": whole, "compiler_options": cpu_options()}
        key_head, key_crops = jax.random.split(jax.random.key(recipe.seed))

        def rate(lr: float) -> optax.GradientTransformation:
            schedule = heads.epoch_cosine(lr, recipe.epochs, steps)
            return heads.sgd(recipe.weight_decay, schedule)

        optimizer = optax.multi_transform(
            {"head": rate(recipe.lr), "backbone": rate(recipe.lr_backbone)},
            {"head": "head", "backbone": "backbone"} if not frozen else {"head": "head"},
        )

        def init(variables: dict) -> dict[str, Any]:
            features = models.feature_dim(loaded.config.model)
            params = {"head": heads.init(key_head, features, num_classes)}
            if not frozen:
                params["backbone"] = variables["params"]
            opt_state = optimizer.init(params)
            return {"params": params, "variables": variables, "opt_state": opt_state}

        def forward(params: dict, variables: dict, images: jax.Array):
            if frozen:
                features = backbone.apply(variables, images, train=False)
                return heads.logits(params["head"], features), variables["batch_stats"]
            variables = {**variables, "params": params["backbone"]}
            features, changed = backbone.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            return heads.logits(params["head"], features), changed["batch_stats"]

        def update(state: dict[str, Any], batch: dict[str, jax.Array], at: jax.Array):
            key = jax.random.fold_in(key_crops, at)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
            images = jax.vmap(
                lambda key, image, size: augment.normalize(
                    augment.view(key, image, size, crops(config.a), config.size, "bilinear"),
                    config.mean,
                    config.std,
                )
            )(keys, batch["image"], batch["size"])

            def objective(params: dict):
                scores, batch_stats = forward(params, state["variables"], images)
                loss = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])
                return loss.mean(), batch_stats

            (loss, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(
                state["params"]
            )
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            return {
                "params": optax.apply_updates(state["params"], updates),
                "variables": {**state["variables"], "batch_stats": batch_stats},
                "opt_state": opt_state,
            }, loss

        def score(state: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
            images = augment.for_evaluation(batch["image"], batch["size"], config)
            variables = state["variables"]
            if not frozen:
                variables = {**variables, "params": state["params"]["backbone"]}
            features = backbone.apply(variables, images, train=False)
            scores = heads.logits(state["params"]["head"], features)  # pyright: ignore[reportArgumentType]
            return heads.hits(scores, batch["label"], batch["mask"])

        self.mesh = mesh
        self.state = jax.jit(init, out_shardings=whole)(loaded.variables)
        self._update = jax.jit(update, donate_argnums=0, **options)
        self._score = jax.jit(score, **options)

    def update(self, state: Any, batch: Any, at: int) -> tuple[Any, jax.Array]:
        return self._update(state, batch, np.uint32(at))

    def score(self, state: Any, source: Source, batch_size: int) -> tuple[float, float]:
        count, index = jax.process_count(), jax.process_index()
        found = [
            self._score(state, meshes.global_batch(self.mesh, batch))
            for batch in data.ordered(source, batch_size, index, count)
        ]
        hits = np.sum(np.float64(jax.device_get(found)), axis=0)
        return float(hits[0]) / len(source), float(hits[1]) / len(source)


def features(
    loaded: Loaded, source: Source, batch_size: int, *, quiet: bool = False
) -> heads.Split:
    """Runs the frozen backbone over all images of a source, in evaluation mode.

    Args:
      loaded: the backbone.
      source: the images.
      batch_size: images at a time, over all devices.
      quiet: no progress on the terminal.

    Returns:
      Features `(N, F)` float32 and labels `(N,)` int32, on every process.

    Raises:
      ValueError: the batch isn't divisible by the devices.
    """
    mesh = meshes.make_mesh()
    batch_size = -(-min(batch_size, len(source)) // mesh.size) * mesh.size
    apply = _feature_function(loaded.config.model, loaded.config.augment, mesh)
    bar = Progress(len(source), "images", quiet=quiet or not meshes.is_lead())
    found: list[tuple[np.ndarray, np.ndarray]] = []
    try:
        for batch in data.ordered(source, batch_size, jax.process_index(), jax.process_count()):
            batch.pop("mask")
            found.append(jax.device_get(apply(loaded.variables, meshes.global_batch(mesh, batch))))
            bar.update(min(len(found) * batch_size, len(source)), {})
    finally:
        bar.close()
    rows = [np.concatenate(part)[: len(source)] for part in zip(*found, strict=True)]
    return heads.Split(*rows)


# Kept, since the splits and checkpoints of a run share it.
@functools.lru_cache(maxsize=8)
def _feature_function(model: ModelConfig, config: AugmentConfig, mesh: jax.sharding.Mesh):
    backbone = models.make_backbone(model)

    def apply(variables: dict, batch: dict[str, jax.Array]):
        images = augment.for_evaluation(batch["image"], batch["size"], config)
        return backbone.apply(variables, images, train=False), batch["label"]

    return jax.jit(apply, out_shardings=meshes.replicated(mesh), compiler_options=cpu_options())
