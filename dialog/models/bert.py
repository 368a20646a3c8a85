"""The encoder of the BERT family: DPR's question and context encoders, and MiniLM.

Parameters of D = d_model, F = ffn, kernels (in, out), everything float32:

    embed_tokens/embedding       (vocab_size, D)       layernorm_embedding/{scale,bias}  (D,)
    embed_positions/embedding    (max_positions, D)    embed_token_types/embedding  (types, D)
    layers_i/self_attn/{q,k,v,out}_proj/{kernel,bias}  (D, D), (D,)
    layers_i/self_attn_layer_norm/{scale,bias}         (D,)
    layers_i/fc1/{kernel,bias}   (D, F), (F,)          layers_i/fc2/{kernel,bias}  (F, D), (D,)
    layers_i/final_layer_norm/{scale,bias}             (D,)
    projection/{kernel,bias}     (D, projection), (projection,), where there is one
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dialog.config import BertConfig
from dialog.models.activations import ACTIVATIONS
from dialog.models.attention import KeyValue, attend

_normal = nn.initializers.normal(0.02)  # Devlin et al. 2019, as in their code


class SelfAttention(nn.Module):
    """Attention of every token to every other that is there."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Args: states `(N, S, D)`; bool `(N, 1, S)`, which keys are there. Returns `(N, S, D)`."""
        heads = self.config.heads

        def project(name: str) -> jax.Array:
            y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_normal, name=name)(x)
            return y.reshape(*x.shape[:-1], heads, -1)

        out, _ = attend(project("q_proj"), KeyValue(project("k_proj"), project("v_proj")), mask)
        dense = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_normal, name="out_proj")
        return dense(out.reshape(x.shape))


class BertLayer(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Args as `SelfAttention`; train: whether dropout acts. Returns `(N, S, D)`."""
        config = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_normal)
        drop = nn.Dropout(config.dropout, deterministic=not train)
        attended = SelfAttention(config, self.dtype, name="self_attn")(x, mask)
        x = _float32(_norm(config, "self_attn_layer_norm"), x + drop(attended))
        hidden = ACTIVATIONS[config.activation](dense(config.ffn, name="fc1")(x))
        hidden = dense(config.d_model, name="fc2")(hidden)
        return _float32(_norm(config, "final_layer_norm"), x + drop(hidden))


class Bert(nn.Module):
    """BERT (Devlin et al., NAACL 2019) as an encoder of texts into vectors.

    Pooled as in DPR (Karpukhin et al., EMNLP 2020), the first token's state of the last layer,
    with no pooler on top; or as in Sentence-BERT (Reimers and Gurevych, EMNLP 2019), the mean over
    the tokens that are there. Dropout acts on the embeddings and on what each half of a layer adds;
    it wants the generator "dropout". The weights of attention aren't dropped.

    Attributes:
      config: shape and pooling.
      dtype: what states are computed in; norms, softmax and vectors are float32 whatever it is.
      remat: compute each layer again in the backward pass, and keep its input alone.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Makes the layers; ValueError where the configuration is no BERT."""
        config = self.config
        check(config)
        embed = functools.partial(
            nn.Embed, features=config.d_model, dtype=self.dtype, embedding_init=_normal
        )
        self.embed_tokens = embed(config.vocab_size)
        self.embed_positions = embed(config.max_positions)
        self.embed_token_types = embed(config.type_vocab_size)
        self.layernorm_embedding = _norm(config)
        self.embed_dropout = nn.Dropout(config.dropout)
        layer = nn.remat(BertLayer, static_argnums=(3,)) if self.remat else BertLayer
        self.layers = [layer(config, self.dtype) for _ in range(config.layers)]
        if config.projection:
            self.projection = nn.Dense(config.projection, kernel_init=_normal)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Returns the texts' vectors, float32 `(N, D)`, or `(N, projection)`.

        With mean pooling a text of no tokens gets zeros (before any projection), and with
        `normalize` zeros stay zeros. With pooling "cls" padding belongs on the right: the first
        column is taken, whether or not it is there.

        Args and errors: as `states`.
        """
        states = self.states(input_ids, attention_mask, token_type_ids, train)
        if self.config.pooling == "cls":
            vectors = states[:, 0].astype(jnp.float32)
        else:
            there = attention_mask[..., None]
            total = jnp.sum(jnp.where(there, states.astype(jnp.float32), jnp.float32(0)), axis=1)
            vectors = total / jnp.maximum(jnp.sum(there, axis=1), 1).astype(jnp.float32)
        if self.config.projection:
            vectors = self.projection(vectors)
        if self.config.normalize:
            # The root of the larger one: at zero, the gradient of the root alone is NaN.
            squares = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
            vectors = vectors * jax.lax.rsqrt(jnp.maximum(squares, jnp.float32(1e-24)))
        return vectors

    def states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Returns the tokens' states in the last layer, `(N, S, D)` in `dtype`.

        Positions are columns 0 to S - 1, so padding on the left moves a text's tokens along.

        Args:
          input_ids: int `(N, S)`.
          attention_mask: bool `(N, S)`, False where a text is padded.
          token_type_ids: int `(N, S)`, of the first or second text of a pair; None for zeros.
          train: whether dropout acts.

        Raises:
          ValueError: shapes differ, the mask isn't bool, or S is above `max_positions`.
        """
        _check_input(self.config, input_ids, attention_mask, token_type_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        positions = self.embed_positions(jnp.arange(input_ids.shape[1]))[None]
        x = self.embed_tokens(input_ids) + self.embed_token_types(token_type_ids) + positions
        x = _float32(self.layernorm_embedding, x)
        x = self.embed_dropout(x, deterministic=not train)
        for layer in self.layers:
            x = layer(x, attention_mask[:, None, :], train)
        return x


def check(config: BertConfig) -> None:
    """Raises ValueError where the heads don't divide `d_model` or an option is unknown."""
    if config.d_model % config.heads:
        raise ValueError(
            f"heads must divide d_model, found heads {config.heads} and d_model {config.d_model}"
        )
    if config.pooling not in ("cls", "mean"):
        raise ValueError(f"pooling must be 'cls' or 'mean', found {config.pooling!r}")
    if config.activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, found {config.activation!r}")


def _float32(norm: nn.LayerNorm, x: jax.Array) -> jax.Array:
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def _norm(config: BertConfig, name: str | None = None) -> nn.LayerNorm:
    # Not the fast variance: it is a difference of squares, and loses the digits that parity needs.
    return nn.LayerNorm(
        config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name
    )


def _check_input(
    config: BertConfig, ids: jax.Array, mask: jax.Array, types: jax.Array | None
) -> None:
    if ids.ndim != 2 or mask.shape != ids.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            "input_ids must be (N, S) and attention_mask bool of the same shape, found "
            f"{ids.dtype}{list(ids.shape)} and {mask.dtype}{list(mask.shape)}"
        )
    if types is not None and types.shape != ids.shape:
        raise ValueError(
            f"token_type_ids must be {list(ids.shape)} as input_ids, found {list(types.shape)}"
        )
    if ids.shape[1] > config.max_positions:
        raise ValueError(
            f"{ids.shape[1]} tokens are more than max_positions, {config.max_positions}"
        )
