"""Beam search and greedy decoding give the ids of transformers' generate, on the same logits.

The models are tables: what follows depends on the last two tokens, on the position and on the
sentence, through float32 sums that torch and JAX round alike. Their vocabulary is small, so that
n-grams come back, sentences end and beams cross all the time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dialog.config import GenerationConfig
from dialog.decoding import beam, greedy
from dialog.decoding.constraints import Context

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PAD, START, EOS = 0, 1, 2


class Tables:
    """logits = table[last but one, last] + position[at] + sentence[of the source's first token]."""

    def __init__(self, vocabulary, seed, scale=2.0, positions=80):
        rng = np.random.default_rng(seed)
        normal = lambda *shape: np.float32(rng.normal(size=shape) * scale)  # noqa: E731
        self.vocabulary = vocabulary
        self.pair = normal(vocabulary, vocabulary, vocabulary)
        self.position = normal(positions, vocabulary)
        self.sentence = normal(vocabulary, vocabulary)

    def step(self, ids, at, cache):
        previous, bias = cache
        logits = self.pair[previous, ids] + jnp.asarray(self.position)[at][None] + bias
        return logits, (ids, bias)

    def prefill(self, prompt, source):
        """The first logits and the cache: the token before a prompt's first is padding."""
        before = np.concatenate([np.full((len(prompt), 1), PAD), prompt], 1)
        bias = jnp.asarray(self.sentence[source[:, 0]])
        return self.traced().step(
            jnp.asarray(prompt[:, -1]),
            jnp.int32(prompt.shape[1] - 1),
            (jnp.asarray(before[:, -2]), bias),
        )

    def traced(self):
        """The same, with a table that traced indices can look up."""
        tables = object.__new__(Tables)
        tables.__dict__.update(self.__dict__, pair=jnp.asarray(self.pair))
        return tables

    def torch_logits(self, ids, source):
        before = torch.cat([torch.full_like(ids[:, :1], PAD), ids], 1)
        pair = torch.from_numpy(self.pair)[before[:, -2], before[:, -1]]
        position = torch.from_numpy(self.position)[ids.shape[1] - 1]
        return pair + position[None] + torch.from_numpy(self.sentence)[source]


def as_transformers(tables, encoder_decoder):
    class Config(transformers.PretrainedConfig):
        model_type = "tables"

    class Encoder(torch.nn.Module):
        main_input_name = "input_ids"

        def forward(self, input_ids, **_):
            states = input_ids[:, :1, None].float()
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)

    class Model(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = Config
        main_input_name = "input_ids"

        def __init__(self, config):
            super().__init__(config)
            self.encoder = Encoder()
            self.anchor = torch.nn.Parameter(torch.zeros(1))
            self.post_init()

        def get_encoder(self, modality=None):
            return self.encoder

        def forward(
            self,
            input_ids=None,
            encoder_outputs=None,
            decoder_input_ids=None,
            attention_mask=None,
            **_,
        ):
            if encoder_decoder:
                source = encoder_outputs.last_hidden_state[:, 0, 0].long()
                logits = tables.torch_logits(decoder_input_ids, source)
            else:
                logits = tables.torch_logits(input_ids, torch.full_like(input_ids[:, 0], PAD))
            return transformers.modeling_outputs.CausalLMOutput(logits=logits[:, None])

    config = Config(
        is_encoder_decoder=encoder_decoder, vocab_size=tables.vocabulary, use_cache=False
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, START, EOS
    config.decoder_start_token_id = START
    return Model(config).eval()


def their_options(options, eos_ids):
    return dict(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        no_repeat_ngram_size=options.no_repeat_ngram,
        encoder_no_repeat_ngram_size=options.encoder_no_repeat_ngram,
        forced_bos_token_id=options.forced_bos_id,
        forced_eos_token_id=options.forced_eos_id,
        eos_token_id=list(eos_ids),
        pad_token_id=PAD,
        do_sample=False,
        use_cache=False,
    )


def theirs(model, inputs, prompt_length, options, eos_ids):
    """Their new tokens, cut after the end, and their scores; None from greedy decoding."""
    with torch.no_grad():
        out = model.generate(
            torch.from_numpy(inputs).long(),
            return_dict_in_generate=True,
            output_scores=True,
            **their_options(options, eos_ids),
        )
    new = out.sequences[:, prompt_length:].numpy()
    if options.num_beams > 1:  # they fill with the end where the padding is 0, so lengths are these
        lengths = (out.beam_indices >= 0).sum(1).numpy()
        return [row[:n].tolist() for row, n in zip(new, lengths, strict=True)], out.sequences_scores
    return [cut(row.tolist(), eos_ids) for row in new], None


def cut(row, eos_ids):
    ends = [i for i, token in enumerate(row) if token in eos_ids]
    return row[: ends[0] + 1] if ends else row


def compiled(tables, options, eos_ids):
    fixed = dict(options=options, eos_ids=eos_ids, pad_id=PAD)
    step = tables.traced().step
    decode = greedy.generate if options.num_beams == 1 else beam.search
    return jax.jit(lambda cache, logits, context: decode(step, cache, logits, context, **fixed))


def ours(tables, prompt, source, options, eos_ids):
    logits, cache = tables.prefill(prompt, source)
    context = Context(jnp.asarray(prompt), source=jnp.asarray(source))
    return compiled(tables, options, eos_ids)(cache, logits, context)


def rows_of(output):
    tokens, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[length:] == PAD).all()
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def assert_same(tables, model, prompt, source, options, eos_ids):
    encoder_decoder = model.config.is_encoder_decoder
    want, scores = theirs(
        model, source if encoder_decoder else prompt, prompt.shape[1], options, eos_ids
    )
    output = ours(tables, prompt, source, options, eos_ids)
    assert rows_of(output) == want
    if scores is not None:
        np.testing.assert_allclose(output.scores, scores, rtol=2e-6, atol=2e-6)
    return want


def sources(rows, length, vocabulary, seed):
    return np.random.default_rng(seed).integers(3, vocabulary, (rows, length)).astype(np.int32)


BLENDERBOT = GenerationConfig(
    num_beams=10,
    max_new_tokens=59,  # transformers counts the start token: 20 to 60
    min_new_tokens=19,
    length_penalty=0.65,
    no_repeat_ngram=3,
    encoder_no_repeat_ngram=3,
    forced_eos_id=EOS,
)
BART_CNN = GenerationConfig(
    num_beams=4,
    max_new_tokens=40,
    min_new_tokens=15,
    length_penalty=2.0,
    early_stopping=True,
    no_repeat_ngram=3,
    forced_bos_id=PAD,
    forced_eos_id=EOS,
)
G = GenerationConfig
OPTIONS = {
    "greedy": G(max_new_tokens=20),
    "greedy rules": G(
        max_new_tokens=40,
        min_new_tokens=10,
        no_repeat_ngram=2,
        encoder_no_repeat_ngram=2,
        forced_bos_id=5,
        forced_eos_id=EOS,
    ),
    "one token": G(max_new_tokens=1, num_beams=3),
    "three": G(max_new_tokens=25, num_beams=3),
    "three early": G(max_new_tokens=25, num_beams=3, early_stopping=True),
    "long": G(max_new_tokens=25, num_beams=3, length_penalty=2.5, min_new_tokens=3),
    "short": G(max_new_tokens=25, num_beams=3, length_penalty=-1.0),
    "no penalty": G(max_new_tokens=25, num_beams=5, length_penalty=0.0, no_repeat_ngram=1),
    "full length": G(max_new_tokens=12, min_new_tokens=12, num_beams=3, forced_eos_id=EOS),
    "source words": G(max_new_tokens=25, num_beams=3, encoder_no_repeat_ngram=1),
    "ten": G(max_new_tokens=30, num_beams=10, no_repeat_ngram=4, encoder_no_repeat_ngram=2),
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(BLENDERBOT, marks=pytest.mark.slow, id="blenderbot"),
        pytest.param(BART_CNN, id="bart-cnn"),
    ],
)
def test_defaults_of_the_families_on_many_prompts(options):
    tables = Tables(40, seed=1)
    source = sources(100, 30, 40, seed=2)
    prompt = np.full((100, 1), START, np.int32)
    want = assert_same(tables, as_transformers(tables, True), prompt, source, options, (EOS,))
    assert len({len(row) for row in want}) >= 3
    free = GenerationConfig(**{**vars(options), "no_repeat_ngram": 0, "encoder_no_repeat_ngram": 0})
    unblocked = rows_of(ours(tables, prompt, source, free, (EOS,)))
    assert sum(a != b for a, b in zip(want, unblocked, strict=True)) > 20  # the rules matter


@pytest.mark.parametrize(
    ("name", "eos_ids"),
    [
        *((name, (EOS,)) for name in OPTIONS),
        *((name, (EOS, 7, 4)) for name in ("greedy rules", "three early", "long", "full length")),
    ],
)
def test_encoder_decoder(name, eos_ids):
    tables = Tables(30, seed=3, scale=1.5)
    source = sources(25, 12, 30, seed=4)
    source[3, 5:] = PAD  # an unmasked source: padding counts, for both
    prompt = np.full((25, 1), START, np.int32)
    model = as_transformers(tables, True)
    assert_same(tables, model, prompt, source, OPTIONS[name], eos_ids)


@pytest.mark.parametrize("name", ["greedy rules", "three", "long", "ten"])
def test_decoder_with_long_prompts(name):
    """The rules see the prompt; it is the source, too; a first token can't be forced after it."""
    tables = Tables(30, seed=5, scale=1.5)
    tables.sentence[:] = 0
    prompt = sources(25, 17, 30, seed=6)
    model = as_transformers(tables, False)
    assert_same(tables, model, prompt, prompt, OPTIONS[name], (EOS,))


@pytest.mark.parametrize(("vocabulary", "beams"), [(6, 3), (9, 4), (24, 10)])
@pytest.mark.parametrize("early", [False, True])
def test_tiny_vocabularies(vocabulary, beams, early):
    """Ends and repeats at every step."""
    tables = Tables(vocabulary, seed=7, scale=1.0)
    source = sources(40, 5, vocabulary, seed=8)
    prompt = np.full((40, 1), START, np.int32)
    options = G(max_new_tokens=15, num_beams=beams, early_stopping=early, no_repeat_ngram=3)
    model = as_transformers(tables, True)
    assert_same(tables, model, prompt, source, options, (EOS,))


@pytest.mark.parametrize("early", [False, True])
def test_ends_that_are_likelier_than_all_else(early):
    """Most of the best continuations end, by one of four tokens."""
    tables = Tables(12, seed=18, scale=1.0)
    tables.position[1:4, 2:6] += 3.0
    source = sources(40, 5, 12, seed=19)
    prompt = np.full((40, 1), START, np.int32)
    options = G(max_new_tokens=12, num_beams=4, early_stopping=early, length_penalty=2.0)
    assert_same(tables, as_transformers(tables, True), prompt, source, options, (2, 3, 4, 5))


@pytest.mark.parametrize("options", [BLENDERBOT, OPTIONS["three early"]], ids=["full", "early"])
def test_a_sentence_does_not_depend_on_its_neighbours(options):
    tables = Tables(40, seed=9)
    source = sources(9, 14, 40, seed=10)
    prompt = np.full((9, 1), START, np.int32)
    together = ours(tables, prompt, source, options, (EOS,))
    search = compiled(tables, options, (EOS,))
    for row in range(9):
        logits, cache = tables.prefill(prompt[row, None], source[row, None])
        context = Context(jnp.asarray(prompt[row, None]), source=jnp.asarray(source[row, None]))
        alone = search(cache, logits, context)
        assert rows_of(alone) == [rows_of(together)[row]]
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-6)


@pytest.mark.parametrize("name", ["greedy rules", "three"])
def test_a_prompt_does_not_depend_on_its_padding(name):
    """Nor where the padding token is an end that prompts contain, as in SmolLM2's."""
    tables = Tables(12, seed=11)
    tables.position[:] = 0
    rng = np.random.default_rng(12)
    tables.pair[:, PAD, PAD] = 20
    changes = {"no_repeat_ngram": 2, "forced_bos_id": None}
    options = GenerationConfig(**{**vars(OPTIONS[name]), **changes})
    lengths = [1, 2, 9]
    prompt = np.full((3, 9), PAD, np.int32)
    for row, length in enumerate(lengths):
        prompt[row, 9 - length : 8] = rng.integers(0, 12, length - 1)  # and PAD at the end
    mask = jnp.asarray(np.arange(9) >= 9 - np.asarray(lengths)[:, None])
    decode = compiled(tables, options, (EOS,))
    start = np.full((3, 1), START, np.int32)
    logits, cache = tables.prefill(prompt, start)
    ids = jnp.asarray(prompt)
    together = decode(cache, logits, Context(ids, mask, ids, mask))
    for row, length in enumerate(lengths):
        ids = prompt[row, None, 9 - length :]
        logits, cache = tables.prefill(ids, start[:1])
        alone = decode(cache, logits, Context(jnp.asarray(ids), source=jnp.asarray(ids)))
        assert rows_of(alone) == [rows_of(together)[row]]
    ids = jnp.asarray(prompt)
    logits, cache = tables.prefill(prompt, start)
    unmasked = decode(cache, logits, Context(ids, source=ids))
    assert rows_of(unmasked) != rows_of(together)  # padding is a token then


def test_eager_equals_jit():
    options = GenerationConfig(**{**vars(OPTIONS["ten"]), "max_new_tokens": 2, "num_beams": 2})
    tables = Tables(30, seed=13)
    source, prompt = sources(3, 8, 30, seed=14), np.full((3, 1), START, np.int32)
    logits, cache = tables.prefill(prompt, source)
    context = Context(jnp.asarray(prompt), source=jnp.asarray(source))
    want = compiled(tables, options, (EOS,))(cache, logits, context)
    with jax.disable_jit():
        got = beam.search(
            tables.traced().step, cache, logits, context, options, eos_ids=(EOS,), pad_id=PAD
        )
    assert rows_of(got) == rows_of(want)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-6)


# ---- torch's own models, through a callback ------------------------------------------------------


def torch_model(family):
    torch.manual_seed(0)
    shape = dict(vocab_size=40, pad_token_id=PAD, bos_token_id=START, eos_token_id=EOS)
    if family == "llama":
        config = transformers.LlamaConfig(
            **shape,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = getattr(transformers, f"{family}Config")(
            **shape,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=20,
            max_position_embeddings=80,
            decoder_start_token_id=START,
            forced_eos_token_id=None,
        )
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Blenderbot", GenerationConfig(**{**vars(BLENDERBOT), "max_new_tokens": 25})),
        ("Bart", GenerationConfig(**{**vars(BART_CNN), "max_new_tokens": 20})),
        ("llama", OPTIONS["three"]),
        ("llama", OPTIONS["greedy"]),
    ],
)
def test_models_of_torch(family, options):
    """Their whole prefix is run at each step, on the tokens that our search hands over."""
    model = torch_model(family)
    source = sources(4, 11, 40, seed=15)
    prompt = source if family == "llama" else np.full((4, 1), START, np.int32)
    width = prompt.shape[1] + options.max_new_tokens

    def logits_of(ids, source):
        ids, source = (torch.from_numpy(np.array(x)).long() for x in (ids, source))
        given = {"input_ids": ids} if family == "llama" else {"decoder_input_ids": ids}
        with torch.no_grad():
            out = model(**given) if family == "llama" else model(input_ids=source, **given)
        return out.logits[:, -1].float().numpy()

    def step(ids, at, cache):
        tokens, source = cache
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, ids[:, None], at, axis=1)
        shape = jax.ShapeDtypeStruct((len(ids), 40), jnp.float32)
        call = lambda tokens, at, source: logits_of(np.asarray(tokens)[:, : int(at) + 1], source)  # noqa: E731
        return jax.pure_callback(call, shape, tokens, at, source), (tokens, source)

    want, _ = theirs(
        model, prompt if family == "llama" else source, prompt.shape[1], options, (EOS,)
    )
    tokens = jnp.pad(jnp.asarray(prompt), ((0, 0), (0, width - prompt.shape[1])))
    decode = greedy.generate if options.num_beams == 1 else beam.search
    search = jax.jit(partial(decode, step, options=options, eos_ids=(EOS,), pad_id=PAD))
    context = Context(jnp.asarray(prompt), source=jnp.asarray(source))
    got = search(
        cache=(tokens, jnp.asarray(source)),
        logits=jnp.asarray(logits_of(prompt, source)),
        context=context,
    )
    assert rows_of(got) == want


# ---- bad input and dead ends ---------------------------------------------------------------------


def test_where_every_continuation_is_forbidden():
    tables = Tables(6, seed=16)
    source, prompt = sources(2, 3, 6, seed=17), np.full((2, 1), START, np.int32)
    options = G(max_new_tokens=20, min_new_tokens=20, num_beams=3, no_repeat_ngram=1)
    output = ours(tables, prompt, source, options, (EOS,))
    assert output.lengths.tolist() == [0, 0] and (output.scores == -1e9).all()
    assert (output.tokens == PAD).all()


def test_no_step_is_run_after_the_last_token():
    """Not even where there are fewer ways to finish than beams, so that places stay free."""
    seen = []

    def step(ids, at, cache):
        seen.append(int(at))
        assert len(seen) == 1
        return jnp.zeros((len(ids), 5)), cache

    # Nothing may follow 0, 1 and 2, only 3 may follow 3; 9 stands between the pairs.
    pairs = [(a, b) for a in range(4) for b in range(5) if (a, b) != (3, 3)] + [(4, 4)]
    source = jnp.array([[token for pair in pairs for token in (*pair, 9)]])
    context = Context(jnp.full((1, 1), 4, jnp.int32), source=source)
    options = G(max_new_tokens=2, num_beams=6, encoder_no_repeat_ngram=2)
    with jax.disable_jit():
        output = beam.search(
            step, (), jnp.zeros((1, 5)), context, options, eos_ids=(EOS,), pad_id=PAD
        )
    assert seen == [1]
    assert output.tokens.tolist() == [[2, PAD]]


def bad(logits=(2, 9), prompt=(2, 1), cache=(2, 3), eos_ids=(EOS,), pad_id=PAD, **options):
    return beam.search(
        lambda ids, at, cache: (jnp.zeros((len(ids), 9)), cache),
        jnp.zeros(cache),
        jnp.zeros(logits),
        Context(jnp.zeros(prompt, jnp.int32)),
        GenerationConfig(**{"max_new_tokens": 3, **options}),
        eos_ids=eos_ids,
        pad_id=pad_id,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": (9,)}, r"logits must have shape \(B, V\), found \(9,\)"),
        ({"prompt": (3, 1)}, r"prompt must have shape \(2, at least 1\), found \(3, 1\)"),
        ({"prompt": (2, 0)}, r"prompt must have shape"),
        ({"cache": (4, 3)}, r"cache must have 2 rows in front, found \(4, 3\)"),
        ({"eos_ids": (2, 9)}, r"eos_ids must be in \[0, 9\), found 9"),
        ({"pad_id": -1}, r"pad_id must be in \[0, 9\), found -1"),
        ({"eos_ids": tuple(range(9))}, "found 9 tokens"),
        ({"forced_eos_id": 9}, r"forced_eos_id must be in \[0, 9\), found 9"),
        ({"sample": True}, "found sample True"),
        ({"encoder_no_repeat_ngram": 3}, "needs the encoder's input"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bad(**arguments)
