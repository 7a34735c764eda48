"""Who fades how much on its way through the chunks of a causal pass."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int


class Ways(NamedTuple):
    """Factors, in [0, 1], of what passes between tokens of a chunk, and between chunks.

    A key j weighs <q_i, k_j> exp(col_j - row_i) to a query i >= j of its chunk and segment.
    start: of what a query reads of the state before its chunk; end: of a key in the state after it;
    keep: of the state over a chunk. Each is 0 from one segment to another; col is -inf, and end 0,
    of a key that is padding.
    """

    row: Float[Array, "B H T"]
    col: Float[Array, "B H T"]
    start: Float[Array, "B H T"]
    end: Float[Array, "B H T"]
    keep: Float[Array, "B H N"]
    segments: Int[Array, "B T"] | None


def of_scales(scale, entered, segments, chunk: int) -> tuple[Ways, Float[Array, "B H"]]:
    """Ways of keys with log scales [B,H,T], and the log scale that the last state is held at.

    entered: that of the state before the first token, None where there is none.
    """
    first = jnp.full_like(scale[..., 0], -jnp.inf) if entered is None else entered
    row = _running_max(scale, first, segments)
    after = row[..., chunk - 1 :: chunk]
    before = jnp.concatenate([first[..., None], after[..., :-1]], axis=-1)
    by_chunk = functools.partial(rearrange, pattern="b h (n c) -> b h n c", c=chunk)
    flat = functools.partial(rearrange, pattern="b h n c -> b h (n c)")
    start = jnp.exp(before[..., None] - finite(by_chunk(row)))
    end = jnp.exp(by_chunk(scale) - finite(after)[..., None])
    keep = jnp.exp(before - finite(after))
    start, end, keep = _reached(_reach(segments, chunk), start, end, keep)
    return Ways(finite(row), scale, flat(start), flat(end), keep, segments), after[..., -1]


def of_decays(decay, segments, chunk: int) -> Ways:
    """Ways where a state fades by log decays [B,H,T], those of padding 0."""
    since = jnp.cumsum(rearrange(decay, "b h (n c) -> b h n c", c=chunk), axis=-1)
    last = since[..., -1:]
    flat = functools.partial(rearrange, pattern="b h n c -> b h (n c)")
    start, end, keep = jnp.exp(since), jnp.exp(last - since), jnp.exp(last[..., 0])
    start, end, keep = _reached(_reach(segments, chunk), start, end, keep)
    return Ways(-flat(since), -flat(since), flat(start), flat(end), keep, segments)


def finite(top):
    """`top`, 0 where it is -inf."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def _reached(reach, start, end, keep):
    if reach is None:
        return start, end, keep
    return (jnp.where(r, x, 0.0) for r, x in zip(reach, (start, end, keep), strict=True))


def _reach(segments, chunk: int):
    """Who reads the state before a chunk [B 1 N C], is in that after it, and whether it stays."""
    if segments is None:
        return None
    by_chunk = rearrange(segments, "b (n c) -> b 1 n c", c=chunk)
    last = by_chunk[..., -1]
    before = jnp.concatenate([by_chunk[:, :, :1, 0], last[..., :-1]], axis=-1)
    return by_chunk == before[..., None], by_chunk == last[..., None], before == last


def _running_max(scale, first, segments):
    """max of the log scales up to each token in its segment; `first` is before the first."""
    scale = jnp.concatenate(
        [jnp.maximum(scale[..., :1], first[..., None]), scale[..., 1:]], axis=-1
    )
    if segments is None:
        return jax.lax.cummax(scale, axis=2)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)])
    begins = jnp.broadcast_to(begins[:, None], scale.shape)

    def join(left, right):
        (begun, top), (begins, own) = left, right
        return begun | begins, jnp.where(begins, own, jnp.maximum(top, own))

    return jax.lax.associative_scan(join, (begins, scale), axis=2)[1]
