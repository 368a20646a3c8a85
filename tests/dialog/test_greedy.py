"""One token after the other: by itself, in batches, as a stream, greedy and drawn.

That greedy ids are those of transformers is in test_beam.py, which has the models for it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dialog.config import GenerationConfig
from dialog.decoding.constraints import Context
from dialog.decoding.greedy import advance, generate, running, start

V, PAD, EOS = 11, 0, 2
FIXED = {"eos_ids": (EOS, 7), "pad_id": PAD}
TABLE = jax.random.normal(jax.random.key(0), (V, V, V)) * 2


def step(ids, at, previous):
    """What follows depends on the last two tokens."""
    return TABLE[previous, ids], ids


def setting(rows, length=4):
    prompt = jax.random.randint(jax.random.key(1), (rows, length), 3, V)
    logits, cache = step(prompt[:, -1], length - 1, prompt[:, -2])
    return cache, logits, Context(prompt)


def by_hand(prompt, count):
    """Greedy in NumPy: tokens and their mean log-probability in float64."""
    table, tokens, total = np.float64(TABLE), list(prompt), 0.0
    for _ in range(count):
        logits = table[tokens[-2], tokens[-1]]
        tokens.append(int(logits.argmax()))
        total += logits.max() - np.log(np.exp(logits).sum())
        if tokens[-1] in FIXED["eos_ids"]:
            break
    new = tokens[len(prompt) :]
    return new, total / len(new)


SAMPLED = GenerationConfig(max_new_tokens=12, sample=True, temperature=1.3, top_k=8, top_p=0.95)
CASES = {
    "greedy": GenerationConfig(max_new_tokens=12),
    "rules": GenerationConfig(
        max_new_tokens=12, min_new_tokens=5, no_repeat_ngram=2, forced_eos_id=EOS
    ),
    "sampled": SAMPLED,
}


@pytest.mark.parametrize("count", [1, 2, 15])
def test_greedy_by_hand(count):
    cache, logits, context = setting(30)
    options = GenerationConfig(max_new_tokens=count)
    output = jax.jit(partial(generate, step, options=options, **FIXED))(
        cache=cache, logits=logits, context=context
    )
    assert output.tokens.shape == (30, count) and output.tokens.dtype == jnp.int32
    lengths = []
    for row, prompt in enumerate(np.asarray(context.prompt).tolist()):
        new, score = by_hand(prompt, count)
        assert output.tokens[row].tolist() == new + [PAD] * (count - len(new))
        assert output.lengths[row] == len(new)
        assert float(output.scores[row]) == pytest.approx(score, rel=1e-5)
        lengths.append(len(new))
    assert count < 15 or len(set(lengths)) > 3


@pytest.mark.parametrize("name", CASES)
def test_a_stream_gives_the_same_tokens(name):
    cache, logits, context = setting(6)
    options, key = CASES[name], jax.random.key(3)
    whole = jax.jit(partial(generate, step, options=options, **FIXED))(
        cache=cache, logits=logits, context=context, key=key
    )
    state = start(logits, cache, context, options, key, **FIXED)
    one_more = jax.jit(partial(advance, step, options=options, **FIXED))
    stream = [state.tokens[:, state.at - 1]]
    while running(state):
        state = one_more(state, context)
        stream.append(state.tokens[:, state.at - 1])
    stream = np.stack(stream, axis=1)
    assert stream.shape[1] == whole.lengths.max()  # it stops when all have ended
    np.testing.assert_array_equal(stream, whole.tokens[:, : stream.shape[1]])
    assert (whole.tokens[:, stream.shape[1] :] == PAD).all()
    assert one_more._cache_size() == 1


@pytest.mark.parametrize("name", CASES)
def test_eager_equals_jit_and_single_equals_batch(name):
    cache, logits, context = setting(5)
    options = CASES[name]
    keys = jax.random.split(jax.random.key(4), 5)
    decode = jax.jit(partial(generate, step, options=options, **FIXED))
    together = decode(cache=cache, logits=logits, context=context, key=keys)
    with jax.disable_jit():
        eager = generate(step, cache, logits, context, options, keys, **FIXED)
    np.testing.assert_array_equal(eager.tokens, together.tokens)
    np.testing.assert_allclose(eager.scores, together.scores, rtol=1e-5)
    for row in range(5):
        one = jax.tree.map(lambda x: x[row, None], (cache, logits, context))  # noqa: B023
        alone = decode(cache=one[0], logits=one[1], context=one[2], key=keys[row, None])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        assert alone.lengths[0] == together.lengths[row]


def test_more_neighbours_do_not_change_what_one_key_draws():
    decode = jax.jit(partial(generate, step, options=SAMPLED, **FIXED))
    (cache, logits, context), key = setting(6), jax.random.key(5)
    six = decode(cache=cache, logits=logits, context=context, key=key)
    cache, logits, context = jax.tree.map(lambda x: x[:2], (cache, logits, context))
    two = decode(cache=cache, logits=logits, context=context, key=key)
    np.testing.assert_array_equal(six.tokens[:2], two.tokens)
    old = decode(cache=cache, logits=logits, context=context, key=jax.random.PRNGKey(5))
    np.testing.assert_array_equal(old.tokens, two.tokens)
    other = decode(cache=cache, logits=logits, context=context, key=jax.random.key(6))
    assert (np.asarray(other.tokens) != two.tokens).any()


def test_drawn_sentences_follow_the_law():
    """Chi-square of the second token given the first, over 4,000 sentences of one prompt."""
    rows = 4_000
    options = GenerationConfig(max_new_tokens=2, sample=True, temperature=2.0)
    prompt = jnp.full((rows, 2), 3)
    logits, cache = step(prompt[:, 1], 1, prompt[:, 0])
    output = jax.jit(partial(generate, step, options=options, **FIXED))(
        cache=cache, logits=logits, context=Context(prompt), key=jax.random.key(7)
    )
    first, second = np.asarray(output.tokens).T
    first_law = np.exp(np.float64(TABLE[3, 3]) / 2)
    counts = np.bincount(first, minlength=V)
    assert stats.chisquare(counts, rows * first_law / first_law.sum()).pvalue > 1e-4
    likeliest = int(np.argmax(np.where(np.isin(np.arange(V), FIXED["eos_ids"]), 0, counts)))
    law = np.exp(np.float64(TABLE[3, likeliest]) / 2)
    seen = np.bincount(second[first == likeliest], minlength=V)
    assert stats.chisquare(seen, seen.sum() * law / law.sum()).pvalue > 1e-4
    assert (second[np.isin(first, FIXED["eos_ids"])] == PAD).all()


def test_no_end_at_all():
    cache, logits, context = setting(2)
    options = GenerationConfig(max_new_tokens=9)
    output = generate(step, cache, logits, context, options, eos_ids=(), pad_id=PAD)
    assert output.lengths.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"num_beams": 2}, None, "num_beams must be 1, found 2"),
        ({"sample": True}, None, "sample needs a key, found None"),
        (
            {"sample": True},
            jax.random.split(jax.random.key(0), 3),
            r"2 of them, found shape \(3,\)",
        ),
        ({"encoder_no_repeat_ngram": 2}, None, "found no source in the context"),
    ],
)
def test_bad_input_is_named(options, key, message):
    cache, logits, context = setting(2)
    with pytest.raises(ValueError, match=message):
        generate(step, cache, logits, context, GenerationConfig(**options), key, **FIXED)
