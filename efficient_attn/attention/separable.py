"""One context vector for the whole sequence in place of a weight for each pair of tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_attn.attention.base import Cost, Mixer, refuse_mask
from efficient_attn.attention.multihead import linear
from kernels.dispatch import Path, run


class Separable(Mixer):
    """(relu(x W_v) * c) W_o, c = sum_s softmax_s(x w_i) x_s W_k (2206.02680, section 3.2, eq. 2).

    Linear in the length, without heads. Attending to a context, c is that of the context and x_W_v
    that of x. Where no key is seen c is 0. Positions are not added, whatever the site says.
    """

    @dataclass(frozen=True)
    class Config:
        """No options."""

    paper = "Separable Self-attention for Mobile Vision Transformers, arXiv 2206.02680"
    supports = frozenset({"padding", "bidirectional", "cross"})

    def __init__(self, config, site, *, rngs, shared):
        self.site = site
        self.project = linear(1 + 2 * site.width, site, use_bias=site.qkv_bias, rngs=rngs)
        self.out = linear(site.width, site, rngs=rngs)

    @classmethod
    def cost(cls, config, site, length):
        """Projections, and E for each token: its share in the context vector."""
        width = site.width
        return Cost(length * width * (1 + 2 * width) + length * width + length * width**2, None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Attend from x to the context, or to x itself."""
        if context is not None:
            return self.cross(x, self.init_cross(context, mask=mask, shared=shared), shared=shared)
        refuse_mask("separable", mask, self.supports)
        score, key, value = jnp.split(self.project(x), (1, 1 + self.site.width), axis=-1)
        return self._look(value, self._context(score, key, mask))

    def init_cross(self, context, *, mask, shared):
        """The context vector [B,E], float32."""
        refuse_mask("separable", mask, self.supports)
        made = self._columns(context, slice(0, 1 + self.site.width))
        return self._context(made[..., :1], made[..., 1:], mask)

    def cross(self, x, memory, *, shared):
        """Look from x at that vector."""
        return self._look(self._columns(x, slice(1 + self.site.width, None)), memory)

    def _columns(self, x, which: slice):
        """Those columns of the projection of x."""
        layer, dtype = self.project, self.site.dtype
        y = x.astype(dtype) @ layer.kernel[...][:, which].astype(dtype)
        return y if layer.bias is None else y + layer.bias[...][which].astype(dtype)[None, None]

    def _context(self, score, key, mask):
        return run("separable", self.site.backend, {"xla": Path(_xla)}, (score, key, mask), {})

    def _look(self, value, context):
        return self.out((jax.nn.relu(value) * context[:, None]).astype(value.dtype))


def _xla(score, key, mask):
    """The context vector [B,E] in float32."""
    score = score[..., 0].astype(jnp.float32)
    if mask.keys is not None:
        score = jnp.where(mask.keys, score, -jnp.inf)
        some = jnp.any(mask.keys, axis=1, keepdims=True)
        score = jnp.where(some, score, 0.0)
    share = jax.nn.softmax(score, axis=1)
    if mask.keys is not None:
        share = jnp.where(mask.keys, share, 0.0)
        key = jnp.where(mask.keys[..., None], key, 0)
    return jnp.einsum("bs,bse->be", share, key.astype(jnp.float32))
