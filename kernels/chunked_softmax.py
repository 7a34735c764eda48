"""Softmax attention tile by tile, for a CPU: no more logits at once than its caches hold.

An online softmax over tiles of keys, for each tile of queries (FlashAttention, arXiv 2205.14135,
algorithms 1 and 4). Backward makes each tile's weights again from the logarithm of its rows' sums.
Memory is linear in T and S. There is no forward-mode derivative (`jax.jvp`): backend="xla" has one.

One loop goes over the tiles of all heads, one tile at a time: XLA runs a loop's turns, and loops
that share memory, one after the other, and spreads a matrix product over cores where it has some
10^7 multiply-adds. Keys are the rows and queries the columns of a tile, so that maxima and sums
over keys run along the vector unit's lanes; and every product has its left factor stored row by
row, as the library that XLA takes for them wants it: three times as fast as a transposed one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from kernels.mask import Mask
from kernels.target import alone, target

QUERIES, KEYS = 512, 512
"""The largest tile: products of fewer rows run on one core, and larger tiles compute more logits
that a causal mask hides."""
SHORTEST, LOGITS = 64, 256 * 256
"""Queries, and keys, and logits of a head, from which on tiles are faster."""
VECTOR = 16
"""Sides of tiles are multiples of it: the floats of a vector register."""


class _How(NamedTuple):
    """What is static: whether the mask is causal, positions of a tile of queries, heads of keys."""

    causal: bool
    queries: int
    groups: int


class _Who(NamedTuple):
    """Who may see whom, None where the mask does not say.

    hidden: 0 or -inf for each key [B,m,K,1]. queries, keys: segments, [B,n,1,W] and [B,m,K,1].
    """

    hidden: Array | None
    queries: Array | None
    keys: Array | None


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
    """`kernels.softmax_attention` where `refuse_chunked` does not object; float32 inside.

    tile: the most queries, those of a group's heads together, and the most keys of a tile.
    """
    del logit_cap, bias
    length, count, groups = q.shape[1], *k.shape[1:3]
    many = q.shape[2] // groups
    size_q, size_k = _even(length, tile[0] // many), _even(count, tile[1])
    more_q, more_k = -length % size_q, -count % size_k
    who = _who(mask, k, (many, size_q, more_q), (size_k, more_k))
    wide_q, wide_k, wide_v = (
        jnp.pad(x.astype(jnp.float32), [(0, 0), (0, more), (0, 0), (0, 0)])
        for x, more in ((q, more_q), (k, more_k), (v, more_k))
    )
    rows = rearrange(wide_q * scale, "b (n t) (g r) d -> (b g) n (r t) d", g=groups, t=size_q)
    keys = rearrange(wide_k, "b (m s) g d -> (b g) m s d", s=size_k)
    values = rearrange(wide_v, "b (m s) g d -> (b g) m d s", s=size_k)
    out: Array = _attend(_How(mask.causal, size_q, groups), rows, keys, values, who)
    out = rearrange(out, "(b g) n d (r t) -> b (n t) (g r) d", g=groups, t=size_q)
    return out[:, :length].astype(v.dtype)


def refuse_chunked(q, k, v, *, mask: Mask, scale, logit_cap=None, bias=None) -> str | None:
    """Why `chunked_softmax` does not take these arguments, and what to do; None if it does."""
    del mask, scale
    if target().chip != "cpu":
        return f"tiles of cache size are for a CPU, not for a {target().chip}; take backend='xla'"
    if logit_cap is not None or bias is not None:
        return "the chunked path has no logit_cap and no slopes (ALiBi); take backend='xla'"
    return None


def worth_tiles(q, k, v, *, mask: Mask, scale, logit_cap=None, bias=None) -> bool:
    """Whether tiles are faster than all logits at once, forward and backward, on one CPU.

    At T = S, batch 4, 8 heads of 64 on two cores: the same at 192, twice as fast at 256, four times
    at 1,024. jax would gather what several devices hold before it looped over their heads.
    """
    del v, mask, scale, logit_cap, bias
    length, count = q.shape[1], k.shape[1]
    return min(length, count) >= SHORTEST and length * count >= LOGITS and alone()


def _even(length: int, largest: int) -> int:
    """Positions of a tile where as few tiles as can be are all of one size."""
    each = -(-length // -(-length // max(largest, 1)))
    return -(-each // VECTOR) * VECTOR


def _who(mask: Mask, k, queries: tuple[int, int, int], keys: tuple[int, int]) -> _Who:
    """queries: heads of a group, positions of a tile, and how many are filled up; keys: these."""
    (many, size_q, more_q), (size_k, more_k) = queries, keys
    columns = functools.partial(rearrange, pattern="b (m s) -> b m s 1", s=size_k)
    hidden = None
    if mask.keys is not None or (more_k and not mask.causal):  # the last queries see these, too
        seen = jnp.ones(k.shape[:2], bool) if mask.keys is None else mask.keys
        hidden = columns(jnp.where(jnp.pad(seen, [(0, 0), (0, more_k)]), 0.0, -jnp.inf))
    if mask.segments is None:
        return _Who(hidden, None, None)
    own, other = (
        jnp.pad(mask.segments, [(0, 0), (0, more)], mode="edge") for more in (more_q, more_k)
    )
    own = jnp.tile(rearrange(own, "b (n t) -> b n 1 t", t=size_q), many)
    return _Who(hidden, own, columns(other))


def _tiles(how: _How, q, k):
    """(turns, turn -> (head, i, j)): tiles of queries i and keys j, whose one sees of the other."""
    i, j = np.indices((q.shape[1], k.shape[1])).reshape(2, -1)
    if how.causal:
        seen = j * k.shape[2] < (i + 1) * how.queries
        i, j = i[seen], j[seen]
    i, j = jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)

    def at(turn):
        tile = turn % len(i)
        return turn // len(i), i[tile], j[tile]

    return q.shape[0] * len(i), at


def _take(x, head, tile):
    """[N,n,...] or, the same for the heads of a sequence, [B,n,...] at a head's tile."""
    return jax.lax.dynamic_slice(x, (head, tile, 0, 0), (1, 1, *x.shape[2:]))[0, 0]


def _put(x, new, head, tile):
    return jax.lax.dynamic_update_slice(x, new[None, None], (head, tile, 0, 0))


def _logits(how: _How, q, k, who: _Who, head, i, j):
    """Those of query tile i (columns) on key tile j (rows), -inf where there is no sight."""
    keys = _take(k, head, j)
    logits = keys @ _take(q, head, i).T
    if how.causal:
        key = j * keys.shape[0] + jnp.arange(keys.shape[0])[:, None]
        query = i * how.queries + jnp.arange(q.shape[2])[None] % how.queries
        logits = jnp.where(key <= query, logits, -jnp.inf)
    sequence = head // how.groups
    if who.hidden is not None:
        logits += _take(who.hidden, sequence, j)
    if who.keys is not None:
        own, other = _take(who.queries, sequence, i), _take(who.keys, sequence, j)
        logits = jnp.where(own == other, logits, -jnp.inf)
    return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q, k, v, who: _Who):
    return _forward(how, q, k, v, who)[0]


def _forward(how: _How, q, k, v, who: _Who):
    """out [N,n,Dv,W] and log-sum-exp [N,n,1,W] of q [N,n,W,D] on k [N,m,K,D] and v [N,m,Dv,K].

    N heads of keys, n tiles of W queries, m tiles of K keys.
    """
    turns, at = _tiles(how, q, k)

    def step(turn, state):
        head, i, j = at(turn)
        top, total, out = (_take(x, head, i) for x in state)
        logits = _logits(how, q, k, who, head, i, j)
        new = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        weights = jnp.exp(logits - safe)
        kept = jnp.exp(top - safe)
        total = total * kept + jnp.sum(weights, axis=0, keepdims=True)
        out = out * kept + _take(v, head, j) @ weights
        return tuple(_put(x, y, head, i) for x, y in zip(state, (new, total, out), strict=True))

    made = lambda rows, x: jnp.full_like(q, x, shape=(*q.shape[:2], rows, q.shape[2]))  # noqa: E731
    empty = made(1, -jnp.inf), made(1, 0), made(v.shape[2], 0)
    top, total, out = jax.lax.fori_loop(0, turns, step, empty)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return out / total, jnp.where(seen, top + jnp.log(total), -jnp.inf)


def _attend_forward(how: _How, q, k, v, who: _Who):
    out, lse = _forward(how, q, k, v, who)
    return out, (q, k, v, who, out, lse)


def _attend_backward(how: _How, kept, dout):
    q, k, v, who, out, lse = kept
    turns, at = _tiles(how, q, k)
    inner = jnp.einsum("hndw,hndw->hnw", out, dout)[:, :, None]  # a sum takes 10 times as long
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # a row that saw nothing weighs nothing
    across, v, dout = (jnp.swapaxes(x, 2, 3) for x in (k, v, dout))

    def step(turn, state):
        head, i, j = at(turn)
        queries, cotangent = _take(q, head, i), _take(dout, head, i)
        weights = jnp.exp(_logits(how, q, k, who, head, i, j) - _take(lse, head, i))
        dlogits = weights * (_take(v, head, j) @ cotangent.T - _take(inner, head, i))
        more = _take(across, head, j) @ dlogits, dlogits @ queries, weights @ cotangent
        return tuple(
            _put(x, _take(x, head, tile) + y, head, tile)
            for x, y, tile in zip(state, more, (i, j, j), strict=True)
        )

    empty = jnp.zeros_like(jnp.swapaxes(q, 2, 3)), jnp.zeros_like(k), jnp.zeros_like(v)
    dq, dk, dv = jax.lax.fori_loop(0, turns, step, empty)
    return jnp.swapaxes(dq, 2, 3), dk, jnp.swapaxes(dv, 2, 3), None


_attend.defvjp(_attend_forward, _attend_backward)
