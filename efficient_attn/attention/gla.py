"""Gated linear attention: every channel of the keys fades at a rate read off the input."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from efficient_attn.attention.base import Cost
from efficient_attn.attention.recurrent import (
    CHUNK,
    Projected,
    head_norm,
    projection,
    split_heads,
    tokens_run,
)
from efficient_attn.config import at_least, require
from kernels.gated_linear_attention import chunk_length


class Gla(Projected):
    """S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, y_t = (swish(x_t W_r + b_r) * norm(q_t S_t)) W_O.

    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/tau) (GLA, arXiv 2312.06635, equation 3 and section 4.4).
    q is scaled by the root of its width, as in the released code; the norm takes it out but for its
    epsilon.
    """

    @dataclass(frozen=True)
    class Config:
        """expand_k, expand_v: width of keys and values over the model's.
        rank: of the gate's two factors. temperature: tau; the larger, the slower memory fades.
        norm: of each head, "layer" (the paper) or "rms" (the released code).
        conv: taps of a short convolution of q, k and v; 0 is none, as in the paper.
        """

        expand_k: float = 0.5
        expand_v: float = 1.0
        rank: int = 16
        temperature: float = 16.0
        norm: Literal["layer", "rms"] = "layer"
        conv: int = 0

        def __post_init__(self):
            at_least(self, 1, "rank")
            at_least(self, 0, "conv")
            require(self.temperature > 0, f"temperature={self.temperature} must be positive")

    paper = "Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635"
    label = "gla"

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs)
        keys, values = self.query.out_features, self.value.out_features
        self.gate = projection(site.width, values, site, use_bias=True, rngs=rngs)
        self.narrow = projection(site.width, config.rank, site, rngs=rngs)
        self.decay = projection(config.rank, keys, site, use_bias=True, rngs=rngs)
        self.norm = head_norm(config.norm, values // site.heads, site, rngs=rngs)
        self.out = projection(values, site.width, site, rngs=rngs)

    @classmethod
    def cost(cls, config, site, length):
        """Projections, taps, and chunks of tokens each with each; the state in decoding."""
        heads, (key, value) = site.heads, cls.widths(config, site)
        streams = heads * (2 * key + value)
        projections = site.width * (streams + 2 * heads * value)
        projections += config.rank * (site.width + heads * key)
        chunk = chunk_length(length, CHUNK, per_channel=True)
        tokens = tokens_run(length, chunk)
        mixed = tokens * heads * (chunk * (key + value) + 2 * key * value)
        kept = heads * key * value + max(config.conv - 1, 0) * streams
        return Cost(length * (projections + config.conv * streams) + mixed, 4 * kept)

    def enter(self, x):
        """Queries, keys and values side by side; the output's gate and the memory's."""
        streams = self.together(x)
        return streams, (self.gate(x), self.decay(self.narrow(x)))

    def given(self, streams, aside, positions):
        """q, k, v, and the decay of each key channel."""
        q, k, v = self.apart(streams)
        log_gate = jax.nn.log_sigmoid(split_heads(aside[1].astype(jnp.float32), self.site.heads))
        return {
            "q": q * q.shape[-1] ** -0.5,
            "k": k,
            "v": v,
            "log_decay": log_gate / self.config.temperature,
        }

    def leave(self, out, streams, aside, keys):
        """The norm of each head, the gate, the projection."""
        out = rearrange(self.norm(out), "b t h d -> b t (h d)")
        return self.out(jax.nn.silu(aside[0]) * out)
