"""Linformer: keys and values projected along the sequence to a fixed length."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from efficient_attn.attention.base import Core, Cost
from efficient_attn.config import require
from kernels import linformer_attention


class Linformer(Core):
    """softmax(q (E k)^T / sqrt(D)) F v, E and F of R x S (Wang et al., arXiv 2006.04768, eq. 7).

    Padding is zeroed before it is projected, so a masked sequence gives exactly what the sequence
    cut to its length gives; shorter sequences use the first columns of E and F. Not causal: each
    projected key mixes all positions.
    """

    @dataclass(frozen=True)
    class Config:
        """rank: R, the projected length, `k` in the paper; None is a quarter of the sequence.
        sharing (paper, section 4): "none" gives each head its own E and F; "headwise" one E and one
        F per layer; "key-value" one E = F per layer; "layerwise" one E = F for all layers.
        projection (paper, "general projections"): "linear"; or over windows of ceil(seq / R)
        positions "mean" pooling, "max" pooling, or "convolution" with that kernel and stride.
        Pooling has no parameters to share.
        """

        rank: int | None = None
        sharing: Literal["none", "headwise", "key-value", "layerwise"] = "headwise"
        projection: Literal["linear", "mean", "max", "convolution"] = "linear"

        def __post_init__(self):
            require(self.rank is None or self.rank > 0, f"rank={self.rank} must be positive")

    paper = "Linformer: Self-Attention with Linear Complexity, arXiv 2006.04768"
    supports = frozenset({"padding", "bidirectional", "cross"})

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs, shared=shared)
        self.rank = _rank(config, site)
        require(
            self.rank <= site.seq,
            f"linformer: rank={self.rank} exceeds the sequence length {site.seq}; lower it",
        )
        self.window = math.ceil(site.seq / self.rank)
        if config.projection in ("mean", "max"):
            return
        heads = site.heads if config.sharing == "none" else 1
        if config.sharing == "layerwise":
            if self._key not in shared:
                shared[self._key] = self._projection(heads, rngs)
            return
        self.keys = self._projection(heads, rngs)
        if config.sharing != "key-value":
            self.values = self._projection(heads, rngs)

    @classmethod
    def cost(cls, config, site, length):
        """Projecting k and v, then T x R attention; linear in T."""
        rank = _rank(config, site)
        attend = 2 * length * rank * site.width
        project = {
            "linear": 2 * length * rank * site.width,
            "convolution": 2 * length * site.width * site.head_dim,
        }
        return Cost(attend + project.get(config.projection, 0), None)

    def __call__(self, q, k, v, *, mask, shared):
        """Raises ValueError where the keys are longer than the site's sequence."""
        return self.cross(q, self.init_cross(k, v, mask=mask, shared=shared), shared=shared)

    def init_cross(self, k, v, *, mask, shared):
        """The projected keys and values [B,R,H,D], and which of them hold anything [B,R]."""
        if k.shape[1] > self.site.seq:
            raise ValueError(f"{k.shape[1]} keys, but linformer was built for {self.site.seq}")
        valid = jnp.ones(k.shape[:2], bool) if mask.keys is None else mask.keys
        if self.config.projection in ("mean", "max"):
            k, v = (self._pool(x, valid) for x in (k, v))
        else:
            e, f = self._weights(shared)
            k, v = (
                self._project(jnp.where(valid[..., None, None], x, 0), w)
                for x, w in ((k, e), (v, f))
            )
        return k, v, self._alive(valid)

    def cross(self, q, memory, *, shared):
        """See `kernels.linformer_attention`."""
        k, v, alive = memory
        return linformer_attention(q, k, v, alive=alive, backend=self.site.backend)

    @property
    def _key(self) -> str:
        key = f"linformer {self.config.projection} rank {self.rank} seq {self.site.seq}"
        convolves = self.config.projection == "convolution"
        return f"{key} dim {self.site.head_dim}" if convolves else key

    def _projection(self, heads: int, rngs: nnx.Rngs) -> "Projection":
        dim = self.site.head_dim
        if self.config.projection == "linear":
            return Projection((heads, self.rank, self.site.seq), fan_in=self.site.seq, rngs=rngs)
        return Projection((heads, self.window, dim, dim), fan_in=self.window * dim, rngs=rngs)

    def _weights(self, shared):
        if self.config.sharing == "layerwise":
            keys = values = shared[self._key]
        else:
            keys, values = (
                self.keys,
                self.keys if self.config.sharing == "key-value" else self.values,
            )
        return (p.weight[...].astype(self.site.dtype) for p in (keys, values))

    def _project(self, x, weight):
        """[B,S,H,D] -> [B,R,H,D], padding already zero."""
        heads = x.shape[2]
        weight = jnp.broadcast_to(weight, (heads, *weight.shape[1:]))
        if self.config.projection == "linear":
            return jnp.einsum("bshd,hrs->brhd", x, weight[..., : x.shape[1]])
        return jnp.einsum("brwhd,hwdf->brhf", self._windows(x, 0), weight)

    def _pool(self, x, valid):
        seen = self._windows(valid, False)[..., None, None]
        if self.config.projection == "max":
            lowest = jnp.finfo(x.dtype).min
            pooled = jnp.max(jnp.where(seen, self._windows(x, 0), lowest), axis=2)
            return jnp.where(jnp.any(seen, axis=2), pooled, 0)
        total = jnp.sum(jnp.where(seen, self._windows(x, 0), 0), axis=2)
        return total / jnp.maximum(jnp.sum(seen, axis=2), 1).astype(x.dtype)

    def _windows(self, x, fill):
        """[B,S,...] -> [B,ceil(S/window),window,...]."""
        pad = [(0, 0), (0, -x.shape[1] % self.window)] + [(0, 0)] * (x.ndim - 2)
        return rearrange(
            jnp.pad(x, pad, constant_values=fill), "b (r w) ... -> b r w ...", w=self.window
        )

    def _alive(self, valid):
        """Which projected keys hold anything: windows with a valid position; all, for linear."""
        if self.config.projection == "linear":
            return jnp.broadcast_to(jnp.any(valid, axis=1, keepdims=True), (len(valid), self.rank))
        return jnp.any(self._windows(valid, False), axis=2)


def _rank(config, site) -> int:
    return config.rank or max(1, site.seq // 4)


class Projection(nnx.Module):
    """One matrix E, or convolution kernel: normal with variance 1 / fan_in.

    The paper's theory draws N(0, 1/R); with 1 / S the projected keys keep the variance of the
    keys, whatever S and R.
    """

    def __init__(self, shape: tuple[int, ...], *, fan_in: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)
