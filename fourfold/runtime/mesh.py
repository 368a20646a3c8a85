"""Devices: the start of a distributed run, the mesh, and process-local batches as global arrays.

The same calls serve one CPU, eight accelerators of one machine and a pod: with one process
`initialize` does nothing and every agreement between processes is the process's own opinion.
"""

from __future__ import annotations

import os
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fourfold.runtime.hardware import cores

T = TypeVar("T")


def _launched_by_a_cluster() -> bool:
    """Whether the environment says that this process is one of several of the same job."""
    env = os.environ
    # SLURM_STEP_NUM_TASKS is set by srun only; SLURM_NTASKS is also set in a plain salloc shell,
    # where nobody started the other tasks and waiting for them would hang.
    if int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in env:
        return True
    if int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return True
    if int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    return "," in env.get("TPU_WORKER_HOSTNAMES", "")


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    distributed: bool | None = None,
) -> bool:
    """Joins this process to the others of its job; call it before anything touches a device.

    The three flags default to the environment variables `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Without them a job of several tasks under SLURM's
    srun, Open MPI or a TPU pod is recognised by its environment and left to JAX to work out.

    Args:
      coordinator: `host:port` of process 0.
      num_processes: how many processes the job has.
      process_id: this one's number, from 0.
      distributed: None to decide as above, True to insist (JAX then finds the cluster or fails),
        False to stay alone.

    Returns:
      Whether the run is distributed. A second call changes nothing.

    Raises:
      ValueError: some of the three flags are given and others are not, or `process_id` is out of
        range.
    """
    if jax.distributed.is_initialized():
        return True
    if distributed is False:
        return False
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None and "JAX_NUM_PROCESSES" in env:
        num_processes = int(env["JAX_NUM_PROCESSES"])
    if process_id is None and "JAX_PROCESS_ID" in env:
        process_id = int(env["JAX_PROCESS_ID"])
    flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if not missing:
        if not 0 <= int(process_id or 0) < int(num_processes or 0):
            raise ValueError(f"process_id must be in [0, {num_processes}), found {process_id}")
        jax.distributed.initialize(coordinator, num_processes, process_id)
        return True
    if distributed or _launched_by_a_cluster():
        jax.distributed.initialize(coordinator, num_processes, process_id)
        return True
    if len(missing) < 3:
        raise ValueError(
            f"a distributed run needs coordinator, num_processes and process_id together; "
            f"missing {', '.join(missing)} of {flags}"
        )
    return False


def one_cpu_device_per_core() -> None:
    """Splits a CPU into a device per core, for programs that run one agent or more on each.

    Where the user chose a number (`JAX_NUM_CPU_DEVICES`, or XLA's flag), that stands. JAX allows it
    only before its first computation; after it, what devices there are will do.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    try:
        jax.config.update("jax_num_cpu_devices", cores())
    except RuntimeError:
        pass


def is_lead() -> bool:
    """Whether this process writes the logs, prints, and names the folders (process 0)."""
    return jax.process_index() == 0


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds on every process; a barrier, so all processes must call it."""
    return all(gather(int(ok)))


def gather(value: int) -> list[int]:
    """The `value` (a non-negative integer below 2**62) of each process, in process order."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    # Two 31-bit halves: JAX has no 64-bit integers unless they are switched on.
    halves = np.asarray([value >> 31, value & 0x7FFFFFFF], np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(halves)).reshape(-1, 2)
    return [(int(high) << 31) | int(low) for high, low in gathered]


def make_mesh(num_devices: int | None = None, axis: str = "data") -> Mesh:
    """A mesh of one axis over the devices of all processes.

    The axis type is Auto: GSPMD propagates shardings through jitted code that names none.

    Args:
      num_devices: how many devices, the same number from each process; None for all.
      axis: the axis's name.

    Raises:
      ValueError: `num_devices` is below 1, more than there are, or no multiple of the processes.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    processes = jax.process_count()
    if not 1 <= count <= len(devices):
        raise ValueError(f"num_devices must be in [1, {len(devices)}], found {count}")
    if count % processes:
        raise ValueError(f"num_devices {count} is not divisible by the {processes} processes")
    if count < len(devices):
        share = count // processes
        devices = [
            device
            for process in range(processes)
            for device in [d for d in devices if d.process_index == process][:share]
        ]
        if len(devices) < count:
            raise ValueError(f"num_devices {count}: a process has fewer than {share} devices")
    return jax.make_mesh((count,), (axis,), axis_types=(AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis, the leading one by default, split over the mesh's first axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names[0]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(mesh: Mesh, local: T, axis: int = 0) -> T:
    """Joins the batches of the processes into global arrays split over the mesh.

    Args:
      mesh: from `make_mesh`.
      local: a pytree of host arrays (..., B_local, ...), this process's part of the batch; B_local
        is the same on every process.
      axis: that of the batch.

    Returns:
      The same pytree of `jax.Array`s (..., B_local * number of processes, ...), split over `axis`.
      Row order is the order of the processes.

    Raises:
      ValueError: an array has no such axis, or the global batch isn't divisible by the devices.
    """
    sharding = batch_sharding(mesh, axis)
    devices = mesh.shape[mesh.axis_names[0]]
    processes = len({device.process_index for device in mesh.devices.flat})

    def place(path: jax.tree_util.KeyPath, leaf: np.ndarray) -> jax.Array:
        leaf = np.asarray(leaf)
        name = jax.tree_util.keystr(path) or "the batch"
        if leaf.ndim <= axis:
            raise ValueError(f"{name} has shape {leaf.shape}; a batch needs an axis {axis}")
        rows = leaf.shape[axis] * processes
        if rows % devices:
            raise ValueError(
                f"{name}: the global batch of {rows} rows ({leaf.shape[axis]} from each of "
                f"{processes} processes) is not divisible by the {devices} devices"
            )
        shape = (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree_util.tree_map_with_path(place, local)
