"""Linear attention that fades by channel, on Hopper: the kernels of `kernels.fused.gated_linear`.

What tokens of a chunk are to each other is made of all chunks at once (`channel_pairs`), backward
once more; passes from chunk to chunk do the rest (`channel_passes`): one forward, and three for the
gradients, of which that of the values makes the gradient of the first state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from kernels.pallas_gpu.channel_pairs import Weights, gradients, weights
from kernels.pallas_gpu.channel_passes import channels, values
from kernels.pallas_gpu.fit import WIDTHS, Fit, fit
from kernels.pallas_gpu.plan import CHUNK, in_parts

LEAST_LOG_DECAY = -128.0
"""What a decay is taken for at the least: nothing is left, in float32."""
LARGEST = 512
"""The most channels of a value: those of a chunk are in shared memory at once."""

__all__ = ["backward", "chunk_length", "forward", "refuse"]


def refuse(q, k, v) -> str | None:
    """Why these kernels do not take a case, and what to do; None where they do."""
    if v.dtype != jnp.bfloat16:
        return (
            f"v is {jnp.dtype(v.dtype).name} and the Hopper kernels take bfloat16: cast q, k and "
            "v, or use backend='xla'"
        )
    if k.shape[3] > WIDTHS[-1] or v.shape[3] > LARGEST:
        return (
            f"keys and values have {k.shape[3]} and {v.shape[3]} channels a head; where each "
            f"fades by itself the Hopper kernels take {WIDTHS[-1]} and {LARGEST}: use backend='xla'"
        )
    return None


def chunk_length(length: int) -> int:
    """Tokens of a chunk."""
    del length
    return CHUNK


def forward(q, k, v, log_decay, *, state, chunk: int, interpret=None):
    """See `kernels.fused.gated_linear`."""
    assert chunk == CHUNK
    of = _of(q, k, v, log_decay, interpret)
    out, last = values(
        of.weights.reading, of.weights.leaving, of.fit.values(v), pairs=of.weights.pairs,
        keep=of.keep, state=of.fit.state(state), interpret=interpret,
    )  # fmt: skip
    return of.fit.of_values(out), of.fit.of_state(last)


def backward(q, k, v, log_decay, *, dout, state, dstate, crossing, chunk: int, interpret=None):
    """See `kernels.fused.gated_linear`."""
    assert chunk == CHUNK
    of = _of(q, k, v, log_decay, interpret)
    (pairs, reading, leaving), how = of.weights, {"keep": of.keep, "interpret": interpret}
    v, dout = of.fit.values(v), of.fit.values(dout)
    state, dstate = of.fit.state(state), of.fit.state(dstate)
    dv, before = values(leaving, reading, dout, pairs=pairs, state=dstate, reverse=True, **how)
    read, _ = channels(dout, v, leaving, state=_turned(state), **how)
    held, _ = channels(v, dout, reading, state=_turned(dstate), reverse=True, **how)
    whole = lambda x: rearrange(x, "b t (h p) d -> b t h (p d)", p=of.fit.parts)  # noqa: E731
    made = gradients(
        of.q, of.k, of.log_decay, dout=whole(dout), v=whole(v), read=of.added(read),
        held=of.added(held), interpret=interpret,
    )  # fmt: skip
    rank = k.shape[3]
    dlog_decay = _over_chunks(made.later[..., :rank], crossing)
    dq, dk = made.dq[..., :rank], made.dk[..., :rank]
    return dq, dk, of.fit.of_values(dv), dlog_decay, of.fit.of_state(before)


class _Of(NamedTuple):
    """What both passes of a call have to do with, in the kernels' widths.

    keep: float32 [B, H, N, R], what is left over each chunk.
    """

    fit: Fit
    q: jax.Array
    k: jax.Array
    log_decay: jax.Array
    weights: Weights
    keep: jax.Array

    def added(self, x: jax.Array) -> jax.Array:
        """The sum [B, T, H, R] of what each part of the values gives [B, T, H parts, R]."""
        return reduce(x, "b t (h p) d -> b t h d", "sum", p=self.fit.parts)


def _of(q, k, v, log_decay, interpret: Any) -> _Of:
    to = fit(k.shape[3], v.shape[3])
    q, k, log_decay = to.keys(q), to.keys(k), to.keys(log_decay)
    log_decay = jnp.maximum(log_decay, LEAST_LOG_DECAY)
    keep = jnp.exp(reduce(log_decay, "b (n c) h r -> b h n r", "sum", c=CHUNK))
    parts = in_parts(log_decay)
    return _Of(to, q, k, parts, weights(q, k, parts, interpret=interpret), keep)


def _over_chunks(later: jax.Array, crossing: jax.Array) -> jax.Array:
    """Sums [B, T, H, R] over all later tokens, and `crossing` [B, H, R], of those in each chunk."""
    later = rearrange(later, "b (n c) h r -> b n c h r", c=CHUNK)
    chunks = jnp.concatenate([later[:, 1:, 0], crossing[:, None]], axis=1)
    behind = jnp.flip(jnp.cumsum(jnp.flip(chunks, 1), axis=1), 1)
    return rearrange(later + behind[:, :, None], "b n c h r -> b (n c) h r")


def _turned(state):
    """For values that ask for channels."""
    return None if state is None else jnp.swapaxes(state, -1, -2)
