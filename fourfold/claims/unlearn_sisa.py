"""Sharded unlearning: accuracy, cost, equal hashes and the attack; certified removal beside it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fourfold.claims import Claim, Progress, arrays, at_scale
from fourfold.claims import _unlearn_ensemble as ensembles
from fourfold.claims._unlearn_attack import attack
from fourfold.claims._unlearn_ensemble import Plan, Problem
from fourfold.claims._unlearn_report import write
from unlearn import certified, convex, partition, planner, solvers
from unlearn.data import Table
from unlearn.sisa import aggregate

Result = dict[str, np.ndarray]
Report = Callable[[float], None]

SCALES = {
    "laptop": Plan("digits", seeds=3),
    "gpu": Plan("mnist", seeds=3, hidden=128, batch_size=64, draws=20, trials=60, removals=1000),
    "paper": Plan("mnist", seeds=5, hidden=128, batch_size=64, trials=200, removals=1000),
}


def run(scale: str, out: Path, progress: Progress) -> Claim:
    """Measures part after part; one that was finished is kept in `out` and not run again.

    Args:
      scale: one of `SCALES`.
      out: folder of the results.
      progress: called now and then.

    Raises:
      ValueError: the scale is unknown.
    """
    return run_plan(at_scale(SCALES, scale), scale, out, progress)


def run_plan(plan: Plan, scale: str, out: Path, progress: Progress) -> Claim:
    """Does what `run` does, for any plan."""
    found: dict[str, Result] = {}
    settings = json.dumps(dataclasses.asdict(plan), sort_keys=True)
    problem: Problem | None = None
    for number, (name, measure) in enumerate(PARTS.items()):
        result = arrays.load(out / f"{name}.npz", settings)
        if result is None:
            problem = problem or ensembles.load(plan)

            def report(share: float, name: str = name, number: int = number) -> None:
                progress((number + share) / len(PARTS), name)

            report(0.0)
            began = time.monotonic()
            result = measure(plan, problem, report)
            result["seconds"] = np.array(time.monotonic() - began)
            arrays.save(out / f"{name}.npz", settings, result)
        found[name] = result
    return write(found, plan, scale)


def accuracy(plan: Plan, problem: Problem, report: Report) -> Result:
    """Trains ensembles and scores them on the test set.

    Returns:
      `vote`, `mean` and `fraction`, `(S, R, seeds)`: of both aggregations, and the mean over the
      networks of one alone, which has learnt from a 1/S fraction of the records.
    """
    shape = (len(plan.shards), len(plan.slices), plan.seeds)
    result = {name: np.zeros(shape) for name in ("vote", "mean", "fraction")}
    for done, (i, j, seed) in enumerate(np.ndindex(shape)):
        ensemble = ensembles.make(plan, problem, plan.shards[i], plan.slices[j], seed)
        probs = ensemble.probabilities(ensemble.fit(), problem.test.x)
        for method in ("vote", "mean"):
            answers = np.argmax(aggregate(jax.numpy.asarray(probs), method), axis=-1)
            result[method][i, j, seed] = np.mean(answers == problem.test.y)
        result["fraction"][i, j, seed] = np.mean(np.argmax(probs, axis=-1) == problem.test.y)
        report((done + 1) / np.prod(shape))
    return result


def cost(plan: Plan, problem: Problem, report: Report) -> Result:
    """Plans deletions of random records, K at once, without training.

    Returns:
      `visits` and `updates`, `(S, R, K, draws)`, each draw with a partition of its own; `expected`
      `(S, R, K)`, visits by `planner.expected_cost`, and their standard deviation `spread` by
      `planner.simulate`; `paper` `(S, K)`, by the paper's formula for
      one slice; `whole` `(K,)` visits and `whole_updates` `(K,)` of one network, trained anew.
    """
    count = len(problem.train.ids)
    shape = (len(plan.shards), len(plan.slices), len(plan.requests))
    result: Result = {name: np.zeros((*shape, plan.draws)) for name in ("visits", "updates")}
    result |= {name: np.zeros(shape) for name in ("expected", "spread")}
    for done, (i, j) in enumerate(np.ndindex(shape[:2])):
        shards, slices = plan.shards[i], plan.slices[j]
        stages = partition.epochs_of_slices(plan.epochs, slices)
        for draw in range(plan.draws):
            ensemble = ensembles.make(plan, problem, shards, slices, draw)
            order = np.random.default_rng(draw).permutation(count)
            for k, requests in enumerate(plan.requests):
                both = ensemble.cost(order < requests)
                result["visits"][i, j, k, draw], result["updates"][i, j, k, draw] = both
        for k, requests in enumerate(plan.requests):
            case = (count, shards, requests, stages)
            drawn = planner.simulate(np.random.default_rng(0), *case, batch=True, trials=200)
            result["expected"][i, j, k] = planner.expected_cost(*case, batch=True)
            result["spread"][i, j, k] = drawn.std(ddof=1)
        report((done + 1) / np.prod(shape[:2]))
    result["paper"] = plan.epochs * np.array(
        [[planner.paper_cost(count, s, k, batch=True) for k in plan.requests] for s in plan.shards]
    )
    left = np.array([count - requests for requests in plan.requests])
    result["whole"] = plan.epochs * left
    result["whole_updates"] = plan.epochs * -(-left // plan.batch_size)
    return result


def exactness(plan: Plan, problem: Problem, report: Report) -> Result:
    """Deletes records in turns and compares every network with training on the survivors alone.

    Of the largest S and the middle R. After each of the deletions of `plan.requests`, and for each
    seed, hashes of all of a network's training state are compared; then one more record's deletion
    is timed, compiled before, and the training of all shards and of one network on all records.

    Returns:
      `equal` to training anew, `affected` by the deletion and `changed` by it, bool `(n,)`, one for
      every network each time; `forget`, `all` and `one`, seconds `(repeats,)`.
    """
    shards, slices = plan.shards[-1], plan.slices[len(plan.slices) // 2]
    rows: list[tuple[np.ndarray, ...]] = []
    for seed in range(plan.seeds):
        ensemble = ensembles.make(plan, problem, shards, slices, seed)
        rng, states = np.random.default_rng(seed), ensemble.fit()
        for requests in plan.requests:
            before, places = ensemble.digests(states), ensemble.records.places
            gone = rng.permutation(len(places)) < requests
            ensemble, states = ensemble.forget(states, gone)
            now, anew = ensemble.digests(states), ensemble.digests(ensemble.fit())
            affected = np.isin(np.arange(shards), places.shard[gone])
            rows.append((now == anew, affected, now != before))
        report((seed + 0.5) / plan.seeds)
    equal, affected, changed = (np.concatenate(column) for column in zip(*rows, strict=True))
    return {"equal": equal, "affected": affected, "changed": changed} | _times(plan, problem)


def _times(plan: Plan, problem: Problem, repeats: int = 5) -> Result:
    shards, slices = plan.shards[-1], plan.slices[len(plan.slices) // 2]
    ensemble = ensembles.make(plan, problem, shards, slices, 0)
    single = ensembles.make(plan, problem, 1, 1, 0)
    states, count = ensemble.fit(), len(problem.train.ids)
    seconds: dict[str, list[float]] = {"forget": [], "all": [], "one": []}
    for repeat in range(repeats + 1):
        gone = np.arange(count) == np.random.default_rng(repeat).integers(count)
        left = ensemble._replace(records=ensemble.records.take(~gone))
        one = single._replace(records=single.records.take(~gone))
        for name, job in (
            ("forget", lambda gone=gone: ensemble.forget(states, gone)),
            ("all", left.fit),
            ("one", one.fit),
        ):
            began = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[1:]) for name, values in seconds.items()}  # the first compiles


def removal(plan: Plan, problem: Problem, report: Report) -> Result:
    """Removes records one by one from logistic regression of two classes, 3 and 8 of digits.

    Returns:
      Of each removal, `(seeds, m)`: `bound` and `true` norm of the gradient, `retrained`, 0 or 1,
      and `step_seconds`. Of each seed, `(seeds,)`: `fits`, seconds of training anew; accuracies on
      the test set `before` and `after` all removals, trained `anew` with the same noise and `plain`
      without. Of all, `budget ()` and `records ()` at first.
    """
    x, y = _two_classes(problem.train)
    x_test, y_test = _two_classes(problem.test)

    def score(w: np.ndarray) -> float:
        return float(np.mean(np.sign(x_test @ w) == y_test))

    mechanism = certified.Mechanism("logistic", lam=1e-2, sigma=0.3, epsilon=1.0, delta=1e-4)
    rows: list[dict[str, Any]] = []
    for seed in range(plan.seeds):
        keys = jax.random.split(jax.random.key(seed), plan.removals + 2)
        state = certified.fit(mechanism, x, y, keys[0])
        row: dict[str, Any] = {"before": score(state.w)}
        steps = []
        order = np.random.default_rng(seed).permutation(len(x))[: plan.removals]
        for gone, key in zip(order, keys[2:], strict=False):
            began = time.perf_counter()
            done = certified.remove(mechanism, state, [gone], key)
            spent, state = time.perf_counter() - began, done.state
            norm = certified.gradient_norm(mechanism, state)
            steps.append((float(state.residual), norm, done.retrained, spent))
        names = ("bound", "true", "retrained", "step_seconds")
        row |= dict(zip(names, np.array(steps).T, strict=True))
        began = time.perf_counter()
        anew = certified.fit(mechanism, state.x, state.y, keys[1])
        row["fits"] = time.perf_counter() - began
        loss = convex.linear_loss("logistic")
        plain, _ = solvers.minimise(loss, np.zeros(x.shape[1]), state.x, state.y, 1e-2, 1e-8)
        row |= {"after": score(state.w), "anew": score(anew.w), "plain": score(plain)}
        rows.append(row)
        report((seed + 1) / plan.seeds)
    result = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return result | {"budget": np.array(mechanism.budget), "records": np.array(len(x))}


def _two_classes(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Records of classes 3 and 8, rows of norm 1 with an intercept, and labels -1 and 1."""
    chosen = (table.y == 3) | (table.y == 8)
    x = np.float64(table.x[chosen].reshape(chosen.sum(), -1))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1) / np.sqrt(2)
    return x, np.where(table.y[chosen] == 3, -1.0, 1.0)


PARTS: dict[str, Callable[[Plan, Problem, Report], Result]] = {
    "accuracy": accuracy,
    "cost": cost,
    "exactness": exactness,
    "attack": attack,
    "removal": removal,
}
