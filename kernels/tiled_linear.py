"""Linear attention slab by slab, for a CPU: what passes between two products stays in its caches.

A slab is a run of tokens of one sequence with all their heads, as it lies in memory, [C, H, D]. One
loop goes over the slabs of all sequences: it turns a slab heads first, where its products run on
all cores, and writes its part of the result where it belongs. No array of T tokens is made but the
results. Memory that XLA sets aside in pieces above some 32 MiB is mapped, zeroed and given back at
each call, at 0.5 ms a MiB; that is where the time went.

Backward, a slab's features are made once more, but not what its queries read: the gradient of a
quotient needs only the quotient and its denominator.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.fused.passes import LEAST
from kernels.linear_chunk import (
    FeatureMap,
    LinearState,
    Tokens,
    absorb,
    divide,
    finite,
    given,
    grouped,
    keys_of,
    positions,
    read,
    turned,
)
from kernels.mask import Mask
from kernels.recurrence import Reach
from kernels.slabs import filled, hoisted, like, most_tokens, put, room, slab_size, take, turns_over
from kernels.target import alone, target

SHORTEST = 256
"""Tokens from which on slabs are faster."""


class _How(NamedTuple):
    """What is static: features of x [1,C,_,D] at [1,C] and what they close over; slabs' tokens."""

    of_queries: Callable
    of_keys: Callable
    queries: int
    keys: int


class _Given(NamedTuple):
    """Whole slabs of tokens; own, other: what the features of queries and of keys close over."""

    q: Array
    tokens: Tokens
    own: list[Array]
    other: list[Array]


def tiled_linear(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G Dv"],
    *,
    features: FeatureMap | None,
    log_scale: Float[Array, "B S G"] | None,
    mask: Mask,
    chunk: int,
) -> Float[Array, "B T H Dv"]:
    """`kernels.linear_attention` where `refuse_tiled` does not object; float32 inside."""
    del chunk
    phi = grouped(features or given, q.shape[2])
    rank = jax.eval_shape(phi, *like(q, 1))[0].shape[3]
    most = most_tokens(q.shape[2] * max(rank, q.shape[3], v.shape[3]))
    size_q, size_k = (slab_size(x.shape[1], most) for x in (q, k))
    seen = mask.keys
    if k.shape[1] % size_k and seen is None:
        seen = jnp.ones(k.shape[:2], bool)
    of_queries, own = hoisted(phi, q, size_q)
    of_keys, other = hoisted(phi, k, size_k)
    scale = None if log_scale is None else log_scale.astype(jnp.float32)
    tokens = jax.tree.map(lambda x: filled(x, size_k), Tokens(k, v, scale, seen, positions(k)))
    how = _How(of_queries, of_keys, size_q, size_k)
    out: Array = _attend(how, _Given(filled(q, size_q), tokens, own, other))
    return out[:, : q.shape[1]].astype(v.dtype)


def refuse_tiled(q, k, v, *, features, log_scale, mask: Mask, chunk: int) -> str | None:
    """Why `tiled_linear` does not take these arguments, and what to do; None if it does."""
    del q, k, v, features, log_scale, chunk
    if target().chip != "cpu":
        return f"slabs of cache size are for a CPU, not for a {target().chip}; take backend='xla'"
    if mask.causal or mask.segments is not None:
        return "slabs of all keys have no causal mask and no segments; take backend='xla'"
    return None


def worth_slabs(q, k, v, *, features, log_scale, mask: Mask, chunk: int) -> bool:
    """Whether slabs are faster than all tokens at once; jax would gather what devices hold."""
    del v, features, log_scale, mask, chunk
    return min(q.shape[1], k.shape[1]) >= SHORTEST and alone()


def _queries(how: _How, q, at, own):
    """Features of a slab's queries, heads first."""
    return turned(how.of_queries(q, at, *own)[0])


def _keys(how: _How, tokens: Tokens, other):
    return keys_of(tokens, lambda x, at: how.of_keys(x, at, *other))


def _weighed(k, v, scale, top):
    """Features of a slab's keys over exp(top), and their values."""
    return k if scale is None else k * jnp.exp(scale - finite(top)[..., None])[..., None], v


def _absorb(state: LinearState, k, v, scale) -> LinearState:
    """The state after a slab of keys, all of which all queries see."""
    if scale is not None:
        always = jnp.ones((1, 1), bool)
        return absorb(state, k, v, scale, Reach(always, always, always, always[0]))
    sums = state.sums + jnp.einsum("bhsr,bhsd->bhrd", k, v)
    return LinearState(sums, state.normaliser + jnp.sum(k, axis=2), state.top)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, x: _Given):
    return _forward(how, x)[0]


def _forward(how: _How, x: _Given):
    """out [B,T,H,Dv], (the denominators [B,T,H], the state that all keys leave)."""
    (batch, _, heads, _), dim = x.q.shape, x.tokens.v.shape[3]
    turns, of, _ = turns_over(x.tokens.k, how.keys)

    def absorb_slab(i, state):
        tokens = take(x.tokens, i, how.keys)
        new = _absorb(take(state, of(i)), *_keys(how, tokens, x.other))
        return put(state, new, of(i))

    rank = jax.eval_shape(how.of_queries, *like(x.q, how.queries), *x.own)[0].shape[3]
    zeros = lambda *shape: jnp.zeros((batch, heads, *shape))  # noqa: E731
    empty = LinearState(zeros(rank, dim), zeros(rank), jnp.full((batch, heads), -jnp.inf))
    state = jax.lax.fori_loop(0, turns, absorb_slab, empty)
    turns, of, at = turns_over(x.q, how.queries)

    def read_slab(i, outs):
        made = _queries(how, take(x.q, i, how.queries), at(i), x.own)
        num, den = read(made, take(state, of(i)))
        return put(outs, (turned(divide(num, den)), turned(den)), i, how.queries)

    wide = jnp.zeros_like(x.q, jnp.float32, shape=(*x.q.shape[:3], dim))
    out, den = jax.lax.fori_loop(0, turns, read_slab, room((wide, wide[..., 0]), 1))
    return out, (den, state)


def _attend_forward(how: _How, x: _Given):
    out, kept = _forward(how, x)
    return out, (x, out, *kept)


def _attend_backward(how: _How, kept, dout):
    x, out, den, state = kept
    turns, of, at = turns_over(x.q, how.queries)
    add = lambda old, new: jax.tree.map(jnp.add, old, new)  # noqa: E731

    def of_queries(i, sofar):
        dq, down, dstate = sofar
        q, out_i, den_i, dout_i = take((x.q, out, den, dout), i, how.queries)
        inverse = jnp.where(jnp.abs(den_i) <= LEAST, 0.0, 1 / den_i)
        dden = turned(-jnp.einsum("bthd,bthd->bth", out_i, dout_i) * inverse)
        dnum = turned(dout_i * inverse[..., None])
        sums, normaliser, _ = take(state, of(i))
        made, back = jax.vjp(lambda q, own: _queries(how, q, at(i), own), q, x.own)
        dmade = jnp.einsum("bhtd,bhrd->bhtr", dnum, sums)
        new, more = back(dmade + dden[..., None] * normaliser[:, :, None])
        past = (
            jnp.einsum("bhtr,bhtd->bhrd", made, dnum),
            jnp.einsum("bhtr,bht->bhr", made, dden),
        )
        dstate = put(dstate, add(take(dstate, of(i)), past), of(i))
        return put(dq, new, i, how.queries), add(down, more), dstate

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    start = room(x.q, 3), zeros(x.own), zeros((state.sums, state.normaliser))
    dq, down, dstate = jax.lax.fori_loop(0, turns, of_queries, start)
    turns, of, _ = turns_over(x.tokens.k, how.keys)

    def of_keys(i, sofar):
        dtokens, dother = sofar
        k, v, scale, seen, places = take(x.tokens, i, how.keys)
        top = take(state.top, of(i))
        dsums, dnormaliser = take(dstate, of(i))

        def weighed(k, v, scale, other):
            return _weighed(*_keys(how, Tokens(k, v, scale, seen, places), other), top)

        (made, values), back = jax.vjp(weighed, k, v, scale, x.other)
        dmade = jnp.einsum("bhsd,bhrd->bhsr", values, dsums) + dnormaliser[:, :, None]
        *new, more = back((dmade, jnp.einsum("bhsr,bhrd->bhsd", made, dsums)))
        return put(dtokens, tuple(new), i, how.keys), add(dother, more)

    start = room((x.tokens.k, x.tokens.v, x.tokens.scale), 4), zeros(x.other)
    (dk, dv, dscale), dother = jax.lax.fori_loop(0, turns, of_keys, start)
    dtokens = x.tokens._replace(k=dk, v=dv, scale=dscale, seen=None, at=None)
    return (_Given(dq, dtokens, down, dother),)


_attend.defvjp(_attend_forward, _attend_backward)
