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

FeatureMap = Literal[
    "positive", "hyperbolic", "trigonometric",
    "relu", "exp", "elu", "abs", "gelu", "cos", "tanh", "sigmoid", "identity",
]  # fmt: skip

GENERALISED: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "exp": jnp.exp,
    "elu": lambda x: jax.nn.elu(x) + 1.0,
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
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    logits = x if projection is None else _project(x, projection)
    half_square = jnp.sum(jnp.square(x), axis=-1) / 2
    count = logits.shape[-1]
    if kind == "trigonometric":  # lemma 1, the first line: unbiased, but of either sign
        waves = jnp.concatenate([jnp.sin(logits), jnp.cos(logits)], axis=-1)
        return waves * count**-0.5, half_square
    if kind == "positive":  # lemma 1, the second line
        return _exponential(logits, -half_square, count)
    if kind == "hyperbolic":  # lemma 1, cosh: w and -w together
        return _exponential(jnp.concatenate([logits, -logits], axis=-1), -half_square, 2 * count)
    if kind == "exp":
        return _exponential(logits, jnp.zeros_like(half_square), count)
    features = GENERALISED[kind](logits)
    features = features if kind in ("elu", "sigmoid") else features + epsilon
    return features * count**-0.5, jnp.zeros_like(half_square)


def _project(x, projection):
    """In full float32: the default of accelerators is off by percents once exponentiated."""
    return jnp.einsum("bthd,rd->bthr", x, projection, precision=jax.lax.Precision.HIGHEST)


def _exponential(logits, offset, count: int):
    """exp(logits + offset) / sqrt(count), each vector's largest feature taken out as its scale."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.exp(logits - top) * count**-0.5, top[..., 0] + offset
