"""Attention on pictures with a learned bias for every offset, and keys narrower than values."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention.base import Cost, Mixer, Site, refuse_context, refuse_mask
from efficient_attn.config import positive_or_none, require
from efficient_attn.layers.activations import ACTIVATIONS, Activation
from efficient_attn.layers.norm import LinearNorm
from kernels.dispatch import Backend, Path, run


class Biased(Mixer):
    """act(softmax(q k^T / sqrt(D) + b) v) W_o, b learned for each head and each distance in rows
    and in columns, whatever their signs (LeViT, arXiv 2104.01136, section 4.2).

    As in the released networks one projection makes queries, keys and values, head by head; norms
    over the batch (section 4.2: convolutions' habits) take the place of the projections' biases.
    """

    @dataclass(frozen=True)
    class Config:
        """heads: how many; None is as many as the site has. They need not divide the width.
        key_dim: channels D of a head's queries and keys; None is width / heads of the site.
        ratio: channels of a head's values over D.
        norm: "batchnorm" after both projections, without biases (LeViT), or "none", with them
        (EfficientFormer).
        activation: before the last projection.
        """

        heads: int | None = None
        key_dim: int | None = None
        ratio: float = 1.0
        norm: Literal["none", "batchnorm"] = "none"
        activation: Activation = "none"

        def __post_init__(self):
            positive_or_none(self, "heads", "key_dim", "ratio")

    paper = "LeViT, arXiv 2104.01136"
    supports = frozenset({"bidirectional", "grid"})
    on_grids = True

    def __init__(self, config, site, *, rngs, shared):
        self.config = config
        self.heads, self.key_dim, self.value_dim = _sizes(config, site)
        given: dict[str, Any] = {"norm": config.norm, "dtype": site.dtype, "rngs": rngs}
        wide = self.heads * (2 * self.key_dim + self.value_dim)
        bias = config.norm == "none"
        self.qkv = LinearNorm(site.width, wide, use_bias=bias and site.qkv_bias, **given)
        self.out = LinearNorm(
            self.heads * self.value_dim, site.width, use_bias=bias, begin=0.0, **given
        )
        self.biases = nnx.Param(jnp.zeros((self.heads, site.seq)))
        self.grid, self.backend = site.grid, site.backend

    @classmethod
    def cost(cls, config, site, length):
        """Both projections, T^2 (D + V) for each head."""
        heads, key_dim, value_dim = _sizes(config, site)
        attend = length**2 * heads * (key_dim + value_dim)
        return Cost(2 * length * site.width * heads * (key_dim + value_dim) + attend, None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; with `rngs` the norms go by the batch."""
        refuse_context("biased", context)
        refuse_mask("biased", mask, self.supports)
        qkv = rearrange(self.qkv(x, rngs=rngs), "b t (h d) -> b t h d", h=self.heads)
        q, k, v = jnp.split(qkv, (self.key_dim, 2 * self.key_dim), axis=-1)
        out = attend(q, k, v, self.biases[...][:, offsets(self.grid)], backend=self.backend)
        return self.out(ACTIVATIONS[self.config.activation](out), rngs=rngs)


def offsets(grid: tuple[int, int], stride: int = 1) -> np.ndarray:
    """[T', T]: rows apart * columns + columns apart, from every `stride`-th place to each one."""
    rows, columns = grid
    there = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    here = there[:, ::stride, ::stride].reshape(2, -1, 1)
    apart = np.abs(here - there.reshape(2, 1, -1))
    return apart[0] * columns + apart[1]


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H V"],
    bias: Float[Array, "H T S"],
    *,
    backend: Backend = "auto",
) -> Float[Array, "B T H*V"]:
    """softmax(q k^T / sqrt(D) + bias) v, heads side by side; the softmax is float32."""
    return run("biased", backend, {"xla": Path(_xla)}, (q, k, v, bias), {})


def _xla(q, k, v, bias):
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5 + bias[None], axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)
    return rearrange(out, "b t h d -> b t (h d)")


def _sizes(config: Biased.Config, site: Site) -> tuple[int, int, int]:
    """Heads, and the channels of a head's keys and of its values."""
    heads, key_dim = config.heads or site.heads, config.key_dim or site.head_dim
    value_dim = round(config.ratio * key_dim)
    require(value_dim > 0, f"biased: ratio={config.ratio} leaves values no channel; raise it")
    return heads, key_dim, value_dim
