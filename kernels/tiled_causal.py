"""Causal linear attention slab by slab, for a CPU; see `kernels.tiled_linear`.

A slab is of few tokens here, but of several sequences, so that its products fill all cores. Inside
one of C tokens, A = tril(q k^T), queries read A v + q S and A 1 + q z, S and z being the sums of
k v^T and of k over the slabs before. These are kept, R (Dv + 1) numbers a slab, sequence and head.
Backward goes the other way and makes A once more.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.fused.passes import LEAST
from kernels.linear_chunk import FeatureMap, Tokens, divide, given, grouped, keys_of, turned
from kernels.mask import Mask
from kernels.slabs import filled, hoisted, like, most_tokens, room, slab_size
from kernels.target import alone, target

SHORTEST = 256
"""Tokens from which on slabs are faster."""
MOST = 64
"""Tokens of a slab: at D 64, 128 take 1.3 times as long, 256 2.4 times."""


class _How(NamedTuple):
    """What is static: features at places and of what they close over; a slab's sequences, tokens.

    There are `each` slabs, one after the other, of the same sequences.
    """

    of_queries: Callable
    of_keys: Callable
    rows: int
    size: int
    each: int


class _Given(NamedTuple):
    """Whole slabs of tokens; own, other: what the features of queries and of keys close over."""

    q: Array
    k: Array
    v: Array
    seen: Array | None
    own: list[Array]
    other: list[Array]


def tiled_causal(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G Dv"],
    *,
    features: FeatureMap | None,
    log_scale: None,
    mask: Mask,
    chunk: int,
) -> Float[Array, "B T H Dv"]:
    """Causal `kernels.linear_attention` where `refuse_causal` does not object; float32 inside."""
    del log_scale
    phi = grouped(features or given, q.shape[2])
    size = slab_size(q.shape[1], min(chunk, MOST))
    rank = jax.eval_shape(phi, *like(q, 1))[0].shape[3]
    most = most_tokens(q.shape[2] * max(rank, q.shape[3], v.shape[3]))
    rows = slab_size(q.shape[0], max(1, most // size), whole=True)
    of_queries, own = hoisted(phi, q, size, rows)
    of_keys, other = hoisted(phi, k, size, rows)
    seen = None if mask.keys is None else filled(mask.keys, size)
    q_whole, k_whole, v_whole = (filled(x, size) for x in (q, k, v))
    given_whole = _Given(q_whole, k_whole, v_whole, seen, own, other)
    how = _How(of_queries, of_keys, rows, size, q_whole.shape[1] // size)
    out: Array = _attend(how, given_whole)
    return out[:, : q.shape[1]].astype(v.dtype)


def refuse_causal(q, k, v, *, features, log_scale, mask: Mask, chunk: int) -> str | None:
    """Why `tiled_causal` does not take these arguments, and what to do; None if it does."""
    del v, chunk
    if target().chip != "cpu":
        return f"slabs of cache size are for a CPU, not for a {target().chip}; take backend='xla'"
    if not mask.causal or mask.segments is not None:
        return "the tiled causal path has no segments; take backend='xla'"
    scaled = features is not None and jax.eval_shape(features, *like(k, 1))[1] is not None
    if scaled or log_scale is not None:
        return "the tiled causal path has no log scales; take backend='xla'"
    return None


def worth_causal(q, k, v, *, features, log_scale, mask: Mask, chunk: int) -> bool:
    """Whether slabs are faster; jax would gather what several devices hold."""
    del k, v, features, log_scale, mask, chunk
    return q.shape[1] >= SHORTEST and alone()


def _turns(how: _How, x: _Given) -> int:
    return x.q.shape[0] // how.rows * how.each


def _queries(how: _How, q, at, own):
    return turned(how.of_queries(q, at, *own)[0])


def _keys(how: _How, k, v, seen, at, other):
    tokens = Tokens(k, v, None, seen, at)
    return keys_of(tokens, lambda x, at: how.of_keys(x, at, *other))[:2]


def _start(how: _How, i, x):
    """Where slab i of x [B,T,...] starts."""
    return (i // how.each * how.rows, i % how.each * how.size, *(0 for _ in x.shape[2:]))


def _take(how: _How, arrays, i):
    shape = lambda x: (how.rows, how.size, *x.shape[2:])  # noqa: E731
    one = lambda x: jax.lax.dynamic_slice(x, _start(how, i, x), shape(x))  # noqa: E731
    return jax.tree.map(one, arrays)


def _put(how: _How, arrays, new, i):
    one = lambda x, y: jax.lax.dynamic_update_slice(x, y, _start(how, i, x))  # noqa: E731
    return jax.tree.map(one, arrays, new)


def _at(how: _How, i):
    """Positions of the tokens of slab i."""
    places = i % how.each * how.size + jnp.arange(how.size, dtype=jnp.int32)
    return jnp.broadcast_to(places[None], (how.rows, how.size))


def _unless(edge, state):
    """`state`, 0 at the edge of the sequences."""
    return jax.tree.map(lambda x: jnp.where(edge, 0.0, x), state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, x: _Given):
    return _forward(how, x)[0]


def _forward(how: _How, x: _Given):
    """out [B,T,H,Dv], (the denominators [B,T,H], the sums before each slab)."""
    turns, heads, dim = _turns(how, x), x.q.shape[2], x.v.shape[3]
    rank = jax.eval_shape(how.of_queries, *like(x.q, how.size, how.rows), *x.own)[0].shape[3]
    order = jnp.tril(jnp.ones((how.size, how.size), bool))[None, None]

    def step(i, sofar):
        outs, states, state = sofar
        sums, normaliser = _unless(i % how.each == 0, state)
        q, k, v, seen = _take(how, (x.q, x.k, x.v, x.seen), i)
        q = _queries(how, q, _at(how, i), x.own)
        k, v = _keys(how, k, v, seen, _at(how, i), x.other)
        weights = jnp.where(order, jnp.einsum("bhtr,bhsr->bhts", q, k), 0.0)
        num = jnp.einsum("bhts,bhsd->bhtd", weights, v) + jnp.einsum("bhtr,bhrd->bhtd", q, sums)
        den = jnp.sum(weights, axis=-1) + jnp.einsum("bhtr,bhr->bht", q, normaliser)
        after = sums + jnp.einsum("bhsr,bhsd->bhrd", k, v), normaliser + jnp.sum(k, axis=2)
        outs = _put(how, outs, (turned(divide(num, den)), turned(den)), i)
        keep = lambda kept, new: jax.lax.dynamic_update_index_in_dim(kept, new, i, 0)  # noqa: E731
        return outs, jax.tree.map(keep, states, (sums, normaliser)), after

    wide = jnp.zeros_like(x.q, jnp.float32, shape=(*x.q.shape[:3], dim))
    state = tuple(jnp.zeros((how.rows, heads, rank, *more)) for more in ((dim,), ()))
    kept = jax.tree.map(lambda y: jnp.zeros((turns, *y.shape)), state)
    start = room((wide, wide[..., 0]), 1), room(kept, 3), state
    (out, den), states, _ = jax.lax.fori_loop(0, turns, step, start)
    return out, (den, states)


def _attend_forward(how: _How, x: _Given):
    out, kept = _forward(how, x)
    return out, (x, out, *kept)


def _attend_backward(how: _How, kept, dout):
    x, out, den, states = kept
    turns = _turns(how, x)
    order = jnp.tril(jnp.ones((how.size, how.size), bool))[None, None]
    add = lambda old, new: jax.tree.map(jnp.add, old, new)  # noqa: E731

    def step(turn, sofar):
        i = turns - 1 - turn
        grads, dconsts, later = sofar
        dsums, dnormaliser = _unless(i % how.each == how.each - 1, later)
        sums, normaliser = jax.tree.map(lambda y: y[i], states)
        parts = _take(how, (x.q, x.k, x.v, x.seen, out, den, dout), i)
        q, k, v, seen, out_i, den_i, dout_i = parts
        inverse = jnp.where(jnp.abs(den_i) <= LEAST, 0.0, 1 / den_i)
        dden = turned(-jnp.einsum("bthd,bthd->bth", out_i, dout_i) * inverse)
        dnum = turned(dout_i * inverse[..., None])
        q, back_q = jax.vjp(lambda q, own: _queries(how, q, _at(how, i), own), q, x.own)
        make = lambda k, v, other: _keys(how, k, v, seen, _at(how, i), other)  # noqa: E731
        (k, v), back_k = jax.vjp(make, k, v, x.other)
        weights = jnp.where(order, jnp.einsum("bhtr,bhsr->bhts", q, k), 0.0)
        dweights = jnp.einsum("bhtd,bhsd->bhts", dnum, v) + dden[..., None]
        dweights = jnp.where(order, dweights, 0.0)
        dq = jnp.einsum("bhts,bhsr->bhtr", dweights, k) + dden[..., None] * normaliser[:, :, None]
        dq = dq + jnp.einsum("bhtd,bhrd->bhtr", dnum, sums)
        dk = jnp.einsum("bhts,bhtr->bhsr", dweights, q) + dnormaliser[:, :, None]
        dk = dk + jnp.einsum("bhsd,bhrd->bhsr", v, dsums)
        dv = jnp.einsum("bhts,bhtd->bhsd", weights, dnum)
        dv = dv + jnp.einsum("bhsr,bhrd->bhsd", k, dsums)
        dsums = dsums + jnp.einsum("bhtr,bhtd->bhrd", q, dnum)
        dnormaliser = dnormaliser + jnp.einsum("bhtr,bht->bhr", q, dden)
        (dq, down), (dk, dv, dother) = back_q(dq), back_k((dk, dv))
        grads = _put(how, grads, (dq, dk, dv), i)
        return grads, add(dconsts, (down, dother)), (dsums, dnormaliser)

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    start = (
        room((x.q, x.k, x.v), 5),
        zeros((x.own, x.other)),
        zeros(jax.tree.map(lambda y: y[0], states)),
    )
    (dq, dk, dv), dconsts, _ = jax.lax.fori_loop(0, turns, step, start)
    return (_Given(dq, dk, dv, None, *dconsts),)


_attend.defvjp(_attend_forward, _attend_backward)
