"""The oracle of every op: its formula written out, in float64 or float32, and nothing clever.

Tests compare against these, forward and gradient. They hold T x S numbers per head.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

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


def block_attention(q, k, v, *, blocks, mask=None, scale=None, slopes=None):
    """q [B,T,H,D], k and v [B,S,G,D] -> (out, lse); see `kernels.block_attention`."""
    listed = np.zeros((k.shape[2], q.shape[1], k.shape[1]), bool)
    for head, (n, row) in itertools.product(range(len(listed)), enumerate(blocks.queries)):
        for block in blocks.table[min(head, len(blocks.table) - 1), n]:
            for t, s in itertools.product(row, blocks.keys[block] if block >= 0 else ()):
                listed[head, t, s] |= t >= 0 and s >= 0
    if blocks.band is not None:
        left, right = blocks.band
        ahead = np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])[None]
        inside = (ahead <= left) & (ahead >= -right)
        listed &= (inside if blocks.side == "inside" else ~inside)[None]
    return _listed(q, k, v, listed, mask, scale, slopes)


def window_attention(q, k, v, *, left, right, dilation=1, mask=None, slopes=None):
    """q [B,T,H,D], k and v [B,T,G,D] -> (out, lse); see `kernels.window_attention`."""
    ahead = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])[None]
    listed = (ahead <= left * dilation) & (ahead >= -right * dilation) & (ahead % dilation == 0)
    return _listed(q, k, v, np.repeat(listed[None], k.shape[2], axis=0), mask, None, slopes)


def _listed(q, k, v, listed, mask, scale, slopes):
    """Attention to the keys that `listed` [G,T,S] and the mask show, and log-sum-exp."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if slopes is not None:
        ahead = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None]
        logits -= slopes[None, :, None, None] * jnp.abs(ahead)[None, None]
    seen = _visible(mask, q.shape[1], k.shape[1]) & np.repeat(listed, repeat, axis=0)[None]
    lse = jax.nn.logsumexp(logits, axis=-1, where=seen)
    return _normalised(_exp(logits, seen), v), jnp.swapaxes(lse, 1, 2)


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


def gated_linear_attention(q, k, v, log_decay, *, mask=None, initial_state=None):
    """q, k [B,T,G,R], v [B,T,H,D], log_decay [B,T,H(,R)] -> [B,T,H,D] and [B,H,R,D]."""
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    decay = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])

    def update(state, k, v, decay):
        return state * decay[..., None] + k[..., None] * v[:, :, None]

    return _recurrence(update, q, (k, v, decay), mask, initial_state)


def gated_delta_rule(q, k, v, beta, log_decay=None, *, mask=None, initial_state=None):
    """q, k [B,T,H,R], v [B,T,H,D], beta, log_decay [B,T,H] -> [B,T,H,D] and [B,H,R,D]."""
    decay = jnp.exp(jnp.zeros_like(beta) if log_decay is None else log_decay)

    def update(state, k, v, beta, decay):
        beta, decay = beta[..., None, None], decay[..., None, None]
        removed = k[..., None] * jnp.einsum("bhr,bhrd->bhd", k, state)[:, :, None]
        return decay * (state - beta * removed) + beta * k[..., None] * v[:, :, None]

    return _recurrence(update, q, (k, v, beta, decay), mask, initial_state)


def decode_step(q, k, v, *, state, log_decay=None, beta=None):
    """q, k [B,1,G,R], v [B,1,H,D], state [B,H,R,D] -> out, state; see `kernels.decode_step`."""
    q, k = (jnp.repeat(x[:, 0], v.shape[2] // x.shape[2], axis=1) for x in (q, k))
    change = v[:, 0]
    if log_decay is not None:
        state = jnp.exp(log_decay[:, 0]).reshape(*state.shape[:2], -1, 1) * state
    if beta is not None:
        change = beta[:, 0, :, None] * (change - jnp.einsum("bhr,bhrd->bhd", k, state))
    state = state + k[..., None] * change[:, :, None]
    return jnp.einsum("bhr,bhrd->bhd", q, state)[:, None], state


def _recurrence(update, q, tokens, mask, state):
    """State after state: emptied where a segment begins, untouched by a token that is padding."""
    (batch, length), (k, v) = q.shape[:2], tokens[:2]
    mask = mask or Mask(causal=True)
    keys = jnp.ones((batch, length), bool) if mask.keys is None else mask.keys
    begins = jnp.zeros((batch, length), bool)
    if mask.segments is not None:
        begins = begins.at[:, 1:].set(mask.segments[:, 1:] != mask.segments[:, :-1])
    if state is None:
        state = jnp.zeros((batch, v.shape[2], k.shape[3], v.shape[3]), v.dtype)

    def one(state, given):
        q, here, begins, *token = given
        state = jnp.where(begins[:, None, None, None], 0, state)
        state = jnp.where(here[:, None, None, None], update(state, *token), state)
        return state, jnp.einsum("bhr,bhrd->bhd", q, state)

    columns = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, keys, begins, *tokens))
    state, outs = jax.lax.scan(one, state, columns)
    return jnp.swapaxes(outs, 0, 1), state


def lsh_attention(q, v, buckets, *, chunk, layout="bucket", mask=None):
    """q [B,T,H,D], v [B,T,H,D], buckets [R,B,T,H] -> [B,T,H,D]; see `kernels.lsh_attention`."""
    batch, length = q.shape[:2]
    at, mask = jnp.arange(length), mask or Mask()
    valid = jnp.ones((batch, length), bool) if mask.keys is None else mask.keys
    if layout == "bucket":  # padding goes with the last token before it
        last = jax.lax.cummax(jnp.where(valid, at[None], -1), axis=1)
        inherited = jnp.take_along_axis(buckets, jnp.maximum(last, 0)[None, :, :, None], axis=2)
        buckets = jnp.where((last < 0)[None, :, :, None], -1, inherited)
    else:
        buckets = jnp.where(valid[None, :, :, None], buckets, jnp.iinfo(jnp.int32).max)
    by_head = jnp.moveaxis(buckets, 3, 2)
    mine, theirs = by_head[..., :, None], by_head[..., None, :]
    same, earlier = mine == theirs, (at[:, None] > at[None])[None, None, None]
    ahead = same & earlier if layout == "bucket" else (mine > theirs) | (same & earlier)
    chunks = ahead.sum(-1) // chunk
    back = chunks[..., :, None] - chunks[..., None, :]
    seen = (same & ((back == 0) | (back == 1))).any(0) & _visible(mask, length, length)
    itself = jnp.eye(length, dtype=bool)[None, None]
    seen &= ~itself
    seen |= itself & valid[:, None, None] & ~seen.any(-1, keepdims=True)
    keys = q / jnp.sqrt((q * q).sum(-1, keepdims=True) + 1e-6 * q.shape[-1])
    return _normalised(_exp(jnp.einsum("bthd,bshd->bhts", q, keys), seen), v)
