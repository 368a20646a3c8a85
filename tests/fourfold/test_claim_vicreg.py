"""The two VICReg claims: a small run, its resumption, its judgements, and memory by shapes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from fourfold.claims import _vicreg_report as report
from fourfold.claims import load, vicreg_memory
from fourfold.claims import vicreg_collapse as claim
from vicreg import baselines, losses

PLAN = report.Plan("digits-laptop", "digits", seeds=2, epochs=2, size=12)
TWO = {name: claim.METHODS[name] for name in ("VICReg", "random")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("claim")
    messages = []
    result = claim.run_plan(PLAN, TWO, "laptop", out, lambda f, m: messages.append((f, m)))
    return out, result, messages


def test_it_runs_and_reports(done):
    out, result, messages = done
    fractions = [fraction for fraction, _ in messages]
    assert fractions == sorted(fractions) and 0 <= fractions[0] and fractions[-1] <= 1
    figures = {figure.name: figure for figure in result.figures}
    assert all(np.isfinite(f.ours) and f.low <= f.ours <= f.high for f in result.figures)
    assert figures["VICReg: linear"].paper == 73.2 and figures["random: linear"].paper is None
    # Guessing gives 10 %.
    assert all(20 < figures[f"{name}: linear"].ours < 100 for name in TWO)
    assert "random: std of the embeddings" not in figures, "it is not trained"
    assert len(result.plots) == 3 and all(p.png.startswith(b"\x89PNG") for p in result.plots)
    assert result.seeds == (0, 1) and result.seconds > 0
    with np.load(out / "VICReg.npz") as file:
        assert file["linear"][0] != file["linear"][1], "the seeds are the same"
        assert file["spectrum"].shape[0] == 2 and np.all(file["spectrum"][:, 0] == 1)
        assert np.all(np.diff(file["spectrum"], axis=1) <= 0)


def test_a_killed_claim_loses_one_method_at_most(done, monkeypatch):
    out, result, _ = done
    ran = []

    def train_and_measure(config, *rest):
        ran.append(config.loss.variance_weight)
        raise KeyboardInterrupt

    monkeypatch.setattr(claim, "train_and_measure", train_and_measure)
    again = claim.run_plan(PLAN, TWO, "laptop", out, lambda f, m: None)
    assert again.figures == result.figures and not ran
    more = {**TWO, "no variance": claim.METHODS["no variance"]}
    with pytest.raises(KeyboardInterrupt):
        claim.run_plan(PLAN, more, "laptop", out, lambda f, m: None)
    assert ran == [0.0]


def test_every_method_differs_from_vicreg_as_its_name_says():
    configs = {name: claim.config_of(PLAN, changes) for name, changes in claim.METHODS.items()}
    first = configs["VICReg"]
    assert (first.epochs, first.augment.size, first.loss.name) == (2, 12, "vicreg")
    assert configs["random"] == first
    for name in ("variance", "covariance", "invariance"):
        changed = dataclasses.replace(first.loss, **{f"{name}_weight": 0.0})
        assert configs[f"no {name}"].loss == changed != first.loss
    assert all(c.optim == first.optim and c.epochs == 2 for c in configs.values())


@pytest.mark.parametrize("name", ["vicreg_collapse", "vicreg_memory"])
def test_an_unknown_scale_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="scale must be one of laptop, gpu, paper, found 'huge'"):
        load(name)("huge", tmp_path, lambda f, m: None)


def results_of(linear, std=0.5, rank=30.0):
    return {
        "linear": np.array(linear),
        "std": np.full((2, 3), std),
        "rankme": np.array([[9, 9, rank], [9, 9, rank + 1]]),
    }


def test_the_verdict_follows_the_numbers():
    results = {
        "VICReg": results_of([0.90, 0.92]),
        "random": results_of([0.60, 0.91]),
        "SimCLR": results_of([0.93, 0.95]),
        "supervised": results_of([0.96, 0.97]),
        "no variance": results_of([0.5, 0.6], std=0.02),
        "no covariance": results_of([0.7, 0.8], rank=2.0),
    }
    text = report.verdict(results)
    assert text.startswith("VICReg learns features better than untrained ones: not told apart;")
    assert "and than SimCLR's: the opposite" in text
    assert "supervised ones are better still: yes; the covariance term improves them: yes" in text
    assert "embeddings collapse: yes (std 0.020)" in text
    assert "redundant: yes (effective rank 2 against 30)" in text
    assert "invariance" not in text and "Barlow" not in text, "not measured"
    results["no variance"] = results_of([0.5, 0.6], std=0.7)
    assert "embeddings collapse: no (std 0.700)" in report.verdict(results)


def test_memory_follows_the_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(vicreg_memory, "DIMS", 512)
    monkeypatch.setitem(vicreg_memory.ROWS, "laptop", (64, 256, 1024, 2048))
    seen = []
    result = vicreg_memory.run("laptop", tmp_path, lambda f, m: seen.append(f))
    figures = {figure.name: figure.ours for figure in result.figures}
    # All pairs of 2N = 4,096 rows, once at least, against N×D twice and a few more.
    assert figures["NT-Xent, batch 2,048"] >= 4 * 4096**2 / 2**20
    assert figures["VICReg, batch 2,048"] < 16 * 4 * 2048 * 512 / 2**20
    assert figures["VICReg, batch 64"] < 1 <= figures["VICReg, always D×D, batch 64"]
    assert "batch: yes" in result.verdict and "square: yes" in result.verdict
    assert seen == sorted(seen) and len(seen) == 12 and len(result.plots) == 1


def test_memory_is_the_compiler_s():
    def count(loss, n):
        return vicreg_memory.temporaries(loss, n, 64)

    contrast = functools.partial(baselines.nt_xent, temperature=0.2)
    assert 3 < count(contrast, 2048) / count(contrast, 1024) < 5
    assert 1.5 < count(losses.vicreg_loss, 2048) / count(losses.vicreg_loss, 1024) < 2.5

    def stored(a, b):
        return (jax.numpy.square(jax.numpy.sort(a @ b.T)).sum(), {})

    assert count(stored, 1024) >= 4, "a 1,024² matrix of float32 is 4 MiB"
