"""Checkpoints of BERT encoders in Hugging Face's format: MiniLM and its like, and DPR's two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dialog.config import BertConfig, GenerationConfig
from dialog.models.bert import Bert, check
from dialog.models.family import Family, Tensor

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
    "silu": "swish",
    "swish": "swish",
}
# What a checkpoint may say, and the only value that is computed here.
_FIXED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# Ours to theirs, within a layer.
_LINEAR = {
    "self_attn/q_proj": "attention.self.query",
    "self_attn/k_proj": "attention.self.key",
    "self_attn/v_proj": "attention.self.value",
    "self_attn/out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_NORMS = {
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "final_layer_norm": "output.LayerNorm",
}


def dpr_family(config: Mapping[str, Any]) -> Family:
    """Returns which of DPR's families a config.json is of, `DPR_QUESTION` or `DPR_CONTEXT`.

    Both have the `model_type` dpr; `architectures` tells them apart.

    Raises:
      ValueError: it names another architecture, such as DPRReader, or none.
    """
    known = {"DPRQuestionEncoder": DPR_QUESTION, "DPRContextEncoder": DPR_CONTEXT}
    found = config.get("architectures") or []
    if len(found) != 1 or found[0] not in known:
        raise ValueError(f"architectures must be one of {', '.join(known)}, found {found}")
    return known[found[0]]


def _config(json: Mapping[str, Any], pooling: str, normalize: bool) -> BertConfig:
    for key, value in _FIXED.items():
        if json.get(key, value) != value:
            raise ValueError(f"{key} must be {value!r}, found {json[key]!r}")
    activation = json.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, found {activation!r}"
        )
    # What a file leaves out is what transformers fills in: BERT-base.
    config = BertConfig(
        vocab_size=json.get("vocab_size", 30522),
        d_model=json.get("hidden_size", 768),
        layers=json.get("num_hidden_layers", 12),
        heads=json.get("num_attention_heads", 12),
        ffn=json.get("intermediate_size", 3072),
        max_positions=json.get("max_position_embeddings", 512),
        type_vocab_size=json.get("type_vocab_size", 2),
        layer_norm_eps=json.get("layer_norm_eps", 1e-12),
        activation=_ACTIVATIONS[activation],  # pyright: ignore[reportArgumentType]
        dropout=json.get("hidden_dropout_prob", 0.1),
        pad_id=0 if json.get("pad_token_id") is None else json["pad_token_id"],
        pooling=json.get("pooling", pooling),
        projection=json.get("projection_dim", 0),
        normalize=json.get("normalize", normalize),
    )
    check(config)
    return config


def _bert_config(json: Mapping[str, Any]) -> BertConfig:
    return _config({**json, "projection_dim": 0}, "mean", True)


def _dpr_config(json: Mapping[str, Any]) -> BertConfig:
    return _config(json, "cls", False)


def _to_json(config: BertConfig, model_type: str, architecture: str) -> dict[str, Any]:
    check(config)
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "pad_token_id": config.pad_id,
        "pooling": config.pooling,
        "normalize": config.normalize,
    }


def _bert_to_json(config: BertConfig) -> dict[str, Any]:
    if config.projection:
        raise ValueError(
            f"a checkpoint of BERT has no projection, found {config.projection}: save it as DPR"
        )
    return _to_json(config, "bert", "BertModel")


def _tensors(config: BertConfig, bert: str = "", top: str = "") -> dict[str, Tensor]:
    """Tensors of BERT under the prefix `bert`, and of a projection under `top`."""
    d, f = config.d_model, config.ffn
    tables = {"word": "tokens", "position": "positions", "token_type": "token_types"}
    rows = {
        "word": config.vocab_size,
        "position": config.max_positions,
        "token_type": config.type_vocab_size,
    }
    tensors = {
        f"{bert}embeddings.{theirs}_embeddings.weight": Tensor(
            f"embed_{ours}/embedding", (rows[theirs], d)
        )
        for theirs, ours in tables.items()
    }

    def norm(theirs: str, ours: str) -> None:
        tensors[f"{theirs}.weight"] = Tensor(f"{ours}/scale", (d,))
        tensors[f"{theirs}.bias"] = Tensor(f"{ours}/bias", (d,))

    def linear(theirs: str, ours: str, outputs: int, inputs: int) -> None:
        tensors[f"{theirs}.weight"] = Tensor(f"{ours}/kernel", (outputs, inputs), transpose=True)
        tensors[f"{theirs}.bias"] = Tensor(f"{ours}/bias", (outputs,))

    norm(f"{bert}embeddings.LayerNorm", "layernorm_embedding")
    for i in range(config.layers):
        for ours, theirs in _LINEAR.items():
            shape = {"fc1": (f, d), "fc2": (d, f)}.get(ours, (d, d))
            linear(f"{bert}encoder.layer.{i}.{theirs}", f"layers_{i}/{ours}", *shape)
        for ours, theirs in _NORMS.items():
            norm(f"{bert}encoder.layer.{i}.{theirs}", f"layers_{i}/{ours}")
    if config.projection:
        linear(f"{top}encode_proj", "projection", config.projection, d)
    return tensors


def _ignored(bert: str = "") -> tuple[str, ...]:
    return (f"{bert}pooler.", f"{bert}embeddings.position_ids")


def _generation(generation: Mapping[str, Any], config: Mapping[str, Any]) -> GenerationConfig:
    """An encoder generates nothing: the defaults."""
    del generation, config
    return GenerationConfig()


def _dpr(prefix: str, architecture: str) -> Family:
    return Family(
        name="dpr",
        config=_dpr_config,
        to_json=lambda config: (
            _to_json(config, "dpr", architecture) | {"projection_dim": config.projection}
        ),
        model=Bert,
        tensors=lambda config: _tensors(config, f"{prefix}.bert_model.", f"{prefix}."),
        ignored=_ignored(f"{prefix}.bert_model."),
        generation=_generation,
    )


BERT = Family(
    "bert", _bert_config, _bert_to_json, Bert, _tensors, _ignored(), generation=_generation
)
"""`model_type` bert: MiniLM and other encoders of sentence-transformers.

Their pooling is told in `1_Pooling/config.json` and `modules.json`, which aren't seen here: it is
the mean over tokens, of length 1, unless config.json has our own keys "pooling" ("cls" or "mean")
and "normalize" (true or false), as what `to_json` writes has.
"""

DPR_QUESTION = _dpr("question_encoder", "DPRQuestionEncoder")
"""`model_type` dpr, architecture DPRQuestionEncoder: the first token, as it is, maybe projected."""

DPR_CONTEXT = _dpr("ctx_encoder", "DPRContextEncoder")
"""`model_type` dpr, architecture DPRContextEncoder: the same for what is searched."""
