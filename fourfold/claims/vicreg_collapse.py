"""VICReg beside its ablations, two rivals, supervised and untrained features, on real digits."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fourfold.claims import Claim, Progress, arrays, at_scale
from fourfold.claims._vicreg_report import Plan, write
from fourfold.runtime import mesh as meshes
from vicreg import classify, compiled, data, diagnostics, heads, learner, presets, probe, train
from vicreg.compiled import Functions
from vicreg.config import PretrainConfig
from vicreg.data import Source
from vicreg.learner import TrainState
from vicreg.load import Loaded

Result = dict[str, np.ndarray]

# What differs from VICReg: fields of the loss, and widths of the expander.
METHODS: dict[str, dict[str, Any]] = {
    "VICReg": {},
    "no variance": {"variance_weight": 0.0},
    "no covariance": {"covariance_weight": 0.0},
    "no invariance": {"invariance_weight": 0.0},
    "SimCLR": {"name": "simclr", "expander": (256, 128)},
    "Barlow Twins": {"name": "barlow_twins"},
    "supervised": {"name": "supervised"},
    "random": {},  # not trained
}
SCALES = {
    "laptop": Plan("digits-laptop", "digits", seeds=3, epochs=12, size=20),
    "gpu": Plan("cifar10-r18-1000ep", "cifar10", seeds=3, epochs=200, size=32),
    "paper": Plan("imagenet-r50-100ep", "imagenet2012", seeds=1, epochs=100, size=224),
}


def run(scale: str, out: Path, progress: Progress) -> Claim:
    """Trains every method with every seed, scores the features, and compares.

    A method that was finished is kept in `out` and not run again.

    Args:
      scale: one of `SCALES`.
      out: folder of the results.
      progress: called now and then.

    Raises:
      ValueError: the scale is unknown.
    """
    return run_plan(at_scale(SCALES, scale), METHODS, scale, out, progress)


def run_plan(
    plan: Plan, methods: Mapping[str, dict[str, Any]], scale: str, out: Path, progress: Progress
) -> Claim:
    """Does what `run` does, for any plan and methods; the first method is VICReg."""
    configs = {name: config_of(plan, changes) for name, changes in methods.items()}
    first = next(iter(configs.values()))
    sources: dict[str, Source] = {}
    found: dict[str, Result] = {}
    for number, (name, config) in enumerate(configs.items()):
        path = out / f"{name.replace(' ', '-')}.npz"
        settings = json.dumps([name, dataclasses.asdict(config), plan.seeds], sort_keys=True)
        result = arrays.load(path, settings)
        if result is None:
            if not sources:
                sources = {s: train.open_images(first, s, quiet=True) for s in ("train", "test")}
            label = f"{name}: compiling"
            progress(number / len(configs), label)

            def report(share: float, name: str = name, number: int = number) -> None:
                progress((number + share) / len(configs), name)

            trained = name != "random"
            result = train_and_measure(config, plan.seeds, sources, trained, report)
            arrays.save(path, settings, result)
        found[name] = result
    return write(found, plan, scale)


def config_of(plan: Plan, changes: Mapping[str, Any]) -> PretrainConfig:
    """Returns the configuration of a method: the plan's preset but for what the method changes."""
    config = presets.get(plan.preset).config
    changes = dict(changes)
    expander = changes.pop("expander", config.model.expander)
    return dataclasses.replace(
        config,
        epochs=plan.epochs,
        augment=dataclasses.replace(config.augment, size=plan.size),
        model=dataclasses.replace(config.model, expander=expander),
        loss=dataclasses.replace(config.loss, **changes),
    )


def train_and_measure(
    config: PretrainConfig,
    seeds: int,
    sources: Mapping[str, Source],
    trained: bool,
    report: Callable[[float], None],
) -> Result:
    """Trains one method with several seeds and scores its features.

    Returns:
      `steps (K,)`, `std (S, K)` and `rankme (S, K)` of the embeddings over the steps,
      `spectrum (S, F)`, singular values of the centred test features as fractions of the largest,
      `linear (S,)` and `knn (S,)`, fractions right, and `seconds ()`.
    """
    began = time.monotonic()
    steps_per_epoch = len(sources["train"]) // config.batch_size
    parts = learner.make(config, steps_per_epoch, sources["train"].num_classes)
    functions = compiled.compile_functions(config, parts, meshes.make_mesh())
    total = config.epochs * steps_per_epoch if trained else 0
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):

        def advance(share: float, seed: int = seed) -> None:
            report((seed + share) / seeds)

        state, curve = pretrain(config, functions, sources["train"], seed, total, advance)
        rows.append({**curve, **score(config, state, sources, seed)})
    result = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    result["steps"] = result["steps"][0]
    return result | {"seconds": np.array(time.monotonic() - began)}


def pretrain(
    config: PretrainConfig,
    functions: Functions,
    source: Source,
    seed: int,
    total: int,
    report: Callable[[float], None],
) -> tuple[TrainState, Result]:
    """Trains with one seed; returns the state and the curves."""
    state = functions.init(jax.random.key(seed))
    batches = data.batches(source, config.batch_size, seed=seed)
    steps, lines = [], []
    for step in range(1, total + 1):
        state, metrics, images = functions.advance(state, next(batches))
        if step % config.log_every == 0:
            seen = functions.diagnose(state, images)
            steps.append(step)
            lines.append(jax.device_get((metrics["std"], seen["rankme"])))
            report(step / total)
    std, rank = np.array(lines, np.float32).reshape(-1, 2).T
    return state, {"steps": np.array(steps, np.int32), "std": std, "rankme": rank}


def score(
    config: PretrainConfig, state: TrainState, sources: Mapping[str, Source], seed: int
) -> dict[str, Any]:
    """Scores the features of both splits: linear, 20 nearest neighbours, and their spectrum."""
    variables = {"params": state.params["backbone"], "batch_stats": state.batch_stats["backbone"]}
    loaded = Loaded(config, variables, int(state.step))
    fit_on, test = (
        classify.features(loaded, sources[split], config.batch_size, quiet=True)
        for split in ("train", "test")
    )
    classes = sources["train"].num_classes
    recipe = config.evaluation
    history = list(
        heads.fit(
            fit_on,
            test,
            num_classes=classes,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            seed=seed,
        )
    )
    centred = np.float64(test.features) - test.features.mean(axis=0)
    spectrum = np.linalg.svd(centred, compute_uv=False)
    return {
        "linear": np.float64(history[-1]["top1"]),
        "knn": np.float64(probe.nearest(fit_on, test, num_classes=classes)["20"]),
        "spectrum": spectrum / max(spectrum[0], 1e-30),
        "rank": np.float64(diagnostics.rankme(test.features)),
    }
