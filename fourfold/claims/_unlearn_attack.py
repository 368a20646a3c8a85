"""Requests that depend on what was published, against ensembles with and without noise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fourfold.claims import _unlearn_ensemble as ensembles
from fourfold.claims._unlearn_ensemble import Plan, Problem
from unlearn import adaptive, models, privacy
from unlearn.config import ModelConfig
from unlearn.losses import cross_entropy
from unlearn.sisa import aggregate

_CLIP, _LR, _DELTA = 1.0, 4.0, 1e-5  # of the private training
# Networks' probabilities `(S, N, C)` for the records learnt from and for the test set.
_Published = tuple[np.ndarray, np.ndarray]
_Train = Callable[[np.ndarray], _Published]


def attack(plan: Plan, problem: Problem, report: Callable[[float], None]) -> dict[str, np.ndarray]:
    """Repeats the confidence attack of Gupta et al. and random requests of as many records.

    Returns:
      `attacked` and `others`, `(2 + noises, T)`: accuracies on the test set after the deletion, of
      SISA under the attack, SISA under random requests, and under the attack private networks with
      each noise; `accuracy` of the ensembles before it and `share` of the records that were
      deleted, likewise; `epsilon (noises,)` of what was published, with δ = 1e-5, and `vacuous
      (noises,)`, whether that guarantees nothing.
    """
    rows: list[list[tuple[float, ...]]] = [[] for _ in range(2 + len(plan.noise))]
    for trial in range(plan.trials):
        rows[0].append(one_trial(problem, sisa(plan, problem, trial), True, trial))
        rows[1].append(one_trial(problem, sisa(plan, problem, trial), False, trial))
        for row, noise in zip(rows[2:], plan.noise, strict=True):
            row.append(one_trial(problem, private(plan, problem, trial, noise), True, trial))
        report((trial + 1) / plan.trials)
    names = ("attacked", "others", "accuracy", "share")
    result = dict(zip(names, np.array(rows).transpose(2, 0, 1), strict=True))
    published = [privacy.Training(n, plan.updates, 1, "own_batch", times=2) for n in plan.noise]
    epsilon = [privacy.total_epsilon([training], _DELTA) for training in published]
    promises = [privacy.guarantee(e, _DELTA, len(problem.train.y)) for e in epsilon]
    vacuous = [promise.vacuous for promise in promises]
    return result | {"epsilon": np.array(epsilon), "vacuous": np.array(vacuous)}


def one_trial(problem: Problem, train: _Train, chosen: bool, seed: int) -> tuple[float, ...]:
    """Trains, asks for a deletion, has it served, and compares.

    Args:
      problem: the data.
      train: trains on records `alive`, bool `(N,)`.
      chosen: whether the requests depend on what was published; else they are as many at random.
      seed: of the random requests.

    Returns:
      Test accuracy of the attacked networks and of the others, of the ensemble before, and the
      share of the records that was deleted.
    """
    y, y_test = jnp.asarray(problem.train.y), jnp.asarray(problem.test.y)
    on_train, on_test = train(np.ones(len(y), bool))
    attacked = len(on_train) // 2
    gone = np.asarray(adaptive.choose_targets(jnp.asarray(on_train), y, attacked))
    if not chosen:
        gone = np.random.default_rng(seed).permutation(gone)
    _, after = train(~gone)
    first, second = adaptive.compare_attacked(jnp.asarray(after), y_test, attacked)
    right = np.argmax(aggregate(jnp.asarray(on_test), "mean"), axis=-1) == problem.test.y
    return float(first), float(second), float(right.mean()), float(gone.mean())


def sisa(plan: Plan, problem: Problem, seed: int) -> _Train:
    """SISA, whose second training is the deletion from the first."""
    shards = plan.attack_shards
    ensemble = ensembles.make(plan, problem, shards, 1, seed, width=shards)
    states: ensembles.States = {}

    def train(alive: np.ndarray) -> _Published:
        nonlocal states
        if alive.all():
            now, states = ensemble, ensemble.fit()
        else:
            now, states = ensemble.forget(states, ~alive)
        tables = (problem.train, problem.test)
        on_train, on_test = (now.probabilities(states, table.x) for table in tables)
        return on_train, on_test

    return train


def private(plan: Plan, problem: Problem, seed: int, noise: float) -> _Train:
    """Networks trained by DP-SGD on the whole of their shard, with fresh noise each time."""
    ensemble = ensembles.make(plan, problem, plan.attack_shards, 1, seed)
    shard, size = ensemble.records.places.shard, ensemble.config.capacity
    key = jax.random.key(seed)

    def train(alive: np.ndarray) -> _Published:
        rows = np.full((plan.attack_shards, size), -1, np.int32)
        for number, row in enumerate(rows):
            held = np.flatnonzero(alive & (shard == number))
            row[: len(held)] = held
        tables = (problem.train, problem.test)
        probs = _private(
            jax.random.fold_in(key, int(alive.sum())),
            problem.train.x.reshape(len(alive), -1),
            problem.train.y,
            rows,
            *(table.x.reshape(len(table.x), -1) for table in tables),
            noise=noise,
            hidden=plan.hidden,
            classes=problem.classes,
            updates=plan.updates,
        )
        on_train, on_test = jax.device_get(probs)
        return on_train, on_test

    return train


@functools.partial(jax.jit, static_argnames=("noise", "hidden", "classes", "updates"))
def _private(
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    rows: jax.Array,
    *scored: jax.Array,
    noise: float,
    hidden: int,
    classes: int,
    updates: int,
) -> tuple[jax.Array, ...]:
    """Trains a network for each row of `rows` and returns its probabilities of what is scored."""
    model = models.make_model(ModelConfig((hidden,)), classes)

    def logits(params: Any, records: jax.Array) -> Any:
        return model.apply({"params": params}, records)

    def loss(params: Any, record: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(logits(params, record[None])[0], label)

    def shard(of: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
        key, rows = of
        init_key, noise_key = jax.random.split(key)
        params = model.init(init_key, x[:1])["params"]
        records, labels, there = x[rows], y[rows], rows >= 0

        def update(t: Any, params: Any) -> Any:
            step_key = jax.random.fold_in(noise_key, t)
            gradient = privacy.noisy_gradient(
                loss, params, records, labels, there, step_key, _CLIP, noise
            )
            return jax.tree.map(lambda p, g: p - _LR * g, params, gradient)

        params = lax.fori_loop(0, updates, update, params)
        return [jax.nn.softmax(logits(params, each)) for each in scored]

    # One after the other: the gradients of one shard's records fill a lot of memory.
    return tuple(lax.map(shard, (jax.random.split(key, len(rows)), rows)))
