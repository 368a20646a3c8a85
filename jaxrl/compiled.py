"""The edge of the Atari agent: its pure functions compiled for a mesh, its replay where it fits."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from fourfold.runtime import mesh as meshes
from fourfold.runtime.hardware import cores, cpu_options
from jaxrl import agent as agents
from jaxrl import device_replay
from jaxrl.agent import Agent, AgentState, Metrics
from jaxrl.config import AtariConfig
from jaxrl.loop import Functions
from jaxrl.networks import ConvMethod
from jaxrl.replay import HostReplay
from jaxrl.windows import FrameBatch, stack_frames

T = TypeVar("T")
STACK = 4
_SEED_STREAM = 0x5EED  # keeps the host's random stream apart from the key's


def best_conv_method() -> ConvMethod:
    """Returns how convolutions run best on the default backend; see `networks.conv2d`."""
    return "direct" if jax.default_backend() == "gpu" else "space_to_depth"


def emulator_threads() -> int | None:
    """Returns how many threads the emulators should take: few where the learner is on the CPU too.

    There the learner keeps all cores busy for ten times as long as a step of the emulators takes,
    and each further thread of theirs takes one from it in the middle of a convolution.
    """
    if jax.default_backend() != "cpu":
        return None
    return max(1, cores() // 4)


def compile_functions(agent: Agent, config: AtariConfig, mesh: Mesh, key: jax.Array) -> Functions:
    """Compiles acting and learning for a mesh: batches split, parameters replicated.

    Args:
      agent: the static parts of the agent.
      config: the configuration.
      mesh: from `fourfold.runtime.mesh.make_mesh`.
      key: source of the exploration's randomness; step t uses `fold_in(key, t)`.
    """
    replicated, split = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    batches_split = meshes.batch_sharding(mesh, 1)
    explore = config.exploration
    options = cpu_options()

    def act(key: jax.Array, state: AgentState, stack, frame, first, valid, steps):
        stack = push(stack, frame, first)
        epsilon = agents.epsilon_at(steps, explore.warmup, explore.end_step, explore.end)
        actions, state = agents.act(agent, state, stack, epsilon, jax.random.fold_in(key, steps))
        # Only what acting changed: whatever else is returned would be copied.
        return actions, state.spectral, stack, steps + jnp.sum(valid, dtype=jnp.int32)

    def update(state: AgentState, frames: FrameBatch) -> tuple[AgentState, Metrics]:
        return agents.update(agent, state, stack_frames(frames))

    def learn(state: AgentState, batches: FrameBatch) -> tuple[AgentState, Metrics]:
        if batches.a_tm1.shape[0] == 1:
            return update(state, jax.tree.map(lambda x: x[0], batches))
        state, metrics = lax.scan(update, state, batches)
        return state, jax.tree.map(lambda x: x[-1], metrics)

    return Functions(
        act=functools.partial(
            jax.jit(
                act,
                donate_argnames="stack",
                out_shardings=(split, replicated, split, replicated),
                compiler_options=options,
            ),
            # device_put cannot spread a typed key over several processes.
            jax.jit(lambda key: key, out_shardings=replicated)(key),
        ),
        learn=jax.jit(
            learn,
            donate_argnums=0,
            in_shardings=(replicated, batches_split),
            out_shardings=replicated,
            compiler_options=options,
        ),
        sync=jax.jit(agents.sync_target, donate_argnums=0, out_shardings=replicated),
        place=lambda arrays: place(arrays, mesh, 0),
        fetch=local_rows,
        # Convolutions in a loop are slow on XLA-CPU; elsewhere one call a batch starves the device.
        largest=1 if jax.default_backend() == "cpu" else 64,
    )


def place(arrays: T, mesh: Mesh, axis: int) -> T:
    """Puts this process's host arrays on the devices, split along `axis`."""
    if jax.process_count() == 1:
        # One call for all leaves: this is in the hot loop.
        return jax.device_put(arrays, meshes.batch_sharding(mesh, axis))
    with jax.transfer_guard_host_to_device("allow"):  # joining counts as implicit, to JAX
        return meshes.global_batch(mesh, arrays, axis)


def push(stack: jax.Array, frame: jax.Array, first: jax.Array) -> jax.Array:
    """Appends the newest frame `(N, H, W)` to a stack `(N, H, W, 4)`, cleared where `first`."""
    older = jnp.where(first[:, None, None, None], jnp.uint8(0), stack[..., 1:])
    return jnp.concatenate([older, frame[..., None]], axis=-1)


def local_rows(array: jax.Array) -> np.ndarray:
    """Returns this process's rows of an array split over its leading axis."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate(jax.device_get([shard.data for shard in shards]))


def local_copy(array: jax.Array) -> jax.Array:
    """Returns a replicated array as one of this process's first device alone."""
    return jnp.asarray(np.asarray(array.addressable_data(0)))


class HostMemory:
    """A replay in main memory, which samples this process's part of each batch."""

    def __init__(self, config: AtariConfig, num_envs: int, mesh: Mesh):
        """Makes an empty replay for the `num_envs` environments of this process."""
        processes = jax.process_count()
        self._batch = _share(config.batch_size, processes, mesh.size)
        self._mesh = mesh
        capacity = _share(config.replay_capacity, processes, processes)
        self.replay = HostReplay(
            capacity, num_envs, stack=STACK, n_step=config.n_step, discount=config.discount
        )
        self.rng = np.random.default_rng((config.seed, _SEED_STREAM, jax.process_index()))

    def add(self, *row: np.ndarray) -> None:
        """See `loop.Memory`."""
        self.replay.add(*row)

    def draw(self, sizes: Sequence[int]) -> list[FrameBatch]:
        """See `loop.Memory`; all batches are gathered, and cross to the devices, in one go."""
        count, batches = sum(sizes), []
        drawn = self.replay.sample_frames(self.rng, count * self._batch)
        stacked = jax.tree.map(lambda x: x.reshape(count, self._batch, *x.shape[1:]), drawn)
        for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
            batches.append(FrameBatch(*(x[end - size : end] for x in stacked)))  # views
        return place(batches, self._mesh, 1)

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {**self.replay.state_dict(), "rng": self.rng.bit_generator.state}

    def load(self, arrays: dict[str, Any]) -> None:
        """Takes up where `arrays` was made."""
        self.replay.load_state_dict(arrays)
        self.rng.bit_generator.state = arrays["rng"]


class DeviceMemory:
    """A replay in the memory of one accelerator; sampling costs the host nothing."""

    def __init__(self, config: AtariConfig, num_envs: int, mesh: Mesh):
        """Makes an empty replay; all of its memory is claimed here.

        Raises:
          ValueError: the mesh has several devices.
        """
        if mesh.size != 1:
            raise ValueError(f"replay 'device' needs one device, found {mesh.size}; use 'host'")
        windows: Any = {"stack": STACK, "n_step": config.n_step}
        self.state = device_replay.init(config.replay_capacity, num_envs, **windows)
        self._key = jax.random.key(config.seed ^ _SEED_STREAM)
        self._drawn = jnp.zeros((), jnp.int32)

        def draw(state: device_replay.ReplayState, key: jax.Array, drawn: jax.Array, *, count: int):
            keys = jax.random.split(jax.random.fold_in(key, drawn), count)

            def one(key: jax.Array) -> FrameBatch:
                starts = device_replay.draw(state, key, config.batch_size, **windows)
                return device_replay.gather(state, *starts, discount=config.discount, **windows)

            return jax.vmap(one)(keys), drawn + 1

        self._add = jax.jit(device_replay.add, donate_argnums=0)
        self._draw = jax.jit(draw, static_argnames="count")

    def add(self, *row: np.ndarray) -> None:
        """See `loop.Memory`."""
        self.state = self._add(self.state, *jax.device_put(row))

    def draw(self, sizes: Sequence[int]) -> list[FrameBatch]:
        """See `loop.Memory`."""
        return [self._draw_one(size) for size in sizes]

    def _draw_one(self, count: int) -> FrameBatch:
        batches, self._drawn = self._draw(self.state, self._key, self._drawn, count=count)
        return batches

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        leaves = jax.tree.leaves(self.state)
        return {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)} | {
            "drawn": int(self._drawn)
        }

    def load(self, arrays: dict[str, Any]) -> None:
        """Takes up where `arrays` was made."""
        leaves, tree = jax.tree.flatten(self.state)
        saved = [np.array(arrays[f"leaf{i}"]) for i in range(len(leaves))]
        self.state = jax.tree.unflatten(tree, jax.device_put(saved))
        self._drawn = jnp.asarray(arrays["drawn"], jnp.int32)


def make_memory(config: AtariConfig, num_envs: int, mesh: Mesh) -> HostMemory | DeviceMemory:
    """Makes the replay that the configuration asks for."""
    return (HostMemory if config.replay == "host" else DeviceMemory)(config, num_envs, mesh)


def _share(total: int, processes: int, unit: int) -> int:
    if total % math.lcm(processes, unit):
        raise ValueError(f"{total} is not divisible by {unit} devices or {processes} processes")
    return total // processes
