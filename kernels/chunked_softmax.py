"""Softmax attention tile by tile, for a CPU: no more logits at once than its cache holds.

An online softmax over tiles of keys, for each tile of queries (FlashAttention, arXiv 2205.14135,
algorithms 1 and 4). Keys are the rows and queries the columns of a tile, so that maxima and sums
over keys run along the vector unit's lanes. Backward makes each tile's weights again from the
logarithm of its rows' sums. Memory is linear in T and S.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from kernels.mask import Mask
from kernels.target import target

QUERIES, KEYS = 256, 256
"""The tile: of 128 to 512 each, the fastest on AVX2 cores with 512 KiB of cache."""


class _How(NamedTuple):
    """What is static: which masks there are, and how many queries and keys a tile has."""

    causal: bool
    hidden: bool
    segments: bool
    queries: int
    keys: int


class _Who(NamedTuple):
    """Who may see whom: 0 or -inf for each key [N,S], segments of queries and keys [N,T], [N,S]."""

    hidden: Array
    queries: Array
    keys: Array


def chunked_softmax(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G Dv"],
    *,
    mask: Mask,
    scale: float,
    logit_cap: float | None = None,
    bias=None,
    tile: tuple[int, int] = (QUERIES, KEYS),
) -> Float[Array, "B T H Dv"]:
    """`kernels.softmax_attention` where `refuse_chunked` does not object; float32 inside."""
    del logit_cap, bias
    (batch, length), (count, groups) = q.shape[:2], k.shape[1:3]
    size_q, size_k = min(tile[0], length), min(tile[1], count)
    more_q, more_k = -length % size_q, -count % size_k
    hide = mask.keys is not None or (more_k > 0 and not mask.causal)
    how = _How(mask.causal, hide, mask.segments is not None, size_q, size_k)
    who = _who(mask, batch, groups, count, more_q, more_k)
    q = _flat(q.astype(jnp.float32) * scale, groups, more_q)
    keys, values = (_flat(x.astype(jnp.float32), groups, more_k)[:, 0] for x in (k, v))
    out = rearrange(_attend(how, q, keys, values, who), "(b g) r t d -> b t (g r) d", b=batch)
    return out[:, :length].astype(v.dtype)


def refuse_chunked(q, k, v, *, mask: Mask, scale, logit_cap=None, bias=None) -> str | None:
    """Why `chunked_softmax` does not take these arguments, and what to do; None if it does."""
    del mask, scale
    if target().chip != "cpu":
        return f"tiles of cache size are for a CPU, not for a {target().chip}; take backend='xla'"
    if logit_cap is not None or bias is not None:
        return "the chunked path has no logit_cap and no slopes (ALiBi); take backend='xla'"
    return None


def _flat(x, groups: int, more: int):
    """[B,T,(G R),D] -> [B G,R,T + more,D], zeros at the end."""
    x = jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)])
    return rearrange(x, "b t (g r) d -> (b g) r t d", g=groups)


def _who(mask: Mask, batch: int, groups: int, count: int, more_q: int, more_k: int) -> _Who:
    seen = jnp.ones((batch, count), bool) if mask.keys is None else mask.keys
    seen = jnp.pad(seen, [(0, 0), (0, more_k)])
    own = jnp.zeros((batch, 1), jnp.int32) if mask.segments is None else mask.segments
    wide = lambda x, more: jnp.repeat(  # noqa: E731
        jnp.pad(x, [(0, 0), (0, more)], mode="edge"), groups, axis=0
    )
    hidden = jnp.where(seen, 0.0, -jnp.inf)
    return _Who(wide(hidden, 0), wide(own, more_q), wide(own, more_k))


def _tile(how: _How, q, k, who: _Who, i, j):
    """Logits of query tile i (columns) on key tile j (rows), -inf where there is no sight."""
    logits = k @ q.T
    key = j * how.keys + jnp.arange(how.keys)[:, None]
    if how.causal:
        query = i * how.queries + jnp.arange(how.queries)[None]
        query = jnp.tile(query, (1, q.shape[0] // how.queries))
        logits = jnp.where(key <= query, logits, -jnp.inf)
    if how.hidden:
        logits += _part(who.hidden, j, how.keys)[:, None]
    if how.segments:
        own = jnp.tile(_part(who.queries, i, how.queries), q.shape[0] // how.queries)
        logits = jnp.where(_part(who.keys, j, how.keys)[:, None] == own[None], logits, -jnp.inf)
    return logits


def _part(x, index, size: int, axis: int = 0):
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _rows(x, index, size: int):
    """Tile `index` of [R,T,D] as [R size,D]: the heads of a group side by side."""
    return rearrange(_part(x, index, size, 1), "r t d -> (r t) d")


def _last(how: _How, i, count: int):
    """Tiles of keys that query tile i sees one of."""
    tiles = count // how.keys
    return jnp.minimum(tiles, ((i + 1) * how.queries - 1) // how.keys + 1) if how.causal else tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q, k, v, who: _Who):
    return _forward(how, q, k, v, who)[0]


def _forward(how: _How, q, k, v, who: _Who):
    """out [N,R,T,Dv] and log-sum-exp [N,R,T] of q [N,R,T,D] on k [N,S,D] and v [N,S,Dv]."""
    heads, length = q.shape[1:3]

    def head(given):
        q, k, v, who = given

        def tile(i):
            queries = _rows(q, i, how.queries)

            def step(j, carry):
                top, total, out = carry
                logits = _tile(how, queries, _part(k, j, how.keys), who, i, j)
                new = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
                safe = jnp.where(new == -jnp.inf, 0.0, new)
                weights = jnp.exp(logits - safe)
                kept = jnp.exp(top - safe)
                out = out * kept + _part(v, j, how.keys).T @ weights
                return new, total * kept + jnp.sum(weights, axis=0, keepdims=True), out

            width = heads * how.queries
            made = lambda rows, x: jnp.full_like(q, x, shape=(rows, width))  # noqa: E731
            empty = made(1, -jnp.inf), made(1, 0), made(v.shape[1], 0)
            top, total, out = jax.lax.fori_loop(0, _last(how, i, len(k)), step, empty)
            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
            return (out / total).reshape(-1, heads, how.queries), lse.reshape(heads, how.queries)

        out, lse = jax.lax.map(tile, jnp.arange(length // how.queries))
        return rearrange(out, "n d r t -> r (n t) d"), rearrange(lse, "n r t -> r (n t)")

    return jax.lax.map(head, (q, k, v, who))


def _attend_forward(how: _How, q, k, v, who: _Who):
    out, lse = _forward(how, q, k, v, who)
    return out, (q, k, v, who, out, lse)


def _attend_backward(how: _How, kept, dout):
    q, k, v, who, out, lse = kept
    inner = jnp.sum(out * dout, axis=-1)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # a row that saw nothing weighs nothing

    def head(given):
        q, k, v, who, dout, lse, inner = given

        def column(dq, j):
            keys, values = _part(k, j, how.keys), _part(v, j, how.keys)

            def step(i, carry):
                dq, dk, dv = carry
                queries, cotangent = _rows(q, i, how.queries), _rows(dout, i, how.queries)
                row = lambda x: _part(x, i, how.queries, 1).reshape(1, -1)  # noqa: E731
                weights = jnp.exp(_tile(how, queries, keys, who, i, j) - row(lse))
                dlogits = weights * (values @ cotangent.T - row(inner))
                more = rearrange(dlogits.T @ keys, "(r t) d -> r t d", t=how.queries)
                old = _part(dq, i, how.queries, 1)
                dq = jax.lax.dynamic_update_slice_in_dim(dq, old + more, i * how.queries, 1)
                return dq, dk + dlogits @ queries, dv + weights @ cotangent

            first = j * how.keys // how.queries if how.causal else 0
            empty = dq, jnp.zeros_like(keys), jnp.zeros_like(values)
            dq, dk, dv = jax.lax.fori_loop(first, q.shape[1] // how.queries, step, empty)
            return dq, (dk, dv)

        dq, (dk, dv) = jax.lax.scan(column, jnp.zeros_like(q), jnp.arange(len(k) // how.keys))
        return dq, dk.reshape(k.shape), dv.reshape(v.shape)

    return *jax.lax.map(head, (q, k, v, who, dout, lse, inner)), None


_attend.defvjp(_attend_forward, _attend_backward)
