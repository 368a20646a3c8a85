"""Audits see records that are there, and none where they were forgotten."""

import dataclasses

import jax
import numpy as np
import pytest

from fourfold.runtime import mesh as meshes
from unlearn import models, oracles, partition
from unlearn.audit import audit_ensembles
from unlearn.config import DataConfig, ModelConfig, OptimConfig, RunConfig, SisaConfig
from unlearn.data import Table
from unlearn.examine import audit
from unlearn.run import Run

CONFIG = SisaConfig(
    shards=2, slices=2, capacity=64, epochs=8, batch_size=16, optim=OptimConfig(lr=0.1)
)
N, K = 120, 10


def table():
    """Records with labels at random, so that nothing but having seen one tells its label."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 64)).astype(np.float32)
    return Table(np.arange(N), x, rng.integers(0, 2, N).astype(np.int32))


@pytest.fixture(scope="module")
def found():
    # Of one shard, which sees every record: what there is to see is to be seen.
    config = dataclasses.replace(CONFIG, shards=1, capacity=N, epochs=40, model=ModelConfig((64,)))
    learner = models.make_learner(config.model, config.optim, 2)
    seen = []
    margins = oracles.margins(
        learner,
        config,
        table(),
        np.arange(N) < K,
        16,
        meshes.make_mesh(1),
        progress=lambda *at: seen.append(at),
    )
    return margins, seen


def test_margins_are_of_independent_ensembles(found):
    margins, seen = found
    assert all(m.shape == (16, K) and np.isfinite(m).all() for m in margins)
    assert all(len(np.unique(m, axis=0)) == 16 for m in margins)
    assert seen == [(12, 32), (24, 32), (28, 32), (32, 32)]
    # Forgetting changed the very ensembles that had kept the records, above all on those.
    assert margins.kept.mean() > margins.unlearned.mean() + 1


def test_the_audit_sees_what_was_kept_and_not_what_was_forgotten(found):
    margins, _ = found
    kept = {f.name: f for f in audit_ensembles(margins.kept, margins.retrained)}
    gone = {f.name: f for f in audit_ensembles(margins.unlearned, margins.retrained)}
    assert kept["u-lira auc"].trace and kept["u-lira auc"].unlearned.value > 0.8
    assert not any(f.trace for f in gone.values())


def test_a_run_is_audited_and_not_changed(tmp_path):
    data = table()
    np.savez(tmp_path / "d.npz", x=data.x, y=data.y + 5, ids=data.ids)
    np.savez(tmp_path / "old.npz", x=data.x[:3], y=data.y[:3] + 5, ids=data.ids[:3] + 1000)
    np.savez(tmp_path / "odd.npz", x=data.x[:3], y=data.y[:3], ids=data.ids[:3] + 1000)
    config = RunConfig(DataConfig(str(tmp_path / "d.npz")), CONFIG)
    loaded = Table(data.ids, data.x, data.y + 5)
    run = Run.create(tmp_path / "run", config, loaded)  # it need not even be trained
    after, before = audit(run, [1, 2], str(tmp_path / "old.npz"), 8, quiet=True)
    assert after.title == "Forgotten: 5 records, 8 ensembles of each kind"
    assert [f.name for f in after.findings] == [f.name for f in before.findings]
    assert len(run.table().ids) == N and not run.status()["requests"]
    for ids, file, models_, message in (
        ([], None, 8, "needs ids or a file"),
        ([1], None, 7, "at least 8 models; found 1 records, 7"),
        ([5000], None, 8, "5000"),
        ([1], str(tmp_path / "odd.npz"), 8, "unknown labels"),
        ([1], str(tmp_path / "d.npz"), 8, "more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            audit(run, ids, file, models_, quiet=True)


def test_an_ensemble_of_a_group_is_one_of_its_own():
    """Trained beside eleven others or alone, it has the same bits."""
    data = table()
    learner = models.make_learner(ModelConfig((8,)), CONFIG.optim, 2)
    names = [(0, "x", m) for m in range(3)]
    mesh = meshes.make_mesh(1)
    none = np.zeros(N, bool)
    group = oracles._Group(learner, CONFIG, data, mesh, names)
    alone = oracles._Group(learner, CONFIG, data, mesh, names[:1])
    together, single = (g.train(none, {}) for g in (group, alone))
    for place, state in single.items():
        jax.tree.map(np.testing.assert_array_equal, state, together[place])
    assert len(together) == 3 * len(single)
    shard = partition.assign(data.ids, CONFIG, b"k" * 16).shard
    assert shard.max() == 1
