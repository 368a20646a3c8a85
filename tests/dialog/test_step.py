"""An update: of the whole batch, of its parts, on several devices, and of adapters alone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dialog import lora, step
from dialog.step import Batch, Learner
from fourfold.runtime import mesh as meshes

VOCAB, ROWS, LENGTH = 13, 8, 5


class Model(nn.Module):
    """Predicts from the token before, which it may forget."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, input_ids, train):
        x = nn.Embed(VOCAB, 6, name="embed")(input_ids)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.tanh(nn.Dense(7, name="q_proj")(x))
        return nn.Dense(VOCAB, name="head")(x)


def make(dropout=0.0, optimizer=None, **options):
    model = Model(dropout)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), train=False)["params"]
    learner = Learner(step.forward_of(model), optimizer or optax.sgd(1.0), **options)
    return learner, params


def batch(parts=None):
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < rng.integers(0, LENGTH + 1, (ROWS, 1))  # a sentence may be empty
    whole = Batch({"input_ids": ids}, targets, mask)
    if parts is None:
        return whole
    return jax.tree.map(lambda a: a.reshape(parts, ROWS // parts, LENGTH), whole)


def update(learner, params, given, key=1):
    state = step.init(learner, params, jax.random.key(key))
    return jax.jit(functools.partial(step.train_step, learner))(state, given)


def assert_close(ours, theirs, atol=1e-6):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_an_update_is_the_gradient_of_the_mean_over_tokens():
    learner, params = make()
    given = batch()

    def loss(params):
        logits = learner.forward(params, given, None)
        log_probs = jax.nn.log_softmax(logits)
        nll = -sum(
            log_probs[n, t, given.targets[n, t]]
            for n, t in zip(*np.nonzero(given.mask), strict=True)
        )
        return nll / float(given.mask.sum())

    value, grads = jax.value_and_grad(loss)(params)
    state, metrics = update(learner, params, given)
    assert_close(state.params, jax.tree.map(lambda p, g: p - g, params, grads))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(value), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    assert int(metrics["tokens"]) == given.mask.sum() and int(state.step) == 1


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_make_the_whole(parts, smoothing):
    learner, params = make(label_smoothing=smoothing)
    whole, parted = update(learner, params, batch()), update(learner, params, batch(parts))
    assert_close(parted[0].params, whole[0].params)
    assert_close(parted[1], whole[1], atol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("parts", [None, 1])
def test_devices_make_the_whole(devices, parts):
    learner, params = make()
    given, spec = batch(parts), P("data") if parts is None else P(None, "data")
    mapped = jax.shard_map(
        functools.partial(step.train_step, learner, axis_name="data"),
        mesh=meshes.make_mesh(devices),
        in_specs=(P(), spec),
        out_specs=P(),
        check_vma=False,
    )
    state = step.init(learner, params, jax.random.key(1))
    ours, theirs = jax.jit(mapped)(state, given), update(learner, params, given)
    assert_close(ours[0].params, theirs[0].params)
    assert_close(ours[1], theirs[1], atol=1e-5)


def test_dropout_is_of_the_key_and_the_step():
    learner, params = make(dropout=0.5)
    first, again, other = (update(learner, params, batch(), key)[1]["loss"] for key in (1, 1, 2))
    assert first == again != other
    state = dataclasses.replace(step.init(learner, params, jax.random.key(1)), step=np.int32(1))
    assert step.train_step(learner, state, batch())[1]["loss"] != first
    sums = step.eval_step(learner, params, batch())
    assert sums.nll == step.eval_step(make()[0], params, batch()).nll


def test_a_batch_of_padding_changes_nothing_but_the_count():
    learner, params = make()
    given = batch()._replace(mask=np.zeros((ROWS, LENGTH), bool))
    state, metrics = update(learner, params, given)
    assert_close(state.params, params, atol=0)
    assert metrics["loss"] == 0 and int(state.step) == 1


def test_it_learns_and_resumes(lenient_promotion):
    learner, params = make(optimizer=optax.adam(0.01))
    given = batch()
    run = jax.jit(functools.partial(step.train_step, learner))
    state, losses = step.init(learner, params, jax.random.key(0)), []
    for number in range(60):
        if number == 30:
            middle = jax.tree.map(lambda x: x.copy(), state)
        state, metrics = run(state, given)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    for _ in range(30):
        middle, _ = run(middle, given)
    assert_close(middle.params, state.params, atol=0)


def test_adapters_begin_as_the_model_and_leave_it_alone(lenient_promotion):
    learner, params = make(optimizer=optax.adam(0.05), lora_scale=2.0)
    adapters = lora.init(jax.random.key(2), params, rank=2)
    assert list(adapters) == ["q_proj/kernel"]
    state = step.init(learner, adapters, jax.random.key(3), base=params)
    assert_close(step.model_params(learner, state), params, atol=0)
    run = jax.jit(functools.partial(step.train_step, learner))
    losses = []
    for _ in range(20):
        state, metrics = run(state, batch())
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]
    assert_close(state.base, params, atol=0)
    merged = step.model_params(learner, state)
    a, b = (np.asarray(x, np.float64) for x in state.params["q_proj/kernel"])
    wanted = np.asarray(params["q_proj"]["kernel"]) + 2.0 * a @ b
    np.testing.assert_allclose(merged["q_proj"]["kernel"], wanted, atol=1e-6)
    assert np.linalg.matrix_rank(wanted - np.asarray(params["q_proj"]["kernel"])) == 2
    assert_close(merged["head"], params["head"], atol=0)


def test_targets_that_match_nothing_are_named():
    _, params = make()
    with pytest.raises(ValueError, match="no kernel matches targets 'nowhere'; there are head/ker"):
        lora.init(jax.random.key(0), params, 2, "nowhere")
    with pytest.raises(ValueError, match="rank must be at least 1, found 0"):
        lora.init(jax.random.key(0), params, 0)
