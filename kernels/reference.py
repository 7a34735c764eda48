"""The oracle of every op: its formula written out, in float64 or float32, and nothing clever.

Tests compare against these, forward and gradient. They hold T x S numbers per head.
"""

import jax
import jax.numpy as jnp

from kernels.mask import Mask


def _visible(mask: Mask | None, queries: int, keys: int):
    mask = mask or Mask()
    mask.check(queries, keys)
    return mask.visible(jnp.arange(queries), keys)


def softmax_attention(q, k, v, *, mask=None, scale=None, logit_cap=None):
    """q [B,T,H,D], k and v [B,S,G,D] -> [B,T,H,D]; see `kernels.softmax_attention`."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    seen = _visible(mask, q.shape[1], k.shape[1])
    return _normalised(_exp(logits, seen), v)


def linear_attention(q, k, v, *, log_scale=None, mask=None):
    """q [B,T,H,R], k [B,S,H,R], v [B,S,H,D] -> [B,T,H,D]; see `kernels.linear_attention`."""
    log_scale = jnp.zeros(k.shape[:3]) if log_scale is None else log_scale
    seen = _visible(mask, q.shape[1], k.shape[1])
    magnitude = _exp(log_scale.transpose(0, 2, 1)[:, :, None], seen)
    return _normalised(jnp.einsum("bthr,bshr->bhts", q, k) * magnitude, v)


def _exp(logits, seen):
    """exp of what is seen, over the row's largest; 0 elsewhere. Only ratios in a row matter."""
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.exp(logits - jax.lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0.0)))


def _normalised(weights, v):
    total = weights.sum(-1, keepdims=True)
    weights = jnp.where(total == 0, 0.0, weights / jnp.where(total == 0, 1.0, total))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def local_conv(x, weights, *, mask=None):
    """x [B,T,E], weights [B|1,T|1,H,K] -> [B,T,E]; see `kernels.local_conv`."""
    mask = mask or Mask()
    batch, length, width = x.shape
    heads, taps = weights.shape[2:]
    past = taps - 1 if mask.causal else (taps - 1) // 2
    weights = jnp.broadcast_to(weights, (batch, length, heads, taps))
    seen = _visible(Mask(keys=mask.keys, segments=mask.segments), length, length)
    source = (
        jnp.arange(length)[None, :] - jnp.arange(length)[:, None] + past
    )  # tap that reads s at t
    inside = ((source >= 0) & (source < taps))[None, None] & seen
    matrix = weights[
        :, jnp.arange(length)[:, None], :, jnp.clip(source, 0, taps - 1)
    ]  # [T, S, B, H]
    matrix = jnp.where(inside, matrix.transpose(2, 3, 0, 1), 0.0)
    by_head = x.reshape(batch, length, heads, width // heads)
    return jnp.einsum("bhts,bshd->bthd", matrix, by_head).reshape(x.shape)
