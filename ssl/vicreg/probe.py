"""What a run's features are worth: linear and nearest-neighbour probes, few-label fine-tuning."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fourfold.runtime import mesh as meshes
from fourfold.runtime.host_arrays import replacing, write_array
from vicreg import classify, data, heads, knn
from vicreg.classify import History, Recipe
from vicreg.config import ProbeConfig
from vicreg.load import Loaded, load
from vicreg.train import open_images

KS = (20, 200)
_knn = jax.jit(knn.accuracy, static_argnames=("num_classes", "ks"))
# Fraction of the labels, learning rates of backbone and head.
_SEMI = {"semi1": (0.01, 0.03, 0.08), "semi10": (0.1, 0.01, 0.1)}


def probe(
    path: str | Path, config: ProbeConfig, step: int | None = None, *, quiet: bool = False
) -> dict[str, Any]:
    """Scores a checkpoint; what was finished before is read, what was killed goes on.

    Args:
      path: the run's folder; the scores go to `probe/` in it.
      config: what to score, and how.
      step: which checkpoint, in updates; None for the newest; 0 for the untrained network.
      quiet: no progress on the terminal.

    Returns:
      JSON data: `run`, `checkpoint`, and per task its scores, fractions. `linear`, `semi1` and
      `semi10` have `last` and `best`, each with `top1`, `top5` and `epoch`; `best` is what the
      authors report, and is chosen by the test split. `knn` has an accuracy per number of
      neighbours.

    Raises:
      FileNotFoundError, ValueError: as `load.load` and `data.open_source`.
    """
    loaded = load(path, step)
    train, test = (open_images(loaded.config, split, quiet=quiet) for split in ("train", "test"))
    folder = Path(path) / "probe"
    report: dict[str, Any] = {"run": str(path), "checkpoint": loaded.step}
    needs_features = "knn" in config.tasks or ("linear" in config.tasks and not config.augment)
    splits: list[heads.Split] = []
    if needs_features:
        splits = [
            classify.features(loaded, s, config.batch_size, quiet=quiet) for s in (train, test)
        ]
    for task in config.tasks:
        if task == "knn":
            report["knn"] = nearest(*splits, num_classes=train.num_classes)
        elif task == "linear" and not config.augment:
            history = list(heads.fit(*splits, num_classes=train.num_classes, **_linear(config)))
            report["linear"] = summary(history)
        else:
            recipe = Recipe(lr_backbone=0.0, **_linear(config))
            learn_from = train
            if task != "linear":
                fraction, lr_backbone, lr = _SEMI[task]
                recipe = Recipe(
                    config.semi_epochs, config.batch_size, lr, lr_backbone, 0.0, config.seed
                )
                chosen = data.stratified_subset(data.labels(train), fraction, config.seed)
                learn_from = data.subset(train, chosen)
            where = folder / _name(task, loaded, recipe)
            history = classify.fit(loaded, learn_from, test, recipe, where, quiet=quiet)
            report[task] = summary(history) | {"images": len(learn_from)}
    if meshes.is_lead():
        folder.mkdir(exist_ok=True)
        text = json.dumps({**report, "config": dataclasses.asdict(config)}, indent=2)
        (folder / f"step_{loaded.step:012d}.json").write_text(text + "\n")
    return report


def nearest(
    train: heads.Split, test: heads.Split, *, num_classes: int, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Scores of weighted nearest neighbours for each k that the training images allow."""
    ks = [k for k in ks if k <= len(train.labels)] or [len(train.labels)]
    found = _knn(*train, *test, num_classes=num_classes, ks=tuple(ks))
    return {str(k): round(float(top1), 6) for k, top1 in found.items()}


def summary(history: History) -> dict[str, Any]:
    """The last epoch's scores and the best one's."""
    best = max(history, key=lambda row: row["top1"])
    return {"last": history[-1], "best": best}


def embed(
    path: str | Path,
    out: Path,
    split: str = "test",
    step: int | None = None,
    *,
    quiet: bool = False,
) -> tuple[Path, Path]:
    """Writes a split's features and labels as `.npy` files.

    Args:
      path: the run's folder.
      out: file of the features, float32 `(N, F)`; the labels, int32 `(N,)`, go beside it.
      split: "train" or "test".
      step: as in `probe`.
      quiet: no progress on the terminal.

    Returns:
      The two files.

    Raises:
      ValueError: `out` isn't a `.npy` file; or as `probe`.
    """
    if out.suffix != ".npy":
        raise ValueError(f"out must end in .npy, found {out}")
    loaded = load(path, step)
    source = open_images(loaded.config, split, quiet=quiet)
    found = classify.features(loaded, source, loaded.config.batch_size, quiet=quiet)
    labels = out.with_name(f"{out.stem}_labels.npy")
    if meshes.is_lead():
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, array in ((out, found.features), (labels, found.labels)):
            with replacing(path) as draft:
                write_array(draft, np.asarray(array))
    return out, labels


def _linear(config: ProbeConfig) -> dict[str, Any]:
    names = ("epochs", "batch_size", "lr", "weight_decay", "seed")
    return {name: getattr(config, name) for name in names}


def _name(task: str, loaded: Loaded, recipe: Recipe) -> str:
    text = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    return f"{task}-{loaded.step}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
