"""The MinAtar claim at a toy scale, its resumption, its measures and its judgements."""

import dataclasses

import jax
import numpy as np
import pytest

from fourfold.claims import _minatar_report as report
from fourfold.claims import _minatar_smoothness as smoothness
from fourfold.claims import arrays, load, store
from fourfold.claims import jaxrl_minatar as claim
from jaxrl import agent as agents
from jaxrl import networks
from jaxrl.config import AgentConfig, Exploration

PLAN = report.Plan(("breakout",), 2, 800, 100, 200, Exploration(200, 400))
TWO = {name: claim.VARIANTS[name] for name in ("C51", "SN[-2]")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("claim")
    messages = []
    result = claim.run_plan(PLAN, TWO, "laptop", out, lambda f, m: messages.append((f, m)))
    return out, result, messages


def test_it_runs_and_reports(done):
    _, result, messages = done
    fractions = [fraction for fraction, _ in messages]
    assert fractions == sorted(fractions) and 0 <= fractions[0] and fractions[-1] == 1
    names = [figure.name for figure in result.figures]
    assert "breakout, SN[-2]: return" in names and "breakout: SN[-2] minus C51" in names
    headline, measured = result.figures[:2], result.figures[2:]
    assert all(np.isfinite(f.ours) and f.low <= f.ours <= f.high for f in measured)
    assert [(f.paper, f.ours and round(f.ours, 2)) for f in headline] == [
        (248.45, None),
        (227.05, 227.05),
    ]
    assert len(result.plots) == 2 and all(p.png.startswith(b"\x89PNG") for p in result.plots)
    assert result.seeds == (0, 1) and result.seconds > 0
    norm = next(f for f in result.figures if f.name.startswith("breakout, SN[-2]: norm"))
    assert norm.ours == pytest.approx(1, abs=0.05) and norm.paper == "≤ 1"
    plain = next(f for f in result.figures if f.name.startswith("breakout, C51: norm"))
    assert plain.ours > 1.5


def test_it_survives_being_stored(done, tmp_path):
    _, result, _ = done
    store.save(dataclasses.replace(result, date="2024-01-01"), tmp_path)
    assert store.load(tmp_path, "laptop").figures == result.figures


def test_a_killed_claim_loses_one_variant_at_most(done, monkeypatch):
    out, result, _ = done
    monkeypatch.setattr(claim, "train_and_measure", lambda *a: pytest.fail("trained again"))
    again = claim.run_plan(PLAN, TWO, "laptop", out, lambda f, m: None)
    assert again.figures == result.figures and again.seconds == result.seconds
    # Another configuration is not taken for this one.
    longer = dataclasses.replace(PLAN, steps=900)
    config = claim.config_of(longer, "breakout", TWO["C51"])
    assert arrays.load(out / "breakout-C51.npz", claim.settings(config)) is None


def test_an_unknown_scale_is_refused(tmp_path):
    with pytest.raises(ValueError, match="scale must be one of laptop, gpu, paper, found 'huge'"):
        load("jaxrl_minatar")("huge", tmp_path, lambda f, m: None)


def test_measures_against_brute_force():
    config = AgentConfig(spectral=("-2",), num_atoms=3)
    agent = agents.make(config, networks.minatar_net(2, 3, convs=(2,), hidden=(5,)))
    learner = jax.jit(lambda key: agents.init(agent, key, (10, 10, 4)))(jax.random.key(0))
    pairs = np.random.default_rng(0).random((20, 2, 10, 10, 4)) < 0.1
    pairs[3, 1] = pairs[3, 0]  # left out, or it would divide by 0
    got = smoothness.measure(agent, learner, pairs)
    p, s = jax.device_get((learner.params, learner.spectral["fc"]))
    kernel = p["fc"]["kernel"] / (s["v"] @ p["fc"]["kernel"] @ s["u"])
    assert got["norm"] == pytest.approx(np.linalg.norm(kernel, 2), rel=1e-5)

    def forward(x):
        conv = np.zeros((8, 8, 2))
        for i in range(3):
            for j in range(3):
                conv += x[i : i + 8, j : j + 8] @ p["conv1"]["kernel"][i, j]
        hidden = np.maximum(conv + p["conv1"]["bias"], 0).reshape(-1)
        out = hidden @ kernel + p["fc"]["bias"]
        logits = (np.maximum(out, 0) @ p["head"]["kernel"] + p["head"]["bias"]).reshape(2, 3)
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return hidden, out, probs @ [-10, 0, 10]

    layer, q = [], []
    for x, y in np.delete(pairs, 3, axis=0).astype(float):
        a, b = forward(x), forward(y)
        layer.append(np.linalg.norm(a[1] - b[1]) / np.linalg.norm(a[0] - b[0]))
        q.append(np.linalg.norm(a[2] - b[2]) / np.linalg.norm(x - y))
    assert got["layer"] == pytest.approx(max(layer), rel=1e-4)
    assert got["layer"] <= got["norm"] * (1 + 1e-6)
    assert got["q_max"] == pytest.approx(max(q), rel=1e-4)
    assert got["q_mean"] == pytest.approx(np.mean(q), rel=1e-4)


def result_of(level: float, norm: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(int(10 * level))
    measured = {name: np.full(6, norm) for name in ("norm", "layer", "q_mean")}
    returns = level + rng.normal(size=(10, 6)) * 0.2
    other = {"steps": np.arange(10), "seconds": np.array(1.0), "pairs": np.zeros((4, 2))}
    return {"return": returns, **measured, **other}


def test_the_verdict_follows_the_numbers():
    good = {"C51": 2.0, "SN[-2]": 4.0, "SN[all]": 1.0, "divGrad[-2]": 4.0}
    plan = dataclasses.replace(PLAN, seeds=6)

    def verdict(levels, norm):
        results = {"breakout": {name: result_of(x, norm) for name, x in levels.items()}}
        return report.write(results, plan, "laptop").verdict

    assert verdict(good, 0.99).startswith("Normalising the") and "divGrad" in verdict(good, 0.99)
    assert verdict(good, 0.99).count("yes") == 3 and "not told apart" in verdict(good, 0.99)
    bad = {"C51": 4.0, "SN[-2]": 2.0, "SN[all]": 5.0, "divGrad[-2]": 3.0}
    assert verdict(bad, 1.2).count("the opposite") == 2
    assert "better (breakout)" in verdict(bad, 1.2) and "by 1: no" in verdict(bad, 1.2)


def test_intervals_cover():
    rng = np.random.default_rng(1)
    a, b = rng.normal(3, 1, 40), rng.normal(1, 2, 40)
    low, high = report.difference_interval(a, b)
    width = 2 * 1.96 * np.sqrt(a.var() / 40 + b.var() / 40)
    assert low < a.mean() - b.mean() < high
    assert high - low == pytest.approx(width, rel=0.1)
    late = np.zeros((10, 3))
    late[-2:] = [[1, 2, np.nan], [3, 4, 5]]
    np.testing.assert_array_equal(report.final({"return": late}), [2, 3, 5])


def test_successive_observations_are_those_of_a_replay(done):
    out, _, _ = done
    settings = claim.settings(claim.config_of(PLAN, "breakout", TWO["C51"]))
    pairs = arrays.load(out / "breakout-C51.npz", settings)["pairs"]
    assert pairs.shape == (smoothness.PAIRS, 2, 10, 10, 4) and pairs.dtype == bool
    # In Breakout plane 0 is the paddle, a single cell, and plane 1 the ball.
    assert (pairs[..., 0].sum(axis=(2, 3)) == 1).all() and (
        pairs[..., 1].sum(axis=(2, 3)) == 1
    ).all()
    columns = pairs[..., 0].any(axis=2).argmax(axis=-1)
    assert np.mean(np.abs(columns[:, 0] - columns[:, 1]) <= 1) > 0.9
