"""Gated DeltaNet: a memory that fades and overwrites; DeltaNet without its gates."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from efficient_attn.attention.base import Cost
from efficient_attn.attention.recurrent import (
    CHUNK,
    Discretisation,
    Projected,
    head_norm,
    projection,
    tokens_run,
)
from efficient_attn.config import at_least
from kernels import gated_delta_rule


class GatedDelta(Projected):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T (arXiv 2412.06464, equation 10).

    q, k, v pass through the short convolution and SiLU; q and k are then brought to length 1.
    b = sigmoid(x W_b), a as in Mamba-2, the output is RMS-normed by head and gated by swish(x W_g).
    `gated_delta(gate='none', output='none', expand_k=1.0, expand_v=1.0)` is DeltaNet (arXiv
    2406.06484). q is scaled by the root of its width, as in the released code.
    """

    op = staticmethod(gated_delta_rule)

    @dataclass(frozen=True)
    class Config:
        """expand_k, expand_v: width of keys and values over the model's; the defaults make 6 E^2
        parameters, as many as Mamba-2's.
        gate: of the memory, "mamba2" or "none" (the plain delta rule).
        output: gate of the output, "swish" or "none".
        eigenvalues: of I - b k k^T along k, "positive" in (0, 1), or "signed" in (-1, 1) by
        b = 2 sigmoid (arXiv 2411.12537), which can track states.
        conv: taps; 0 is none, SiLU stays.
        """

        expand_k: float = 0.75
        expand_v: float = 1.5
        gate: Literal["mamba2", "none"] = "mamba2"
        output: Literal["swish", "none"] = "swish"
        eigenvalues: Literal["positive", "signed"] = "positive"
        conv: int = 4

        def __post_init__(self):
            at_least(self, 0, "conv")

    paper = "Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464"
    label = "gated_delta"

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs)
        values = self.value.out_features
        self.beta = projection(site.width, site.heads, site, rngs=rngs)
        if config.gate == "mamba2":
            self.decay = projection(site.width, site.heads, site, rngs=rngs)
            self.discretise = Discretisation(site.heads, rates=(2**-10, 16.0), rngs=rngs)
        if config.output == "swish":
            self.gate = projection(site.width, values, site, rngs=rngs)
        self.norm = head_norm("rms", values // site.heads, site, rngs=rngs)
        self.out = projection(values, site.width, site, rngs=rngs)

    @classmethod
    def cost(cls, config, site, length):
        """Projections, taps, and chunks of tokens each with each; the state in decoding."""
        heads, (key, value) = site.heads, cls.widths(config, site)
        streams = heads * (2 * key + value)
        gates = 1 + (config.gate == "mamba2") + value * (1 + (config.output == "swish"))
        projections = site.width * (streams + heads * gates)
        chunk = min(CHUNK, length)
        tokens = tokens_run(length, chunk)
        size = 1 << (chunk - 1).bit_length()
        inverses = tokens // chunk * size * (size**2 - 1) // 3
        mixed = tokens * (2 * chunk * (key + value) + 3 * key * value) + inverses
        kept = heads * key * value + max(config.conv - 1, 0) * streams
        return Cost(length * (projections + config.conv * streams) + heads * mixed, 4 * kept)

    def enter(self, x):
        """Queries, keys and values side by side; the logits of the gates."""
        streams = self.together(x)
        if self.conv is None:
            streams = jax.nn.silu(streams)
        return streams, (
            self.beta(x),
            self.decay(x) if self.config.gate == "mamba2" else None,
            self.gate(x) if self.config.output == "swish" else None,
        )

    def given(self, streams, aside, positions):
        """q and k of length 1, v, how much to write and how much to keep."""
        q, k, v = self.apart(streams)
        beta, decay, _ = aside
        top = {"positive": 1.0, "signed": 2.0}[self.config.eigenvalues]
        return {
            "q": _unit(q) * q.shape[-1] ** -0.5,
            "k": _unit(k),
            "v": v,
            "beta": top * jax.nn.sigmoid(beta.astype(jnp.float32)),
        } | ({} if decay is None else {"log_decay": self.discretise(decay)[1]})

    def leave(self, out, streams, aside, keys):
        """The norm of each head, the gate, the projection."""
        out = rearrange(self.norm(out), "b t h d -> b t (h d)")
        return self.out(out if aside[2] is None else jax.nn.silu(aside[2]) * out)


def _unit(x):
    """x over its length, float32; 0 for 0, by the released code's 1e-6 under the root."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
