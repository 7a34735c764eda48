"""Random features of FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794): projections W, maps phi.

With x' = x / D^(1/4), so that <x', y'> is the logit of softmax attention, and rows w of W, a map
gives

    K(x, y) = E[<phi(x), phi(y)>]

for the softmax kernel K = exp(<x', y'>), or defines a kernel of its own (`GENERALISED`). A map
returns bounded features and the logarithm of a scale per vector, phi(x) = features exp(log_scale),
because exp(|x'|^2 / 2) overflows float32 long before attention does. All of it is float32.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.favor_attention import exponential, favor_features, project, scaled

FeatureMap = Literal[
    "positive", "hyperbolic", "trigonometric",
    "relu", "exp", "elu", "abs", "gelu", "cos", "tanh", "sigmoid", "identity",
]  # fmt: skip

SOFTMAX_MAPS = ("positive", "hyperbolic", "trigonometric")
"""The maps of FAVOR+: estimates of softmax attention (`kernels.favor_features`)."""

GENERALISED: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "exp": jnp.exp,
    "elu": lambda x: jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0))),  # elu(x) + 1
    "abs": jnp.abs,
    "gelu": jax.nn.gelu,
    "cos": jnp.cos,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}
"""f of the generalised kernels <f(W x') + epsilon, f(W y') + epsilon> (2.3, figures 15-17)."""


def draw_projection(key: Array, features: int, dim: int, kind: str) -> Float[Array, "R D"]:
    """R rows w for dimension D.

    "iid": independent N(0, I). "orthogonal": blocks of D orthogonal rows with the norms of "iid",
    so that each row is still N(0, I) (paper, section 2.4). "regularised": the same with every
    norm sqrt(D) (SMREG, section 3).
    """
    draw, norms = jax.random.split(key)
    if kind == "iid":
        return jax.random.normal(draw, (features, dim))
    blocks = jax.random.orthogonal(draw, dim, shape=(-(-features // dim),))
    rows = blocks.reshape(-1, dim)[:features]
    if kind == "regularised":
        return rows * dim**0.5
    return rows * jnp.linalg.norm(jax.random.normal(norms, (features, dim)), axis=-1, keepdims=True)


def feature_map(
    x: Float[Array, "B T H D"], projection: Float[Array, "R D"] | None, *, kind: str, epsilon: float
) -> tuple[Float[Array, "B T H R2"], Float[Array, "B T H"]]:
    """(features, log_scale) of x; "hyperbolic" and "trigonometric" have 2 R features.

    Without a projection, generalised features act on x' itself. `epsilon` is added to the features
    of those generalised maps that can vanish (all but exp, elu and sigmoid).
    """
    if projection is not None and kind in SOFTMAX_MAPS:
        return favor_features(x, projection, feature_map=kind)
    x = scaled(x)
    logits = x if projection is None else project(x, projection)
    if kind == "exp":
        return exponential(logits)
    features = GENERALISED[kind](logits)
    features = features if kind in ("elu", "sigmoid") else features + epsilon
    features = features * logits.shape[-1] ** -0.5
    return features, jnp.zeros(features.shape[:3])
