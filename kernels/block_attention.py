"""Exact attention of blocks of queries to chosen blocks of keys, and the sum of several such parts.

    out_t = sum_s exp(l_ts) v_s / sum_s exp(l_ts),    l_ts = scale <q_t, k_s> - m_h |t - s|

over the keys s that a list gives to the block of query t: the block-sparse attention of Sparse
Transformer (arXiv 1904.10509), Longformer (arXiv 2004.05150) and BigBird (arXiv 2007.14062). Each
part also returns the logarithm of its normaliser, so that parts over disjoint keys join to the one
softmax over all of them (`join`), as blocks do in flash attention (arXiv 2205.14135).
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from kernels.dispatch import Backend, Path, run
from kernels.mask import Mask, check_heads

LIVE, FEW = 2, 1 << 14
"""Logits of a head held at once: LIVE for each number of its queries, FEW or one block's at least.
What is more goes chunk by chunk, so that memory is linear in the length however long the lists."""


class Part(NamedTuple):
    """Attention to some of the keys, float32.

    lse: log sum_s exp(l_ts) over those keys, -inf (and out 0) where a query saw none.
    """

    out: Float[Array, "B T H Dv"]
    lse: Float[Array, "B T H"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """Which keys each query is compared with: positions in numpy, known when a program is traced.

    queries: [N,C], positions of the queries of each block; one that stands nowhere sees nothing.
    keys: [J,K], positions of the keys of each block. In both, -1 fills a block that is not full.
    table: [1,N,M] or, for each key-value head, [G,N,M]: the key blocks that a query block sees,
        each at most once, -1 for none.
    band: (left, right), the keys t - left <= s <= t + right.
    side: "inside" sees only keys within the band, "outside" only the others.
    """

    queries: np.ndarray
    keys: np.ndarray
    table: np.ndarray
    band: tuple[int, int] | None = None
    side: Literal["inside", "outside"] = "inside"

    @property
    def logits(self) -> int:
        """How many logits a head computes."""
        return self.queries.size * self.table.shape[2] * self.keys.shape[1]


def block_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G Dv"],
    *,
    blocks: Blocks,
    mask: Mask | None = None,
    scale: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    backend: Backend = "auto",
) -> Part:
    """Attention of each query to the keys that `blocks` lists for it and `mask` shows.

    G key-value heads serve H query heads, G dividing H. `scale` is 1/sqrt(D) by default; `slopes`
    are ALiBi's m_h (arXiv 2108.12409). Logits and sums are float32. `blocks.logits` D multiply-adds
    a head, twice; memory is linear in T, backward as well.

    Raises:
        ValueError: the mask does not fit, or G does not divide H.
        NotImplementedError: the op has no such backend.
    """
    mask = mask or Mask()
    mask.check(q.shape[1], k.shape[1])
    check_heads(q.shape[2], k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    how = {"blocks": blocks, "mask": mask, "scale": scale, "slopes": slopes}
    return run("block_attention", backend, {"xla": Path(_xla)}, (q, k, v), how)


def join(*parts: Part) -> Float[Array, "B T H Dv"]:
    """Attention over the keys of all parts, which are disjoint; 0 where a query saw none."""
    top = functools.reduce(jnp.maximum, (part.lse for part in parts))
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = [jnp.exp(part.lse - top) for part in parts]
    total = functools.reduce(jnp.add, weights)
    total = jnp.where(total > 0, total, 1.0)
    terms = [part.out * (w / total)[..., None] for part, w in zip(parts, weights, strict=True)]
    return functools.reduce(jnp.add, terms)


def runs(length: int, size: int) -> np.ndarray:
    """[ceil(length / size), size]: positions 0 ... length - 1 in order, then -1."""
    at = np.full(-(-length // size) * size, -1, np.int32)
    at[:length] = np.arange(length)
    return at.reshape(-1, size)


def compact(table: np.ndarray) -> np.ndarray:
    """The table with each list's -1 at its end, as wide as its longest list."""
    order = np.argsort(table < 0, axis=-1, kind="stable")
    longest = max(1, int((table >= 0).sum(-1).max()))
    return np.take_along_axis(table, order, axis=-1)[..., :longest].astype(np.int32)


def _xla(q, k, v, *, blocks: Blocks, mask: Mask, scale: float, slopes):
    """Chunks of query blocks one after the other; the key blocks of each are gathered."""
    count, groups = len(blocks.queries), k.shape[2]
    split = functools.partial(rearrange, pattern="b n c (g r) d -> n b c g r d", g=groups)
    given = (split(_take(q, blocks.queries)), blocks.queries, np.swapaxes(blocks.table, 0, 1))
    if mask.segments is not None:
        given += (jnp.swapaxes(_take(mask.segments, blocks.queries), 0, 1),)
    seen = functools.partial(
        _rows,
        k=rearrange(_take(k, blocks.keys), "b j k g d -> b g j k d"),
        v=rearrange(_take(v, blocks.keys), "b j k g d -> b g j k d"),
        keys=None if mask.keys is None else _take(mask.keys, blocks.keys),
        segments=None if mask.segments is None else _take(mask.segments, blocks.keys),
        blocks=blocks, causal=mask.causal, scale=scale,
        slopes=None if slopes is None else slopes.reshape(groups, -1),
    )  # fmt: skip
    live = max(FEW, LIVE * q.shape[1] * q.shape[3])
    chunks = min(count, -(-blocks.logits // live))
    out, lse = seen(*given) if chunks == 1 else _chunked(seen, given, -(-count // chunks))
    out = rearrange(out, "n b c g r d -> b (n c) (g r) d")
    lse = rearrange(lse, "b g r n c -> b (n c) (g r)")
    restore = functools.partial(_put_back, at=blocks.queries, length=q.shape[1])
    return Part(restore(out, nothing=0.0), restore(lse, nothing=-jnp.inf))


def _chunked(rows, given, chunk: int):
    """`rows` over chunks of query blocks, one chunk's logits alive at a time, backward as well."""
    count = len(given[0])
    chunks = -(-count // chunk)

    def divide(x):
        pad = [(0, chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pad).reshape(chunks, chunk, *x.shape[1:])

    out, lse = jax.lax.map(jax.checkpoint(lambda part: rows(*part)), jax.tree.map(divide, given))
    return (
        rearrange(out, "x n b c g r d -> (x n) b c g r d")[:count],
        rearrange(lse, "x b g r n c -> b g r (x n) c")[:, :, :, :count],
    )


def _rows(q, at, table, own=None, *, k, v, keys, segments, blocks, causal, scale, slopes):
    """The output and lse of the query blocks q [n,b,c,g,r,d], which stand at `at` [n,c].

    table: [n,1|G,M]. own: the queries' segments [n,b,c].
    """
    table = jnp.swapaxes(table, 0, 1)
    listed = jnp.maximum(table, 0)
    head = np.arange(k.shape[1])[:, None, None]
    near_k, near_v = (rearrange(x[:, head, listed], "b g n m k d -> b g n (m k) d") for x in (k, v))
    there = jnp.where(table[..., None] >= 0, jnp.asarray(blocks.keys)[listed], -1)
    there = rearrange(there, "g n m k -> g n 1 (m k)")
    here = at[None, :, :, None]
    seen = ((there >= 0) & (here >= 0) & _within(here - there, blocks, causal))[None]
    if keys is not None:
        seen &= rearrange(keys[:, listed], "b g n m k -> b g n 1 (m k)")
    if own is not None:
        other = rearrange(segments[:, listed], "b g n m k -> b g n 1 (m k)")
        seen &= rearrange(own, "n b c -> b 1 n c 1") == other
    logits = jnp.einsum("nbcgrd,bgnsd->bgrncs", q, near_k, preferred_element_type=jnp.float32)
    logits = logits * scale
    if slopes is not None:
        far = jnp.abs(here - there)[None, :, None]
        logits -= slopes[None, :, :, None, None, None] * far
    return _softmax(jnp.where(seen[:, :, None], logits, -jnp.inf), near_v)


def _within(ahead, blocks: Blocks, causal: bool):
    """Whether a key `ahead` = t - s positions before its query lies on the right side."""
    seen = ahead >= 0 if causal else jnp.ones_like(ahead, bool)
    if blocks.band is None:
        return seen
    left, right = blocks.band
    inside = (ahead <= left) & (ahead >= -right)
    return seen & (inside if blocks.side == "inside" else ~inside)


def _softmax(logits, v):
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum(
        "bgrncs,bgnsd->nbcgrd", (weights / some).astype(v.dtype), v,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return out, jnp.where(total > 0, jnp.log(some) + top, -jnp.inf)[..., 0]


def _take(x, at: np.ndarray):
    """x [B,T,...] at the positions `at` [N,C], anything where there is none: [B,N,C,...]."""
    flat, length = at.reshape(-1), x.shape[1]
    if np.array_equal(flat, runs(length, at.shape[1]).reshape(-1)):
        x = jnp.pad(x, [(0, 0), (0, flat.size - length)] + [(0, 0)] * (x.ndim - 2))
    else:
        x = x[:, np.maximum(flat, 0)]
    return x.reshape(x.shape[0], *at.shape, *x.shape[2:])


def _put_back(x, *, at: np.ndarray, length: int, nothing: float):
    """x [B,N*C,...] of the queries at `at` in their order [B,T,...], `nothing` where none stood."""
    flat = at.reshape(-1)
    if np.array_equal(flat, runs(length, at.shape[1]).reshape(-1)):
        return x[:, :length]
    row = np.full(length, -1)
    row[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    there = (row >= 0).reshape(1, -1, *(1,) * (x.ndim - 2))
    return jnp.where(there, x[:, np.maximum(row, 0)], nothing)
