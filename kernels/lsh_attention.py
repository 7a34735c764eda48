"""Attention among tokens whose hashes agree (Reformer, arXiv 2001.04451, section 2).

Queries are keys: k_t = q_t / |q_t|. In every round r of hashing a query sees the other tokens of
its bucket that stand in its own chunk or in the one before, chunks having C places:

    layout "bucket"  chunk c of a bucket holds its members c C to c C + C - 1, by position
    layout "sorted"  tokens are sorted by (bucket, position) and cut into chunks (the paper's)

A query's chunk in the sorted layout depends on the buckets of all tokens, later ones too, so that
layout cannot be causal, whatever it masks; in the other it depends on earlier tokens alone. With
P_r(t) what t sees in round r and N_ts the number of rounds in which it sees s,

    out_t = sum_r sum_(s in P_r(t)) exp(q_t k_s) / N_ts v_s / the same without v_s

(appendix A), a softmax over the union of the rounds. A token sees itself only if it sees no other.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.dispatch import Backend, Path, run
from kernels.mask import Mask

Layout = Literal["bucket", "sorted"]
EPSILON = 1e-6


def lsh_attention(
    q: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    buckets: Int[Array, "R B T H"],
    *,
    count: int,
    chunk: int,
    layout: Layout = "bucket",
    mask: Mask | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B T H Dv"]:
    """Softmax attention of q to q / |q|, each query to those of its bucket that are near.

    `buckets` are 0 to `count` - 1. Logits are float32 and are not divided by sqrt(D), as in the
    authors' code. What padding holds has no influence, its bucket neither: in the layout "bucket"
    it takes a place beside the last token before it, in "sorted" all of it comes last. Work and
    memory are linear in T for a given `count` and `chunk`.

    Raises:
        ValueError: the mask does not fit, has segments, or is causal in the layout "sorted".
        NotImplementedError: the op has no such backend.
    """
    mask = mask or Mask()
    mask.check(q.shape[1], q.shape[1])
    if mask.segments is not None or (mask.causal and layout == "sorted"):
        raise ValueError(
            "lsh_attention has no segments, and in the layout 'sorted' no causal mask; "
            "use the layout 'bucket'"
        )
    chunk = min(chunk, q.shape[1])
    how = {"count": count, "chunk": chunk, "layout": layout, "mask": mask}
    return run("lsh_attention", backend, {"xla": Path(_xla)}, (q, v, buckets), how)


def unit(q: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """q / |q| in float32; 1e-6 is added to the mean square, as in the authors' code."""
    q = q.astype(jnp.float32)
    square = jnp.mean(q * q, axis=-1, keepdims=True)
    return q * jax.lax.rsqrt(q.shape[-1] * (square + EPSILON))


def chunks(length: int, *, count: int, chunk: int, layout: Layout) -> int:
    """How many chunks of `chunk` places are enough for any buckets of `length` tokens."""
    if layout == "sorted":
        return -(-length // chunk)
    return min(length, (length + count * (chunk - 1)) // chunk)


class Places(NamedTuple):
    """Where the tokens of one round stand: bucket, chunk, the chunk before it (-1: none), place."""

    bucket: Int[Array, " T"]
    chunk: Int[Array, " T"]
    before: Int[Array, " T"]
    offset: Int[Array, " T"]


def _xla(q, v, buckets, *, count, chunk, layout, mask: Mask):
    valid = jnp.ones(q.shape[:2], bool) if mask.keys is None else mask.keys
    padded = mask.keys is not None
    size = chunks(q.shape[1], count=count + padded, chunk=chunk, layout=layout)
    place = functools.partial(_place, count=count, chunk=chunk, layout=layout)

    def head(q, v, buckets, valid):
        places = jax.vmap(place, in_axes=(0, None))(buckets, valid)
        attend = functools.partial(
            _round, q=q, k=unit(q), v=v, valid=valid, places=places, causal=mask.causal,
            shape=(size, chunk),
        )  # fmt: skip
        top, total, mixed = jax.lax.map(jax.checkpoint(attend), places)
        scale = jnp.exp(top - jnp.max(top, axis=0, keepdims=True))
        total, mixed = jnp.sum(scale * total, axis=0), jnp.sum(scale[..., None] * mixed, axis=0)
        alone = jnp.where(valid[:, None], v, 0).astype(jnp.float32)
        some = total > 0
        mixed = mixed / jnp.where(some, total, 1)[:, None]
        return jnp.where(some[:, None], mixed, alone).astype(v.dtype)

    heads = jax.vmap(head, in_axes=(1, 1, 2, None), out_axes=1)
    return jax.vmap(heads, in_axes=(0, 0, 1, 0))(q, v, buckets, valid)


def ranks(bucket: Int[Array, " T"]) -> Int[Array, " T"]:
    """How many tokens before each are in its bucket."""
    _, slot, rank = _sorted(bucket)
    return rank[slot]


def _sorted(bucket: Int[Array, " T"]):
    """Tokens by (bucket, position), where each then stands, and ranks in the bucket, sorted."""
    at = jnp.arange(len(bucket))
    order = jnp.argsort(bucket, stable=True)
    slot = jnp.zeros_like(order).at[order].set(at)
    ordered = bucket[order]
    starts = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return order, slot, at - jax.lax.cummax(jnp.where(starts, at, 0))


def _place(bucket: Int[Array, " T"], valid: Bool[Array, " T"], *, count, chunk, layout) -> Places:
    """The places of one round and head."""
    at = jnp.arange(len(bucket))
    if layout == "bucket":
        last = jax.lax.cummax(jnp.where(valid, at, -1))
        bucket = jnp.where(last >= 0, bucket[jnp.maximum(last, 0)], count)
    else:
        bucket = jnp.where(valid, bucket, count)
    order, slot, rank = _sorted(bucket)
    if layout == "sorted":
        return Places(bucket, slot // chunk, slot // chunk - 1, slot % chunk)
    opens = (rank % chunk == 0)[slot]
    opened = (jnp.cumsum(opens) - 1)[order]  # chunks are numbered as they are begun
    first = at - rank % chunk
    before = jnp.where(rank >= chunk, opened[first - chunk], -1)
    return Places(bucket, opened[first][slot], before[slot], (rank % chunk)[slot])


def _round(own: Places, *, q, k, v, valid, places: Places, causal: bool, shape):
    """(largest logit, sum of exponentials, their sum with the values) of each token."""
    size, chunk = shape
    length = len(q)
    slot = own.chunk * chunk + own.offset
    table = jnp.full(size * chunk, length).at[slot].set(jnp.arange(length)).reshape(size, chunk)
    before = jnp.full(size, -1).at[own.chunk].set(own.before)

    def with_previous(x, empty):
        previous = jnp.where((before < 0).reshape(-1, *[1] * (x.ndim - 1)), empty, x[before])
        return jnp.concatenate([previous, x], axis=1)

    theirs = with_previous(table, length)
    inside = jnp.minimum(table, length - 1)
    within = jnp.minimum(theirs, length - 1)
    seen = ((theirs < length) & valid[within])[:, None, :]
    seen = seen & (table[..., None] != theirs[:, None, :])
    seen = seen & (own.bucket[inside][..., None] == own.bucket[within][:, None, :])
    if causal:
        seen = seen & (table[..., None] > theirs[:, None, :])
    times = jnp.zeros(seen.shape, jnp.int32)
    for n in range(len(places.bucket)):
        times = times + _meet(Places(*(x[n] for x in places)), inside, within)

    keys, values = with_previous(k[inside], 0), with_previous(v[inside], 0)
    logits = jnp.einsum("ncd,nkd->nck", q[inside].astype(jnp.float32), keys)
    logits = logits - jnp.log(jnp.maximum(times, 1).astype(jnp.float32))
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    top = jnp.where(jnp.isfinite(top), top, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jnp.where(seen.any(-1), top, 0)[..., None])
    mixed = jnp.einsum(
        "nck,nkd->ncd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32
    )
    total = jnp.sum(weights, axis=-1)
    return (
        top.reshape(-1)[slot], total.reshape(-1)[slot], mixed.reshape(size * chunk, -1)[slot],
    )  # fmt: skip


def _meet(round_: Places, inside, within):
    """Whether a query [N,C] stands near enough to a key [N,2C] in this round."""
    bucket, chunk, before, _ = round_
    same = bucket[inside][..., None] == bucket[within][:, None, :]
    theirs = chunk[within][:, None, :]
    return same & ((theirs == chunk[inside][..., None]) | (theirs == before[inside][..., None]))
