"""One process of a distributed run on Atari, which notes what its learner was given.

`two_process_worker.py FOLDER` joins the job that the JAX_* environment variables describe, trains,
goes on with the run from its checkpoint, and leaves `FOLDER/PROCESS.npz`:

    start/LEAF             the agent at the start
    UPDATE/batch/FIELD     this process's rows of the batch of an update
    UPDATE/hooks/LEAF      the hooked layers' vectors before it
    UPDATE/sync            whether a sync of the target network followed it
    end0/LEAF, end1/LEAF   the agent at the end of each training, the same on all its devices
    outputs                of an evaluation, which each process does by itself
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from fourfold.runtime import mesh
from jaxrl import compiled, evaluate, networks, train
from jaxrl.config import AgentConfig, AtariConfig, Exploration

FIRST_STEPS, ALL_STEPS = 96, 136
CONFIG = AtariConfig(
    agent=AgentConfig(spectral=("-2",)),
    exploration=Exploration(warmup=24, end_step=64, end=0.0),
    steps=ALL_STEPS,
    num_envs=4,
    batch_size=8,
    target_period=20,
    replay_capacity=1_000,
    evaluate_every=0,
    checkpoint_every=48,
    log_every=16,
)


def small_net(actions: int, atoms: int | None, **options) -> networks.ConvNet:
    """Takes the Nature CNN's input and compiles in a second."""
    return networks.ConvNet(actions, atoms, ((4, 12, 12), (8, 3, 2)), (16,), 1 / 255, **options)


def leaves_of(tree, device: int = 0) -> dict[str, np.ndarray]:
    """Named leaves, as this process's `device` holds them."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf.addressable_data(device))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def noting(notes: dict[str, np.ndarray], functions):
    """The functions of a run, which also fill `notes`."""
    updates = sum(name.endswith("batch/a_tm1") for name in notes)

    def learn(state, batches):
        nonlocal updates
        if not updates:
            notes.update({f"start/{name}": x for name, x in leaves_of(state).items()})
        for name, leaf in batches._asdict().items():
            shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[1].start or 0)
            rows = np.concatenate([np.asarray(shard.data) for shard in shards], axis=1)
            notes[f"{updates}/batch/{name}"] = rows[0]
        notes.update(
            {f"{updates}/hooks/{name}": x for name, x in leaves_of(state.spectral).items()}
        )
        updates += 1
        return functions.learn(state, batches)

    def sync(state):
        notes[f"{updates - 1}/sync"] = np.ones(1)
        return functions.sync(state)

    return functions._replace(learn=learn, sync=sync)


def main(folder: Path) -> None:
    """Trains twice; see the module's docstring."""
    mesh.initialize()
    networks.nature_net = small_net
    notes: dict[str, np.ndarray] = {}
    compile_functions = compiled.compile_functions
    compiled.compile_functions = lambda *args: noting(notes, compile_functions(*args))
    for part, steps in enumerate((FIRST_STEPS, ALL_STEPS)):
        config = dataclasses.replace(CONFIG, steps=steps)
        state = train.train(config, folder / "run", resume=part == 1, quiet=True)
        ends = [leaves_of(state, device) for device in range(jax.local_device_count())]
        for end in ends:
            jax.tree.map(np.testing.assert_array_equal, end, ends[0])
        notes.update({f"end{part}/{name}": x for name, x in ends[0].items()})
    policy = evaluate.Policy(train.make_agent(CONFIG, 6), state, 0.0, 2)
    policy(np.full((2, 84, 84), 200, np.uint8), np.ones(2, bool))
    np.savez(folder / f"{jax.process_index()}.npz", **notes, outputs=policy.outputs())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
