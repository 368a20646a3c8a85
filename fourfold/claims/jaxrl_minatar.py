"""C51 with spectral normalisation on one layer, on all, on none, and as a scheduler, on MinAtar."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from fourfold.claims import Claim, Progress, arrays, at_scale
from fourfold.claims._minatar_report import Plan, write
from fourfold.claims._minatar_smoothness import measure, successive_observations
from fourfold.runtime import mesh as meshes
from jaxrl import fused, train_minatar
from jaxrl.config import AgentConfig, Exploration, MinAtarConfig

VARIANTS: dict[str, AgentConfig] = {
    "C51": AgentConfig(spectral=("-2L",)),
    "SN[-2]": AgentConfig(spectral=("-2",)),
    "SN[all]": AgentConfig(spectral=("all",)),
    "divGrad[-2]": AgentConfig(spectral=("-2L",), scheduler="div_grad"),
}
Result = dict[str, np.ndarray]


SCALES = {
    "laptop": Plan(("breakout",), 6, 40_000, 2_000, 1_000, Exploration(1_000, 12_000, 0.01)),
    "gpu": Plan(
        ("asterix", "breakout", "space_invaders"),
        10,
        1_000_000,
        20_000,
        4_000,
        Exploration(5_000, 100_000, 0.01),
    ),
    "paper": Plan(
        ("asterix", "breakout", "seaquest", "space_invaders"),
        10,
        5_000_000,
        50_000,
        4_000,
        Exploration(5_000, 250_000, 0.01),
    ),
}


def run(scale: str, out: Path, progress: Progress) -> Claim:
    """Trains every variant on every game and compares them.

    A game and variant that was finished is kept in `out` and not run again.

    Args:
      scale: one of `SCALES`.
      out: folder of the results.
      progress: called at every line of the log.

    Raises:
      ValueError: the scale is unknown.
    """
    return run_plan(at_scale(SCALES, scale), VARIANTS, scale, out, progress)


def run_plan(
    plan: Plan, variants: Mapping[str, AgentConfig], scale: str, out: Path, progress: Progress
) -> Claim:
    """Does what `run` does, for any plan and variants; the first variant is the baseline."""
    meshes.one_cpu_device_per_core()
    results: dict[str, dict[str, Result]] = {}
    total, done = len(plan.games) * len(variants), 0
    for game in plan.games:
        results[game] = {}
        pairs: np.ndarray | None = None
        for name, agent in variants.items():
            config = config_of(plan, game, agent)
            path = out / f"{game}-{name}.npz"
            found = arrays.load(path, settings(config))
            if found is None:
                label = f"{game}, {name}"
                progress(done / total, f"{label}: compiling")

                def report(step: int, label: str = label, done: int = done) -> None:
                    progress((done + step / plan.steps) / total, f"{label}: step {step:,}")

                found = train_and_measure(config, pairs, report)
                arrays.save(path, settings(config), found)
            pairs = found["pairs"]
            results[game][name] = found
            done += 1
    return write(results, plan, scale)


def config_of(plan: Plan, game: str, agent: AgentConfig) -> MinAtarConfig:
    """Returns the configuration of one variant: the paper's but for what the plan shortens."""
    return MinAtarConfig(
        game=game,  # pyright: ignore[reportArgumentType]
        agent=agent,
        exploration=plan.exploration,
        steps=plan.steps,
        num_seeds=plan.seeds,
        target_period=plan.target_period,
        log_every=plan.log_every,
        checkpoint_every=plan.log_every,
    )


def train_and_measure(
    config: MinAtarConfig, pairs: np.ndarray | None, report: Callable[[int], None]
) -> Result:
    """Trains one variant, all seeds at once, and measures its smoothness.

    Args:
      config: of the variant.
      pairs: observations to measure on, bool `(P, 2, H, W, C)`; None to take them from the
        replays of the agents themselves.
      report: called with the step at every line of the log.

    Returns:
      `steps (K,)`, `return (K, S)` and the other rows of the log, `pairs`, `seconds ()`, and the
      figures of `measure`, `(S,)` each.
    """
    began = time.monotonic()
    seeds, hyper = config.num_seeds, fused.hyper_of(config)
    keys, hypers = fused.agents_of(config)
    mesh = meshes.make_mesh(train_minatar.most_devices(seeds))
    functions = train_minatar.compile_functions(config, mesh, seeds, hyper)
    keys, hypers = functions.place((keys, hypers))
    carry = functions.init(keys, hypers)
    rows, steps = [], []
    for step, row, after in train_minatar.intervals(functions, carry, hypers, config.steps):
        carry = after
        rows.append(row)
        steps.append(step)
        report(step)
    curves = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    pairs = successive_observations(carry) if pairs is None else pairs
    agent, learner = fused.make(config, hyper)[1], jax.device_get(carry.agent)
    measured = [
        measure(agent, jax.tree.map(lambda x, s=seed: x[s], learner), pairs)
        for seed in range(seeds)
    ]
    smoothness = {name: np.array([m[name] for m in measured]) for name in measured[0]}
    seconds = np.array(time.monotonic() - began)
    return {"steps": np.array(steps), "pairs": pairs, "seconds": seconds, **curves, **smoothness}


def settings(config: MinAtarConfig) -> str:
    """Returns a configuration as text, to tell a saved result by."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)
