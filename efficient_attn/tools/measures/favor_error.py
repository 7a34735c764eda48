"""How far FAVOR+ is from what it estimates: the kernel of one pair, and the output of attention."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from efficient_attn.attention.features import draw_projection
from efficient_attn.tools.measures.favor_theory import (
    Rows,
    mean_squared_error,
    orthogonal_bound,
)
from kernels import favor_attention, softmax_attention
from kernels.favor_attention import FavorMap, favor_features


def measure(
    *,
    seed: int,
    features: int,
    feature_map: FavorMap,
    projection: Rows,
    dim: int,
    length: int,
    samples: int,
    scale: float,
    norm: float,
    cosine: float,
    rows: int,
) -> dict[str, float]:
    """Both errors with `features` rows of a projection (arXiv 2009.14794, figure 4).

    Output: mean squared error of attention on `length` queries, keys and values of N(0, 1) in `dim`
    dimensions, queries and keys times `scale`; new ones and a new projection for each of `samples`.
    Kernel: that of exp(<x, y>), |x| = |y| = `norm`, over as many projections as have `rows` rows.

    Returns "output_error" and "output_deviation", of its mean over the samples; "halved_error" and
    "halved_deviation", the same with half the scale; "kernel_error", "kernel_deviation" likewise
    over the projections, "closed_form" of it, and "z", by how many deviations it is off;
    "theorem_2" for positive orthogonal features, `features` <= `dim`.
    """
    run = {"features": features, "feature_map": feature_map, "projection": projection}
    output, kernel = jax.random.split(jax.random.key(seed))
    found = {}
    for name, times in (("output", scale), ("halved", scale / 2)):
        errors = [
            output_error(key, scale=times, dim=dim, length=length, **run)
            for key in jax.random.split(output, samples)
        ]
        found[f"{name}_error"], found[f"{name}_deviation"] = _mean(errors)
    x, y = pair(dim, norm, cosine)
    keys = jax.random.split(jax.random.fold_in(kernel, features), rows // features)
    error, deviation = _mean(kernel_errors(keys, jnp.stack([x, y]), **run))
    theory = mean_squared_error(x, y, **run)
    if projection == "orthogonal" and feature_map == "positive" and features <= dim:
        found["theorem_2"] = orthogonal_bound(x, y, features=features)
    return found | {
        "kernel_error": error,
        "kernel_deviation": deviation,
        "closed_form": theory,
        "z": (error - theory) / deviation,
    }


def _mean(values) -> tuple[float, float]:
    """The mean, and its standard deviation."""
    values = np.asarray(values, np.float64)
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))


def pair(dim: int, norm: float, cosine: float) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of that norm, and the cosine of the angle between them."""
    x, y = np.zeros(dim), np.zeros(dim)
    x[0] = norm
    y[:2] = norm * cosine, norm * math.sqrt(1 - cosine**2)
    return x, y


@functools.partial(
    jax.jit, static_argnames=("features", "feature_map", "projection", "dim", "length")
)
def output_error(
    key: Array, *, features: int, feature_map: FavorMap, projection: Rows, dim: int, length: int,
    scale: float | Float[Array, ""],
) -> Float[Array, ""]:  # fmt: skip
    """Mean squared difference of FAVOR+ and softmax attention on one draw of everything."""
    *drawn, rows = jax.random.split(key, 4)
    q, k, v = (jax.random.normal(one, (1, length, 1, dim)) for one in drawn)
    w = draw_projection(rows, features, dim, projection)
    estimate = favor_attention(q * scale, k * scale, v, w, feature_map=feature_map)
    return jnp.mean(jnp.square(estimate - softmax_attention(q * scale, k * scale, v)))


@functools.partial(jax.jit, static_argnames=("features", "feature_map", "projection"))
def kernel_errors(
    keys: Array, both: Float[Array, "2 D"], *, features: int, feature_map: FavorMap,
    projection: Rows,
) -> Float[Array, " N"]:  # fmt: skip
    """(<phi(x), phi(y)> - exp(<x, y>))^2 for a projection drawn with each of `keys`."""
    dim = both.shape[1]
    given = (both * dim**0.25)[None, :, None]  # favor_features divides by D^(1/4)
    kernel = jnp.exp(jnp.dot(*both))

    def one(key):
        w = draw_projection(key, features, dim, projection)
        phi, log_scale = favor_features(given, w, feature_map=feature_map)
        estimate = jnp.sum(phi[0, 0] * phi[0, 1]) * jnp.exp(jnp.sum(log_scale))
        return jnp.square(estimate - kernel)

    return jax.lax.map(one, keys, batch_size=min(250, len(keys)))
