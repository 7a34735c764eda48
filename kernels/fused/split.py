"""A causal sequence cut into pieces that run beside each other, where heads do not fill a chip.

Each piece is a batch row of its own to a chip's kernels. `Ways` say of every chunk of the whole
sequence what reaches it, so that the state S_p before piece p is exact, whatever decays, log scales
and segments are:

    S_p = keep_{p-1} S_{p-1} + A_{p-1},    keep_p = prod of the keeps of p's chunks

A_p being the sum of what p's own keys leave behind at its end (the kernel `sums`). From the other
side the same holds of R_p, the gradient of the state after p, with queries in place of keys.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from kernels.fused.ways import Ways
from kernels.target import cores

COLUMNS = 128
"""Channels of values that one core takes: of a head, or of some side by side."""
SUMS, STATE = 0.5, 4.0
"""What cutting costs: the kernel `sums` moves half of what the pass does, and the state of a piece
as much as four chunks (written, read, written and read again; of D = Dv = 128, chunks of 64)."""


def pieces(batch: int, heads: int, dim: int, length: int, chunk: int) -> int:
    """How many pieces of whole chunks are done first, in the time of a chunk on one core.

    A length that is whole chunks is not filled up further: that would copy q, k and v.
    """
    tasks, chunks = batch * min(heads, math.ceil(heads * dim / COLUMNS)), -(-length // chunk)
    whole = length % chunk == 0
    able = [p for p in range(1, chunks + 1) if not (whole and chunks % p)]

    def time(p: int) -> float:
        own = math.ceil(chunks / p)
        return float(math.ceil(tasks * p / cores()) * (own if p == 1 else (1 + SUMS) * own + STATE))

    return min(able, key=time)


class Cut(NamedTuple):
    """The arguments of a chip's `forward` and `backward`, every piece a batch row."""

    q: Any
    k: Any
    v: Any
    ways: Ways | None
    projection: Any


def cut(count: int, qkv, ways: Ways | None, projection) -> Cut:
    """`count` pieces of q, k, v and what goes with them."""
    q, k, v = (tokens(count, x) for x in qkv)
    if count == 1:
        return Cut(q, k, v, ways, projection)
    if ways is not None:
        segments = None if ways.segments is None else tokens(count, ways.segments)
        cut_up = jax.tree.map(lambda x: numbers(count, x), ways._replace(segments=None))
        ways = cut_up._replace(segments=segments)
    if projection is not None:
        shifts = jax.tree.map(lambda x: numbers(count, x), projection[2:])
        projection = projection._replace(shift_q=shifts[0], shift_k=shifts[1])
    return Cut(q, k, v, ways, projection)


def tokens(count: int, x):
    """[B, T, ...] in pieces."""
    return x.reshape(x.shape[0] * count, -1, *x.shape[2:])


def numbers(count: int, x):
    """[B, H, T], or [B, H, N], in pieces."""
    return x if count == 1 else rearrange(x, "b h (p t) -> (b p) h t", p=count)


def whole(count: int, x):
    """[B, T, ...] out of its pieces."""
    return x.reshape(x.shape[0] // count, -1, *x.shape[2:])


def whole_numbers(count: int, x) -> Any:
    """[B, H, T] out of its pieces."""
    return x if count == 1 or x is None else rearrange(x, "(b p) h t -> b h (p t)", p=count)


def place(count: int, state, p: int) -> tuple[jax.Array, jax.Array]:
    """The S and z of one piece, out of all [B P, H, ...]."""
    sums, normaliser = (x.reshape(-1, count, *x.shape[1:])[:, p] for x in state)
    return sums, normaliser


def states_before(how, given: Cut, entered):
    """(S, z) before each piece [B P, H, ...]; `entered` is that before the first, or None."""
    heads, groups = (max(x.shape[2] for x in xs) for xs in (given[:3], given[1:3]))
    end = keep = None
    if given.ways is not None:
        later = jnp.flip(_before(jnp.flip(given.ways.keep, -1)), -1)
        end = (given.ways.end * _each(later, how.chunk))[:, :: heads // groups]
        keep = given.ways.keep
    own = how.module.sums(
        given.k, given.v, end=end, projection=given.projection, chunk=how.chunk,
        interpret=how.interpret,
    )  # fmt: skip
    own = [jnp.repeat(x, heads // groups, axis=1) for x in own]
    return passed_on(how.pieces, keep, own, entered)


def grads_after(how, given: Cut, dout, inverse, r, left):
    """(dS, dz) after each piece, `left` being those after the last.

    dout, inverse, r: as `kernels.fused.linear` has them, in pieces.
    """
    keep = None
    if given.ways is not None:
        keep = given.ways.keep
        start = given.ways.start * _each(_before(keep), how.chunk)
        inverse, r = start * inverse, start * r
    projection = given.projection
    if projection is not None:  # of queries, here
        projection = projection._replace(shift_k=projection.shift_q)
    own = how.module.sums(
        given.q, dout, end=inverse, fill=r, projection=projection, chunk=how.chunk,
        interpret=how.interpret,
    )  # fmt: skip
    return passed_on(how.pieces, keep, own, left, backwards=True)


def _before(keep):
    """The product of the keeps of all chunks before each, [B, H, N]."""
    first = jnp.ones_like(keep[..., :1])
    return jnp.concatenate([first, jnp.cumprod(keep[..., :-1], axis=-1)], axis=-1)


def _each(factors, chunk: int):
    """A number of every chunk for each of its tokens."""
    return jnp.repeat(factors, chunk, axis=-1)


def passed_on(count: int, keep, own, first, backwards: bool = False):
    """The states that come out where each piece fades what enters it, and adds its own.

    keep: of every chunk, [B P, H, N] or, for each channel of the states, [B P, H, N, R]; None is 1.
    One product of P x P with the states: a scan would be P small kernels.
    """
    own = [x.reshape(-1, count, *x.shape[1:]) for x in own]
    if keep is None:
        keep = jnp.ones_like(own[0], shape=own[0].shape[:3])
    else:
        keep = jnp.prod(keep, axis=2)
        keep = keep.reshape(-1, count, *keep.shape[1:])
    axes = "hr"[: keep.ndim - 2]
    turn = (lambda x: jnp.flip(x, 1)) if backwards else (lambda x: x)
    first = [jnp.zeros_like(x[:, 0]) for x in own] if first is None else first
    kept = _between(turn(keep).reshape(*keep.shape[:2], -1))
    kept = kept.reshape(*kept.shape[:3], *keep.shape[2:])
    product, made = f"bpm{axes},bm{axes}...->bp{axes}...", []
    for x, entering in zip(own, first, strict=True):
        known = jnp.concatenate([entering[:, None], turn(x)[:, :-1]], axis=1)
        states = jnp.einsum(product, kept, known, precision=jax.lax.Precision.HIGHEST)
        made.append(turn(states).reshape(-1, *states.shape[2:]))
    return tuple(made)


def _between(keep):
    """[B, p, m, H] of [B, P, H]: what is left of what enters piece m where it enters p >= m."""
    order = jnp.tril(jnp.ones(2 * keep.shape[1:2], bool))[None, :, :, None]
    factors = jnp.where(order, keep[:, :, None], 1.0)
    before = jnp.concatenate(
        [jnp.ones_like(factors[:, :1]), jnp.cumprod(factors, axis=1)[:, :-1]], axis=1
    )
    return jnp.where(order, before, 0.0)
