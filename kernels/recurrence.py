"""What recurrences share when they run chunk by chunk: the scan, who reaches whom, how much fades.

Inside a chunk every token reads every earlier one at once; between chunks only the state passes.
Decays enter as sums of logarithms over the tokens in between, each at most 0, never as differences
of long sums: nothing overflows, and what fades a lot costs what fades little no precision. Sums are
held in float32, and made by matrix products of JAX's default precision: float32's own on a CPU,
TF32 or bfloat16 on an accelerator unless `jax.default_matmul_precision` asks for more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from kernels.mask import Mask


class Reach(NamedTuple):
    """Which token of a chunk reads which, and the state: within a segment, never the future.

    within: token t reads token s. start: token t reads the state before the chunk. end: token s is
    still held by the state after it. keep: the state before the chunk is.
    """

    within: Bool[Array, "B C C"]
    start: Bool[Array, "B C"]
    end: Bool[Array, "B C"]
    keep: Bool[Array, " B"]


class Fade(NamedTuple):
    """What is left along each way of `Reach`, 0 where there is none."""

    within: Float[Array, "B H C C"]
    start: Float[Array, "B C H"]
    end: Float[Array, "B C H"]
    keep: Float[Array, "B H"]


def causal(mask: Mask | None, length: int) -> Mask:
    """The mask of a recurrence; None is causal and no more.

    Raises:
        ValueError: the mask lets a token see the future, or does not fit.
    """
    mask = mask or Mask(causal=True)
    if not mask.causal:
        raise ValueError("a recurrence sees the past alone; give it Mask(causal=True, ...)")
    mask.check(length, length)
    return mask


def written(mask: Mask, *arrays: Float[Array, "B T ..."]) -> list[Float[Array, "B T ..."]]:
    """float32 arrays, 0 at the tokens that `mask.keys` hides: they write and fade nothing."""
    wide = [x.astype(jnp.float32) for x in arrays]
    if mask.keys is None:
        return wide
    return [jnp.where(mask.keys.reshape(mask.keys.shape + (1,) * (x.ndim - 2)), x, 0) for x in wide]


def scan_chunks(
    body: Callable[[Any, Any, Reach], tuple[Any, Any]],
    state: Any,
    tokens: Any,
    segments: Array | None,
    *,
    chunk: int,
) -> tuple[Any, Any]:
    """`body(state, tokens of a chunk, reach) -> (state, outputs)` over all chunks of [B, T, ...].

    State, tokens and outputs are arrays or trees of them. The last chunk is filled with zeros.
    `state` is that of the first token's segment; the last one's comes back. Backwards, one chunk at
    a time is computed again, unless there is only one: memory grows with T alone.
    """
    batch, length = jax.tree.leaves(tokens)[0].shape[:2]
    pad = -length % chunk
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)

    def split(x: Array, mode: Any = "constant") -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return rearrange(x, "b (n c) ... -> n b c ...", c=chunk)

    order = jnp.tril(jnp.ones((chunk, chunk), bool))[None]

    def one(carry, given):
        (state, segment), (numbers, tokens) = carry, given
        last = numbers[:, -1]
        reach = Reach(
            within=order & (numbers[:, :, None] == numbers[:, None, :]),
            start=numbers == segment[:, None],
            end=numbers == last[:, None],
            keep=segment == last,
        )
        state, out = body(state, tokens, reach)
        return (state, last), out

    given = split(segments, "edge"), jax.tree.map(split, tokens)
    again = jax.checkpoint(one) if length > chunk else one
    (state, _), outs = jax.lax.scan(again, (state, segments[:, 0]), given)
    join = lambda x: rearrange(x, "n b c ... -> b (n c) ...")[:, :length]  # noqa: E731
    return jax.tree.map(join, outs), state


def fade(log_decay: Float[Array, "B C H"], reach: Reach) -> Fade:
    """Products of the decays between a token and another, and the chunk's ends.

    Token s has faded by a_{s+1} ... a_t when t reads it, the state before by a_1 ... a_t.
    """
    g = rearrange(log_decay, "b t h -> b h t")
    between = jnp.tril(jnp.broadcast_to(g[..., None], (*g.shape, g.shape[-1])), -1)
    between = jnp.cumsum(between, axis=-2)  # [t, s]: over s < u <= t
    since = jnp.cumsum(log_decay, axis=1)
    return Fade(
        within=_exp(between, reach.within[:, None]),
        start=_exp(since, reach.start[:, :, None]),
        end=_exp(rearrange(between[..., -1, :], "b h s -> b s h"), reach.end[:, :, None]),
        keep=_exp(since[:, -1], reach.keep[:, None]),
    )


def _exp(x: Array, where: Array) -> Array:
    return jnp.where(where, jnp.exp(jnp.where(where, x, 0.0)), 0.0)
