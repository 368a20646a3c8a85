"""A run in its folder: exact, durable whatever kills it, and clean of what it forgot."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from fourfold.runtime import host_arrays
from unlearn import certificate, cli, programs, store
from unlearn.config import DataConfig, ModelConfig, OptimConfig, RunConfig, SisaConfig
from unlearn.ledger import Ledger, State
from unlearn.run import Run
from unlearn.train import forget, train

N = 90
CANARY = np.float32(1234.5678)  # a feature of the record that goes
SISA = SisaConfig(
    shards=3,
    slices=3,
    capacity=24,
    epochs=2,
    batch_size=8,
    width=2,
    optim=OptimConfig(lr=0.1),
    model=ModelConfig((5,)),
)


def write_data(path, ids=None):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 4)).astype(np.float32)
    x[7] = CANARY
    ids = np.array([f"person-{i:03d}" for i in range(N)]) if ids is None else ids
    np.savez(path, x=x, y=(x[:, 0] > 0).astype(np.int64) * 3, ids=ids)
    return DataConfig(str(path), test=str(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlearn")
    config = RunConfig(write_data(folder / "data.npz"), SISA)
    train(config, folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return Run(tmp_path / "run")


def hashes(run):
    return [shard.hash for shard in run.shards]


def scratch(run, gone):
    """Hashes of the same configuration trained on the others alone."""
    table = run.table()
    left = ~np.isin(table.ids, gone)
    from unlearn.trainer import Records

    records = Records(table.x[left], table.y[left], run.places(table.ids[left]))
    states = {}
    for shard, slice_, state in run.trainer(1).fit(records, {s: 0 for s in range(3)}, None):
        states[shard, slice_] = programs.digest(state)
    return [states[shard, SISA.slices - 1] for shard in range(3)]


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def is_clean(folder, *words):
    for path, data in everything(folder).items():
        for word in (CANARY.tobytes(), *(w.encode() for w in words)):
            assert word not in data, (path, word)
        if path.suffix == ".npy" and path.name == "ids.npy":
            assert not np.isin(words, np.load(folder / path)).any()
    return True


def test_forgetting_is_exact_and_leaves_nothing(run):
    before, reference = hashes(run), scratch(run, ["person-007", "person-050"])
    assert CANARY.tobytes() in run.path.joinpath("records/g000001/x.npy").read_bytes()
    (request,) = forget(run, ["person-007", "person-050", "person-007"], "she", quiet=True)
    assert hashes(run) == reference
    affected = {s for s in range(3) if before[s] != reference[s]}
    assert set(request.before) == affected == set(request.after)
    assert request.before == {s: before[s] for s in affected}
    assert (request.state, request.who, len(request.hmacs)) == (State.ATTESTED, "she", 2)
    assert is_clean(run.path, "person-007", "person-050")
    assert len(run.table().ids) == N - 2 and run.serving().all()
    document = certificate.verify(run.certificate(1))
    assert document["who"] == "she" and document["request"] == 1
    # Slices before the first that is hit are kept as they were, later ones are new.
    for shard in affected:
        for path in run.shards[shard].folder.iterdir():
            assert path.name in ("current.json", "g000002")


def test_one_after_the_other_is_all_at_once(run):
    reference = scratch(run, [f"person-{i:03d}" for i in (3, 4, 80)])
    for i in (80, 3, 4):
        forget(run, [f"person-{i:03d}"], "he", quiet=True)
    assert hashes(run) == reference
    with run.ledger() as ledger:
        assert [r.state for r in ledger.requests()] == [State.ATTESTED] * 3


def test_unknown_ids_change_nothing(run):
    before = everything(run.path)
    for ids, message in (
        (["person-001", "nobody"], "1 of 2 ids are not in this run, or no longer: nobody"),
        ([5], "ids of this run are text, found integers: 5"),
        ([1.5], "ids must be integers or text"),
    ):
        with pytest.raises(ValueError, match=message):
            forget(run, ids, "x", quiet=True)
    after = everything(run.path)
    assert {p: d for p, d in after.items() if not p.name.startswith("ledger")} == {
        p: d for p, d in before.items() if not p.name.startswith("ledger")
    }
    assert run.status()["requests"] == []
    forget(run, ["person-001"], "x", quiet=True)
    with pytest.raises(ValueError, match="no longer: person-001"):
        forget(run, ["person-001"], "x", quiet=True)


class Killed(BaseException):
    """Nothing in the code catches it, but for what only closes files."""


STEPS = (
    (store, "write_array"),
    (store, "write_text"),
    (store, "sync"),
    (store, "sync_tree"),
    (host_arrays, "sync"),
    (store.shutil, "rmtree"),
    (store.shutil, "copyfile"),
    (Path, "rename"),
    (Path, "unlink"),
    (np, "savez"),
    (Ledger, "request"),
    (Ledger, "tombstone"),
    (Ledger, "retrained"),
    (Ledger, "purged"),
    (Ledger, "attest"),
    (certificate, "write"),
)


def kill_at(patch, moment):
    """Dies before or after the moment's half-th write."""
    count = 0

    def wrap(home, name):
        real = getattr(home, name)

        def step(*args, **options):
            nonlocal count
            count += 1
            if count == moment:
                raise Killed
            result = real(*args, **options)
            count += 1
            if count == moment:
                raise Killed
            return result

        patch.setattr(home, name, step)

    for home, name in STEPS:
        wrap(home, name)
    return lambda: count


def test_killed_at_any_write_it_ends_all_the_same(trained, tmp_path):
    ids = ["person-007", "person-050"]
    reference = scratch(Run(trained), ids)
    old = hashes(Run(trained))
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(trained, tmp_path / "count")
        count = kill_at(patch, 0)
        forget(Run(tmp_path / "count"), ids, "she", quiet=True)
        total = count()
    assert total > 60
    seen = set()
    for moment in range(1, total + 1):
        path = tmp_path / f"run{moment}"
        shutil.copytree(trained, path)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, moment)
            forget(Run(path), ids, "she", quiet=True)
        run = Run(path)
        states = [request["state"] for request in run.status()["requests"]]
        seen |= set(states)
        serving = run.serving()
        if states and states[0] != "requested":  # whatever serves has not seen them
            assert all(hashes(run)[s] == reference[s] for s in range(3) if serving[s])
        if states and states[0] in ("retrained", "purged", "attested"):
            assert serving.all() and hashes(run) == reference
        if not states:
            assert hashes(run) == old
            assert len(run.table().ids) == N
            forget(run, ids, "she", quiet=True)
        else:
            forget(run, [], "", quiet=True)
        assert hashes(run) == reference and run.serving().all()
        assert [r["state"] for r in run.status()["requests"]] == ["attested"]
        assert run.certificate(1).exists() and is_clean(path, *ids)
        shutil.rmtree(path)
    assert seen == {str(state) for state in State}


def test_killed_in_training_it_resumes(trained, tmp_path):
    config = Run(trained).config
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 60)
        train(config, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="was not trained to its end"):
        forget(Run(tmp_path / "run"), ["person-001"], "x", quiet=True)
    again = train(config, tmp_path / "run", resume=True, quiet=True)
    assert hashes(again) == scratch(again, [])


@pytest.mark.parametrize("moment", [9, 20])
def test_sigkill(trained, tmp_path, moment):
    """The real thing, in a process of its own."""
    shutil.copytree(trained, tmp_path / "run")
    program = textwrap.dedent(
        f"""
        import os, signal
        count, real = 0, os.fsync
        def fsync(number):
            global count
            count += 1
            if count == {moment}:
                os.kill(os.getpid(), signal.SIGKILL)
            real(number)
        os.fsync = fsync
        from unlearn import cli
        cli.main(["forget", "--run", {str(tmp_path / "run")!r}, "--ids", "person-007", "--quiet"])
        """
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL
    run = Run(tmp_path / "run")
    reference = scratch(run, ["person-007"])
    forget(run, [], "", quiet=True)
    assert hashes(run) == reference and is_clean(run.path, "person-007")


def test_a_backup_of_the_states_is_found_out_and_repaired(run, tmp_path):
    shutil.copytree(run.path / "shards", tmp_path / "shards")
    forget(run, ["person-007"], "x", quiet=True)
    newest = hashes(run)
    restore(run, tmp_path, "shards")
    with pytest.raises(ValueError, match="not its newest.*restored from a backup"):
        run.predict(np.zeros((1, 4), np.float32))
    assert "restored" in json.dumps(run.status())
    forget(run, [], "", quiet=True)
    assert hashes(run) == newest and run.serving().all() and is_clean(run.path, "person-007")


def test_records_that_a_backup_brings_back_are_not_learnt(run, tmp_path):
    """Their ids are gone from the ledger; that they are there shows in what training comes to."""
    for part in ("shards", "records"):
        shutil.copytree(run.path / part, tmp_path / part)
    forget(run, ["person-007"], "x", quiet=True)
    restore(run, tmp_path, "shards", "records")
    with pytest.raises(ValueError, match="not those that were left.*restoring a backup"):
        forget(run, [], "", quiet=True)
    with pytest.raises(ValueError, match="not its newest"):
        run.serving()


def restore(run, backup, *parts):
    for part in parts:
        shutil.rmtree(run.path / part)
        shutil.copytree(backup / part, run.path / part)


@pytest.mark.parametrize("parts", [["records"], ["shards"], ["records", "shards"]])
def test_tombstones_are_applied_to_a_backup_while_it_may_be_restored(tmp_path, parts):
    config = RunConfig(write_data(tmp_path / "data.npz"), SISA, backup_days=30)
    run = train(config, tmp_path / "run", quiet=True)
    shutil.copytree(run.path, tmp_path / "backup")
    forget(run, ["person-007"], "x", quiet=True)
    forget(run, ["person-008", "person-009"], "y", quiet=True)
    newest, left = hashes(run), list(run.table().ids)
    restore(run, tmp_path / "backup", *parts)
    forget(run, [], "", quiet=True)
    assert hashes(run) == newest and list(run.table().ids) == left and run.serving().all()
    assert is_clean(run.path, "person-007")
    # Nor is a request that comes in between led astray.
    restore(run, tmp_path / "backup", *parts)
    (again,) = forget(run, ["person-050"], "z", quiet=True)
    assert hashes(run) == scratch(run, []) and again.salt_destroyed is None
    with run.ledger() as ledger:
        assert ledger.match(["person-007", "person-010"]).tolist() == [True, False]
        assert ledger.expire(again.salt_due) == [1, 2, 3]
        assert not ledger.match(["person-007"]).any()


def test_a_backup_amid_a_request_does_not_come_through(run, tmp_path):
    """Old states under a tombstone: their early slices have seen what was forgotten before."""
    places = run.places(run.table().ids)
    ids = run.table().ids[places.shard == 1]
    slices = places.slice[places.shard == 1]
    first, last = ids[slices == 0][0], ids[slices == 2][0]
    shutil.copytree(run.path, tmp_path / "backup")
    forget(run, [first], "x", quiet=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store.ShardStore, "save", lambda *a: (_ for _ in ()).throw(Killed))
        forget(run, [last], "y", quiet=True)
    restore(run, tmp_path / "backup", "shards")
    reference = scratch(run, [last])
    forget(run, [], "", quiet=True)
    assert hashes(run) == reference


def test_two_at_once(run):
    with run.ledger() as ledger, ledger.exclusive():
        with pytest.raises(TimeoutError, match=str(os.getpid())):
            forget(run, ["person-001"], "x", quiet=True)
        assert run.serving().all(), "predictions go on"


def test_a_full_disk_loses_nothing(run, monkeypatch):
    import errno

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space"):
            forget(run, ["person-007"], "x", quiet=True)
    assert not run.serving().all()
    reference = scratch(run, ["person-007"])
    forget(run, [], "", quiet=True)
    assert hashes(run) == reference and run.serving().all()


def test_a_shard_that_lost_all_serves_no_more(run):
    ids = run.table().ids
    mine = ids[run.places(ids).shard == 1]
    forget(run, mine, "x", quiet=True)
    assert run.serving().tolist() == [True, False, True]
    assert run.status()["shards"][1]["state"] == "empty"
    assert np.isfinite(run.predict(np.zeros((3, 4), np.float32))).all()


def test_the_command_line(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data.npz", np.arange(N))
    words = ["--data", data.name, "--data.test", data.name, "--sisa.shards", "3"]
    words += ["--sisa.slices", "2", "--sisa.epochs", "20", "--sisa.model.hidden", "5"]
    words += ["--sisa.optim.lr", "0.1"]
    cli.main(["train", *words, "--out", "run", "--quiet"])
    found = json.loads(capsys.readouterr().out)
    assert found["records"] == N and found["accuracy"] > 0.8  # its salt is drawn: 0.89 to 0.99
    cli.main(["predict", "--run", "run", "--data", "data.npz", "--out", "probs.npy"])
    probs = np.load("probs.npy")
    assert probs.shape == (N, 2) and np.allclose(probs.sum(1), 1, atol=1e-5)
    Path("ids.txt").write_text("3\n4\n")
    capsys.readouterr()
    cli.main(["forget", "--run", "run", "--ids", "80", "--ids-file", "ids.txt", "--quiet"])
    found = json.loads(capsys.readouterr().out)
    assert found["records"] == N - 3 and found["requests"] == [1]
    cli.main(["certificate", "--run", "run", "--request", "1"])
    assert json.loads(capsys.readouterr().out)["request"]
    cli.main(["status", "--run", "run"])
    assert json.loads(capsys.readouterr().out)["records"] == N - 3
    cli.main(["plan", "--records", "60000", "--requests", "90", "--shards", "30", "--slices", "4"])
    assert "3 S = 90" in capsys.readouterr().out
    cli.main(["--help"])
    assert "forget" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["sing"], "unknown command 'sing'; allowed: train, predict, forget, plan"),
        (["train", "--data", "nowhere.csv", "--out", "x"], "no data: nowhere.csv is no file"),
        (["train", "--sisa.slices", "99", "--out", "x"], "99 slices are more than"),
        (
            ["train", "--sisa.shards", "2", "--sisa.groups", "1.0", "2", "--out", "x"],
            "a run in a folder keeps no probabilities",
        ),
        (["train", "--sisa.shards", "2000", "--out", "x"], "empty"),
        (["forget", "--run", "nowhere", "--ids", "1"], "no run: nowhere does not exist"),
        (["forget", "--run", "nowhere"], "give --ids or --ids-file"),
        (["predict", "--run", "x", "--data", "y", "--out", "z.txt"], "must end in .npy"),
        (["plan", "--records", "9", "--requests", "2", "--shards", "2"], "give both or neither"),
    ],
)
def test_bad_words_are_named(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        cli.main(words)
    assert message in str(error.value) + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_predictions_want_records_of_the_right_shape(run):
    with pytest.raises(ValueError, match=r"shape \(4,\), found \(5,\)"):
        run.predict(np.zeros((2, 5), np.float32))


def test_predictions_are_the_mean_of_the_shards(run):
    x = run.table().x[:10]
    like, learner = run.like, run.learner()
    from unlearn import sisa

    probs = [
        sisa.probabilities(learner, jax.tree.map(np.asarray, s.load(2, like)), x)
        for s in run.shards
    ]
    np.testing.assert_allclose(run.predict(x, batch_size=4), np.mean(probs, 0), rtol=1e-5)
