"""Linear attention whose memory fades: retention, state space duality, gated linear attention.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,    out_t = S_t^T q_t,    a_t = exp(log_decay_t)

with one decay per head and token (RetNet, arXiv 2307.08621, equation 6; Mamba-2's SSD, arXiv
2405.21060, equation 16) or one per key channel (GLA, arXiv 2312.06635, equation 3). Nothing is
normalised. A token that `mask.keys` hides is skipped: it writes nothing and lets nothing fade. A
new segment starts from an empty state.
"""

import functools

import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from kernels.dispatch import Backend, Path, run
from kernels.fused import gated_linear as fused_by_channel
from kernels.fused import linear as fused_linear
from kernels.mask import Mask
from kernels.recurrence import Reach, causal, fade, scan_chunks, written

BLOCK = 16
"""Tokens of a chunk between which each channel's decay is written out; further ones share it."""


def gated_linear_attention(
    q: Float[Array, "B T G R"],
    k: Float[Array, "B T G R"],
    v: Float[Array, "B T H Dv"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H R"],
    *,
    mask: Mask | None = None,
    chunk: int = 64,
    initial_state: Float[Array, "B H R Dv"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H R Dv"]]:
    """Outputs in v's dtype, and the state after the last token in float32.

    Sums are held in float32 (for their precision see `kernels.recurrence`).
    Chunks of `chunk` tokens run in parallel inside and one after the other: T (chunk (G R + H Dv) +
    2 H R Dv) multiply-adds, memory linear in T. `log_decay` is at most 0 and may be as low as
    float32 goes. G groups of queries and keys serve H heads, G dividing H; a decay per channel
    repeats them. `initial_state` belongs to the segment of the first token, the one returned to
    that of the last: cutting a sequence in two and passing it on gives the whole. backend="pallas"
    is `kernels.fused.linear.gated` or `kernels.fused.gated_linear.by_channel`: see there.

    Raises:
        ValueError: the mask is not causal or does not fit, or G does not divide H.
        NotImplementedError: the op has no such backend, or it does not take these arguments.
    """
    mask = causal(mask, q.shape[1])
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"{q.shape[2]} groups of keys do not divide {v.shape[2]} heads")
    how = {"mask": mask, "chunk": chunk, "state": initial_state}
    kernel = Path(fused_linear.gated, fused_linear.refuse_gated)
    if log_decay.ndim == 4:
        kernel = Path(fused_by_channel.by_channel, fused_by_channel.refuse_by_channel)
    paths = {"pallas": kernel, "xla": Path(_xla)}
    return run("gated_linear_attention", backend, paths, (q, k, v, log_decay), how)


def chunk_length(length: int, chunk: int, *, per_channel: bool) -> int:
    """Tokens of a chunk: no more than there are, in whole blocks where channels have their own."""
    chunk = min(chunk, length)
    return -(-chunk // BLOCK) * BLOCK if per_channel and chunk > BLOCK else chunk


def _xla(q, k, v, log_decay, *, mask: Mask, chunk: int, state):
    per_channel, dtype = log_decay.ndim == 4, v.dtype
    k, v, log_decay = written(mask, k, v, log_decay)
    q = q.astype(jnp.float32)
    if per_channel:
        q, k = (repeat(x, "b t g r -> b t (g n) r", n=v.shape[2] // q.shape[2]) for x in (q, k))
    if state is None:
        shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        state = jnp.zeros_like(v, shape=shape)  # "like": sharded as v is
    chunk = chunk_length(q.shape[1], chunk, per_channel=per_channel)
    body = functools.partial(_channels, block=min(BLOCK, chunk)) if per_channel else _heads
    out, state = scan_chunks(
        body, state.astype(jnp.float32), (q, k, v, log_decay), mask.segments, chunk=chunk
    )
    return out.astype(dtype), state


def _heads(state, tokens, reach: Reach):
    """A chunk with a decay per head: masked attention inside, as in 2405.21060, section 6."""
    q, k, v, log_decay = tokens
    heads = v.shape[2] // q.shape[2]
    left = fade(log_decay, reach)
    weights = jnp.einsum("btgr,bsgr->bgts", q, k)
    weights = repeat(weights, "b g t s -> b (g n) t s", n=heads) * left.within
    grouped = rearrange(state, "b (g n) r d -> b g n r d", n=heads)
    read = jnp.einsum("btgr,bgnrd->btgnd", q, grouped)
    out = jnp.einsum("bhts,bshd->bthd", weights, v)
    out += rearrange(read, "b t g n d -> b t (g n) d") * left.start[..., None]
    entering = rearrange(v * left.end[..., None], "b s (g n) d -> b s g n d", n=heads)
    new = rearrange(jnp.einsum("bsgr,bsgnd->bgnrd", k, entering), "b g n r d -> b (g n) r d")
    return state * left.keep[..., None, None] + new, out


def _channels(state, tokens, reach: Reach, *, block: int):
    """A chunk with a decay per key channel, in blocks (2312.06635, section 4.3).

    Between blocks i > j a decay is a product of three, each at most 1: from s to the end of block
    j, over the blocks between, from the beginning of block i to t. Inside a block, where there is
    no such point between t and s, it is written out for every pair and channel.
    """
    q, k, v, log_decay = tokens
    q, k, g = (rearrange(x, "b (m u) h r -> b m u h r", u=block) for x in (q, k, log_decay))
    blocks = q.shape[1]
    since = jnp.cumsum(g, axis=2)
    later = jnp.pad(g[:, :, 1:], [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0)])
    until = jnp.flip(jnp.cumsum(jnp.flip(later, 2), axis=2), 2)
    total = since[:, :, -1]

    over = jnp.broadcast_to(total[:, :, None], (total.shape[0], blocks, *total.shape[1:]))
    after = jnp.tril(jnp.ones((blocks, blocks), bool), -1)[None, :, :, None, None]
    over = jnp.cumsum(jnp.where(after, over, 0.0), axis=1)  # [i, j]: blocks j < m <= i
    between = jnp.pad(over, [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])[:, :-1]
    between = jnp.where(after, jnp.exp(between), 0.0)
    fading = k * jnp.exp(until)
    weights = jnp.einsum(
        "biuhr,bijwhr->bhiujw", q * jnp.exp(since), fading[:, None] * between[:, :, :, None]
    )
    weights += _diagonal(q, k, g)
    weights = rearrange(weights, "b h i u j w -> b h (i u) (j w)")
    weights = jnp.where(reach.within[:, None], weights, 0.0)

    before = jnp.cumsum(total, axis=1)
    start = since + jnp.pad(before, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1, None]
    fused = functools.partial(rearrange, pattern="b m u h r -> b (m u) h r")
    held = jnp.where(reach.start[:, :, None, None], fused(q * jnp.exp(start)), 0.0)
    out = jnp.einsum("bhts,bshd->bthd", weights, v)
    out += jnp.einsum("bthr,bhrd->bthd", held, state)
    entering = fused(fading * jnp.exp(over[:, -1])[:, :, None])
    entering = jnp.where(reach.end[:, :, None, None], entering, 0.0)
    keep = jnp.where(reach.keep[:, None, None], jnp.exp(before[:, -1]), 0.0)
    return state * keep[..., None] + jnp.einsum("bshr,bshd->bhrd", entering, v), out


def _diagonal(q, k, g):
    """Weights [b h i u j w] of the pairs inside one block i = j, 0 elsewhere."""
    blocks, block = q.shape[1:3]
    order = jnp.ones((block, block), bool)
    after, order = (jnp.tril(order, below)[None, None, :, :, None, None] for below in (-1, 0))
    between = jnp.cumsum(jnp.where(after, g[:, :, :, None], 0.0), axis=2)  # [u, w]: w < p <= u
    products = jnp.where(order, q[:, :, :, None] * k[:, :, None] * jnp.exp(between), 0.0)
    inside = rearrange(jnp.sum(products, axis=-1), "b i u w h -> b h i u 1 w")
    return inside * jnp.eye(blocks)[None, None, :, None, :, None]
