"""How fast does an ensemble of 16 shards learn, and what does exactness cost?

    python benchmarks/unlearn_train.py [--quick]

About 1,024 records a shard, perceptrons 64-32-10 and 784-128-10, batches of 64. Ours is the whole
of `Trainer.fit`, on all devices (of a CPU: one a core), or its compiled program alone, to which
records and batches are given on the device. Peers, each at its best of two choices of compiler
options or numbers of threads:

- a Python loop over shards, of which each slice is one jitted scan; beside `Trainer.fit`, it also
  plans its batches and fetches a checkpoint after each slice;
- PyTorch's plain loop, in a process of its own, in turns with ours; it need do neither;
- the same scan vmapped over shards, without what makes ours exact: fixed numbers of lanes and of
  steps a call, care for NaN and for empty batches. It is compared with the program on one device.

All train to the same weights up to rounding, and ours to the same bits on any devices.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _sisa
import jax
import numpy as np
import tyro
from _bench import alternate, figure, median, show
from _sisa import LARGE, SHARDS, SMALL, Layout, Problem
from jax.sharding import Mesh

from fourfold.runtime import mesh as meshes
from fourfold.runtime.hardware import cores
from unlearn import programs
from unlearn.sisa import ShardState

PEERS = str(Path(__file__).parent / "peers")
# By network and by what ours is compared with.
TARGETS = {(SMALL, "loop"): 1.5, (LARGE, "loop"): 1.0, (SMALL, "torch"): 10.0}


def program_alone(
    found: Problem, layout: Layout, init: list[ShardState], mesh: Mesh
) -> Callable[[], ShardState]:
    """The trainer's compiled program, with all that it is called with on the devices."""
    compiled = programs.programs(found.learner, mesh)
    lanes = -(-SHARDS // mesh.size) * mesh.size

    def put(array: np.ndarray, steps: int | None = None) -> jax.Array:
        room = [(0, lanes - SHARDS)] + [(0, 0)] * (array.ndim - 1)
        if steps is not None:
            room[1] = (0, steps - array.shape[1])
        return compiled.place(np.pad(array, room, constant_values=-1))

    x, y = put(layout.x), put(layout.y)
    first = programs.stack(init + init[:1] * (lanes - SHARDS))
    calls = []
    for stage in layout.stages:
        for begin in range(0, stage.shape[1], programs.BLOCK):
            part = stage[:, begin : begin + programs.BLOCK]
            calls.append((put(part, programs.BLOCK), np.int32(part.shape[1])))

    def train() -> ShardState:
        state = compiled.place(first)
        for block, count in calls:
            state = compiled.run(state, x, y, block, count)
        return state

    return train


def jax_peers(
    found: Problem, layout: Layout, init: list[ShardState], quick: bool
) -> dict[str, Callable[[], Any]]:
    """The peers in JAX, by kind and compiler options; if quick, with one choice of these."""
    sys.path.insert(0, PEERS)
    import jax_sisa

    scan = jax_sisa.scan_of(found.learner.model, found.learner.optimizer)
    given = (layout.x, layout.y, [(state.params, state.opt_state) for state in init])
    planned = [jax.device_put(list(_sisa.batches(found, s))) for s in range(SHARDS)]
    peers = {}
    choices = {"ours": programs.exact_options()} | ({} if quick else {"XLA's": None})
    for name, options in choices.items():
        jitted = jax.jit(scan, compiler_options=options)
        plan = functools.partial(_sisa.batches, found)
        peers[f"whole loop, {name}"] = jax_sisa.loop(jitted, *given, plan, keep=True)
        peers[f"loop, {name}"] = jax_sisa.loop(jitted, *given, planned.__getitem__, keep=False)
        jitted = jax.jit(jax.vmap(scan), compiler_options=options)
        peers[f"vmap, {name}"] = jax_sisa.vmapped(jitted, *given, layout.stages)
    return peers


def torch_worker(pipe: Connection, params: list[Any], *made: Any) -> None:
    """Trains in PyTorch with as many threads as it is asked for; sends the first shard's weights.

    Args:
      pipe: the other end gets and gives.
      params: first weights of each shard.
      *made: arguments of `problem`.
    """
    sys.path.insert(0, PEERS)
    import torch_sisa

    found = _sisa.problem(*made)
    optim = found.config.optim
    ensemble = torch_sisa.Ensemble(*_sisa.lay_out(found), params, optim.lr, optim.momentum)
    while (threads := pipe.recv()) is not None:
        pipe.send(torch_sisa.params_of(ensemble.train(threads)[0]))


def start_torch(*arguments: Any) -> Connection | None:
    """The pipe to a `torch_worker`; None where PyTorch isn't installed."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch isn't installed: its figures are left out (make bench installs it)")
        return None
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=torch_worker, args=(theirs, *arguments), daemon=True).start()
    theirs.close()  # should the worker die, its end is closed, and we hear of it
    return pipe


def check(layout: Layout, fits: list[dict], trained: Mapping[str, Any]) -> None:
    """Raises AssertionError where two don't train to the same weights."""
    for at in fits[0]:
        assert len({programs.digest(states[at]) for states in fits}) == 1, f"other bits at {at}"
    # Vmapped peers are compared by a shard without empty batches, for momentum moves the others.
    busy = np.all([(stage[:, -1] >= 0).any(axis=1) for stage in layout.stages], axis=0)
    full, last = int(np.flatnonzero(busy)[0]), len(layout.stages) - 1
    for name, result in trained.items():
        kind, shard = name.split(",")[0], 0
        if kind == "torch":
            params = result
        elif kind == "program":
            params = jax.tree.map(lambda leaf: leaf[0], result.params)
        else:
            params = result[0][0]
        if kind == "vmap":
            shard, params = full, jax.tree.map(lambda leaf: leaf[full], params)
        ours = fits[0][shard, last].params
        for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
            theirs = params[path[0].key][path[1].key]
            np.testing.assert_allclose(leaf, theirs, atol=1e-3, err_msg=name)


def measure(network: str, slices: int, epochs: int, repeats: int, quick: bool) -> None:
    """Times everyone on one network, and collects the figures."""
    found = _sisa.problem(network, slices, epochs)
    layout, records = _sisa.lay_out(found), found.records
    meshes_of = {mesh.size: mesh for mesh in (meshes.make_mesh(1), meshes.make_mesh())}
    trainers = {n: found.trainer(mesh) for n, mesh in meshes_of.items()}
    init = [trainers[1].init(s, programs.Shape.of(records.x)) for s in range(SHARDS)]
    fits = {f"fit, {n}": lambda t=t: _sisa.fit(t, records) for n, t in trainers.items()}
    others = jax_peers(found, layout, init, quick)
    for n, mesh in meshes_of.items():
        others[f"program, {n}"] = program_alone(found, layout, init, mesh)
    pipe = start_torch([state.params for state in init], network, slices, epochs)
    if pipe is not None:
        for threads in sorted({1, cores()}):
            others[f"torch, {threads}"] = lambda n=threads: (pipe.send(n), pipe.recv())[1]
    # The warm-up of all.
    fitted, trained = ([f() for f in fits.values()], {n: f() for n, f in others.items()})
    check(layout, fitted, trained)
    timed = alternate({**fits, **others}, repeats, warmup=0)
    if pipe is not None:
        pipe.send(None)
    report(network, {name: median(times) for name, times in timed.items()}, len(jax.devices()))


def report(network: str, seconds: Mapping[str, float], devices: int) -> None:
    """Collects the figures of the fastest of each kind."""

    def best(kind: str) -> float | None:
        return min((t for n, t in seconds.items() if n.startswith(f"{kind},")), default=None)

    fit, program = (seconds[f"{kind}, {devices}"] for kind in ("fit", "program"))
    rows = {
        "Trainer.fit, loop over jitted shards": (fit, best("whole loop"), "loop"),
        "its program, loop over jitted shards": (program, best("loop"), "loop"),
        "Trainer.fit, PyTorch's loop": (fit, best("torch"), "torch"),
    }
    for name, (ours, peer, kind) in rows.items():
        target = TARGETS.get((network, kind))
        figure(f"{network}: {name}", ours, peer, "s", peer and peer / ours, target, "higher")
    one, vmap = seconds["program, 1"], best("vmap")
    name = f"{network}: program on a device, vmapped without exactness"
    figure(name, one, vmap, "s", vmap and one / vmap, 1.15)
    figure(f"{network}: Trainer.fit, its program", fit, program, "s", fit / program)
    if devices > 1:
        one = seconds["fit, 1"]
        name = f"{network}: Trainer.fit on {devices} devices, on one"
        figure(name, fit, one, "s", one / fit, better="higher")


def main(repeats: int = 9, quick: bool = False) -> None:
    """Times both networks.

    Args:
      repeats: timed calls of each.
      quick: fewer of them; 2 slices and 3 epochs instead of 4 and 10; no choice of options.
    """
    meshes.one_cpu_device_per_core()
    repeats, slices, epochs = (3, 2, 3) if quick else (repeats, 4, 10)
    for network in (SMALL, LARGE):
        measure(network, slices, epochs, repeats, quick)
    show()


if __name__ == "__main__":
    tyro.cli(main)
