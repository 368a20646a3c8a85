"""The update against a float64 transcription of it: under every compiler, whole and in parts."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from fourfold.runtime import mesh as meshes
from vicreg import accumulate, augment, compiled, losses, models, monitor, step
from vicreg import learner as learners
from vicreg.config import (
    AugmentConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    ViewConfig,
)
from vicreg.step import Embedded

SIZE, ROWS, CLASSES, DIM = 8, 32, 4, 16
EPOCHS, PER_EPOCH, UPDATES = 4, 2, 4
LOSSES = ("vicreg", "simclr", "barlow_twins", "supervised")
VIEW = ViewConfig(area=(0.5, 1.0), jitter=0.0, gray=0.0, blur=0.0, solarize=0.0)
# Moves every parameter by far more than what is tolerated, from the second update on.
OPTIM = OptimConfig(base_lr=0.16, warmup_epochs=1.0, weight_decay=1e-2, trust_coefficient=1.0)

# Compiling takes nearly all the time here, and these options take most of that away.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


class Flat(nn.Module):
    """The smallest backbone with BatchNorm; its features are never 0, so that no scores tie."""

    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(6, use_bias=False, dtype=self.dtype, name="dense")(x.reshape(len(x), -1))
        x = models.BatchNorm(jnp.dtype(self.dtype), self.axis_name, name="bn")(x, train)
        return nn.tanh(x).astype(jnp.float32)


def config(loss="vicreg", dtype="float32", **changes):
    default = {
        "augment": AugmentConfig(SIZE, VIEW, VIEW, mean=(0.5,), std=(0.25,)),
        "model": ModelConfig("convnet", width=4, expander=(8, DIM), dtype=dtype),
        "loss": LossConfig(loss),
        "optim": OPTIM,
        "epochs": EPOCHS,
        "batch_size": ROWS,
    }
    return PretrainConfig(**default | changes)


@functools.cache
def make(loss, axis_name=None, dtype="float32", **changes):
    made = learners.make(config(loss, dtype, **changes), PER_EPOCH, CLASSES, axis_name)
    return made._replace(backbone=Flat(dtype, axis_name))


@functools.cache
def compiled_init(supervised):
    learner = make("supervised" if supervised else "vicreg")
    return jit(lambda key: learners.init(learner, key, (SIZE, SIZE, 1)))


@functools.cache
def start(loss, seed=0):
    return compiled_init(loss == "supervised")(jax.random.key(seed))


@functools.cache
def update(loss):
    """Plain jit on one device."""
    return jit(functools.partial(step.update, make(loss)))


def batch(seed, rows=ROWS):
    """Two views of patterns that say their class, under noise; the views' statistics differ."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows).astype(np.int32)
    patterns = np.random.default_rng(99).normal(size=(CLASSES, SIZE, SIZE, 1))[labels]
    noise_a, noise_b = rng.normal(size=(2, *patterns.shape))
    return {
        "view_a": np.float32(patterns + 0.5 * noise_a),
        "view_b": np.float32(0.6 * patterns + 0.5 * noise_b + 0.3),
        "label": labels,
    }


def run(one_update, state, split=lambda batch: batch):
    """Some updates; the state after them and the last one's metrics."""
    metrics = {}
    for i in range(UPDATES):
        state, metrics = jax.block_until_ready(one_update(state, split(batch(i))))
    return state, metrics


@functools.cache
def expected(loss):
    return run(update(loss), start(loss))


def comparable(state):
    """A state without its key, which has no numbers to compare."""
    return state.replace(key=jax.random.key_data(state.key))


def assert_close(got, want, atol=1e-5):
    """To `atol` of the largest number of each array, or of 1."""

    def close(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        tolerance = atol * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, got, want)


def assert_as_expected(loss, state, metrics):
    wanted_state, wanted_metrics = expected(loss)
    assert_close(comparable(state), comparable(wanted_state))
    assert_close(metrics, wanted_metrics)


# ---- the update in float64 -----------------------------------------------------------------------


def network(params, images):
    """One view of one part: features, embeddings, and the moments that BatchNorm keeps."""

    def batch_norm(x, p):
        mean, var, n = x.mean(0), x.var(0), len(x)
        y = (x - mean[None]) / jnp.sqrt(var + 1e-5)[None] * p["scale"][None] + p["bias"][None]
        return y, {"mean": mean, "var": var * (n / (n - 1))}

    def dense(x, p):
        return x @ p["kernel"] + p["bias"][None]

    first, second = params["backbone"], params["expander"]
    x, moments = batch_norm(images.reshape(len(images), -1) @ first["dense"]["kernel"], first["bn"])
    moments = {"backbone": {"bn": moments}, "expander": {}}
    features = jnp.tanh(x)
    if "kernel" in second:
        return features, dense(features, second), moments
    x, moments["expander"]["bn1"] = batch_norm(dense(features, second["dense1"]), second["bn1"])
    return features, jnp.maximum(x, 0) @ second["dense2"]["kernel"], moments


def vicreg64(z_a, z_b, labels):
    terms = {"invariance": ((z_a - z_b) ** 2).mean(), "variance": 0.0, "covariance": 0.0}
    for z in (z_a, z_b):
        z = z - z.mean(0)[None]
        c = z.T @ z / (len(z) - 1)
        terms["variance"] += jnp.maximum(0, 1 - jnp.sqrt(jnp.diag(c) + 1e-4)).mean() / 2
        terms["covariance"] += (c**2).sum() / DIM - (jnp.diag(c) ** 2).sum() / DIM
    return 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"], terms


def simclr64(z_a, z_b, labels):
    n = len(z_a)
    z = jnp.concatenate([z_a, z_b])
    z = z / jnp.sqrt((z**2).sum(1))[:, None]
    cosines = z @ z.T
    partner = (np.arange(2 * n) + n) % (2 * n)
    others = jnp.where(np.eye(2 * n, dtype=bool), -jnp.inf, cosines)
    log_p = jax.nn.log_softmax(others / LossConfig().temperature, axis=1)
    rows = np.arange(2 * n)
    return -log_p[rows, partner].mean(), {
        "similarity": cosines[rows, partner].mean(),
        "top1": (others.argmax(1).astype(partner.dtype) == partner).astype(z.dtype).mean(),
    }


def barlow_twins64(z_a, z_b, labels):
    z_a, z_b = ((z - z.mean(0)[None]) / jnp.sqrt(z.var(0) + 1e-5)[None] for z in (z_a, z_b))
    c = z_a.T @ z_b / len(z_a)
    diagonal = np.eye(DIM, dtype=bool)
    on, off = ((1 - jnp.diag(c)) ** 2).sum(), (jnp.where(diagonal, 0, c) ** 2).sum()
    loss = 0.024 * (on + LossConfig().off_diagonal_weight * off)
    return loss, {"on_diagonal": on, "off_diagonal": off}


def supervised64(z_a, z_b, labels):
    z, labels = jnp.concatenate([z_a, z_b]), jnp.concatenate([labels, labels])
    loss = -jax.nn.log_softmax(z)[jnp.arange(len(z)), labels].mean()
    return loss, {"top1": (z.argmax(1).astype(labels.dtype) == labels).astype(z.dtype).mean()}


@functools.cache
def gradient64(loss):
    loss_of = {
        "vicreg": vicreg64,
        "simclr": simclr64,
        "barlow_twins": barlow_twins64,
        "supervised": supervised64,
    }[loss]

    def objective(params, views, labels):
        features, z, moments = jax.vmap(functools.partial(network, params))(views)
        h_a, h_b, z_a, z_b = (
            jnp.concatenate(list(x[view::2])) for x in (features, z) for view in (0, 1)
        )
        value, terms = loss_of(z_a, z_b, labels)
        return value, (Embedded(h_a, h_b, z_a, z_b), moments, terms)

    return jit(jax.value_and_grad(objective, has_aux=True))


def differentiate(loss, params, batch, parts=1):
    """Of the loss of all parts' embeddings; each view of a part has statistics of its own."""
    views = [batch[name].reshape(parts, -1, SIZE, SIZE, 1) for name in ("view_a", "view_b")]
    views = np.float64(np.stack(views, 1)).reshape(2 * parts, -1, SIZE, SIZE, 1)
    with jax.enable_x64(True):
        found = gradient64(loss)(to_float64(params), views, batch["label"])
        return jax.tree.map(np.asarray, found)


def to_float64(tree):
    return jax.tree.map(np.float64, tree)


class Reference:
    """The state of a run and its update, by hand from the gradient on."""

    def __init__(self, loss, state, optim=OPTIM):
        self.loss, self.optim, self.step = loss, optim, 0
        self.params, self.batch_stats = to_float64(state.params), to_float64(state.batch_stats)
        self.probe = to_float64(state.probe)
        self.buffers = jax.tree.map(np.zeros_like, self.params)
        self.m, self.v = (jax.tree.map(np.zeros_like, self.probe) for _ in range(2))

    def update(self, batch, parts=1):
        (loss, aux), grads = differentiate(self.loss, self.params, batch, parts)
        embedded, moments, terms = aux
        metrics = {"loss": loss, **terms, "nonfinite": 0.0, "lr": self.learning_rate()}
        metrics["std"] = np.mean([z.std(0, ddof=1) for z in embedded[2:]])
        metrics["grad_norm"] = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        self.lars(grads, metrics["lr"])
        for group in range(2 * parts):  # a and b of the first part, a and b of the second, ...
            self.batch_stats = jax.tree.map(
                lambda old, new, group=group: 0.9 * old + 0.1 * new[group],
                self.batch_stats,
                moments,
            )
        self.step += 1
        return metrics | self.update_probe(np.concatenate(embedded[:2]), np.tile(batch["label"], 2))

    def learning_rate(self):
        peak, warmup = self.optim.base_lr * ROWS / 256, self.optim.warmup_epochs * PER_EPOCH
        if self.step < warmup:
            return peak * self.step / warmup
        q = 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / (EPOCHS * PER_EPOCH - warmup)))
        return peak * (q + self.optim.end_scale * (1 - q))

    def lars(self, grads, lr):
        def direction(g, p):
            if p.ndim == 1:
                return g
            d = g + self.optim.weight_decay * p
            return self.optim.trust_coefficient * np.linalg.norm(p) / np.linalg.norm(d) * d

        d = jax.tree.map(direction, grads, self.params)
        self.buffers = jax.tree.map(lambda m, d: self.optim.momentum * m + d, self.buffers, d)
        self.params = jax.tree.map(lambda p, m: p - lr * m, self.params, self.buffers)

    def update_probe(self, features, labels):
        """Adam on the cross-entropy of both views."""
        scores = features @ self.probe["kernel"] + self.probe["bias"]
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        rows = np.arange(len(labels))
        metrics = {
            "probe/loss": -np.log(p[rows, labels]).mean(),
            "probe/top1": np.mean(scores.argmax(1) == labels),
        }
        p[rows, labels] -= 1
        for name, g in {"kernel": features.T @ p, "bias": p.sum(0)}.items():
            g = g / len(labels)
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            m, v = self.m[name] / (1 - 0.9**self.step), self.v[name] / (1 - 0.999**self.step)
            self.probe[name] = self.probe[name] - config().probe_lr * m / (np.sqrt(v) + 1e-8)
        return metrics

    def assert_matches(self, state, atol=1e-5):
        assert int(state.step) == self.step
        for name in ("params", "batch_stats", "probe"):
            assert_close(getattr(state, name), getattr(self, name), atol)


def test_a_run_begins_with_the_backbone_that_load_calls_untrained():
    state, keys = start("vicreg"), jax.random.split(jax.random.key(0), 3)
    images = jnp.zeros((2, SIZE, SIZE, 1))
    backbone = jit(lambda key: Flat().init(key, images, train=False))(keys[0])
    jax.tree.map(np.testing.assert_array_equal, state.params["backbone"], backbone["params"])
    assert state.batch_stats["backbone"]["bn"]["mean"].tolist() == [0] * 6
    assert state.batch_stats["backbone"]["bn"]["var"].tolist() == [1] * 6
    assert int(state.step) == 0 and not any(p.any() for p in state.probe.values())
    used = [jax.random.key_data(key).tolist() for key in (*keys[:2], jax.random.key(0))]
    assert jax.random.key_data(state.key).tolist() not in used


@pytest.mark.parametrize("loss", LOSSES)
def test_updates_are_those_of_the_transcription(loss):
    state, reference = start(loss), Reference(loss, start(loss))
    for i in range(UPDATES):
        state, metrics = update(loss)(state, batch(i))
        assert_close(metrics, reference.update(batch(i)))
        reference.assert_matches(state)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, start(loss).params)
    moved["expander"].get("dense1", {}).pop("bias", None)  # BatchNorm takes it away again
    assert min(jax.tree.leaves(moved)) > 1e-3  # a hundred times what is tolerated
    np.testing.assert_array_equal(*(jax.random.key_data(s.key) for s in (state, start(loss))))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, start(loss))


def test_running_statistics_take_up_each_view_once_a_before_b():
    data, kernel = batch(0), np.float64(start("vicreg").params["backbone"]["dense"]["kernel"])
    a, b = (data[view].reshape(ROWS, -1) @ kernel for view in ("view_a", "view_b"))

    def after(first, second):
        return {
            "mean": 0.9 * 0.1 * first.mean(0) + 0.1 * second.mean(0),
            "var": 0.9 * (0.9 + 0.1 * first.var(0, ddof=1)) + 0.1 * second.var(0, ddof=1),
        }

    found = update("vicreg")(start("vicreg"), data)[0].batch_stats["backbone"]["bn"]
    assert_close(found, after(a, b), 1e-6)
    for name, value in after(b, a).items():
        assert np.abs(found[name] - value).max() > 1e-3


def test_eager_is_jit():
    """Of the smallest network, since now each operation is compiled by itself."""
    learner, state = make("supervised"), start("supervised")
    data = jax.tree.map(jnp.asarray, batch(0))
    eager, metrics = step.update(learner, state, data)
    jitted = update("supervised")(state, data)
    assert_close((comparable(eager), metrics), (comparable(jitted[0]), jitted[1]), 1e-6)


# ---- several devices -----------------------------------------------------------------------------


def assert_replicated(tree, devices):
    for leaf in jax.tree.leaves(comparable(tree)):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == devices - 1
        assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("loss", "devices"),
    [("vicreg", 1), ("vicreg", 8), ("simclr", 4), ("barlow_twins", 2), ("supervised", 8)],
)
def test_jit_over_a_mesh(loss, devices):
    mesh = meshes.make_mesh(devices)
    whole = meshes.replicated(mesh)
    one_update = jit(functools.partial(step.update, make(loss)), out_shardings=whole)
    split = functools.partial(meshes.global_batch, mesh)
    state, metrics = run(one_update, jax.device_put(start(loss), whole), split)
    assert_as_expected(loss, state, metrics)
    assert_replicated(state, devices)


# Checked, shard_map sums the gradients in replicated parameters by itself; unchecked, it does not.
@pytest.mark.parametrize(
    ("loss", "devices", "check_vma"),
    [
        ("vicreg", 8, True),
        ("vicreg", 4, False),
        ("simclr", 8, False),
        ("barlow_twins", 2, True),
        ("supervised", 8, False),
    ],
)
def test_shard_map(loss, devices, check_vma):
    one_update = jax.shard_map(
        functools.partial(step.update, make(loss, "data")),
        mesh=meshes.make_mesh(devices),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    state, metrics = run(jit(one_update), start(loss))
    assert_as_expected(loss, state, metrics)
    assert_replicated(state, devices)


@pytest.mark.parametrize(("loss", "devices"), [("vicreg", 8), ("supervised", 4)])
def test_pmap(loss, devices):
    one_update = jax.pmap(
        functools.partial(step.update, make(loss, "data")),
        axis_name="data",
        devices=jax.devices()[:devices],
    )

    def split(batch):
        return jax.tree.map(lambda x: x.reshape(devices, ROWS // devices, *x.shape[1:]), batch)

    def repeat(state):
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (devices, *x.shape)), state)

    begin = jit(repeat)(start(loss))
    one_update = one_update.lower(begin, split(batch(0))).compile(QUICK)
    state, metrics = run(one_update, begin, split)
    state = comparable(state)
    wanted, wanted_metrics = expected(loss)
    for device in (0, devices - 1):
        own = jax.tree.map(lambda x, device=device: np.asarray(x)[device], (state, metrics))
        assert_close(own, (comparable(wanted), wanted_metrics))


@pytest.mark.parametrize("devices", [1, 8])
def test_embeddings_that_are_not_finite_are_counted_on_all_devices(devices):
    a, b = (np.random.default_rng(i).normal(size=(ROWS, DIM)).astype(np.float32) for i in (0, 1))
    a[3, 0], a[3, 5], b[3, 1], b[30, 2] = np.nan, np.inf, np.inf, -np.inf
    metrics = jax.shard_map(
        lambda *views: step.embedding_metrics(make("vicreg", "data"), Embedded(*views)),
        mesh=meshes.make_mesh(devices),
        in_specs=P("data"),
        out_specs=P(),
    )
    found = jax.block_until_ready(jit(metrics)(a, b, a, b))
    assert float(found["nonfinite"]) == 3 and not np.isfinite(found["std"])


def test_an_image_that_is_not_finite_shows():
    data = batch(0)
    data["view_b"][5, 0, 0, 0] = np.nan
    _, metrics = update("vicreg")(start("vicreg"), data)
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["grad_norm"])
    assert metrics["nonfinite"] == ROWS  # of view b, whose BatchNorm spreads it


# ---- seeds, types, weights -----------------------------------------------------------------------


def test_seeds_are_vmapped():
    learner, seeds = make("vicreg"), (0, 3)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    init = functools.partial(learners.init, learner, image_shape=(SIZE, SIZE, 1))
    states = jit(jax.vmap(init))(keys)
    together = jit(jax.vmap(functools.partial(step.update, learner), (0, None)))
    for i in range(2):  # the first of which has learning rate 0
        states, metrics = together(states, batch(i))
    for at, seed in enumerate(seeds):
        state = start("vicreg", seed)
        for i in range(2):
            state, wanted = update("vicreg")(state, batch(i))
        own = jax.tree.map(lambda x, at=at: x[at], (comparable(states), metrics))
        assert_close(own, (comparable(state), wanted))
    assert not np.allclose(*states.params["expander"]["dense2"]["kernel"], atol=0.01)


def test_bfloat16_leaves_state_and_loss_in_float32():
    learner = make("vicreg", dtype="bfloat16")
    state, metrics = jit(functools.partial(step.update, learner))(start("vicreg"), batch(0))
    exact, wanted = update("vicreg")(start("vicreg"), batch(0))
    dtypes = [jax.tree.map(lambda x: x.dtype, pair) for pair in ((state, metrics), (exact, wanted))]
    assert dtypes[0] == dtypes[1]
    assert {str(x.dtype) for x in metrics.values()} == {"float32"}
    assert metrics["loss"] != wanted["loss"]
    assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), rel=0.02)
    assert float(metrics["grad_norm"]) == pytest.approx(float(wanted["grad_norm"]), rel=0.1)


@functools.cache
def flexible_update():
    """VICReg's update, its weights and the probe's learning rate being arguments."""
    learner = make("vicreg", epochs=50)

    def flexible(state, batch, probe_lr, weights):
        objective = functools.partial(losses.vicreg_loss, **weights)
        optimizer = optax.adam(probe_lr)
        changed = learner._replace(objective=objective, probe_optimizer=optimizer)
        return step.update(changed, state, batch)

    return jit(flexible)


def weights(invariance=25.0, variance=25.0, covariance=1.0):
    values = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return {f"{name}_weight": value for name, value in values.items()}


def test_the_network_does_not_feel_the_probe():
    rng = np.random.default_rng(0)
    begin = start("vicreg")
    other = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in begin.probe.items()}
    ends = []
    for state, probe_lr in ((begin, 0.1), (begin, 10.0), (begin.replace(probe=other), 0.1)):
        for i in range(3):
            state, _ = flexible_update()(state, batch(i), probe_lr, weights())
        ends.append(state)
    for end in ends[1:]:
        assert np.abs(end.probe["kernel"] - ends[0].probe["kernel"]).max() > 0.1
        for name in ("params", "batch_stats", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(end, name), getattr(ends[0], name))


def test_the_probe_learns():
    state, found = start("vicreg"), []
    for i in range(30):
        state, metrics = update("vicreg")(state, batch(i))
        found.append((float(metrics["probe/top1"]), float(metrics["probe/loss"])))
    assert found[0][1] == pytest.approx(math.log(CLASSES), rel=1e-5)  # from weights of 0
    assert found[0][0] < 0.5 and min(top1 for top1, _ in found[-5:]) > 0.9
    assert found[-1][1] < 0.3


def test_without_the_variance_term_the_embeddings_collapse():
    std = {}
    for variance in (25.0, 0.0):
        state = start("vicreg")
        for i in range(60):
            state, metrics = flexible_update()(state, batch(i), 0.1, weights(variance=variance))
        std[variance] = float(metrics["std"])
    assert std[0.0] < 0.03 and std[25.0] > 0.5


# ---- in parts ------------------------------------------------------------------------------------


@functools.cache
def by_parts(loss):
    """`cache`, `loss_gradient`, `part_gradient` and `finish`, compiled."""
    names = ("cache", "loss_gradient", "part_gradient", "finish")
    return [jit(functools.partial(getattr(accumulate, name), make(loss))) for name in names]


def shares_of(data, parts):
    shares = {name: np.split(x, parts) for name, x in data.items()}
    return [{name: share[i] for name, share in shares.items()} for i in range(parts)]


def accumulated(loss, state, data, parts):
    """The gradient, and the state and metrics after the update."""
    cache, loss_gradient, part_gradient, finish = by_parts(loss)
    found, stats = [], state.batch_stats
    for part in shares_of(data, parts):
        embedded, stats = cache(state.params, stats, part)
        found.append(embedded)
    embedded = jax.tree.map(lambda *xs: np.concatenate(xs), *found)
    value, terms, cotangents = loss_gradient(embedded, data["label"])
    grads = jax.tree.map(np.zeros_like, state.params)
    shares = [np.split(g, parts) for g in cotangents]
    for part, *rows in zip(shares_of(data, parts), *shares, strict=True):
        grads = part_gradient(state, part, tuple(rows), grads)
    state, metrics = finish(state, embedded, data["label"], grads, stats)
    return grads, state, {"loss": value, **terms, **metrics}


def distance(got, want):
    """Of two gradients, relative to the second."""
    difference = jax.tree.map(np.subtract, got, want)
    return float(optax.tree.norm(difference) / optax.tree.norm(want))


@pytest.mark.parametrize(
    ("loss", "parts"),
    [("vicreg", 1), ("vicreg", 2), ("vicreg", 4), ("simclr", 4), ("supervised", 2)],
)
def test_parts_add_up_to_the_loss_of_all_embeddings(loss, parts):
    reference = Reference(loss, start(loss))
    reference.update(batch(0))
    state, _ = update(loss)(start(loss), batch(0))
    params, data = reference.params, batch(1)
    _, want = differentiate(loss, params, data, parts)
    grads, after, metrics = accumulated(loss, state, data, parts)
    assert distance(grads, want) < 1e-5
    assert_close(grads, want)
    assert_close(metrics, reference.update(data, parts))
    reference.assert_matches(after)

    alone = [differentiate(loss, params, share)[1] for share in shares_of(data, parts)]
    naive = jax.tree.map(lambda *gs: sum(gs) / parts, *alone)
    if loss == "supervised" or parts == 1:  # a mean over rows, or over everything
        assert distance(naive, want) < 1e-10
    else:
        assert distance(naive, want) > 0.01


def test_one_part_is_the_update():
    state, _ = update("vicreg")(start("vicreg"), batch(0))
    _, after, metrics = accumulated("vicreg", state, batch(1), 1)
    wanted, wanted_metrics = update("vicreg")(state, batch(1))
    got = comparable(after), metrics
    assert_close(got, (comparable(wanted), wanted_metrics), 1e-6)


# ---- compiled for a run --------------------------------------------------------------------------


def host_batch(seed):
    """As of `data.batches`: images a little larger than their views, in an order of their own."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (ROWS, SIZE + 2, SIZE + 2, 1)).astype(np.uint8),
        "size": np.full((ROWS, 2), SIZE + 2, np.int32),
        "label": rng.integers(0, CLASSES, ROWS).astype(np.int32),
        "index": rng.permutation(1000)[:ROWS].astype(np.int32),
    }


@functools.cache
def views_of(seed):
    """The views of the update `seed` by a run of seed 0."""
    key, data = jax.random.fold_in(start("vicreg").key, seed), host_batch(seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, data["index"])
    return two_views(keys, data["image"], data["size"])


two_views = jit(functools.partial(augment.two_views, config=config().augment))


@pytest.mark.parametrize(("devices", "parts"), [(1, 4), (8, 4), (8, 1)])
def test_a_run_on_its_devices_in_parts_or_whole(monkeypatch, devices, parts):
    monkeypatch.setattr(compiled, "cpu_options", lambda: QUICK)
    learner = make("vicreg")
    functions = compiled.compile_functions(
        config(accumulate=parts), learner, meshes.make_mesh(devices)
    )
    state, reference = functions.init(jax.random.key(0)), Reference("vicreg", start("vicreg"))
    for i in range(3):
        state, metrics, images = functions.advance(state, host_batch(i))
        jax.block_until_ready(state)
        a, b = views_of(i)
        data = {"view_a": np.asarray(a), "view_b": np.asarray(b), "label": host_batch(i)["label"]}
        assert_close(metrics, reference.update(data, parts))
        reference.assert_matches(state)
        np.testing.assert_allclose(images, data["view_a"][-ROWS // parts :], atol=1e-5)
    assert_replicated(state, devices)


# ---- what is watched -----------------------------------------------------------------------------


def test_diagnosis_against_numpy():
    state, _ = expected("vicreg")
    images = np.random.default_rng(0).normal(size=(520, SIZE, SIZE, 1)).astype(np.float32)
    images[512:] = np.nan  # more than are looked at
    found = jit(functools.partial(monitor.diagnose, make("vicreg")))(state, images)
    with jax.enable_x64(True):
        features, z, _ = jit(network)(to_float64(state.params), np.float64(images[:512]))
        features, z = np.asarray(features), np.asarray(z)

    def rank(x):
        p = np.linalg.svd(x, compute_uv=False)
        p = p / p.sum() + 1e-7
        return np.exp(-(p * np.log(p)).sum())

    covariances = np.cov(z.T)[~np.eye(DIM, dtype=bool)]
    assert found == pytest.approx(
        {
            "rankme": rank(z),
            "rankme/backbone": rank(features),
            "off_diagonal_covariance": np.sqrt((covariances**2).mean()),
        },
        rel=1e-4,
    )
    assert 1.5 < found["rankme/backbone"] < found["rankme"] < DIM


def test_score_counts_what_is_right_and_no_padding():
    state, _ = expected("vicreg")
    data, mask = batch(50), np.arange(ROWS) < ROWS - 5
    labels = data["label"] * (np.arange(ROWS) % 3 != 0)  # a third of them made wrong
    images = np.where(mask[:, None, None, None], data["view_a"], np.nan).astype(np.float32)
    labels[~mask] = 0
    score = jit(functools.partial(monitor.score, make("vicreg")))
    found = score(state, {"image": images, "label": labels, "mask": mask})

    p, running = to_float64((state.params["backbone"], state.batch_stats["backbone"]["bn"]))
    x = np.float64(images[mask]).reshape(mask.sum(), -1) @ p["dense"]["kernel"]
    x = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5) * p["bn"]["scale"] + p["bn"]["bias"]
    scores = np.tanh(x) @ np.float64(state.probe["kernel"]) + np.float64(state.probe["bias"])
    wanted = (scores.argmax(1) == labels[mask]).sum()
    assert float(found) == wanted and 5 < wanted < mask.sum()


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("vicreg", r"one shape and type, found float32\[32, 16\] and float32\[31, 16\]"),
        ("simclr", r"shapes must be equal, found z_a \(32, 16\), z_b \(31, 16\)"),
        ("barlow_twins", "shapes must be equal"),
        ("supervised", r"one entry per row of logits \(31, 4\), found \(32,\)"),
    ],
)
def test_views_of_different_numbers_are_refused(loss, message):
    data = batch(0)
    data["view_b"] = data["view_b"][1:]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(step.update, make(loss)), start(loss), data)


def test_integer_images_are_refused():
    learner = learners.make(config(), PER_EPOCH, CLASSES)
    state = jax.eval_shape(lambda key: learners.init(learner, key, (8, 8, 1)), jax.random.key(0))
    data = batch(0)
    data["view_a"] = data["view_a"].astype(np.uint8)
    with pytest.raises(ValueError, match="images must be of a floating type, found uint8"):
        jax.eval_shape(functools.partial(step.update, learner), state, data)


def test_a_warm_up_longer_than_the_run_is_refused():
    long = OptimConfig(warmup_epochs=EPOCHS + 1)
    with pytest.raises(ValueError, match="the warm-up of 5 epochs takes 10 updates, more than"):
        learners.make(config(optim=long), PER_EPOCH, CLASSES)
