"""Linear attention on pictures, its queries, keys and values seen at several scales."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from efficient_attn.attention.base import Cost, Mixer, Site, on_map, refuse_context, refuse_mask
from efficient_attn.attention.multihead import linear
from efficient_attn.config import require
from efficient_attn.layers.conv2d import conv2d
from kernels.dispatch import Path, run

EPSILON = 1e-5
"""Added to the normaliser, as in timm's network: a query without a feature of any key gets 0."""


class ReluLinear(Mixer):
    """Heads of relu(q) (relu(k)^T v), normalised, at several scales (2205.14756, equations 1 to 3).

    Beside the queries, keys and values of each place stand, for each scale, those of windows around
    it (section 3.1, figure 2), in heads of their own; one projection mixes all. It has no bias, as
    a norm follows in the paper's network. Without scales this is linear(feature_map='relu'), which
    is for any sequence. Positions are not added, whatever the site says.
    """

    @dataclass(frozen=True)
    class Config:
        """scales: sides of the windows, odd numbers; the paper's is one of 5."""

        scales: tuple[int, ...] = (5,)

        def __post_init__(self):
            require(
                all(scale > 0 and scale % 2 == 1 for scale in self.scales),
                f"scales={self.scales} must be odd: as much on each side",
            )

    paper = "EfficientViT: Multi-Scale Linear Attention, arXiv 2205.14756"
    supports = frozenset({"bidirectional", "grid"})
    on_grids = True

    def __init__(self, config, site, *, rngs, shared):
        self.config, self.site = config, site
        self.qkv = linear(3 * site.width, site, use_bias=site.qkv_bias, rngs=rngs)
        self.scales = nnx.List([Windows(scale, site, rngs=rngs) for scale in config.scales])
        init = nnx.initializers.xavier_uniform()
        self.out = nnx.Linear(
            (1 + len(config.scales)) * site.width, site.width, use_bias=False, kernel_init=init,
            dtype=site.dtype, rngs=rngs,
        )  # fmt: skip

    @classmethod
    def cost(cls, config, site, length):
        """Projections, windows, and T D (D + 1) a head, twice."""
        width, dim, times = site.width, site.head_dim, 1 + len(config.scales)
        windows = sum(3 * width * (scale**2 + dim) for scale in config.scales)
        projections = 3 * width**2 + times * width**2
        attend = 2 * length * times * width * (dim + 1)
        return Cost(length * (projections + windows) + attend, None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context is refused."""
        refuse_context("relu_linear", context)
        refuse_mask("relu_linear", mask, self.supports)
        made = on_map(self.qkv(x), self.site)
        made = jnp.concatenate([made, *(windows(made) for windows in self.scales)], axis=-1)
        q, k, v = rearrange(made, "b r c (h n d) -> n b (r c) h d", n=3, d=self.site.head_dim)
        out = run("relu_linear", self.site.backend, {"xla": Path(_attend)}, (q, k, v), {})
        return self.out(rearrange(out, "b t h d -> b t (h d)"))


def _attend(q, k, v):
    """All [B,T,H,D]; in float32, the normaliser being one more column of values."""
    dtype = v.dtype
    q, k, v = (x.astype(jnp.float32) for x in (jax.nn.relu(q), jax.nn.relu(k), v))
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    sums = jnp.einsum("bthr,bhrd->bthd", q, jnp.einsum("bthr,bthd->bhrd", k, v))
    return (sums[..., :-1] / (sums[..., -1:] + EPSILON)).astype(dtype)


class Windows(nnx.Module):
    """Of each channel its window, then of each head's queries, keys or values a projection."""

    def __init__(self, scale: int, site: Site, *, rngs: nnx.Rngs):
        width = 3 * site.width
        given: dict[str, Any] = {"use_bias": site.qkv_bias, "dtype": site.dtype, "rngs": rngs}
        self.depthwise = conv2d(width, width, scale, groups=width, **given)
        self.pointwise = conv2d(width, width, groups=3 * site.heads, **given)

    def __call__(self, x):
        """[B,R,C,3 E], the channels head by head."""
        return self.pointwise(self.depthwise(x))
