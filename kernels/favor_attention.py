"""FAVOR+: softmax attention estimated by random features, the projection inside the op.

    phi(x) phi(y)^T ~ exp(<x, y> / sqrt(D)),    phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(R)

with x' = x / D^(1/4) and rows w ~ N(0, I) of W (Choromanski et al. 2021, arXiv 2009.14794, lemma 1
and equation 4). Features are bounded, their scales are logarithms that are taken out row by row as
in `kernels.linear_attention`: nothing overflows, nothing is added to the normaliser, and no later
key has a say. No array of T x R numbers is written out, forward or backward.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dispatch import Backend, Path, run
from kernels.fused import linear as fused_linear
from kernels.linear_attention import causal_linear_attention, linear_attention
from kernels.linear_chunk import FeatureMap, LinearState
from kernels.mask import Mask
from kernels.tiled_linear import refuse_tiled, worth_slabs

FavorMap = Literal["positive", "hyperbolic", "trigonometric"]


def favor_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H Dv"],
    projection: Float[Array, "R D"],
    *,
    feature_map: FavorMap = "positive",
    mask: Mask | None = None,
    learn_projection: bool = False,
    chunk: int = 128,
    backend: Backend = "auto",
) -> Float[Array, "B T H Dv"]:
    """Linear attention of phi(q) on phi(k); `feature_map` is explained at `favor_features`.

    The projection gets no gradient unless `learn_projection`. Work and memory are those of
    `linear_attention` with R features, or 2 R, and 2 T R D multiply-adds a head to make them. On a
    CPU, where "auto" takes "tiled" as there, `jax.jvp` needs backend="xla".

    Raises:
        ValueError: the mask does not fit.
        NotImplementedError: the op has no such backend, or it does not take these arguments.
    """
    mask = mask or Mask()
    mask.check(q.shape[1], k.shape[1])
    how = {"feature_map": feature_map, "mask": mask, "learn_projection": learn_projection}
    how["chunk"] = chunk
    paths = {
        "pallas": Path(_fused, _refuse),
        "tiled": Path(_on("tiled"), _of_slabs(refuse_tiled), _of_slabs(worth_slabs)),
        "xla": Path(_on("xla")),
    }
    return run("favor_attention", backend, paths, (q, k, v, projection), how)


def causal_favor_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    projection: Float[Array, "R D"],
    state: LinearState,
    *,
    feature_map: FavorMap = "positive",
    mask: Mask | None = None,
    learn_projection: bool = False,
    chunk: int = 128,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """Causal FAVOR+ that goes on from `state`, and the state that it leaves.

    Raises:
        ValueError: the mask does not fit or is not causal.
        NotImplementedError: the op has no such backend, or it does not take these arguments.
    """
    mask = mask or Mask(causal=True)
    mask.check(q.shape[1], k.shape[1])
    if not mask.causal:
        raise ValueError("causal_favor_attention takes a causal mask: Mask(causal=True, ...)")
    how = {"feature_map": feature_map, "mask": mask, "learn_projection": learn_projection}
    how["chunk"] = chunk
    paths = {"pallas": Path(_fused_causal, _refuse_causal), "xla": Path(_xla_causal)}
    return run("causal_favor_attention", backend, paths, (q, k, v, projection, state), how)


def favor_features(
    x: Float[Array, "B T H D"], projection: Float[Array, "R D"], *, feature_map: FavorMap
) -> tuple[Float[Array, "B T H R2"], Float[Array, "B T H"]]:
    """Bounded float32 features of queries or keys x, and the logarithm of each vector's scale.

    "positive": lemma 1, the second line, R features. "hyperbolic": lemma 1, cosh, w and -w
    together, 2 R. "trigonometric": lemma 1, the first line, 2 R; unbiased, but of either sign, so
    that its normaliser can vanish.
    """
    x = scaled(x)
    logits = project(x, projection)
    half_square = jnp.sum(jnp.square(x), axis=-1) / 2
    if feature_map == "trigonometric":
        waves = jnp.concatenate([jnp.sin(logits), jnp.cos(logits)], axis=-1)
        return waves * len(projection) ** -0.5, half_square
    if feature_map == "hyperbolic":
        logits = jnp.concatenate([logits, -logits], axis=-1)
    features, top = exponential(logits)
    return features, top - half_square


def scaled(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """x / D^(1/4) in float32: products of two are the logits of softmax attention."""
    return x.astype(jnp.float32) * x.shape[-1] ** -0.25


def project(x: Float[Array, "B T H D"], projection: Float[Array, "R D"]) -> Float[Array, "B T H R"]:
    """W x in full float32: the default of accelerators is off by percents once exponentiated."""
    return jnp.einsum("bthd,rd->bthr", x, projection, precision=jax.lax.Precision.HIGHEST)


def exponential(logits: Float[Array, "*N R"]) -> tuple[Float[Array, "*N R"], Float[Array, "*N"]]:
    """exp(logits) / sqrt(R), and the logarithm of what is taken out: each vector's largest."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.exp(logits - top) * logits.shape[-1] ** -0.5, top[..., 0]


def _features(projection, feature_map: FavorMap, learn_projection: bool) -> FeatureMap:
    w = projection if learn_projection else jax.lax.stop_gradient(projection)
    made = functools.partial(favor_features, projection=w, feature_map=feature_map)
    return lambda x, at: made(x)


def _on(backend: Backend):
    """Linear attention of features that it makes."""

    def attend(q, k, v, projection, *, feature_map, mask, learn_projection, chunk):
        phi = _features(projection, feature_map, learn_projection)
        return linear_attention(q, k, v, features=phi, mask=mask, chunk=chunk, backend=backend)

    return attend


def _of_slabs(said):
    """What `tiled_linear` says of these arguments."""

    def answer(q, k, v, projection, *, feature_map, mask, learn_projection, chunk):
        return said(q, k, v, features=None, log_scale=None, mask=mask, chunk=chunk)

    return answer


def _xla_causal(q, k, v, projection, state, *, feature_map, mask, learn_projection, chunk):
    phi = _features(projection, feature_map, learn_projection)
    return causal_linear_attention(
        q, k, v, state, features=phi, mask=mask, chunk=chunk, backend="xla"
    )


def _weight(projection, feature_map: FavorMap):
    """The rows that exponential features are made with, of x as it is given."""
    w = projection * projection.shape[1] ** -0.25
    return jnp.concatenate([w, -w]) if feature_map == "hyperbolic" else w


def _fused(q, k, v, projection, *, feature_map, mask, learn_projection, chunk):
    half = 0.5 * projection.shape[1] ** -0.5
    w = _weight(projection, feature_map)
    return fused_linear.favor(q, k, v, w, half=half, mask=mask, chunk=chunk)


def _fused_causal(q, k, v, projection, state, *, feature_map, mask, learn_projection, chunk):
    half = 0.5 * projection.shape[1] ** -0.5
    w = _weight(projection, feature_map)
    count = jnp.full_like(k, -0.5 * math.log(len(w)), jnp.float32, shape=k.shape[:3])
    return fused_linear.favor(
        q, k, v, w, half=half, log_scale=count, mask=mask, chunk=chunk, state=state
    )  # R^-1/2, by which the features of `favor_features` are smaller, is in the state


def _refuse(q, k, v, projection, *, feature_map, mask, learn_projection, chunk):
    if feature_map == "trigonometric":
        return "the fused kernels make positive and hyperbolic features: use backend='xla'"
    if learn_projection:
        return "the fused kernels give the projection no gradient: use backend='xla'"
    rows = jax.eval_shape(lambda w: _weight(w, feature_map), projection)
    return fused_linear.refuse_favor(q, k, v, rows)


def _refuse_causal(q, k, v, projection, state, *, feature_map, mask, learn_projection, chunk):
    how = {"feature_map": feature_map, "mask": mask, "learn_projection": learn_projection}
    return _refuse(q, k, v, projection, **how, chunk=chunk)
