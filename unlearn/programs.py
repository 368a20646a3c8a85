"""The compiled functions of an ensemble, and which numbers of shards they may take at once.

The last bits of a sum depend on how the compiler cuts it up, and that on the shapes: a shard that
is trained alone may come out otherwise than among 16. So a device trains the same number of shards
at once, always, and lanes that have none idle. But where `is_exact` has shown, on these very
shapes, that fewer lanes give the same bits, those may be taken.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fourfold.runtime import mesh as meshes
from unlearn import sisa
from unlearn.config import SisaConfig
from unlearn.sisa import Learner, ShardState

BLOCK = 256  # updates of one call, at most
_TRIED = 8  # updates of a trial
_CPU_WIDTH, _CPU_BYTES = 8, 1 << 22  # most shards of a CPU at once, and most bytes of their states


class Shape(NamedTuple):
    """Shape and dtype of one record or label."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: np.ndarray) -> Shape:
        """Those of one row of an array."""
        return cls(array.shape[1:], array.dtype.str)

    def zeros(self, *axes: int) -> np.ndarray:
        """Rows of zeros."""
        return np.zeros((*axes, *self.shape), self.dtype)


class Programs(NamedTuple):
    """Functions compiled for a mesh.

    Attributes:
      init: `(key, shards (S,), record) -> states`, the S shards one after the other.
      place: arrays with an axis of lanes in front, from the host to the devices of the lanes.
      run: `(states, x, y, rows, count) -> states` as `sisa.updates`, with an axis of lanes in front
        of all but the count, and split over the mesh. The states that go in stay: the host fetches
        them while the next stage is under way.
      predict: `(states, x (B, ...)) -> probabilities (S, B, C)`.
    """

    init: Callable[..., ShardState]
    place: Callable[[Any], Any]
    run: Callable[..., ShardState]
    predict: Callable[..., jax.Array]


@functools.lru_cache(maxsize=16)
def programs(learner: Learner, mesh: Mesh) -> Programs:
    """Returns the functions of a learner; the same ones for the same learner."""
    options: Any = {"compiler_options": exact_options()}
    axis = PartitionSpec(mesh.axis_names[0])
    run = jax.shard_map(
        functools.partial(_updates, learner),
        mesh=mesh,
        in_specs=(axis, axis, axis, axis, PartitionSpec()),
        out_specs=axis,
    )
    lanes = meshes.batch_sharding(mesh)
    predict = jax.vmap(functools.partial(sisa.probabilities, learner), (0, None))

    def init(key: jax.Array, shards: jax.Array, record: jax.Array) -> ShardState:
        return lax.map(lambda s: sisa.init(learner, jax.random.fold_in(key, s), record), shards)

    return Programs(
        init=jax.jit(init, **options),
        # Half the time of device_put, and small networks have little else to wait for.
        place=jax.jit(lambda arrays: arrays, in_shardings=(lanes,), out_shardings=lanes),
        run=jax.jit(run, **options),
        predict=jax.jit(predict),
    )


def _updates(learner: Learner, states: ShardState, x: Any, y: Any, rows: Any, count: Any) -> Any:
    """`sisa.updates` with an axis of lanes in front of all but the count."""
    one = functools.partial(sisa.updates, learner)
    if rows.shape[0] > 1:
        return jax.vmap(one, (0, 0, 0, 0, None))(states, x, y, rows, count)
    # A lane alone jumps over empty batches; among others each update costs a selection of all.
    return jax.vmap(one, (0, 0, 0, None, None))(states, x, y, rows[0], count)


def exact_options() -> dict[str, Any] | None:
    """Returns compiler options that make a result depend on shapes and inputs as little as can be.

    On a CPU, XLA's YNN fusions (jaxlib 0.10) choose their kernels by the number of shards; on a GPU
    the fastest kernel is found by timing, which is not the same every day.
    """
    options: dict[str, Any]
    if jax.default_backend() == "cpu":
        options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    elif jax.default_backend() == "gpu":
        options = {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}
    else:
        return None
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:  # a jaxlib without them; `is_exact` finds out what that means
        return None
    return options


def is_exact(
    width: int, learner: Learner, config: SisaConfig, record: Shape, label: Shape, mesh: Mesh
) -> bool:
    """Tries, once and on random records, whether a width gives the bits of the configuration's.

    Args:
      width: shards that a device trains at once.
      learner: what is trained.
      config: of the ensemble.
      record: of the data.
      label: of the data.
      mesh: devices that share the shards.
    """
    rest = learner, config, record, label, mesh
    return _trial(width, *rest) == _trial(width_of(learner, config, record), *rest)


@functools.lru_cache(maxsize=64)
def width_of(learner: Learner, config: SisaConfig, record: Shape) -> int:
    """Returns how many shards a device trains at once."""
    if config.width or jax.default_backend() != "cpu":
        return min(config.width or config.shards, config.shards)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(sisa.init, learner), key, record.zeros())
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    cached = min(_CPU_WIDTH, max(_CPU_BYTES // size, 1))
    return min(1 << (cached.bit_length() - 1), config.shards)


def stack(states: list[ShardState]) -> ShardState:
    """Joins the states of S shards to one, whose arrays have an axis of S in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def to_host(state: ShardState) -> ShardState:
    """Returns a state as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.device_get(state))


def digest(state: ShardState) -> str:
    """Returns the SHA-256 of a state's names, shapes, dtypes and bytes, in hexadecimal."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


@functools.lru_cache(maxsize=64)
def _trial(
    width: int, learner: Learner, config: SisaConfig, record: Shape, label: Shape, mesh: Mesh
) -> tuple[str, ...]:
    """Hashes of a few shards after a few updates on noise, trained so many at once."""
    rng = np.random.default_rng(0)
    compiled = programs(learner, mesh)
    lanes, shards = width * mesh.size, width_of(learner, config, record)
    size, batch = config.slices * config.capacity, config.batch_size
    used = min(size, 2 * batch)
    x, y = record.zeros(shards, size), label.zeros(shards, size)
    noise = rng.normal(size=(shards, used, *record.shape))
    x[:, :used] = noise if x.dtype.kind == "f" else noise > 0
    rows = np.full((shards, BLOCK, batch), -1, np.int32)
    for shard in range(shards):
        for t in range(_TRIED):
            count = batch - (t % 2) * (shard % batch)
            rows[shard, t, :count] = rng.integers(0, used, count)
    hashes = []
    for begin in range(0, shards, lanes):
        part = np.arange(begin, begin + lanes) % shards
        state = compiled.init(jax.random.key(0), part.astype(np.uint32), record.zeros())
        state, block = compiled.place(to_host(state)), compiled.place(rows[part])
        state = compiled.run(state, *compiled.place((x[part], y[part])), block, np.int32(_TRIED))
        found = to_host(state)
        hashes += [digest(jax.tree.map(lambda a, i=i: a[i], found)) for i in range(lanes)]
    return tuple(hashes[:shards])
