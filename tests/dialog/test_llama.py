"""Llama against transformers, and decoding with a cache against the whole call."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dialog.config import GenerationConfig, LlamaConfig  # noqa: E402
from dialog.models.attention import KeyValue  # noqa: E402
from dialog.models.llama import Llama, rotate  # noqa: E402
from dialog.models.llama_family import LLAMA  # noqa: E402


def shape(heads, groups, tied, **changes):
    tiny = LlamaConfig(
        vocab_size=53,
        d_model=heads * 6,
        layers=2,
        heads=heads,
        key_value_heads=groups,
        ffn=41,
        max_positions=19,
        tie_embeddings=tied,
    )
    return dataclasses.replace(tiny, **changes)


GROUPED = shape(9, 3, True, rope_theta=100.0)
CONFIGS = {
    "9/3 tied": GROUPED,
    "4/4": shape(4, 4, False),
    "4/1": shape(4, 1, False, norm_eps=1e-3, eos_ids=(2, 5)),
}


def fill(family, config, state):
    """Parameters from a checkpoint's tensors, each of which is taken or ignored."""
    state = {name: np.asarray(value) for name, value in state.items()}
    params = {}
    for name, tensor in family.tensors(config).items():
        value = state.pop(name)
        assert value.shape == tensor.shape, name
        *parents, leaf = tensor.path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        assert leaf not in node, tensor.path
        node[leaf] = jnp.asarray(value.T if tensor.transpose else value)
    assert all(name.startswith(family.ignored) for name in state), state.keys()
    return {"params": params}


@functools.cache
def oracle(name):
    """A tiny torch model, every parameter of which is perturbed, and ours with its weights."""
    config = CONFIGS[name]
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(LLAMA.to_json(config))
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = LLAMA.model(config)
    variables = fill(LLAMA, config, theirs.state_dict())
    shapes = jax.eval_shape(ours.init, jax.random.key(0), sentences())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    return theirs, config, ours, variables


def sentences(rows=3, length=13, seed=1):
    """Ids that aren't padding's, which torch gives no gradient."""
    return np.random.default_rng(seed).integers(3, 53, (rows, length)).astype(np.int32)


def left(lengths, length):
    return np.arange(length) >= length - np.array(lengths)[:, None]


# ---- against transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients(name):
    theirs, config, ours, variables = oracle(name)
    ids = sentences()
    want = theirs(torch.tensor(ids).long(), labels=torch.tensor(ids).long())

    @jax.jit
    def loss(variables):
        logits = ours.apply(variables, ids)
        chosen = jax.nn.log_softmax(logits)[jnp.arange(3)[:, None], jnp.arange(12), ids[:, 1:]]
        return -jnp.mean(chosen), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(variables)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, want.logits.detach(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours.apply(variables, ids), logits, atol=1e-5, rtol=0)
    assert float(value) == pytest.approx(want.loss.item(), abs=1e-5)

    theirs.zero_grad()
    want.loss.backward()
    wanted = fill(LLAMA, config, {n: p.grad for n, p in theirs.named_parameters()})
    assert jax.tree.structure(wanted) == jax.tree.structure(gradients)
    for (path, w), g in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(g, w, atol=1e-5, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    """On the left as on the right: each sentence alone, by torch."""
    theirs, _, ours, variables = oracle(name)
    ids, lengths = sentences(), (13, 9, 1)
    apply = jax.jit(ours.apply)
    for mask in (left(lengths, 13), left(lengths, 13)[:, ::-1]):
        logits = apply(variables, ids, mask)
        assert np.isfinite(logits).all()
        for row in range(3):
            alone = torch.tensor(ids[row][mask[row]]).long()[None]
            want = theirs(alone).logits[0].detach()
            np.testing.assert_allclose(logits[row][mask[row]], want, atol=1e-5, rtol=0)


def test_the_last_position_is_there_and_none_after_it():
    theirs, _, ours, variables = oracle("9/3 tied")
    ids = sentences(length=19)
    want = theirs(torch.tensor(ids).long()).logits.detach()
    np.testing.assert_allclose(ours.apply(variables, ids), want, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="20 tokens are more than max_positions, 19"):
        ours.apply(variables, sentences(length=20))
    with pytest.raises(ValueError, match="20 tokens are more than max_positions, 19"):
        mask = np.ones((3, 1, 20), bool)
        ours.apply(variables, ids[:, :1], ids[:, :1], mask, None, 0, method="decode")


# ---- rotation ------------------------------------------------------------------------------------


def test_rotation_is_a_product_of_complex_numbers():
    rng = np.random.default_rng(0)
    x, positions = np.float32(rng.normal(size=(2, 5, 3, 10))), rng.integers(0, 300, (2, 5))
    turned = x[..., :5] + 1j * x[..., 5:]
    turned = turned * np.exp(1j * positions[..., None, None] * 500.0 ** (-np.arange(5) / 5))
    got = rotate(jnp.asarray(x), jnp.asarray(positions, jnp.int32), 500.0)
    # An angle near 300 is known to 300 · 2^-24, and so is what it turns.
    want = np.concatenate((turned.real, turned.imag), -1)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dim", "theta"), [(64, 1e4), (64, 1e5), (128, 5e5)])
def test_far_positions_turn_as_in_transformers(dim, theta):
    """Within one unit in the last place of each frequency, even at position 8191."""
    config = transformers.LlamaConfig(
        hidden_size=dim, num_attention_heads=1, rope_parameters={"rope_theta": theta}
    )
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = np.array([[1, 100, 8191]], np.int32)
    cos, sin = embedding(torch.zeros(1), torch.tensor(positions))
    ones = jnp.concatenate((jnp.ones(dim // 2), jnp.zeros(dim // 2)))
    x = jnp.broadcast_to(ones, (1, 3, 1, dim))
    got = rotate(x, jnp.asarray(positions), theta)[0, :, 0]
    want = np.concatenate((cos[0, :, : dim // 2], sin[0, :, : dim // 2]), -1)
    assert (np.abs(got - want).max(1) <= np.array([2e-7, 1e-5, 1e-3])).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_only_the_distance_counts(query, key, shift):
    rng = np.random.default_rng(query)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(a, b):
        return float(jnp.sum(rotate(q, jnp.array([[a]]), 1e4) * rotate(k, jnp.array([[b]]), 1e4)))

    assert product(query, key) == pytest.approx(product(query + shift, key + shift), abs=2e-3)


# ---- decoding ------------------------------------------------------------------------------------


def decoded(ours, variables, ids, mask, prompt, slots, step=1, junk=False):
    """Logits of all columns: a prompt at once, then `step` by `step`, in a cache of `slots`."""
    rows, length = ids.shape
    config = ours.config
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    place = np.arange(slots)
    there = np.zeros((rows, slots), bool)
    there[:, :length] = mask
    cache = None
    if junk:  # what an earlier sentence left behind
        one = KeyValue.empty(rows, slots, config.key_value_heads, config.head_dim, jnp.float32)
        cache = tuple(jax.tree.map(lambda x: x + 7.0, one) for _ in range(config.layers))

    @jax.jit
    def run(ids, positions, seen, cache, at):
        return ours.apply(variables, ids, positions, seen, cache, at, method="decode")

    out, at = [], 0
    while at < length:
        new = slice(at, at + (step if at else prompt))
        seen = there[:, None] & (place <= np.arange(length)[new][:, None])[None]
        logits, cache = run(ids[:, new], positions[:, new], seen, cache, jnp.int32(at))
        out.append(logits)
        at = new.stop
    return np.concatenate(out, 1), cache


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("prompt", "slots", "step", "junk"), [(7, 13, 1, False), (4, 19, 3, True)])
def test_decoding_with_a_cache_is_the_whole_call(name, prompt, slots, step, junk):
    _, config, ours, variables = oracle(name)
    ids, mask = sentences(), left((13, 10, 8), 13)
    want = ours.apply(variables, ids, mask)
    got, cache = decoded(ours, variables, ids, mask, prompt, slots, step, junk)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-5, rtol=0)
    assert len(cache) == config.layers
    assert {x.shape for x in jax.tree.leaves(cache)} == {(3, slots, config.key_value_heads, 6)}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_logits_alone(name):
    *_, ours, variables = oracle(name)
    ids = sentences(length=6)
    args = ids, np.tile(np.arange(6), (3, 1)), np.tile(np.tri(6, 9, dtype=bool), (3, 1, 1)), None, 0
    run = functools.partial(ours.apply, variables, method="decode")
    whole, _ = run(*args)
    last, _ = run(*args, last_only=True)
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-6, rtol=0)
    traced = jax.make_jaxpr(lambda *a: run(*a, None, 0, last_only=True))(*args[:3])
    assert "f32[3,1,53]" in str(traced) and "f32[3,6,53]" not in str(traced)


# ---- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_of_padding_is_finite_forwards_and_backwards(name):
    *_, ours, variables = oracle(name)
    ids, mask = sentences(), left((13, 0, 4), 13)

    def loss(variables):
        logits = ours.apply(variables, ids, mask)
        return jnp.sum(logits**2), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, logits)))
    rest = ours.apply(variables, ids[::2], mask[::2])
    np.testing.assert_allclose(logits[::2][mask[::2]], rest[mask[::2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["9/3 tied", "4/1"])
def test_bf16_is_close_and_logits_stay_float32(name):
    _, config, ours, variables = oracle(name)
    ids, mask = sentences(), left((13, 9, 6), 13)
    half = Llama(config, dtype=jnp.bfloat16)
    want, got = ours.apply(variables, ids, mask), half.apply(variables, ids, mask)
    assert got.dtype == jnp.float32
    spread = np.std(want)
    assert 1e-4 * spread < np.abs(got - want)[mask].max() < 0.1 * spread
    step, cache = decoded(half, variables, ids, mask, 5, 16)
    assert step.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert np.abs(step - got)[mask].max() < 0.1 * spread
    params = half.init(jax.random.key(0), ids)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # Matrices may be kept in bfloat16 too, as generation does for their memory's sake.
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, variables)
    assert np.abs(half.apply(stored, ids, mask) - want)[mask].max() < 0.1 * spread


def test_rotations_of_bf16_are_in_float32():
    """Position 257 is no bfloat16; its cosine must not be that of 256 or 258."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    got = rotate(x, jnp.array([[257]]), 1e4)
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 0, 0, 0]) == pytest.approx(np.cos(257) - np.sin(257), abs=0.01)


def test_remat_changes_nothing_but_memory():
    _, config, ours, variables = oracle("9/3 tied")
    again, ids = Llama(config, remat=True), sentences()
    assert jax.tree.structure(again.init(jax.random.key(0), ids)) == jax.tree.structure(variables)

    def gradient(module):
        return jax.grad(lambda v: jnp.mean(module.apply(v, ids, train=True) ** 2))

    for got, want in zip(
        jax.tree.leaves(jax.jit(gradient(again))(variables)),
        jax.tree.leaves(jax.jit(gradient(ours))(variables)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert str(jax.make_jaxpr(gradient(again))(variables)).count("remat") >= config.layers
    assert "remat" not in str(jax.make_jaxpr(gradient(ours))(variables))
    got, _ = decoded(again, variables, ids, np.ones((3, 13), bool), 12, 13)
    np.testing.assert_allclose(got, ours.apply(variables, ids), atol=1e-5, rtol=0)


def test_bad_input_is_named():
    _, config, ours, variables = oracle("9/3 tied")
    ids = sentences(2, 3)
    mask, cache = np.ones((2, 3, 5), bool), [KeyValue.empty(2, 5, 3, 6, jnp.float32)] * 2
    for args, message in [
        ((ids[0],), r"ids must be \(N, T\), found \[3\]"),
        ((ids, mask[0]), r"mask must be bool\[2, 3\], found bool\[3, 5\]"),
        ((ids, np.ones((2, 3), np.int32)), r"mask must be bool\[2, 3\], found int32\[2, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.apply(variables, *args)
    for args, message in [
        ((ids, ids[:1], mask, None), r"positions must be \[2, 3\], found int32\[1, 3\]"),
        ((ids, ids, mask[:1], None), r"mask must be bool\[2, 3, 5\], found bool\[1, 3, 5\]"),
        ((ids, ids, mask[..., :2], None), "3 tokens want .* found 2 places and 2 layers"),
        ((ids, ids, mask[..., :4], cache), r"\[2, 4, 3, 6\], found float32\[2, 5, 3, 6\]"),
        ((ids, ids, mask, cache[:1]), "of 2 layers, found 5 places and 1 layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.apply(variables, *args, 0, method="decode")
    for change in ({"d_model": 55}, {"d_model": 45}, {"key_value_heads": 2}):
        wrong = dataclasses.replace(config, **change)
        with pytest.raises(ValueError, match=r"found d_model \d+, heads 9, key_value_heads \d"):
            Llama(wrong).init(jax.random.key(0), ids)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_comes_back(name):
    config = CONFIGS[name]
    saved = json.loads(json.dumps(LLAMA.to_json(config)))
    assert LLAMA.config(saved) == config and LLAMA.name == saved["model_type"]
    theirs = transformers.LlamaConfig.from_dict(saved).to_dict()
    assert theirs["rope_parameters"]["rope_theta"] == config.rope_theta
    assert LLAMA.config(theirs) == config
    old = {key: value for key, value in saved.items() if key != "rope_parameters"}
    assert LLAMA.config(old) == config


def test_what_a_configuration_leaves_out_is_what_transformers_fills_in():
    want = LLAMA.config(transformers.LlamaConfig().to_dict())
    assert LLAMA.config({}) == want
    assert LLAMA.config({"rope_scaling": None, "num_key_value_heads": None}) == want
    assert LLAMA.config({"rope_scaling": {"type": "default"}}) == want
    assert LLAMA.config({"eos_token_id": [7, 9]}).eos_ids == (7, 9)
    assert LLAMA.config({"eos_token_id": [7, 9]}).pad_id == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "must be 'default', found 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "must be 'default', found 'llama3'"),
        ({"head_dim": 8}, "head_dim must be .* 6, found 8"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', found 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False, found True"),
        ({"mlp_bias": True}, "mlp_bias must be False, found True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, found 0.5"),
        ({"num_key_value_heads": 4}, "heads 9, key_value_heads 4"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LLAMA.config({**LLAMA.to_json(GROUPED), **change})


def test_old_tensors_are_ignored():
    for name in ("lm_head.weight", "model.layers.31.self_attn.rotary_emb.inv_freq"):
        assert name.startswith(LLAMA.ignored)
    assert not any(name.startswith(LLAMA.ignored) for name in LLAMA.tensors(GROUPED))


def test_generation_options():
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "no_repeat_ngram_size": 3}
    want = GenerationConfig(sample=True, temperature=0.6, top_p=0.9, top_k=50, no_repeat_ngram=3)
    assert LLAMA.generation({**said, "min_p": None, "repetition_penalty": 1.0}, {}) == want
    assert LLAMA.generation({"temperature": 0.6}, {**said, "temperature": 0.1}) == want
    assert LLAMA.generation({"eos_token_id": 2, "max_length": 2048}, {}) == GenerationConfig()
    with pytest.raises(ValueError, match="repetition_penalty is not supported, found 1.1"):
        LLAMA.generation({"repetition_penalty": 1.1}, {})
    with pytest.raises(ValueError, match="early_stopping must be true or false, found 'never'"):
        LLAMA.generation({"early_stopping": "never"}, {})
