"""Linear attention that fades by channel, on Hopper: the kernels of `kernels.fused.gated_linear`.

What tokens of a chunk are to each other is made of all chunks at once (`channel_pairs`), backward
once more; passes from chunk to chunk do the rest (`channel_passes`): one forward, three for the
gradients, of which that of the values makes the gradient of the first state. Where heads do not
fill the chip, one more for each direction comes before: what pieces of the sequence begin with.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from kernels.fused.passes import cumsum_back
from kernels.pallas_gpu.channel_pairs import Weights, gradients, weights
from kernels.pallas_gpu.channel_passes import channels, pieces, values
from kernels.pallas_gpu.fit import WIDTHS, Fit, fit, refuse_dtype
from kernels.pallas_gpu.plan import CHUNK, in_parts

LEAST_LOG_DECAY = -128.0
"""What a decay is taken for at the least: nothing is left, in float32."""
LARGEST = 512
"""The most channels of a value: those of a chunk are in shared memory at once."""

__all__ = ["backward", "chunk_length", "forward", "refuse"]


def refuse(q, k, v) -> str | None:
    """Why these kernels do not take a case, and what to do; None where they do."""
    if reason := refuse_dtype(v=v):
        return reason
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
    of, to = _of(q, k, v, log_decay, interpret)
    v, (pairs, reading, leaving) = to.values(v), of.weights
    begin = pieces(leaving, v, state=to.state(state), **of.how)
    out, last = values(reading, leaving, v, pairs=pairs, begin=begin, **of.how)
    return to.of_values(out), to.of_state(last)


def backward(q, k, v, log_decay, *, dout, state, dstate, crossing, chunk: int, interpret=None):
    """See `kernels.fused.gated_linear`."""
    assert chunk == CHUNK
    rank = k.shape[3]
    of, to = _of(q, k, v, log_decay, interpret)
    v, dout, (pairs, reading, leaving) = to.values(v), to.values(dout), of.weights
    begin = pieces(leaving, v, state=to.state(state), **of.how)
    read = channels(dout, v, leaving, begin=begin.turned, **of.how)
    back = of.how | {"reverse": True}
    begin = pieces(reading, dout, state=to.state(dstate), **back)
    dv, before = values(leaving, reading, dout, pairs=pairs, begin=begin, **back)
    held = channels(v, dout, reading, begin=begin.turned, **back)

    parts = {"p": to.parts}
    v, dout = (rearrange(x, "b t (h p) d -> b t h (p d)", **parts) for x in (v, dout))
    read, held = (reduce(x, "b t (h p) d -> b t h d", "sum", **parts) for x in (read, held))
    made = gradients(
        of.q, of.k, of.log_decay, dout=dout, v=v, read=read, held=held, interpret=interpret
    )
    dq, dk, later = (x[..., :rank] for x in made)
    return dq, dk, to.of_values(dv), _over_chunks(later, crossing), to.of_state(before)


class _Of(NamedTuple):
    """What both passes of a call have to do with, in the kernels' widths."""

    q: jax.Array
    k: jax.Array
    log_decay: jax.Array
    weights: Weights
    how: dict[str, Any]


def _of(q, k, v, log_decay, interpret: Any) -> tuple[_Of, Fit]:
    to = fit(k.shape[3], v.shape[3])
    q, k, log_decay = to.keys(q), to.keys(k), to.keys(log_decay)
    log_decay = jnp.maximum(log_decay, LEAST_LOG_DECAY)
    keep = jnp.exp(reduce(log_decay, "b (n c) h r -> b h n r", "sum", c=CHUNK))
    log_decay = in_parts(log_decay)
    made = weights(q, k, log_decay, interpret=interpret)
    return _Of(q, k, log_decay, made, {"keep": keep, "interpret": interpret}), to


def _over_chunks(later: jax.Array, crossing: jax.Array) -> jax.Array:
    """Sums [B, T, H, R] over all later tokens, and `crossing` [B, H, R], of those in each chunk."""
    later = rearrange(later, "b (n c) h r -> b n c h r", c=CHUNK)
    chunks = jnp.concatenate([later[:, 1:, 0], crossing[:, None]], axis=1)
    behind = cumsum_back(chunks, axis=1)[:, :, None]
    return rearrange(later + behind, "b n c h r -> b (n c) h r")
