"""Shapes of the models and options of generation, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """A transformer of the BART family: BART, Blenderbot, BlenderbotSmall.

    What tells them apart is where they normalise, and from where they count positions:

    | | BART | Blenderbot | BlenderbotSmall |
    |---|---|---|---|
    | `pre_norm` | no | yes, and a last norm at the top | no |
    | `encoder_embed_norm` | sum | none | sum |
    | `decoder_embed_norm` | sum | none | token |
    | `position_offset` | 2 | 0 | 0 |
    | `scale_embedding` | by configuration | yes | yes, of the encoder alone |
    """

    vocab_size: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_ffn: int
    decoder_ffn: int
    max_positions: int
    """Longest input, and longest output."""
    position_offset: int = 0
    """Rows of the table of positions before the first one."""
    pre_norm: bool = False
    """LayerNorm before attention and feed-forward, and after the last layer; else after each."""
    encoder_embed_norm: Literal["none", "sum"] = "none"
    """LayerNorm of token and position together, or none."""
    decoder_embed_norm: Literal["none", "sum", "token"] = "none"
    """The same; or of the token alone, before its position is added."""
    scale_embedding: bool = False
    """Token embeddings times the root of d_model."""
    activation: Literal["gelu", "relu", "swish", "gelu_new"] = "gelu"
    """gelu is the exact one."""
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    decoder_start_id: int = 1


@dataclass(frozen=True)
class BertConfig:
    """An encoder of the BERT family: DPR's two encoders, and MiniLM."""

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    ffn: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: Literal["gelu", "relu", "swish", "gelu_new"] = "gelu"
    dropout: float = 0.1
    pad_id: int = 0
    pooling: Literal["cls", "mean"] = "cls"
    """The vector of a text: that of its first token (DPR), or the mean over its tokens (MiniLM)."""
    projection: int = 0
    """Dimension that the vector is projected to; 0 for none."""
    normalize: bool = False
    """Whether vectors have length 1 (MiniLM) or are left as they are (DPR)."""


@dataclass(frozen=True)
class LlamaConfig:
    """A decoder of the Llama family, such as SmolLM2."""

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    key_value_heads: int
    ffn: int
    max_positions: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_id: int = 2
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)

    @property
    def head_dim(self) -> int:
        """Dimension of a query, key or value."""
        return self.d_model // self.heads


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen. Lengths are in tokens of the output, its prompt not counted."""

    max_new_tokens: int = 60
    min_new_tokens: int = 0
    num_beams: int = 1
    """1: one token after the other; above: beam search."""
    length_penalty: float = 1.0
    """A finished beam's score is its log-probability over its length to this power."""
    early_stopping: bool = False
    """Beam search ends with the first `num_beams` finished ones, and does not wait for better."""
    no_repeat_ngram: int = 0
    """No n-gram of this size comes twice in the output, its prompt counted; 0 for no such rule."""
    encoder_no_repeat_ngram: int = 0
    """No n-gram of this size is taken from the encoder's input."""
    forced_bos_id: int | None = None
    """The first token, where an encoder–decoder's output begins with its start token alone."""
    forced_eos_id: int | None = None
    """The last token, where the output is as long as it may be."""
    sample: bool = False
    """Draw tokens, or take the likeliest."""
    temperature: float = 1.0
    top_k: int = 0
    """Draw among so many; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of range; the message names it."""
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("no_repeat_ngram", "encoder_no_repeat_ngram", "top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be in [0, {self.max_new_tokens}], found {self.min_new_tokens}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")
        if self.sample and self.num_beams > 1:
            raise ValueError(
                f"sample goes with num_beams 1, found {self.num_beams}: beams are not drawn"
            )
