"""What reads a run: probes, embeddings and the command line."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourfold.runtime.checkpoint import Checkpoints
from vicreg import augment, classify, cli, data, load, models, probe, train
from vicreg.train import pretrain


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    state = pretrain(tiny(epochs=1), path, num_devices=1, quiet=True)
    return path, state


@pytest.fixture(scope="module")
def report(run, tiny):
    path, _ = run
    tasks = ("linear", "knn", "semi10")
    return probe.probe(path, dataclasses.replace(tiny().evaluation, tasks=tasks), quiet=True)


def test_every_score_is_reported(report, run):
    path, _ = run
    assert report["checkpoint"] == 12 and set(report["knn"]) == {"20", "200"}
    for task, epochs, images in (("linear", 3, 400), ("semi10", 2, 40)):
        scores = report[task]
        assert scores["images"] == images and scores["last"]["epoch"] == epochs
        assert 0 <= scores["last"]["top1"] <= scores["best"]["top1"] <= 1
        assert scores["best"]["top1"] <= scores["best"]["top5"] <= 1
    kept = json.loads((path / "probe" / "step_000000000012.json").read_text())
    assert kept.pop("config")["tasks"] == ["linear", "knn", "semi10"] and kept == report


def test_a_finished_probe_is_read_and_a_killed_one_goes_on(report, run, tiny, monkeypatch):
    path, _ = run
    evaluation = dataclasses.replace(tiny().evaluation, tasks=("linear",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "_Functions", lambda *a: pytest.fail("trained again"))
        assert probe.probe(path, evaluation, quiet=True)["linear"] == report["linear"]
    # The same recipe in another folder, cut in its second epoch.
    loaded = load.load(path)
    sources = [train.open_images(loaded.config, split, quiet=True) for split in ("train", "test")]
    recipe = classify.Recipe(3, 64, 1.0, 0.0, 1e-6, 0)
    scored = []

    class Cut(classify._Functions):
        def score(self, *args):
            scored.append(args)
            if len(scored) == 2:
                raise KeyboardInterrupt
            return super().score(*args)

    folder = path.parent / "cut"
    monkeypatch.setattr(classify, "_Functions", Cut)
    with pytest.raises(KeyboardInterrupt):
        classify.fit(loaded, *sources, recipe, folder, quiet=True)
    assert Checkpoints(folder / "checkpoints").steps() == [6]
    history = classify.fit(loaded, *sources, recipe, folder, quiet=True)
    assert history[-1] == report["linear"]["last"] and len(history) == 3


def test_features_are_the_backbone_s_in_evaluation_mode(run):
    path, state = run
    loaded = load.load(path)
    for a, b in zip(
        jax.tree.leaves(loaded.variables["params"]),
        jax.tree.leaves(state.params["backbone"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    source = train.open_images(loaded.config, "test", quiet=True)
    found = classify.features(loaded, source, 48, quiet=True)
    assert found.features.shape == (200, 16) and found.features.dtype == np.float32
    batch = source.take(np.arange(200))
    np.testing.assert_array_equal(found.labels, batch["label"])
    images = augment.for_evaluation(batch["image"], batch["size"], loaded.config.augment)
    backbone = models.make_backbone(loaded.config.model)
    want = backbone.apply(loaded.variables, images, train=False)
    np.testing.assert_allclose(found.features, want, rtol=1e-4, atol=1e-5)


def test_step_0_is_the_network_that_the_run_started_from(run, tiny):
    from vicreg import learner

    path, _ = run
    start = learner.init(learner.make(tiny(epochs=1), 12, 10), jax.random.key(0), (12, 12, 1))
    for a, b in zip(
        jax.tree.leaves(load.load(path, 0).variables["params"]),
        jax.tree.leaves(start.params["backbone"]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_embed_writes_files_that_numpy_reads(run, capsys):
    path, _ = run
    out = path.parent / "features" / "digits.npy"
    cli.main(["embed", "--run", str(path), "--out", str(out), "--quiet"])
    assert capsys.readouterr().out.split() == [str(out), str(out.with_name("digits_labels.npy"))]
    assert np.load(out).shape == (200, 16)
    labels = np.load(out.with_name("digits_labels.npy"))
    assert labels.dtype == np.int32 and np.bincount(labels).tolist() == [20] * 10
    with pytest.raises(ValueError, match="must end in .npy, found"):
        probe.embed(path, out.with_suffix(".csv"))


def test_the_command_line_probes_as_the_run_says(run, capsys):
    path, _ = run
    cli.main(["probe", "--run", str(path), "--no-augment", "--quiet"])
    trained = json.loads(capsys.readouterr().out)
    assert trained["linear"]["last"]["epoch"] == 3  # the run's own evaluation.epochs
    cli.main(["probe", "--run", str(path), "--no-augment", "--random", "--quiet", "--tasks", "knn"])
    untrained = json.loads(capsys.readouterr().out)
    assert untrained["checkpoint"] == 0 and "linear" not in untrained
    assert trained["knn"] != untrained["knn"]


def test_another_architecture_is_refused_by_name(run, tmp_path):
    path, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["width"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    message = r"not a checkpoint of the convnet of width 8.*saved float32\[4\]"
    with pytest.raises(ValueError, match=message):
        load.load(copy)
    config["model"]["depth"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ModelConfig has no field .*depth"):
        load.load(copy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sing"], "unknown command 'sing'; allowed: pretrain, probe, embed, presets"),
        (["pretrain"], "give --preset, one of imagenet-r50-1000ep"),
        (["pretrain", "--preset", "cifar"], "unknown preset 'cifar'; allowed: imagenet"),
        (["pretrain", "--resume"], "needs --out"),
        (["pretrain", "--preset", "digits-laptop", "--epochs", "0"], "epochs must be above 0"),
        (
            ["pretrain", "--preset", "mnist-small", "--data-dir", "nowhere", "--quiet"],
            "nowhere",
        ),
        (["pretrain", "--preset=mnist-small", "--data=nothing", "--data-dir=nowhere"], "nothing"),
        (["probe", "--run", "nowhere"], "no run: nowhere does not exist"),
        (["presets", "all"], "takes no options"),
    ],
)
def test_bad_words_are_named(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        cli.main(words)
    assert message in str(error.value) + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_random_and_a_checkpoint_exclude_each_other(run):
    path, _ = run
    with pytest.raises(SystemExit, match="no --checkpoint with it"):
        cli.main(["probe", "--run", str(path), "--random", "--checkpoint", "12"])


def test_presets_are_listed_with_what_to_expect(capsys):
    cli.main(["presets"])
    out = capsys.readouterr().out
    for name, known in (
        ("imagenet-r50-1000ep", "73.2"),
        ("imagenet-r50-100ep", "68.6"),
        ("cifar10-r18-1000ep", "92.07"),
        ("mnist-small", "vicreg pretrain --preset mnist-small"),
        ("digits-laptop", "%"),
    ):
        assert name in out and known in out.split(name, 1)[1]


def test_help_names_short_options(capsys):
    cli.main(["--help"])
    assert "--data-dir" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "--help"])
    assert stop.value.code == 0
    assert "--loss.variance-weight" in capsys.readouterr().out


def test_a_batch_of_few_images_is_scored(run):
    """As of 1 % of the labels; and fewer neighbours than asked for."""
    path, _ = run
    loaded = load.load(path)
    source = train.open_images(loaded.config, "train", quiet=True)
    few = data.subset(source, np.arange(5))
    found = classify.features(loaded, few, 256, quiet=True)
    assert found.features.shape == (5, 16)
    assert list(probe.nearest(found, found, num_classes=10)) == ["5"]
    with pytest.raises(ValueError, match="2 of the 5 train features are not finite"):
        bad = found._replace(features=jnp.where(jnp.arange(5)[:, None] < 2, jnp.nan, 0.0))
        list(
            classify.heads.fit(
                bad, found, num_classes=10, epochs=1, batch_size=2, lr=1.0, weight_decay=0, seed=0
            )
        )
