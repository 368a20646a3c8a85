"""Whole models and whole searches against transformers' `generate`, and the tokens as they come."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dialog import generator as generators
from dialog.config import EncoderDecoderConfig, GenerationConfig, LlamaConfig
from dialog.generator import Generator
from dialog.models.encoder_decoder import EncoderDecoder
from dialog.models.llama import Llama

BART = EncoderDecoderConfig(
    vocab_size=29,
    d_model=16,
    encoder_layers=1,
    decoder_layers=2,
    encoder_heads=2,
    decoder_heads=4,
    encoder_ffn=20,
    decoder_ffn=24,
    max_positions=40,
    position_offset=2,
    encoder_embed_norm="sum",
    decoder_embed_norm="sum",
    pad_id=1,
    bos_id=0,
    eos_id=2,
    decoder_start_id=2,
)
LLAMA = LlamaConfig(
    vocab_size=31,
    d_model=24,
    layers=2,
    heads=6,
    key_value_heads=2,
    ffn=20,
    max_positions=400,
    pad_id=0,
    eos_ids=(2, 5),
)


def perturbed(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: (0.4 * rng.normal(size=s.shape) + (len(s.shape) == 1)).astype(np.float32), shapes
    )


@pytest.fixture(scope="module")
def bart():
    ids = jnp.ones((1, 3), jnp.int32)
    model = EncoderDecoder(BART)
    return Generator(model, perturbed(model, ids, ids > 0, ids))


@pytest.fixture(scope="module")
def llama():
    model = Llama(LLAMA)
    return Generator(model, perturbed(model, jnp.ones((1, 3), jnp.int32)))


def prompts(count, longest, vocabulary, shortest=1):
    rng = np.random.default_rng(1)
    lengths = rng.integers(shortest, longest + 1, count)
    return [rng.integers(6, vocabulary, n).tolist() for n in lengths]


@functools.partial(jax.jit, static_argnums=0)
def whole_call(model, params, inputs):
    return model.apply({"params": params}, *inputs)


def by_hand(generator, prompt, options):
    """The likeliest tokens, from whole calls of the model, padded on the right, with no cache."""
    model, config = generator.model, generator.model.config

    def padded(ids, size):
        return np.pad(np.array([ids], np.int32), ((0, 0), (0, size - len(ids))))

    said = []
    for _ in range(options.max_new_tokens):
        if isinstance(model, Llama):
            inputs, at = (padded(prompt + said, 320 if len(prompt) > 40 else 64),), len(prompt)
        else:
            ids, at = padded(prompt, 40), 1
            mask = np.arange(40)[None] < len(prompt)
            inputs = ids, mask, padded([config.decoder_start_id, *said], 20)
        logits = whole_call(model, generator.params, inputs)
        said.append(int(logits[0, at + len(said) - 1].argmax()))
        if said[-1] in generators.ends_of(config):
            return said[:-1]
    return said


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_greedy_is_the_likeliest_by_whole_calls(name, request):
    generator = request.getfixturevalue(name)
    options = GenerationConfig(max_new_tokens=12)
    asked = prompts(7, 20, 29)
    assert generator.generate(asked, options) == [by_hand(generator, p, options) for p in asked]


@pytest.mark.parametrize("name", ["bart", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        GenerationConfig(max_new_tokens=9),
        GenerationConfig(max_new_tokens=9, sample=True, temperature=1.3, top_k=8, top_p=0.9),
        GenerationConfig(max_new_tokens=9, min_new_tokens=4, no_repeat_ngram=2),
    ],
)
def test_tokens_as_they_come(name, options, request):
    generator, key = request.getfixturevalue(name), jax.random.key(4)
    for prompt in prompts(3, 20, 29):
        assert (
            list(generator.stream(prompt, options, key))
            == generator.generate([prompt], options, key)[0]
        )


@pytest.mark.parametrize("name", ["bart", "llama"])
@pytest.mark.parametrize("beams", [1, 4])
def test_neighbours_are_of_no_matter(name, beams, request):
    generator = request.getfixturevalue(name)
    options = GenerationConfig(max_new_tokens=10, num_beams=beams, no_repeat_ngram=3)
    asked = prompts(5, 30, 29)
    together = generator.generate(asked, options)
    assert together == [generator.generate([p], options)[0] for p in asked]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 300, 396])
def test_prompts_of_any_length(llama, length):
    """Across chunks, sizes, and up to the last position."""
    options = GenerationConfig(max_new_tokens=5)
    rng = np.random.default_rng(length)
    prompt = rng.integers(6, 31, length).tolist()
    if length == 396:
        with pytest.raises(ValueError, match="a prompt has 396 tokens, and the model has room for"):
            llama.generate([prompt], options)
        return
    assert llama.generate([prompt], options)[0] == by_hand(llama, prompt, options)


def test_a_chat_compiles_once(llama):
    """Ten turns of which each is longer, up to a size."""
    options = GenerationConfig(max_new_tokens=11)
    generators._generate.clear_cache()
    rng = np.random.default_rng(0)
    for turn in range(10):
        llama.generate([rng.integers(6, 31, 70 + 15 * turn).tolist()], options)
    assert generators._generate._cache_size() == 1


def test_half_precision(llama):
    model = Llama(LLAMA, dtype=jnp.bfloat16)
    half = Generator(model, llama.params)
    answers = half.generate(prompts(4, 9, 29), GenerationConfig(max_new_tokens=6))
    assert len(answers) == 4


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[7], []], {}, "prompt 1 has no tokens"),
        ([[7, 31]], {}, r"ids must be in \[0, 31\), found 7 to 31"),
        ([[-1]], {}, r"ids must be in \[0, 31\), found -1"),
        ([[7] * 385], {}, "a prompt has 385 tokens, and the model has room for"),
        ([[7]], {"max_new_tokens": 401}, "a prompt has 1 tokens, and the model has room for 0"),
        ([[7]], {"sample": True}, "sample needs a key"),
        ([[7]], {"encoder_no_repeat_ngram": 2}, "source"),
    ],
)
def test_bad_prompts_are_named(llama, asked, options, message):
    options = dataclasses.replace(GenerationConfig(max_new_tokens=20), **options)
    with pytest.raises(ValueError, match=message):
        llama.generate(asked, options)


@pytest.mark.parametrize("name, room", [("bart", 40), ("llama", 384)])
def test_a_prompt_may_take_all_the_room(name, room, request):
    generator, options = request.getfixturevalue(name), GenerationConfig(max_new_tokens=4)
    assert generator.room(options) == room
    assert generator.generate([[7] * room], options)[0]
    with pytest.raises(ValueError, match=f"has {room + 1} tokens, .* room for {room}"):
        generator.generate([[7] * (room + 1)], options)


def test_beams_do_not_stream(bart):
    with pytest.raises(ValueError, match="num_beams must be 1, found 2"):
        next(bart.stream([7], GenerationConfig(max_new_tokens=9, num_beams=2)))


def test_an_output_longer_than_the_model(bart):
    with pytest.raises(ValueError, match="40 positions"):
        bart.generate([[7]], GenerationConfig(max_new_tokens=41))


def test_only_models_that_generate():
    with pytest.raises(ValueError, match="found Dense"):
        import flax.linen as nn

        Generator(nn.Dense(3), {})
