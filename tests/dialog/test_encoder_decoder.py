"""BART, Blenderbot and BlenderbotSmall against transformers' torch models, in float64."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import jaxprs_in_params

from dialog.config import EncoderDecoderConfig, GenerationConfig
from dialog.models.attention import causal_mask
from dialog.models.bart_family import BART, BLENDERBOT, BLENDERBOT_SMALL
from dialog.models.encoder_decoder import EncoderDecoder, init_cache

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = {family.name: family for family in (BART, BLENDERBOT, BLENDERBOT_SMALL)}
CLASSES = {
    "bart": ("BartConfig", "BartForConditionalGeneration"),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration"),
    "blenderbot-small": ("BlenderbotSmallConfig", "BlenderbotSmallForConditionalGeneration"),
}
TINY = {
    "vocab_size": 23,
    "d_model": 12,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 17,
    "decoder_ffn_dim": 7,
    "max_position_embeddings": 11,
}
EVERY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads of so small products only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torch_config(name, **options):
    options = {"scale_embedding": name != "bart", **TINY, **options}
    return getattr(transformers, CLASSES[name][0])(**options)


@functools.cache
def torch_model(name, **options):
    """In float64, with no parameter left as it is initialised, the biases and norms included."""
    config = torch_config(name, **options)
    config._attn_implementation = "eager"
    model = getattr(transformers, CLASSES[name][1])(config).double().eval()
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            norm = "norm" in key and key.endswith("weight")
            noise = rng.normal(size=tuple(value.shape)) * (0.2 if norm else 0.3) + norm
            value.copy_(torch.from_numpy(np.float32(noise)))
    return model


def filled(family, config, state):
    """Our parameters with a state_dict's values."""
    tensors = family.tensors(config)
    assert set(state) <= {*tensors, *family.ignored}
    params = {}
    for key, tensor in tensors.items():
        value = np.float32(state[key].numpy())
        assert value.shape == tensor.shape, key
        params[tensor.path] = value.T if tensor.transpose else value
    params["final_logits_bias"] = params["final_logits_bias"][0]
    return unflatten_dict(params, sep="/")


@functools.cache
def pair(name, **options):
    theirs, family = torch_model(name, **options), FAMILIES[name]
    config = family.config(theirs.config.to_dict())
    return theirs, family.model(config), filled(family, config, theirs.state_dict())


@functools.cache
def jitted(model: Any, method="__call__", **options):
    """`model.apply` with the parameters in front, compiled once for all tests."""

    @jax.jit
    def apply(params, *args, key=None):
        rngs = None if key is None else {"dropout": key}
        return model.apply({"params": params}, *args, method=method, rngs=rngs, **options)

    return apply


def padded(lengths, width, side, rng):
    mask = np.arange(width)[None] < np.array(lengths)[:, None]
    mask = mask if side == "right" else mask[:, ::-1].copy()
    return np.where(mask, rng.integers(3, 23, mask.shape), 0).astype(np.int32), mask


def batch(name, side="right", seed=0):
    """Three inputs, one as long as may be, and three outputs."""
    rng = np.random.default_rng(seed)
    pad = 1 if name == "bart" else 0
    ids, mask = padded((11, 4, 1), 11, side, rng)
    decoder_ids, decoder_mask = padded((3, 7, 6), 7, side, rng)
    labels = np.where(decoder_mask, rng.integers(0, 23, decoder_mask.shape), -100).astype(np.int32)
    ids, decoder_ids = np.where(mask, ids, pad), np.where(decoder_mask, decoder_ids, pad)
    return ids, mask, decoder_ids, decoder_mask, labels


def tensor(x):
    return torch.from_numpy(np.asarray(x).astype(np.int64))


def cross_entropy(logits, labels):
    chosen = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(chosen, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(labels >= 0, chosen, 0)) / jnp.sum(labels >= 0, dtype=jnp.float32)


def assert_close(got, want, tolerance=1e-5, scale=None):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    error = np.abs(got - want).max() / (scale or np.abs(want).max())
    assert error <= tolerance, error


# ---- parity --------------------------------------------------------------------------------------


@functools.cache
def jitted_gradient(model: Any, **options):
    apply = jitted(model, **options)

    def loss(params, ids, mask, decoder_ids, decoder_mask, labels, key=None):
        logits = apply(params, ids, mask, decoder_ids, decoder_mask, key=key)
        return cross_entropy(logits, labels), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@EVERY
@pytest.mark.parametrize("side", ["right", "left"])
def test_states_logits_loss_and_gradients(name, side):
    theirs, model, params = pair(name)
    ids, mask, decoder_ids, decoder_mask, labels = batch(name, side)
    theirs.zero_grad()
    out = theirs(
        *map(tensor, (ids, mask, decoder_ids, decoder_mask)),
        labels=tensor(labels),
    )
    out.loss.backward()
    (loss, logits), grads = jitted_gradient(model)(
        params, ids, mask, decoder_ids, decoder_mask, labels
    )
    encoded = jitted(model, "encode")(params, ids, mask)
    assert logits.dtype == encoded.dtype == jnp.float32
    assert_close(encoded, out.encoder_last_hidden_state.detach())
    # Where a padded query sees nothing, transformers lets it see everything.
    assert_close(logits[decoder_mask], out.logits.detach().numpy()[decoder_mask])
    assert_close(loss, out.loss.item())

    tensors = FAMILIES[name].tensors(model.config)
    grads: Any = flatten_dict(grads, sep="/")
    assert set(grads) == {t.path for t in tensors.values()}
    wanted = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    biggest = max(np.abs(w).max() for w in wanted.values())
    for key, t in tensors.items():
        if key == "final_logits_bias":  # a buffer, which is not learned
            assert not np.any(grads[t.path])
            continue
        want = wanted[key].T if t.transpose else wanted[key]
        # A bias of keys has no gradient but rounding: softmax doesn't see it.
        assert_close(grads[t.path], want, scale=max(np.abs(want).max(), 1e-2 * biggest))


@EVERY
def test_without_a_mask_the_output_is_causal_alone(name):
    theirs, model, params = pair(name)
    ids, mask, decoder_ids, _, _ = batch(name)
    want = theirs(tensor(ids), tensor(mask), decoder_input_ids=tensor(decoder_ids)).logits.detach()
    assert_close(jitted(model)(params, ids, mask, decoder_ids), want)


@EVERY
def test_attention_weights_are_kept_where_asked_for(name):
    theirs, model, params = pair(name)
    ids, mask, decoder_ids, decoder_mask, _ = batch(name)
    arguments = (ids, mask, decoder_ids, decoder_mask)
    out = theirs(*map(tensor, arguments), output_attentions=True)
    _, kept = jitted(model, mutable="intermediates")(params, *arguments)
    kept: Any = flatten_dict(kept["intermediates"], sep="/")
    wanted = {
        "encoder/layers_{}/self_attn": out.encoder_attentions,
        "decoder/layers_{}/self_attn": out.decoder_attentions,
        "decoder/layers_{}/encoder_attn": out.cross_attentions,
    }
    wanted = {
        f"{path.format(i)}/weights": x.detach()
        for path, xs in wanted.items()
        for i, x in enumerate(xs)
    }
    assert set(kept) == set(wanted) and len(kept) == 1 + 2 + 2
    for path, want in wanted.items():
        assert_close(kept[path][0], want)
    variables = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    assert set(variables) == {"params"}


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_new", "gelu_pytorch_tanh"])
def test_other_activations_and_scales(activation):
    options = {"activation_function": activation, "scale_embedding": True}
    theirs, model, params = pair("bart", **options)
    ids, mask, decoder_ids, decoder_mask, _ = batch("bart")
    want = theirs(*map(tensor, (ids, mask, decoder_ids, decoder_mask))).logits.detach().numpy()
    got = jitted(model)(params, ids, mask, decoder_ids, decoder_mask)
    assert_close(got[decoder_mask], want[decoder_mask])


# ---- decoding ------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("prefill", [1, 4])
def test_tokens_one_by_one_give_the_logits_of_the_whole(name, prefill):
    _, model, params = pair(name)
    ids, mask, decoder_ids, _, _ = batch(name)
    decode = functools.partial(jitted(model, "decode"), params)
    encoded = jitted(model, "encode")(params, ids, mask)
    cross = jitted(model, "cross")(params, encoded)
    want = jitted(model)(params, ids, mask, decoder_ids)
    rows, length, room = *decoder_ids.shape, 10
    cache = init_cache(model.config, rows, room)
    # What lies in the cache's unwritten part must not matter.
    cache = jax.tree.map(lambda x: x + 7, cache)
    at = 0
    for width in [prefill] + [1] * (length - prefill):
        positions = np.arange(at, at + width, dtype=np.int32)[None]
        sees = np.arange(room)[None, None] <= positions[..., None]
        tokens = decoder_ids[:, at : at + width]
        logits, cache = decode(tokens, positions, sees, cross, mask, cache, np.int32(at))
        assert_close(logits, want[:, at : at + width], 2e-6)
        at += width


@EVERY
def test_left_padded_outputs_are_as_if_alone(name):
    """With positions counted from the first token, padding has no effect at all."""
    _, model, params = pair(name)
    ids, mask, decoder_ids, decoder_mask, _ = batch(name, "left")
    positions = np.maximum(np.cumsum(decoder_mask, 1, dtype=np.int32) - 1, 0)
    encoded = jitted(model, "encode")(params, ids, mask)
    sees = causal_mask(decoder_mask)
    got, _ = jitted(model, "decode")(params, decoder_ids, positions, sees, encoded, mask)
    for n, shown in enumerate(decoder_mask):
        # At the right, where it can have no effect, padding only spares the compiler a length.
        ahead = np.roll(decoder_ids[n], shown.sum())
        alone = jitted(model)(params, ids[n, None], mask[n, None], ahead[None])
        assert_close(got[n, shown], alone[0, : shown.sum()], 2e-6)


@pytest.mark.parametrize("width", [1, 3])
def test_beams_share_the_keys_of_their_sentence(width):
    _, model, params = pair("blenderbot")
    ids, mask = (x[:2] for x in batch("blenderbot")[:2])
    beams, rng = 4, np.random.default_rng(5)
    tokens = rng.integers(3, 23, (2 * beams, width)).astype(np.int32)
    positions = np.arange(width, dtype=np.int32)[None]
    sees = np.tril(np.ones((1, width, width), bool))
    encoded = jitted(model, "encode")(params, ids, mask)
    cross = jitted(model, "cross")(params, encoded)
    decode = jitted(model, "decode", mutable="intermediates")
    decode = functools.partial(decode, params, tokens, positions, sees)
    wide = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), (cross, mask))
    want, want_kept = decode(*wide)
    for source in (cross, encoded):
        got, kept = decode(source, mask)
        jax.tree.map(functools.partial(assert_close, tolerance=2e-6), got, want)
        jax.tree.map(functools.partial(assert_close, tolerance=2e-6), kept, want_kept)
    assert "8,11,2,6]" in str(jax.make_jaxpr(decode)(*wide))
    assert "8,11,2,6]" not in str(jax.make_jaxpr(decode)(cross, mask))


def test_rows_must_be_whole_sentences():
    _, model, params = pair("blenderbot")
    ids, mask, decoder_ids, _, _ = batch("blenderbot")
    with pytest.raises(ValueError, match="3 rows of 2 sentences"):
        jitted(model)(params, ids[:2], mask[:2], decoder_ids)


@EVERY
def test_past_the_last_position(name):
    _, model, params = pair(name)
    right, wrong = np.full((1, 11), 5, np.int32), np.full((1, 12), 5, np.int32)
    assert jitted(model)(params, right, right > 0, right).shape == (1, 11, 23)
    for ids, decoder_ids in ((right, wrong), (wrong, right)):
        with pytest.raises(ValueError, match="12 tokens are more than the model's 11 positions"):
            jitted(model)(params, ids, ids > 0, decoder_ids)
    with pytest.raises(ValueError, match="12 tokens is more than the model's 11 positions"):
        init_cache(model.config, 1, 12)
    cache = init_cache(model.config, 4, 11, jnp.bfloat16)
    assert len(cache) == 2 and cache[0].key.shape == (4, 11, 2, 6)
    assert cache[0].value.dtype == jnp.bfloat16


# ---- numbers -------------------------------------------------------------------------------------


@EVERY
def test_a_row_of_nothing_but_padding(name):
    _, model, params = pair(name)
    ids, mask, decoder_ids, decoder_mask, labels = batch(name)

    empty, decoder_empty = mask.copy(), decoder_mask.copy()
    empty[1], decoder_empty[1] = False, False
    gradient = jitted_gradient(model)
    results = gradient(params, ids, empty, decoder_ids, decoder_empty, labels)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(results))
    logits = results[0][1]
    full = gradient(params, ids, mask, decoder_ids, decoder_mask, labels)[0][1]
    np.testing.assert_array_equal(logits[::2], full[::2])
    assert not np.allclose(logits[1], full[1])


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
        for inner in jaxprs_in_params(eqn.params):
            yield from primitives(inner)


@EVERY
def test_bfloat16_with_norms_and_softmax_in_float32(name):
    _, model, params = pair(name)
    ids, mask, decoder_ids, decoder_mask, _ = batch(name)
    arguments = (params, ids, mask, decoder_ids, decoder_mask)
    low = model.clone(dtype=jnp.bfloat16)
    logits = jitted(low)(*arguments)
    assert logits.dtype == jnp.float32
    assert_close(logits, jitted(model)(*arguments), 0.05)
    assert jax.eval_shape(jitted(low, "encode"), *arguments[:3]).dtype == jnp.bfloat16
    params = jax.eval_shape(low.init, jax.random.key(0), *arguments[1:])["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    seen = list(primitives(jax.make_jaxpr(jitted(low))(*arguments).jaxpr))
    norms, softmaxes = ([t[0] for n, t in seen if n == which] for which in ("rsqrt", "exp"))
    assert len(norms) >= 2 + 2 * 3 and len(softmaxes) == 1 + 2 + 2
    assert {*norms, *softmaxes} == {jnp.dtype("float32")}
    products = [types for n, types in seen if n == "dot_general"]
    assert all(t == jnp.bfloat16 for types in products for t in types[:2])
    assert products[-1][2] == jnp.float32  # the logits, from sums in float32


def test_remat_changes_nothing():
    """Not even which units dropout drops."""
    rates = {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.4}
    _, model, params = pair("blenderbot", **rates)
    arguments = (params, *batch("blenderbot"), jax.random.key(1))
    plain, remat = (jitted_gradient(model.clone(remat=r), train=True) for r in (False, True))
    (want, _), want_grads = plain(*arguments)
    (got, _), got_grads = remat(*arguments)
    assert_close(got, want, 1e-6)
    for g, w in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)
    for function, count in ((plain, 0), (remat, 1 + 2)):
        names = [n for n, _ in primitives(jax.make_jaxpr(function)(*arguments).jaxpr)]
        # Each layer once: the backward pass has it unrolled.
        assert sum("remat" in n or "checkpoint" in n for n in names) == count


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_drops_in_training_alone(rate):
    rates = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    _, model, params = pair("blenderbot-small", **rates)
    arguments = (params, *batch("blenderbot-small")[:4])
    want = jitted(model)(*arguments)
    nothing = jitted(model, train=True)(*arguments, key=jax.random.key(0))
    np.testing.assert_allclose(nothing, want, rtol=1e-5)
    model = EncoderDecoder(dataclasses.replace(model.config, **{rate: 0.25}))
    np.testing.assert_array_equal(jitted(model)(*arguments), want)
    dropping = jitted(model, train=True)
    a, b, again = (dropping(*arguments, key=jax.random.key(k)) for k in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert not np.allclose(a, b) and not np.allclose(a, want)


def test_dropped_attention_is_scaled_up():
    _, model, params = pair("bart", dropout=0.0, attention_dropout=0.25)
    ids, mask = batch("bart")[:2]
    weights = []
    for train in (False, True):
        encode = jitted(model, "encode", train=train, mutable="intermediates")
        _, kept = encode(params, ids, mask, key=jax.random.key(0))
        weights.append(kept["intermediates"]["encoder"]["layers_0"]["self_attn"]["weights"][0])
    whole, dropped = weights
    gone = dropped == 0
    np.testing.assert_allclose(dropped, jnp.where(gone, 0, whole / 0.75), rtol=1e-6)
    there = np.broadcast_to(mask[:, None, None], whole.shape)
    assert 0.15 < np.mean(gone[there]) < 0.35


def test_the_number_of_parameters_of_400m():
    config = BLENDERBOT.config(
        {
            "vocab_size": 8008,
            "d_model": 1280,
            "encoder_layers": 2,
            "decoder_layers": 12,
            "encoder_attention_heads": 32,
            "decoder_attention_heads": 32,
            "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120,
            "max_position_embeddings": 128,
        }
    )
    ids = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 3), bool)
    params = jax.eval_shape(EncoderDecoder(config).init, jax.random.key(0), ids, mask, ids)[
        "params"
    ]
    bias = params.pop("final_logits_bias")  # a buffer in torch, which doesn't count it
    assert bias.shape == (8008,)
    assert sum(x.size for x in jax.tree.leaves(params)) == 364_802_560


# ---- configurations ------------------------------------------------------------------------------

ODD = {
    "dropout": 0.25,
    "attention_dropout": 0.5,
    "activation_dropout": 0.125,
    "activation_function": "gelu_new",
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "decoder_start_token_id": 6,
}


@EVERY
@pytest.mark.parametrize("options", [{}, ODD], ids=["defaults", "odd"])
def test_configurations_go_to_transformers_and_back(name, options, tmp_path):
    family, theirs = FAMILIES[name], torch_config(name, **options)
    ours = family.config(theirs.to_dict())
    (tmp_path / "config.json").write_text(json.dumps(family.to_json(ours)))
    back = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(back) is type(theirs)
    generated = ("transformers_version", "architectures", "_name_or_path", "dtype")
    got, want = (
        {k: v for k, v in c.to_dict().items() if k not in generated} for c in (back, theirs)
    )
    assert got == want
    assert family.config(family.to_json(ours)) == ours
    # The parameters are those of the model that transformers makes of it.
    state = transformers.AutoModelForSeq2SeqLM.from_config(back).state_dict()
    shape = functools.partial(jax.eval_shape, family.model(ours).init, jax.random.key(0))
    ids = jnp.ones((1, 2), jnp.int32)
    params: Any = flatten_dict(shape(ids, ids > 0, ids)["params"], sep="/")
    found: Any = flatten_dict(filled(family, ours, state), sep="/")
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in params.items()}


def test_defaults_are_those_of_transformers():
    """Where config.json has but the shape."""
    for name, family in FAMILIES.items():
        full = getattr(transformers, CLASSES[name][0])(**TINY).to_dict()
        assert family.config(TINY) == family.config(full)


CONFIG_ERRORS = [
    ({"d_model": None, "encoder_ffn_dim": "7"}, "whole numbers for d_model, encoder_ffn_dim"),
    ({"activation_function": "mish"}, "activation_function must be one of .*gelu.*; found 'mish'"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"eos_token_id": [2, 3]}, r"eos_token_id must be one whole number, found \[2, 3\]"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_ERRORS)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BART.config({**TINY, **change})


def test_ids_may_be_lists_of_one():
    assert BART.config({**TINY, "eos_token_id": [5]}).eos_id == 5


def test_a_model_of_one_family_is_no_checkpoint_of_another():
    with pytest.raises(ValueError, match="a checkpoint of bart must have .*'position_offset': 2"):
        BART.to_json(BLENDERBOT.config(TINY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "mish"}, "gelu_new, relu, swish; found 'mish'"),
        ({"decoder_heads": 5}, "decoder_heads must divide d_model 12, found 5"),
    ],
)
def test_bad_shapes_are_named(change, message):
    config = dataclasses.replace(BART.config(TINY), **change)
    ids = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=message):
        EncoderDecoder(config).init(jax.random.key(0), ids, ids > 0, ids)


# ---- generation ----------------------------------------------------------------------------------

DISTILL = {
    "encoder_no_repeat_ngram_size": 3,
    "forced_eos_token_id": 2,
    "length_penalty": 0.65,
    "max_length": 60,
    "min_length": 20,
    "no_repeat_ngram_size": 3,
    "num_beams": 10,
}
CNN = {
    "early_stopping": True,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": [2],
    "length_penalty": 2.0,
    "max_length": 142,
    "min_length": 56,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
}


def test_generation_of_known_checkpoints():
    want = GenerationConfig(59, 19, 10, 0.65, False, 3, 3, None, 2)
    assert BLENDERBOT.generation(DISTILL, TINY) == want
    assert BLENDERBOT.generation({}, {**TINY, **DISTILL}) == want  # an old one, without the file
    assert BLENDERBOT.generation({"num_beams": 2}, {**TINY, **DISTILL}).length_penalty == 1.0
    want = GenerationConfig(141, 55, 4, 2.0, True, 3, 0, 0, 2)
    assert BART.generation(CNN, TINY) == want
    drawn = {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "max_new_tokens": 9}
    want = GenerationConfig(9, sample=True, temperature=0.7, top_k=50, top_p=0.9)
    assert BART.generation(drawn, TINY) == want
    assert BART.generation({**drawn, "top_k": 0, "min_new_tokens": 3}, TINY) == dataclasses.replace(
        want, top_k=0, min_new_tokens=3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping": "never"}, "early_stopping must be true or false, found 'never'"),
        ({"repetition_penalty": 1.3, "min_p": 0.0}, "not supported: repetition_penalty 1.3$"),
        ({"forced_eos_token_id": [2, 3]}, "forced_eos_token_id"),
        ({"num_beams": 2, "do_sample": True}, "beams"),
    ],
)
def test_bad_generation_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        BART.generation(options, TINY)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 9, "min_length": 5},
        {"max_new_tokens": 6, "min_new_tokens": 2},
        {"max_length": 4},
        {},
    ],
)
def test_lengths_are_those_that_transformers_generates(options):
    theirs = torch_model("blenderbot")
    ours = BLENDERBOT.generation(options, TINY)
    bias, new = theirs.final_logits_bias, []
    for value in (-1e4, 1e4):  # never ends by itself, or at once
        with torch.no_grad():
            old = bias[0, 2].item()
            bias[0, 2] = value
            out = theirs.generate(
                torch.full((1, 3), 7),
                generation_config=transformers.GenerationConfig(
                    decoder_start_token_id=1, eos_token_id=2, pad_token_id=0, **options
                ),
            )
            bias[0, 2] = old
        new.append(out.shape[1] - 1)
    assert new == [ours.max_new_tokens, ours.min_new_tokens + 1]


def test_the_configuration_table_of_the_three():
    """What tells the families apart, against the table in the configuration's docstring."""
    rows = [
        [cell.strip(" `") for cell in line.strip().strip("|").split("|")]
        for line in str(EncoderDecoderConfig.__doc__).splitlines()
        if line.strip().startswith("| `")
    ]
    assert len(rows) == 5
    for row in rows:
        if row[0] == "scale_embedding":
            continue
        found = [getattr(family.config(TINY), row[0]) for family in FAMILIES.values()]
        words = {True: "yes", False: "no"}
        for cell, value in zip(row[1:], found, strict=True):
            assert cell.startswith(words[value] if isinstance(value, bool) else str(value)), row
