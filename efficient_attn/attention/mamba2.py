"""Mamba-2: a selective state space model in its dual form, masked linear attention."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from efficient_attn.attention.base import Cost, Site
from efficient_attn.attention.recurrent import (
    CHUNK,
    Discretisation,
    Recurrent,
    head_norm,
    projection,
    split_heads,
    tokens_run,
)
from efficient_attn.config import at_least, require
from efficient_attn.layers.conv import ShortConv


class Sizes(NamedTuple):
    """inner: expand * E channels in `heads` heads of `dim`; bc: width of B, and of C."""

    inner: int
    heads: int
    dim: int
    bc: int


class Mamba2(Recurrent):
    """h_t = exp(-A dt_t) h_{t-1} + dt_t B_t x_t^T, y_t = C_t^T h_t + D x_t (arXiv 2405.21060).

    [z, x, B, C, dt] = u W_in; x, B, C pass through the short convolution and SiLU; dt =
    softplus(dt + bias); out = norm(y * silu(z)) W_out, an RMS norm over each group's channels, as
    released. A token that the mask hides adds nothing by D either. One such mixer per
    block, followed by the backbone's MLP or by none, is the backbone's choice.
    """

    @dataclass(frozen=True)
    class Config:
        """state: N, channels of B and C. expand: inner width over the model's.
        head_dim: P, channels that share one A, dt and D; None is the site's, so that there are
        expand * heads heads. groups: G pairs of B and C for all heads. conv: taps.
        """

        state: int = 64
        expand: int = 2
        head_dim: int | None = None
        groups: int = 1
        conv: int = 4

        def __post_init__(self):
            at_least(self, 1, "state", "expand", "groups", "conv")
            require(
                self.head_dim is None or self.head_dim > 0,
                f"head_dim={self.head_dim} must be positive",
            )

    paper = "Transformers are SSMs (Mamba-2), arXiv 2405.21060"
    label = "mamba2"

    def __init__(self, config, site, *, rngs, shared):
        sizes = _sizes(config, site)
        wide = sizes.inner + 2 * sizes.bc
        conv = ShortConv(wide, config.conv, use_bias=True, rngs=rngs)
        super().__init__(config, site, conv=conv)
        self.enters = projection(site.width, sizes.inner + wide + sizes.heads, site, rngs=rngs)
        self.discretise = Discretisation(sizes.heads, rates=(1.0, 16.0), rngs=rngs)
        self.skip = nnx.Param(jnp.ones((sizes.heads,)))
        self.norm = head_norm("rms", sizes.inner // config.groups, site, use_scale=False, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((sizes.inner,)))
        self.out = projection(sizes.inner, site.width, site, rngs=rngs)

    @classmethod
    def cost(cls, config, site, length):
        """Projections, taps, and chunks of tokens each with each; the state in decoding."""
        inner, heads, _, bc = _sizes(config, site)
        streams = inner + 2 * bc
        projections = site.width * (2 * inner + streams + heads)
        chunk = min(CHUNK, length)
        tokens = tokens_run(length, chunk)
        mixed = tokens * (chunk * (bc + inner) + 2 * config.state * inner)
        kept = config.state * inner + (config.conv - 1) * streams
        return Cost(length * (projections + config.conv * streams) + mixed, 4 * kept)

    def shape(self):
        """N x P a head."""
        sizes = _sizes(self.config, self.site)
        return sizes.heads, self.config.state, sizes.dim

    def enter(self, x):
        """x, B and C side by side; z and dt."""
        sizes = _sizes(self.config, self.site)
        z, streams, dt = jnp.split(
            self.enters(x), [sizes.inner, 2 * sizes.inner + 2 * sizes.bc], axis=-1
        )
        return streams, (z, dt)

    def given(self, streams, aside, positions):
        """C, B and dt x in the places of queries, keys and values (the duality of section 5)."""
        inner, heads, _, bc = _sizes(self.config, self.site)
        x, b, c = jnp.split(streams, [inner, inner + bc], axis=-1)
        dt, log_decay = self.discretise(aside[1])
        entering = split_heads(x, heads).astype(jnp.float32) * dt[..., None]
        return {
            "q": split_heads(c, self.config.groups),
            "k": split_heads(b, self.config.groups),
            "v": entering.astype(x.dtype),
            "log_decay": log_decay,
        }

    def leave(self, out, streams, aside, keys):
        """The skip, the gate, the norm, the projection."""
        inner, heads, _, _ = _sizes(self.config, self.site)
        x = split_heads(streams[..., :inner], heads).astype(jnp.float32)
        x = x if keys is None else jnp.where(keys[:, :, None, None], x, 0.0)
        out = out + self.skip[...][None, None, :, None] * x
        out = rearrange(out, "b t h d -> b t (h d)") * jax.nn.silu(aside[0].astype(jnp.float32))
        out = self.norm(split_heads(out, self.config.groups))
        out = rearrange(out, "b t g d -> b t (g d)") * self.scale[...][None, None].astype(out.dtype)
        return self.out(out)


def _sizes(config: Mamba2.Config, site: Site) -> Sizes:
    inner, dim = config.expand * site.width, config.head_dim or site.head_dim
    require(
        inner % dim == 0,
        f"mamba2: head_dim={dim} does not divide the {inner} channels of expand={config.expand} "
        f"and width={site.width}",
    )
    require(
        inner // dim % config.groups == 0,
        f"mamba2: groups={config.groups} does not divide its {inner // dim} heads",
    )
    return Sizes(inner, inner // dim, dim, config.groups * config.state)
