"""The rules against sets of n-grams in plain Python, and against transformers' processors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialog.config import GenerationConfig
from dialog.decoding.constraints import (
    Context,
    begin,
    block_copies,
    block_repeats,
    check,
    constrain,
    forbid,
    force,
)

V = 5
LENGTH = 9  # of the buffer
SOURCE = 6


def completes(sequence, last, n):
    """The tokens that would complete an n-gram of the sequence, after the tokens `last`."""
    grams = {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}
    end = tuple(last[len(last) - n + 1 :]) if len(last) >= n - 1 else None
    return {gram[-1] for gram in grams if gram[:-1] == end}


def forbidden(logits):
    assert not np.isnan(logits).any()
    return [set(np.flatnonzero(np.isneginf(row)).tolist()) for row in np.asarray(logits)]


repeats = jax.jit(block_repeats, static_argnames="n")
copies = jax.jit(block_copies, static_argnames="n")
ids = lambda size: st.lists(st.integers(0, V - 1), min_size=size, max_size=size)  # noqa: E731


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(ids(LENGTH), min_size=3, max_size=3),
    at=st.integers(0, LENGTH),
    n=st.sampled_from([1, 2, 3, 4, LENGTH, LENGTH + 1]),
    padding=st.lists(st.integers(0, LENGTH), min_size=3, max_size=3),
)
def test_repeats_against_sets(rows, at, n, padding):
    padding = [min(p, at) for p in padding]
    tokens = np.asarray(rows, np.int32)
    for row, p in enumerate(padding):
        tokens[row, :p] = V
    logits = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32)
    got = repeats(logits, tokens, at, n=n)
    want = [
        completes(row[p:at], row[p:at], n) for row, p in zip(tokens.tolist(), padding, strict=True)
    ]
    assert forbidden(got) == want
    np.testing.assert_array_equal(np.where(np.isinf(got), logits, got), logits)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(ids(LENGTH), min_size=4, max_size=4),
    source=st.lists(ids(SOURCE), min_size=2, max_size=2),
    at=st.integers(0, LENGTH),
    n=st.sampled_from([1, 2, 3, SOURCE, SOURCE + 1]),
    padding=st.lists(st.integers(0, LENGTH), min_size=4, max_size=4),
    cut=st.tuples(st.integers(0, SOURCE), st.integers(0, SOURCE)),
    masked=st.booleans(),
)
def test_copies_against_sets(rows, source, at, n, padding, cut, masked):
    """Two beams a sentence; sources are padded on the left and on the right."""
    padding = [min(p, at) for p in padding]
    tokens, source = np.asarray(rows, np.int32), np.asarray(source, np.int32)
    for row, p in enumerate(padding):
        tokens[row, :p] = V
    left, right = min(cut), max(cut)
    mask = np.zeros((2, SOURCE), bool)
    mask[0, left:right], mask[1, :right] = True, True
    logits = np.zeros((4, V), np.float32)
    got = copies(logits, tokens, at, n=n, source=source, source_mask=mask if masked else None)
    seen = [source[b][mask[b]].tolist() if masked else source[b].tolist() for b in range(2)]
    want = [
        completes(seen[row // 2], tokens[row, padding[row] : at].tolist(), n) for row in range(4)
    ]
    assert forbidden(got) == want


def test_padding_is_not_taken_for_padding_of_the_source():
    """One real token after padding, in both: no trigram, whatever stands for the padding."""
    tokens = np.array([[V, V, 3, 0]], np.int32)
    source, mask = np.array([[0, 0, 3, 4]], np.int32), np.array([[False, False, True, True]])
    assert forbidden(block_copies(jnp.zeros((1, V)), tokens, 3, 3, source, mask)) == [set()]
    assert forbidden(block_copies(jnp.zeros((1, V)), tokens, 3, 2, source, mask)) == [{4}]


def test_begin_marks_padding_and_leaves_room():
    context = Context(
        jnp.array([[0, 0, 3], [4, 0, 3]]), jnp.array([[False, True, True], [True, True, True]])
    )
    assert begin(context, 7, 2, 1).tolist() == [[7, 0, 3, 1, 1], [4, 0, 3, 1, 1]]
    assert begin(context._replace(prompt_mask=None), 7, 1, 1).tolist()[0] == [0, 0, 3, 1]


def test_force_and_forbid():
    logits = jnp.arange(6.0).reshape(2, 3)
    assert force(logits, 1, jnp.array(True)).tolist() == [[-np.inf, 0, -np.inf]] * 2
    assert force(logits, 1, jnp.array(False)).tolist() == logits.tolist()
    assert forbidden(forbid(logits, (0, 2), jnp.array(True))) == [{0, 2}] * 2
    assert forbid(logits, (0, 2), jnp.array(False)).tolist() == logits.tolist()
    assert forbid(logits, (), jnp.array(True)).tolist() == logits.tolist()


# ---- transformers --------------------------------------------------------------------------------


OPTIONS = {
    "none": GenerationConfig(max_new_tokens=8),
    "all": GenerationConfig(
        max_new_tokens=8,
        min_new_tokens=4,
        no_repeat_ngram=2,
        encoder_no_repeat_ngram=2,
        forced_bos_id=3,
        forced_eos_id=2,
    ),
    "unigrams": GenerationConfig(max_new_tokens=8, no_repeat_ngram=1, encoder_no_repeat_ngram=1),
    "trigrams": GenerationConfig(max_new_tokens=8, no_repeat_ngram=3, encoder_no_repeat_ngram=3),
    "too long": GenerationConfig(max_new_tokens=8, no_repeat_ngram=99, encoder_no_repeat_ngram=99),
    "length": GenerationConfig(max_new_tokens=8, min_new_tokens=8, forced_eos_id=2),
}


@pytest.mark.parametrize("eos_ids", [(2,), (2, 0), ()], ids=str)
@pytest.mark.parametrize("prompt_length", [1, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_constrain_is_their_list_of_processors(name, prompt_length, eos_ids):
    """At every length, with three beams a sentence, and padding that counts for both."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    options, beams, batch = OPTIONS[name], 3, 2
    if not eos_ids and options.min_new_tokens:
        eos_ids = (1,)
    rng = np.random.default_rng(prompt_length)
    source = rng.integers(0, V, (batch, 7)).astype(np.int32)
    source[0, 4:] = 0
    tokens = rng.integers(0, V, (batch * beams, prompt_length + 8)).astype(np.int32)
    tokens[:, 0] = 0
    prompt = jnp.asarray(tokens[::beams, :prompt_length])
    context = Context(prompt, source=jnp.asarray(source))
    ours = jax.jit(partial(constrain, options=options, eos_ids=eos_ids))

    processors = theirs.LogitsProcessorList()
    if options.no_repeat_ngram:
        processors.append(theirs.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram))
    if options.encoder_no_repeat_ngram:
        processors.append(
            theirs.EncoderNoRepeatNGramLogitsProcessor(
                options.encoder_no_repeat_ngram, torch.from_numpy(source).long()
            )
        )
    if options.min_new_tokens:
        processors.append(
            theirs.MinNewTokensLengthLogitsProcessor(
                prompt_length, options.min_new_tokens, list(eos_ids)
            )
        )
    if options.forced_bos_id is not None:
        processors.append(theirs.ForcedBOSTokenLogitsProcessor(options.forced_bos_id))
    if options.forced_eos_id is not None:
        processors.append(
            theirs.ForcedEOSTokenLogitsProcessor(prompt_length + 8, options.forced_eos_id)
        )
    for at in range(prompt_length, prompt_length + 8):
        logits = rng.normal(size=(batch * beams, V)).astype(np.float32)
        want = processors(torch.from_numpy(tokens[:, :at]).long(), torch.from_numpy(logits))
        got = ours(jnp.asarray(logits), jnp.asarray(tokens), jnp.int32(at), context)
        np.testing.assert_array_equal(got, want.numpy())
        if at in (prompt_length, prompt_length + 7):
            eager = constrain(
                jnp.asarray(logits), jnp.asarray(tokens), jnp.int32(at), context, options, eos_ids
            )
            np.testing.assert_array_equal(eager, got)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"prompt": None}, "prompt must have shape .* found None"),
        ({"prompt_mask": np.ones((2, 3), bool)}, r"prompt_mask .* \(2, 2\), found \(2, 3\)"),
        ({"source": np.ones((1, 3), np.int32)}, r"source .* \(2, at least 1\), found \(1, 3\)"),
        ({"source": np.ones((2, 0), np.int32)}, r"source .* found \(2, 0\)"),
        ({"source_mask": np.ones((2, 3), bool)}, "source must have shape .* found None"),
    ],
)
def test_contexts_that_do_not_fit_are_named(context, message):
    with pytest.raises(ValueError, match=message):
        check(jnp.zeros((2, V)), Context(**{"prompt": np.ones((2, 2), np.int32), **context}), (), 0)


@pytest.mark.parametrize("forced", [{"forced_bos_id": V}, {"forced_eos_id": -1}], ids=str)
def test_a_forced_token_must_be_in_the_vocabulary(forced):
    context = Context(jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ValueError, match=rf"forced_.os_id must be in \[0, {V}\), found"):
        tokens = begin(context, V, 60, 0)
        constrain(jnp.zeros((1, V)), tokens, 1, context, GenerationConfig(**forced), ())
