"""GGUF files of Llama-shaped models, read as if they were a folder in Hugging Face's layout.

Quantised tensors become float32. llama.cpp rotates neighbouring pairs of dimensions where Hugging
Face rotates dimension i with i + head_dim / 2, so its files have the rows of query and key
reordered; that is undone here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dialog.models.safetensors_folder import Checkpoint, CheckpointError, Found, import_extra

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class TokenizerParts(NamedTuple):
    """What a tokenizer is built from.

    Attributes:
      tokens: by id; in the byte-to-letter alphabet of GPT-2.
      merges: pairs joined by a space, the first to be merged first; empty where there are none.
      types: by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
      special: ids by the names `bos`, `eos`, `eot`, `unk` and `pad`, of those that are set.
      chat_template: in Jinja, or None.
    """

    tokens: list[str]
    merges: list[str]
    types: list[int]
    special: dict[str, int]
    chat_template: str | None


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of the architecture "llama".

    Names, shapes and values are those of the model before its conversion to GGUF, as far as
    quantisation kept them. Tensors without a counterpart keep their names.

    Raises:
      CheckpointError: the file is truncated or no GGUF, of another architecture, or uses what
        a `LlamaConfig` can't say (scaled or partial rotary embedding, experts).
    """
    reader = _reader(path)
    tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
    config = _config(path, _scalars(reader), tensors)
    heads = {
        "q_proj.weight": config["num_attention_heads"],
        "k_proj.weight": config["num_key_value_heads"],
    }
    found = {name: Found(_shape(tensor), "float32") for name, tensor in tensors.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        from gguf.quants import dequantize

        for name in names:
            kind = tensors[name].tensor_type
            try:
                array = dequantize(tensors[name].data, kind)
            except NotImplementedError as error:
                raise CheckpointError(f"{path}: {name} is {kind.name}: {error}") from error
            part = ".".join(name.split(".")[-2:])
            yield name, unpermute(array, heads[part]) if part in heads else array

    return Checkpoint(config, {}, found, read)


def tokenizer_parts(path: str | Path) -> TokenizerParts:
    """Reads the byte-level BPE tokenizer in a GGUF file.

    Raises:
      CheckpointError: the file is truncated or no GGUF, or its tokenizer is of another kind.
    """
    reader = _reader(Path(path))
    fields = _scalars(reader)
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model must be 'gpt2', which is byte-level BPE, found {model!r}"
        )
    names = ("tokens", "merges", "token_type")
    lists = (reader.fields.get(f"tokenizer.ggml.{name}") for name in names)
    tokens, merges, types = ([] if field is None else field.contents() for field in lists)
    template = fields.get("tokenizer.chat_template")
    return TokenizerParts(tokens, merges, types, _special(fields), template)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection, from llama.cpp's order to Hugging Face's.

    llama.cpp's row 2i + j of a head is Hugging Face's row j · head_dim / 2 + i, j in {0, 1}.

    Args:
      weight: `(heads · head_dim, d_model)`.
      heads: of the query, or of the key.

    >>> unpermute(np.arange(12)[:, None], heads=2)[:, 0].tolist()
    [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    """
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The metadata as Hugging Face's config.json."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path}: general.architecture must be 'llama', found {architecture!r}"
        )
    if "model.embed_tokens.weight" not in tensors:
        raise CheckpointError(f"{path} has no tensor token_embd.weight")
    llama = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    try:
        d_model, heads = llama["embedding_length"], llama["attention.head_count"]
        config = {
            "hidden_size": d_model,
            "intermediate_size": llama["feed_forward_length"],
            "num_hidden_layers": llama["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": llama.get("attention.head_count_kv", heads),
            "max_position_embeddings": llama["context_length"],
            "rms_norm_eps": _decimal(llama["attention.layer_norm_rms_epsilon"]),
        }
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the metadata llama.{error.args[0]}") from error
    theta = _decimal(llama.get("rope.freq_base", 10000.0))
    special = _special(fields)
    eos = [special[name] for name in ("eos", "eot") if name in special]
    expected = {
        "rope.dimension_count": d_model // heads,
        "attention.key_length": d_model // heads,
        "attention.value_length": d_model // heads,
        "rope.scaling.type": "none",
        "rope.scale_linear": 1.0,
        "expert_count": 0,
    }
    for key, value in expected.items():
        if llama.get(key, value) != value:
            raise CheckpointError(
                f"{path}: llama.{key} must be {value!r} or absent, found {llama[key]!r}"
            )
    config |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": _shape(tensors["model.embed_tokens.weight"])[0],
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": special.get("bos"),
        "eos_token_id": list(dict.fromkeys(eos)),
        "pad_token_id": special.get("pad", eos[0] if eos else None),
    }
    return config


def _special(fields: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}
    keys = {name: f"tokenizer.ggml.{long}_token_id" for name, long in names.items()}
    return {name: fields[key] for name, key in keys.items() if key in fields}


def _decimal(value: float) -> float:
    """The shortest decimal that the file's float32 is nearest to: 1e-5, not 9.99999974e-6."""
    return float(str(np.float32(value)))


def _name(name: str) -> str:
    block, _, rest = name.removeprefix("blk.").partition(".") if name[:4] == "blk." else ("",) * 3
    stem, _, end = (rest or name).rpartition(".")
    if stem not in _NAMES:
        return name
    return f"model.layers.{block}.{_NAMES[stem]}.{end}" if block else f"{_NAMES[stem]}.{end}"


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))  # the file has the fastest axis first


def _scalars(reader: Any) -> dict[str, Any]:
    """The metadata without its lists: those of the tokenizer take seconds."""
    return {k: f.contents() for k, f in reader.fields.items() if f.types[0].name != "ARRAY"}


def _reader(path: Path) -> Any:
    gguf = import_extra("gguf")
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or no GGUF file: {error}") from error
