"""Checkpoints of Llama decoders in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dialog.config import GenerationConfig, LlamaConfig
from dialog.models.family import Family, Tensor
from dialog.models.llama import Llama, check

# What a checkpoint may say, and the only value that is computed here.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}
# Names of generation_config.json to ours.
_OPTIONS = {
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "forced_bos_token_id": "forced_bos_id",
    "forced_eos_token_id": "forced_eos_id",
    "do_sample": "sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
# Options that change what is generated and that aren't known here, with what changes nothing.
_WITHOUT = {
    "repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def _config(json: Mapping[str, Any]) -> LlamaConfig:
    """Raises ValueError for what `Llama` doesn't compute, by the name it has in config.json."""
    rope = {}
    for part in (json.get("rope_parameters") or {}, json.get("rope_scaling") or {}):
        kind = part.get("rope_type", part.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope scaling must be 'default', found {kind!r}")
        rope |= part
    for key, value in _FIXED.items():
        found = {**rope, **json}.get(key)
        if found is not None and found != value:
            raise ValueError(f"{key} must be {value!r}, found {found!r}")
    # What a file leaves out is what transformers fills in: Llama-7B.
    heads = json.get("num_attention_heads", 32)
    groups, eos = json.get("num_key_value_heads"), json.get("eos_token_id", 2)
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    pad, bos = json.get("pad_token_id"), json.get("bos_token_id", 1)
    config = LlamaConfig(
        vocab_size=json.get("vocab_size", 32000),
        d_model=json.get("hidden_size", 4096),
        layers=json.get("num_hidden_layers", 32),
        heads=heads,
        key_value_heads=heads if groups is None else groups,
        ffn=json.get("intermediate_size", 11008),
        max_positions=json.get("max_position_embeddings", 2048),
        rope_theta=float(json.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        norm_eps=json.get("rms_norm_eps", 1e-6),
        tie_embeddings=json.get("tie_word_embeddings", False),
        # Without a token of its own, padding is masked, and any token will do.
        pad_id=pad if pad is not None else eos_ids[0] if eos_ids else 0,
        bos_id=1 if bos is None else bos,
        eos_ids=eos_ids,
    )
    check(config)
    if json.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"head_dim must be hidden_size over num_attention_heads, {config.head_dim}, "
            f"found {json['head_dim']}"
        )
    return config


def _to_json(config: LlamaConfig) -> dict[str, Any]:
    check(config)
    eos = list(config.eos_ids)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        # transformers 4 reads the one, and 5 the other.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }


def _tensors(config: LlamaConfig) -> dict[str, Tensor]:
    d, f, kv = config.d_model, config.ffn, config.key_value_heads * config.head_dim
    matrices = {
        "self_attn": {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)},
        "mlp": {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)},
    }
    tensors = {
        "model.embed_tokens.weight": Tensor("embed_tokens/embedding", (config.vocab_size, d)),
        "model.norm.weight": Tensor("norm/scale", (d,)),
    }
    for i in range(config.layers):
        for part, shapes in matrices.items():
            for name, shape in shapes.items():
                tensors[f"model.layers.{i}.{part}.{name}.weight"] = Tensor(
                    f"layers_{i}/{part}/{name}/kernel", shape, transpose=True
                )
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = Tensor(f"layers_{i}/{name}/scale", (d,))
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = Tensor("lm_head/kernel", (config.vocab_size, d), transpose=True)
    return tensors


def _generation(generation: Mapping[str, Any], config: Mapping[str, Any]) -> GenerationConfig:
    """Raises ValueError for an option that isn't known here and would change the output.

    Lengths that count the prompt (`max_length`, `min_length`) have no counterpart and are left.
    """
    said = {k: v for k, v in {**config, **generation}.items() if v is not None}
    for key, neutral in _WITHOUT.items():
        if key in said and said[key] != neutral:
            raise ValueError(
                f"generation option {key} is not supported, found {said[key]!r}; "
                f"known are {', '.join(_OPTIONS)}"
            )
    if said.get("early_stopping") not in (None, True, False):
        raise ValueError(f"early_stopping must be true or false, found {said['early_stopping']!r}")
    options = {ours: said[theirs] for theirs, ours in _OPTIONS.items() if theirs in said}
    if options.get("sample"):
        options.setdefault("top_k", 50)  # as transformers draws where nothing is said
    return GenerationConfig(**options)


LLAMA = Family(
    name="llama",
    config=_config,
    to_json=_to_json,
    model=Llama,
    tensors=_tensors,
    # Old checkpoints keep the rotary frequencies, in each layer; the largest Llama has 126.
    ignored=(
        "lm_head.weight",
        *(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(126)),
    ),
    generation=_generation,
)
"""`model_type` llama: SmolLM2 and other Llamas without a scaled rotary embedding.

A tied head's copy, `lm_head.weight`, is ignored; where the head is the model's own it is among
`tensors`, which count first.
"""
