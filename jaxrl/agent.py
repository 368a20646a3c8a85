"""The agent as pure functions of arrays: what it is, how it acts, how it learns.

An `Agent` holds the static parts (network, optimiser, configuration), an `AgentState` the arrays.
Nothing here is jitted: `jaxrl.train` compiles these functions for a mesh, `jaxrl.fused` puts them
in a scan, and both run the same code. The update has no randomness of its own, hence no key.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxrl import losses, schedulers
from jaxrl.config import AgentConfig
from jaxrl.networks import ConvNet
from jaxrl.types import Array, Transition

Params = Any
Spectral = Any
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Agent:
    """The static parts of an agent.

    Attributes:
      network: maps observations to logits `(B, A, num_atoms)`, or to action values `(B, A)`.
      optimizer: an optax transformation; the spectral schedulers are part of it.
      config: the rest.
    """

    network: ConvNet
    optimizer: optax.GradientTransformationExtraArgs
    config: AgentConfig

    @property
    def categorical(self) -> bool:
        """Whether the network's head is one of distributions."""
        return self.config.loss in ("c51", "double_c51")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AgentState:
    """The arrays of an agent.

    Attributes:
      params: of the online network.
      spectral: its collection of `u`, `v`, `sigma` per hooked layer; empty without hooks.
      target_params: of the target network.
      target_spectral: its own collection; a sync copies the online one.
      opt_state: of the optimiser.
      updates: int32 `()`, updates so far.
    """

    params: Params
    spectral: Spectral
    target_params: Params
    target_spectral: Spectral
    opt_state: optax.OptState
    updates: jax.Array


def make(
    config: AgentConfig,
    network: ConvNet,
    *,
    learning_rate: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    bound: ArrayLike | None = None,
) -> Agent:
    """Puts an agent together from its configuration and a network without hooks.

    Args:
      config: the configuration.
      network: from `networks.nature_net` or `networks.minatar_net`, with `config.num_atoms` atoms
        for a categorical loss and None for a DQN loss.
      learning_rate: replaces the configuration's; may be traced, to vmap over it.
      eps: likewise.
      bound: likewise.

    Raises:
      ValueError: where a hooked layer is unknown, or the head doesn't fit the loss.
    """
    atoms = config.num_atoms if config.loss in ("c51", "double_c51") else None
    if network.num_atoms != atoms:
        raise ValueError(f"loss {config.loss!r} needs num_atoms {atoms}, found {network.num_atoms}")
    bound = config.bound if bound is None else bound
    learning_rate = config.learning_rate if learning_rate is None else learning_rate
    eps = config.eps if eps is None else eps
    if config.optimizer == "rmsprop":
        # eps outside of the square root, as in PyTorch, whose defaults the authors rely on.
        optimizer = optax.rmsprop(learning_rate, 0.95, eps, centered=True, eps_in_sqrt=False)  # pyright: ignore[reportArgumentType]
    elif config.scheduler == "mul_eps":
        optimizer = schedulers.adam_mul_eps(learning_rate, eps=eps, bound=bound)  # pyright: ignore[reportArgumentType]
    else:
        optimizer = optax.adam(learning_rate, eps=eps)  # pyright: ignore[reportArgumentType]
    if config.scheduler == "div_grad":
        optimizer = optax.chain(schedulers.div_grad(bound), optimizer)
    network = network.clone(
        spectral=config.spectral, bound=bound, div_out=config.scheduler == "div_out"
    )
    network.hooks()  # an unknown layer is an error here, not in the first forward
    return Agent(network, optax.with_extra_args_support(optimizer), config)


def with_bound(agent: Agent, bound: ArrayLike | None) -> Agent:
    """Returns the agent with another bound, traced or not, in its forward; None changes nothing."""
    if bound is None:
        return agent
    return dataclasses.replace(agent, network=agent.network.clone(bound=bound))


def init(agent: Agent, key: jax.Array, obs_shape: tuple[int, ...]) -> AgentState:
    """Returns a fresh agent; the target network starts as a copy.

    Args:
      agent: the static parts.
      key: a random key.
      obs_shape: `(H, W, C)` of one observation.
    """
    obs = jnp.zeros((1, *obs_shape), jnp.uint8)
    variables = agent.network.init(key, obs, train=True)
    params, hooks = variables["params"], variables.get("spectral", {})
    return AgentState(
        params=params,
        spectral=hooks,
        target_params=jax.tree.map(jnp.copy, params),  # copies: donation must not see one twice
        target_spectral=jax.tree.map(jnp.copy, hooks),
        opt_state=agent.optimizer.init(params),
        updates=jnp.zeros((), jnp.int32),
    )


def outputs_evaluation(agent: Agent, state: AgentState, obs: Array) -> jax.Array:
    """Returns logits `(B, A, atoms)`, or Q `(B, A)`, in evaluation mode, where no `u` advances."""
    return _apply(agent, state.params, state.spectral, obs, train=False)[0]


def act(
    agent: Agent, state: AgentState, obs: Array, epsilon: ArrayLike, key: jax.Array
) -> tuple[jax.Array, AgentState]:
    """Acts ε-greedily while training, which advances the hooked layers' `u`.

    As in the authors' code a forward counts only if its greedy action is taken: where every
    environment of the batch acts at random, `u` stays.

    Args:
      agent: the static parts.
      state: the arrays.
      obs: `(N, H, W, C)`, one observation per environment.
      epsilon: probability of a uniformly random action.
      key: a random key.

    Returns:
      int32 actions `(N,)`, and the state with its `u` advanced.
    """
    outputs, hooks = _apply(agent, state.params, state.spectral, obs, train=True)
    actions, explores = _epsilon_greedy(_values(agent, outputs), epsilon, key)
    hooks = jax.tree.map(
        lambda new, old: jnp.where(explores.all(), old, new), hooks, state.spectral
    )
    return actions, dataclasses.replace(state, spectral=hooks)


def act_evaluation(
    agent: Agent, state: AgentState, obs: Array, epsilon: ArrayLike, key: jax.Array
) -> jax.Array:
    """Acts ε-greedily in evaluation mode: as `act`, but nothing advances."""
    outputs = outputs_evaluation(agent, state, obs)
    return _epsilon_greedy(_values(agent, outputs), epsilon, key)[0]


def update(
    agent: Agent, state: AgentState, batch: Transition, *, axis_name: str | None = None
) -> tuple[AgentState, Metrics]:
    """Takes one gradient step on a batch of transitions.

    Both networks are in training mode, as in the authors' code: each advances its own `u` once.

    Args:
      agent: the static parts.
      state: the arrays.
      batch: transitions with one leading batch axis.
      axis_name: None where the batch is a global one (plain jit, sharded or not); the name of the
        mapped axis under `shard_map` or `pmap`, over which gradients are then averaged. The state
        is the same on all devices, before and after.

    Returns:
      The new state, and the metrics `loss`, `q` (mean value of the actions taken) and, per hooked
      layer, `sigma/<layer>`, scalars all.
    """

    def loss_fn(params: Params):
        outputs, hooks = _apply(agent, params, vectors, batch.s_tm1, train=True)
        target, target_hooks = _apply(
            agent, state.target_params, state.target_spectral, batch.s_t, train=True
        )
        loss = jnp.mean(_losses(agent, params, hooks, batch, outputs, target))
        return loss, (outputs, hooks, target_hooks)

    params, vectors = state.params, state.spectral
    if axis_name is not None:
        # shard_map sums the gradient in a replicated value over the axis by itself, pmap does not;
        # the gradient in a varying one is the device's own under both.
        params, vectors = lax.pcast((params, vectors), axis_name, to="varying")
    (loss, (outputs, hooks, target_hooks)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        params
    )
    taken = jnp.take_along_axis(_values(agent, outputs), batch.a_tm1[:, None], axis=1)
    metrics = {"loss": loss, "q": jnp.mean(taken)}
    if axis_name is not None:
        # The hooks are equal already; the mean is what tells shard_map so.
        grads, metrics, hooks = lax.pmean((grads, metrics, hooks), axis_name)
    metrics |= {f"sigma/{layer}": hook["sigma"] for layer, hook in hooks.items()}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count with floats
        updates, opt_state = agent.optimizer.update(
            grads, state.opt_state, state.params, spectral=hooks
        )
    new = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        spectral=hooks,
        target_spectral=target_hooks,
        opt_state=opt_state,
        updates=state.updates + 1,
    )
    return new, metrics


def sync_target(state: AgentState) -> AgentState:
    """Copies the online network to the target network, `u`, `v` and σ included."""
    return dataclasses.replace(
        state,
        target_params=jax.tree.map(jnp.copy, state.params),
        target_spectral=jax.tree.map(jnp.copy, state.spectral),
    )


def epsilon_at(step: ArrayLike, warmup: int, end_step: int, end: float) -> jax.Array:
    """Returns ε at an agent step: 1 up to `warmup`, then linear to `end` at `end_step`, float32."""
    fraction = (jnp.asarray(step, jnp.float32) - warmup) / max(end_step - warmup, 1)
    return 1 + (end - 1) * jnp.clip(fraction, 0.0, 1.0)


def _losses(agent, params, hooks, batch: Transition, outputs, target) -> jax.Array:
    config = agent.config
    args = (outputs, batch.a_tm1, batch.r_t, batch.discount_t, target)
    if config.loss.startswith("double"):
        # A third forward, not one of the paper's: it must not advance u a second time.
        selector, _ = _apply(agent, lax.stop_gradient(params), hooks, batch.s_t, train=False)
        args = (*args, selector)
    if agent.categorical:
        loss = losses.c51_loss if config.loss == "c51" else losses.double_c51_loss
        return jax.vmap(lambda *a: loss(*a, v_min=config.v_min, v_max=config.v_max))(*args)
    loss = losses.dqn_loss if config.loss == "dqn" else losses.double_dqn_loss
    return jax.vmap(lambda *a: loss(*a, kind=config.td_error))(*args)


def _apply(
    agent: Agent, params: Params, hooks: Spectral, obs: Array, *, train: bool
) -> tuple[jax.Array, Spectral]:
    outputs, mutated = agent.network.apply(
        {"params": params, "spectral": hooks}, obs, train=train, mutable=["spectral"]
    )
    return outputs, mutated.get("spectral", {})


def _values(agent: Agent, outputs: jax.Array) -> jax.Array:
    if not agent.categorical:
        return outputs
    v_min, v_max = agent.config.v_min, agent.config.v_max
    return jax.vmap(lambda logits: losses.expected_values(logits, v_min, v_max))(outputs)


def _epsilon_greedy(
    values: jax.Array, epsilon: ArrayLike, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    key_explore, key_action = jax.random.split(key)
    count, num_actions = values.shape
    explores = jax.random.uniform(key_explore, (count,)) < epsilon
    random = jax.random.randint(key_action, (count,), 0, num_actions)
    greedy = jnp.argmax(values, axis=-1).astype(random.dtype)
    return jnp.where(explores, random, greedy), explores
