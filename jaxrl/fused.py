"""Training on MinAtar wholly on the device: game, replay and learner in one compiled program.

Everything is a pure function of one agent, its key and its hyper-parameters; seeds and sweeps are
`jax.vmap`, with one thing to know. The agents of a program are always at the same step, and what
follows from the step alone must not be batched: with one step number per agent, the end of a loop
and the row to write become per-agent questions, and XLA answers those by computing both sides and
by copying whole replays. `axes` says which leaves stay shared; `init_many` and `run_many` use it.

Loops are nested as the method is: log interval > target period > update > steps. So no parameter
is selected or copied per step for the sake of a target network or of a log.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxrl import agent as agents
from jaxrl import device_replay, minatar_env, networks
from jaxrl.agent import Agent
from jaxrl.config import MinAtarConfig
from jaxrl.fused_state import Carry, Hyper, Row, Totals, agents_of, axes, hyper_of, seed_keys
from jaxrl.minatar_env import MinAtar

__all__ = [
    "Carry",
    "Hyper",
    "Row",
    "Totals",
    "agents_of",
    "axes",
    "hyper_of",
    "init",
    "init_many",
    "interval",
    "interval_many",
    "make",
    "run",
    "seed_keys",
    "train",
]

_INIT, _WARMUP, _TRAIN, _SAMPLE = range(4)  # domains of the random keys


def make(config: MinAtarConfig, hyper: Hyper) -> tuple[MinAtar, Agent]:
    """Returns the game and the static parts of the agent.

    Raises:
      ValueError: the game or a hooked layer is unknown, or the warm-up doesn't end on an update.
    """
    if config.exploration.warmup % config.update_period:
        raise ValueError(
            f"warmup must be a multiple of update_period {config.update_period}, "
            f"found {config.exploration.warmup}"
        )
    with jax.ensure_compile_time_eval():  # pgx builds arrays when it is imported, maybe just now
        env = minatar_env.minatar(config.game)
    atoms = config.agent.num_atoms if config.agent.loss in ("c51", "double_c51") else None
    network = networks.minatar_net(env.num_actions, atoms, convs=config.convs, hidden=config.hidden)
    return env, agents.make(config.agent, network, **hyper._asdict())


def init(config: MinAtarConfig, key: jax.Array, hyper: Hyper) -> Carry:
    """Returns a fresh agent before a fresh game, at step 0.

    Args:
      config: the configuration; `num_seeds`, `sweep` and `seed` aren't used here.
      key: of this agent.
      hyper: its hyper-parameters.
    """
    env, agent = make(config, hyper)
    agent_key, env_key = jax.random.split(jax.random.fold_in(key, _INIT))
    return Carry(
        step=jnp.zeros((), jnp.int32),
        key=key,
        agent=agents.init(agent, agent_key, env.obs_shape),
        env=env.init(env_key),
        first=jnp.ones((), bool),
        score=jnp.zeros((), jnp.float32),
        replay=device_replay.init(
            config.replay_capacity, 1, env.obs_shape, bool, stack=1, n_step=config.n_step
        ),
    )


def interval(config: MinAtarConfig, carry: Carry, hyper: Hyper) -> tuple[Carry, Row]:
    """Trains for `log_every` steps.

    Args:
      config: the configuration.
      carry: from `init` or an earlier call; donate it where this is jitted.
      hyper: of this agent.

    Returns:
      The carry, and scalars: `return`, the mean of the games that ended in the interval (NaN where
      none did), `episodes`, their number, and the means over the interval's updates of `loss`, `q`
      and `sigma/<layer>` (NaN where there was none).
    """
    env, agent = make(config, hyper)
    end = carry.step + config.log_every
    period = config.target_period

    def until(stop: jax.Array, body: Any, state: Any) -> Any:
        return lax.while_loop(lambda state: state[0].step < stop, body, state)

    def random_step(state: tuple[Carry, Totals]) -> tuple[Carry, Totals]:
        action_key, env_key = jax.random.split(_key(state[0], _WARMUP))
        action = jax.random.randint(action_key, (), 0, env.num_actions)
        return _step(env, *state, env.observe(state[0].env), action, env_key)

    def to_sync(state: tuple[Carry, Totals]) -> tuple[Carry, Totals]:
        sync = (state[0].step // period + 1) * period
        body = functools.partial(_update, config, env, agent)
        carry, totals = until(jnp.minimum(sync, end), lambda s: body(*s), state)
        synced = lax.cond(carry.step == sync, agents.sync_target, lambda a: a, carry.agent)
        return dataclasses.replace(carry, agent=synced), totals

    state = (carry, _no_totals(carry))
    state = until(jnp.minimum(config.exploration.warmup, end), random_step, state)
    carry, totals = until(end, to_sync, state)
    row = {"return": totals.returns / totals.episodes, "episodes": totals.episodes}
    return carry, row | {name: x / totals.updates for name, x in totals.learning.items()}


def run(config: MinAtarConfig, carry: Carry, hyper: Hyper, num_steps: int) -> tuple[Carry, Row]:
    """Trains for `num_steps`, a multiple of `log_every`, and stacks the rows of `interval`.

    Raises:
      ValueError: `num_steps` isn't such a multiple.
    """
    if num_steps % config.log_every:
        raise ValueError(
            f"num_steps must be a multiple of log_every {config.log_every}, found {num_steps}"
        )

    def body(carry: Carry, _: None) -> tuple[Carry, Row]:
        return interval(config, carry, hyper)

    return lax.scan(body, carry, None, length=num_steps // config.log_every)


def train(config: MinAtarConfig, key: jax.Array, hyper: Hyper) -> tuple[Carry, Row]:
    """Trains one agent from beginning to end, a pure function of its key.

    Under `jax.vmap` over `key`, or `hyper`, or both, the step is shared of itself: nothing that it
    is made of depends on either. Seeds times a sweep is therefore

        jax.jit(jax.vmap(functools.partial(train, config)))(keys, hypers)

    Returns:
      The last carry, and the curves: leaves `(steps // log_every,)`, see `interval`.
    """
    return run(config, init(config, key, hyper), hyper, config.steps)


def init_many(config: MinAtarConfig, keys: jax.Array, hypers: Hyper) -> Carry:
    """`init` of A agents: keys `(A,)`, and hyper-parameters `(A,)` each."""
    init_one = functools.partial(init, config)
    out = jax.eval_shape(init_one, keys[0], jax.tree.map(lambda x: x[0], hypers))
    return jax.vmap(init_one, out_axes=axes(out))(keys, hypers)


def interval_many(config: MinAtarConfig, carry: Carry, hypers: Hyper) -> tuple[Carry, Row]:
    """`interval` of A agents; the carry is from `init_many`, rows have leaves `(A,)`."""
    shared = axes(carry)
    mapped = jax.vmap(functools.partial(interval, config), (shared, 0), (shared, 0))
    return mapped(carry, hypers)


def _key(carry: Carry, domain: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(carry.key, domain), carry.step)


def _no_totals(carry: Carry) -> Totals:
    names = ["loss", "q", *(f"sigma/{layer}" for layer in carry.agent.spectral)]
    zero = jnp.zeros((), jnp.float32)
    return Totals(zero, zero, dict.fromkeys(names, zero), zero)


def _step(
    env: MinAtar, carry: Carry, totals: Totals, obs: jax.Array, action: jax.Array, key: jax.Array
) -> tuple[Carry, Totals]:
    """Plays one action and stores it."""
    after, reward, terminal, truncated = env.step(carry.env, action, key)
    row = (obs, action, reward, terminal, truncated, carry.first, jnp.ones((), bool))
    replay = device_replay.add(carry.replay, *(x[None] for x in row))
    score, over = carry.score + reward, terminal | truncated
    carry = dataclasses.replace(
        carry,
        step=carry.step + 1,
        env=after,
        first=over,
        score=jnp.where(over, 0, score),
        replay=replay,
    )
    totals = dataclasses.replace(
        totals,
        returns=totals.returns + jnp.where(over, score, 0),
        episodes=totals.episodes + over.astype(jnp.float32),
    )
    return carry, totals


def _update(
    config: MinAtarConfig, env: MinAtar, agent: Agent, carry: Carry, totals: Totals
) -> tuple[Carry, Totals]:
    """Acts for `update_period` steps, then learns from one batch."""
    plan = config.exploration

    def act_step(_: ArrayLike, state: tuple[Carry, Totals]) -> tuple[Carry, Totals]:
        carry, totals = state
        act_key, env_key = jax.random.split(_key(carry, _TRAIN))
        # This is the action of step + 1, which the schedule counts from.
        epsilon = agents.epsilon_at(carry.step, plan.warmup, plan.end_step, plan.end)
        obs = env.observe(carry.env)
        action, learner = agents.act(agent, carry.agent, obs[None], epsilon, act_key)
        carry = dataclasses.replace(carry, agent=learner)
        return _step(env, carry, totals, obs, action[0], env_key)

    key = _key(carry, _SAMPLE)
    carry, totals = lax.fori_loop(0, config.update_period, act_step, (carry, totals))
    batch = device_replay.sample(
        carry.replay,
        key,
        config.batch_size,
        stack=1,
        n_step=config.n_step,
        discount=config.discount,
    )
    learner, metrics = agents.update(agent, carry.agent, batch)
    learning = {name: totals.learning[name] + metrics[name] for name in totals.learning}
    totals = dataclasses.replace(totals, learning=learning, updates=totals.updates + 1)
    return dataclasses.replace(carry, agent=learner), totals
