"""Linear attention: a feature map in place of the exponential, fixed or learned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.attention.features import GENERALISED
from efficient_attn.attention.kernelised import Kernelised


def taylor(x):
    """(1, x', x' (x) x' / sqrt(2)) with x' = x / D^(1/4): <phi(q), phi(k)> = 1 + l + l^2 / 2."""
    x = x * x.shape[-1] ** -0.25
    square = jnp.einsum("bthd,bthe->bthde", x, x).reshape(*x.shape[:-1], -1) * 2**-0.5
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, square], axis=-1)


def dpfp(x):
    """r_i r_(i+1), r = relu([x, -x]) and i + 1 modulo 2 D: DPFP-1."""
    r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return r * jnp.roll(r, 1, axis=-1)


FIXED: dict[str, Callable] = {
    "elu": GENERALISED["elu"],
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "taylor": taylor,
    "dpfp": dpfp,
}
LEARNED: dict[str, Callable] = {
    "hedgehog": lambda x: jnp.concatenate([jax.nn.softmax(y, axis=-1) for y in (x, -x)], axis=-1),
    "t2r": jax.nn.relu,
}


class Linear(Kernelised):
    """phi(q) (phi(k)^T v), normalised (Katharopoulos et al. 2020, 2006.16236, equations 4 to 7)."""

    @dataclass(frozen=True)
    class Config:
        """feature_map: phi of each head's queries and keys. Fixed: "elu", elu(x) + 1, the paper's;
        "relu"; "squared_relu"; "softmax" over the features; "taylor", the exponential's second
        order (Based, arXiv 2402.18668; 1 + D + D^2 features); "dpfp" (arXiv 2102.11174,
        section 5.3, nu = 1). Learned, one matrix a head for queries and keys: "hedgehog",
        softmax(W x) and softmax(-W x) (arXiv 2402.04347, section 4.2), W the identity at first;
        "t2r", relu(W x + b) (arXiv 2103.13076, section 3).
        """

        feature_map: Literal[
            "elu", "relu", "squared_relu", "softmax", "taylor", "dpfp", "hedgehog", "t2r"
        ] = "elu"

    paper = "Transformers are RNNs, arXiv 2006.16236"

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs, shared=shared)
        dim = site.head_dim
        if config.feature_map == "hedgehog":
            self.kernel = nnx.Param(jnp.tile(jnp.eye(dim)[None], (site.heads, 1, 1)))
        if config.feature_map == "t2r":
            init = nnx.initializers.xavier_uniform(batch_axis=(0,))
            self.kernel = nnx.Param(init(rngs.params(), (site.heads, dim, dim)))
            self.bias = nnx.Param(jnp.zeros((site.heads, dim)))

    @classmethod
    def count(cls, config, site):
        """R: D, or what the map makes of it."""
        dim = site.head_dim
        widened = {"taylor": 1 + dim + dim**2, "dpfp": 2 * dim, "hedgehog": 2 * dim}
        return widened.get(config.feature_map, dim)

    @classmethod
    def cost(cls, config, site, length):
        """`Kernelised.cost`, and what makes the features."""
        each = site.head_dim if config.feature_map in ("taylor", "hedgehog", "t2r") else 0
        made = 2 * cls.tokens(config, site, length) * site.width * each
        attend = super().cost(config, site, length)
        return attend._replace(multiply_adds=attend.multiply_adds + made)

    def features(self, x, positions):
        """Float32; no feature needs a scale of its own."""
        x, kind = x.astype(jnp.float32), self.config.feature_map
        if kind in FIXED:
            return FIXED[kind](x), None
        x = jnp.einsum("bthd,hde->bthe", x, self.kernel[...])
        return LEARNED[kind](x + self.bias[...][None, None] if kind == "t2r" else x), None
