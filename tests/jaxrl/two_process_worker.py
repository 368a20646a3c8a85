"""One process of a distributed run on Atari, which notes what its learner was given.

`two_process_worker.py FOLDER` joins the job that the JAX_* environment variables describe, trains,
goes on with the run from its checkpoint, and leaves `FOLDER/PROCESS.npz`: per update `i` this
process's rows of the batch `i/batch/FIELD` and the hooks before it `i/hooks/LAYER/NAME`, whether a
sync followed (`i/sync`), and all leaves of the agent on each of this process's devices at the
start (`start/LEAF`) and at the end of each of the two trainings (`end0/DEVICE/LEAF`, `end1/...`).
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from fourfold.runtime import mesh
from jaxrl import compiled, train
from jaxrl.config import AgentConfig, AtariConfig, Exploration

FIRST_STEPS, ALL_STEPS = 96, 136


def config(steps: int = ALL_STEPS) -> AtariConfig:
    """24 agent steps without updates, then one update per 4, a sync every 5 updates."""
    return AtariConfig(
        agent=AgentConfig(spectral=("-2",)),
        exploration=Exploration(warmup=24, end_step=64, end=0.0),
        steps=steps,
        num_envs=4,
        batch_size=8,
        target_period=20,
        replay_capacity=1_000,
        evaluate_every=0,
        checkpoint_every=48,
        log_every=16,
    )


def leaves_of(tree, device: int = 0) -> dict[str, np.ndarray]:
    """Named leaves, as this process's `device` holds them."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf.addressable_data(device))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def main(folder: Path) -> None:
    """Trains twice; see the module's docstring."""
    mesh.initialize()
    notes: dict[str, np.ndarray] = {}
    updates = 0
    compile_functions = compiled.compile_functions

    def noting(*args):
        functions = compile_functions(*args)

        def learn(state, batches):
            nonlocal updates
            if not notes:
                notes.update({f"start/{name}": x for name, x in leaves_of(state).items()})
            for name, leaf in batches._asdict().items():
                shards = sorted(leaf.addressable_shards, key=lambda s: s.index[1].start or 0)
                rows = np.concatenate([np.asarray(shard.data) for shard in shards], axis=1)
                notes[f"{updates}/batch/{name}"] = rows[0]
            for name, leaf in leaves_of(state.spectral).items():
                notes[f"{updates}/hooks/{name}"] = leaf
            updates += 1
            return functions.learn(state, batches)

        def sync(state):
            notes[f"{updates - 1}/sync"] = np.ones(1)
            return functions.sync(state)

        return functions._replace(learn=learn, sync=sync)

    compiled.compile_functions = noting
    for part, (steps, resume) in enumerate(((FIRST_STEPS, False), (ALL_STEPS, True))):
        changed = dataclasses.replace(config(), steps=steps)
        state = train.train(changed, folder / "run", resume=resume, quiet=True)
        for device in range(jax.local_device_count()):
            leaves = leaves_of(state, device)
            notes.update({f"end{part}/{device}/{name}": x for name, x in leaves.items()})
    np.savez(folder / f"{jax.process_index()}.npz", **notes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
