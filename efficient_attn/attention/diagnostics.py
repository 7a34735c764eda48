"""How far an estimate of softmax attention is from the real thing, on the batch at hand."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels import Mask
from kernels.masked_softmax import masked_softmax


class Diagnostic(nnx.Intermediate):
    """What a watched core says about the batch at hand."""


def estimate_quality(
    core: Any,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H D"],
    out: Float[Array, "B T H D"],
    *,
    mask: Mask,
    queries: int = 256,
) -> dict[str, jax.Array]:
    """Compare `out`, which `core` made by random features, with exact attention.

    Looks at up to `queries` rows, evenly spread, of the first example, all heads. Returns
        error: |out - exact| / |exact|;
        uniform_error: the same for the plain mean of the visible values. An estimate that is no
            better has lost its queries;
        features: effective number of features, (sum c)^2 / sum c^2 over the shares c >= 0 that the
            features have in the normaliser, averaged over rows. Near 1, a single one decides.
    """
    at = jnp.round(jnp.linspace(0, q.shape[1] - 1, min(queries, q.shape[1]))).astype(jnp.int32)
    q, k, v, out = (x[:1].astype(jnp.float32) for x in (q[:, at], k, v, out[:, at]))
    first = jax.tree.map(lambda x: x[:1], mask)
    seen = first.visible(at, k.shape[1])
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    exact = _mean(logits, seen, v)
    uniform = _mean(jnp.zeros_like(logits), seen, v)

    (q_features, _), (k_features, scale) = core.features(q, None), core.features(k, None)
    scale = jnp.broadcast_to(scale.transpose(0, 2, 1)[:, :, None], logits.shape)
    shares = jnp.abs(q_features) * _mean(scale, seen, jnp.abs(k_features))
    effective = jnp.sum(shares, -1) ** 2 / jnp.maximum(jnp.sum(shares**2, -1), 1e-30)
    size = jnp.linalg.norm(exact)
    return {
        "error": jnp.linalg.norm(out - exact) / size,
        "uniform_error": jnp.linalg.norm(uniform - exact) / size,
        "features": jnp.mean(effective),
    }


def _mean(logits, seen, values):
    return jnp.einsum("bhts,bshd->bthd", masked_softmax(logits, seen), values)


def collapsed(quality: dict[str, float]) -> bool:
    """Whether an estimate is worthless.

    It is if it is off by a third and no better than the plain mean, or if fewer than two features
    decide it.
    """
    lost = not quality["error"] <= 1 / 3 and not quality["error"] < 0.95 * quality["uniform_error"]
    return lost or not quality["features"] >= 2
