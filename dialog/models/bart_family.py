"""Checkpoints of BART, Blenderbot and BlenderbotSmall in Hugging Face's format."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from dialog.config import EncoderDecoderConfig, GenerationConfig
from dialog.models.activations import ACTIVATIONS
from dialog.models.encoder_decoder import EncoderDecoder
from dialog.models.family import Family, Tensor

# Our name of each number that config.json must have, for its name there.
_SHAPE = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_attention_heads": "encoder_heads",
    "decoder_attention_heads": "decoder_heads",
    "encoder_ffn_dim": "encoder_ffn",
    "decoder_ffn_dim": "decoder_ffn",
    "max_position_embeddings": "max_positions",
}
# The same for what it may lack; transformers' defaults are those of EncoderDecoderConfig, save ids.
_RATES = ("dropout", "attention_dropout", "activation_dropout")
_IDS = {
    "pad_token_id": "pad_id",
    "bos_token_id": "bos_id",
    "eos_token_id": "eos_id",
    "decoder_start_token_id": "decoder_start_id",
}
# transformers has more than one name of some.
_ACTIVATIONS: dict[str, Any] = {
    "gelu_pytorch_tanh": "gelu_new",
    "silu": "swish",
    **{name: name for name in ACTIVATIONS},
}
# What would change an output and has no option here, with the value that leaves it alone.
_UNKNOWN = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
}


def _config(
    form: Mapping[str, Any], ids: tuple[int, ...], given: Mapping[str, Any]
) -> EncoderDecoderConfig:
    """Reads config.json; what transformers' models ignore (`normalize_before`) is ignored here."""
    if missing := [name for name in _SHAPE if not isinstance(given.get(name), int)]:
        raise ValueError(f"config.json must have whole numbers for {', '.join(missing)}")
    activation = given.get("activation_function", "gelu")
    if activation not in _ACTIVATIONS:
        allowed = ", ".join(_ACTIVATIONS)
        raise ValueError(f"activation_function must be one of {allowed}; found {activation!r}")
    if not given.get("tie_word_embeddings", True):
        raise ValueError("tie_word_embeddings must be true, found false: the output is tied")
    return EncoderDecoderConfig(
        **{ours: given[name] for name, ours in _SHAPE.items()},
        **{name: given[name] for name in _RATES if name in given},
        **{
            ours: _single(name, given.get(name, default))
            for (name, ours), default in zip(_IDS.items(), ids, strict=True)
        },
        scale_embedding=bool(given.get("scale_embedding", False)),
        activation=_ACTIVATIONS[activation],
        **form,
    )


def _to_json(
    name: str, architecture: str, form: Mapping[str, Any], config: EncoderDecoderConfig
) -> dict[str, Any]:
    found = {key: getattr(config, key) for key in form}
    if found != dict(form):
        raise ValueError(f"a checkpoint of {name} must have {dict(form)}, found {found}")
    return {
        "model_type": name,
        "architectures": [architecture],
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        **{theirs: getattr(config, ours) for theirs, ours in (_SHAPE | _IDS).items()},
        **{rate: getattr(config, rate) for rate in _RATES},
        "scale_embedding": config.scale_embedding,
        "activation_function": config.activation,
    }


def _tensors(config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """Names in the checkpoint; its `final_logits_bias` is (1, V) and the parameter (V,)."""
    width = config.d_model
    tensors = {
        "model.shared.weight": Tensor("shared/embedding", (config.vocab_size, width)),
        "final_logits_bias": Tensor("final_logits_bias", (1, config.vocab_size), needed=False),
    }

    def dense(name: str, path: str, into: int, out: int) -> None:
        tensors[f"{name}.weight"] = Tensor(f"{path}/kernel", (out, into), transpose=True)
        tensors[f"{name}.bias"] = Tensor(f"{path}/bias", (out,))

    def norm(name: str, path: str) -> None:
        tensors[f"{name}.weight"] = Tensor(f"{path}/scale", (width,))
        tensors[f"{name}.bias"] = Tensor(f"{path}/bias", (width,))

    stacks = (
        ("encoder", config.encoder_layers, config.encoder_ffn, config.encoder_embed_norm),
        ("decoder", config.decoder_layers, config.decoder_ffn, config.decoder_embed_norm),
    )
    for stack, layers, ffn, embed_norm in stacks:
        tensors[f"model.{stack}.embed_positions.weight"] = Tensor(
            f"{stack}/embed_positions/embedding",
            (config.position_offset + config.max_positions, width),
        )
        if embed_norm != "none":
            norm(f"model.{stack}.layernorm_embedding", f"{stack}/layernorm_embedding")
        if config.pre_norm:
            norm(f"model.{stack}.layer_norm", f"{stack}/layer_norm")
        for i in range(layers):
            name, path = f"model.{stack}.layers.{i}", f"{stack}/layers_{i}"
            for attention in ("self_attn", "encoder_attn")[: 1 if stack == "encoder" else 2]:
                for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    dense(f"{name}.{attention}.{part}", f"{path}/{attention}/{part}", width, width)
                norm(f"{name}.{attention}_layer_norm", f"{path}/{attention}_layer_norm")
            dense(f"{name}.fc1", f"{path}/fc1", width, ffn)
            dense(f"{name}.fc2", f"{path}/fc2", ffn, width)
            norm(f"{name}.final_layer_norm", f"{path}/final_layer_norm")
    return tensors


def _generation(generation: Mapping[str, Any], config: Mapping[str, Any]) -> GenerationConfig:
    """Reads generation_config.json; where there is none, config.json, as transformers 5 does.

    transformers' `max_length` and `min_length` count the token that the decoder starts from.
    """
    # A null is transformers' way to leave an option out.
    given = {k: v for k, v in (generation or config).items() if v is not None}
    if unknown := [f"{k} {given[k]}" for k, v in _UNKNOWN.items() if given.get(k, v) != v]:
        raise ValueError(f"generation has options that are not supported: {', '.join(unknown)}")
    early = given.get("early_stopping", False)
    if not isinstance(early, bool):
        raise ValueError(f"early_stopping must be true or false, found {early!r}")
    longest = min(20, config["max_position_embeddings"] - 1)  # transformers' default
    if "max_length" in given:
        longest = given["max_length"] - 1
    forced = {
        f"forced_{end}_id": _single(f"forced_{end}_token_id", given[f"forced_{end}_token_id"])
        for end in ("bos", "eos")
        if f"forced_{end}_token_id" in given
    }
    return GenerationConfig(
        max_new_tokens=given.get("max_new_tokens", longest),
        min_new_tokens=given.get("min_new_tokens", max(0, given.get("min_length", 0) - 1)),
        num_beams=given.get("num_beams", 1),
        length_penalty=given.get("length_penalty", 1.0),
        early_stopping=early,
        no_repeat_ngram=given.get("no_repeat_ngram_size", 0),
        encoder_no_repeat_ngram=given.get("encoder_no_repeat_ngram_size", 0),
        sample=given.get("do_sample", False),
        temperature=given.get("temperature", 1.0),
        top_k=given.get(
            "top_k", 50 if given.get("do_sample") else 0
        ),  # 50 is transformers' default
        top_p=given.get("top_p", 1.0),
        **forced,
    )


def _single(name: str, value: Any) -> int:
    """A token's id, which newer files may give as a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ValueError(f"{name} must be one whole number, found {value!r}")
    return value


def _family(
    name: str, architecture: str, ids: tuple[int, int, int, int], **form: int | bool | str
) -> Family:
    return Family(
        name=name,
        config=functools.partial(_config, form, ids),
        to_json=functools.partial(_to_json, name, architecture, form),
        model=EncoderDecoder,
        tensors=_tensors,
        ignored=(
            "lm_head.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "model.encoder.version",
            "model.decoder.version",
        ),
        generation=_generation,
    )


BART = _family(
    "bart",
    "BartForConditionalGeneration",
    (1, 0, 2, 2),
    position_offset=2,
    pre_norm=False,
    encoder_embed_norm="sum",
    decoder_embed_norm="sum",
)
BLENDERBOT = _family(
    "blenderbot",
    "BlenderbotForConditionalGeneration",
    (0, 1, 2, 1),
    position_offset=0,
    pre_norm=True,
    encoder_embed_norm="none",
    decoder_embed_norm="none",
)
BLENDERBOT_SMALL = _family(
    "blenderbot-small",
    "BlenderbotSmallForConditionalGeneration",
    (0, 1, 2, 1),
    position_offset=0,
    pre_norm=False,
    encoder_embed_norm="sum",
    decoder_embed_norm="token",
)
