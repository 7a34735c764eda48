"""Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, equation 1)."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from kernels.chunked_softmax import chunked_softmax, refuse_chunked, worth_tiles
from kernels.dispatch import Backend, Path, run
from kernels.fused import softmax as fused_softmax
from kernels.mask import Mask, check_heads
from kernels.masked_softmax import masked_softmax

DENSE_LOGITS = 1 << 20
"""Up to this many logits per head, T x S, are held at once; longer queries go chunk by chunk."""


def softmax_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G Dv"],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B T H Dv"]:
    """softmax(scale q k^T) v, each row over the keys it sees; 0 where it sees none.

    G key-value heads serve H query heads, G dividing H: G = H is multi-head, 1 < G < H grouped-
    query (arXiv 2305.13245), G = 1 multi-query attention (arXiv 1911.02150). `scale` is 1/sqrt(D)
    by default. `logit_cap` c replaces a logit l by c tanh(l / c) (Gemma 2, arXiv 2408.00118).
    `slopes` m take m_h |t - s| off the logits of head h (ALiBi, arXiv 2108.12409); s counts from 0,
    and t does too, unless `positions` says where the queries stand. Logits and their softmax are
    float32 whatever the inputs are. Memory is linear in T for a given S. "tiled" is for a CPU,
    where "auto" takes it from 256 tokens on, for two to four times the speed and a tenth of the
    memory (`kernels.chunked_softmax`); it has no `logit_cap`, no `slopes` and no forward-mode
    derivative: `jax.jvp` and `jax.linearize` need backend="xla" there.

    Raises:
        ValueError: the mask does not fit, or G does not divide H.
        NotImplementedError: the op has no such backend.
    """
    mask = mask or Mask()
    mask.check(q.shape[1], k.shape[1])
    check_heads(q.shape[2], k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None
    if slopes is not None:
        bias = slopes, jnp.arange(q.shape[1])[None] if positions is None else positions
    how = {"mask": mask, "scale": scale, "logit_cap": logit_cap, "bias": bias}
    paths = {
        "cudnn": Path(fused_softmax.cudnn, fused_softmax.refuse_cudnn),
        "pallas": Path(fused_softmax.softmax, fused_softmax.refuse_softmax),
        "tiled": Path(chunked_softmax, refuse_chunked, worth_tiles),
        "xla": Path(_xla),
    }
    return run("softmax_attention", backend, paths, (q, k, v), how)


def _xla(q, k, v, *, mask: Mask, scale: float, logit_cap: float | None, bias):
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q = rearrange(q, "b t (g n) d -> b t g n d", g=k.shape[2])
    rows = functools.partial(
        _rows, k=k, v=v, mask=mask, scale=scale, logit_cap=logit_cap, bias=bias
    )
    chunk = max(1, DENSE_LOGITS // keys)
    out = rows(q, jnp.arange(queries)) if queries <= chunk else _chunked(rows, q, chunk)
    return rearrange(out, "b t g n d -> b t (g n) d", n=heads // k.shape[2])


def _chunked(rows, q, chunk: int):
    """`rows` over equal chunks of at most `chunk` queries, one chunk's logits alive at a time,
    backward as well.
    """
    queries = q.shape[1]
    chunks = -(-queries // chunk)
    chunk = -(-queries // chunks)
    padded = jnp.pad(q, [(0, 0), (0, chunks * chunk - queries)] + [(0, 0)] * 3)
    padded = rearrange(padded, "b (n c) g m d -> n b c g m d", n=chunks)
    at = jnp.minimum(jnp.arange(chunks * chunk), queries - 1).reshape(chunks, chunk)
    out = jax.lax.map(jax.checkpoint(lambda pair: rows(*pair)), (padded, at))
    return rearrange(out, "n b c g m d -> b (n c) g m d")[:, :queries]


def _rows(q, at, *, k, v, mask: Mask, scale: float, logit_cap: float | None, bias):
    """The output of the queries `q`, which stand at positions `at`.

    Products are of matrices, for each sequence and key head: XLA's CPU backend takes one to two
    times as long where it has to find the matrices itself.
    """
    many = q.shape[3]
    rows = rearrange(q, "b t g n d -> b g (n t) d")
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    logits = jnp.einsum("bgrd,bgsd->bgrs", rows, k, preferred_element_type=jnp.float32) * scale
    logits = rearrange(logits, "b g (n t) s -> b g n t s", n=many)
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    if bias is not None:
        slopes, positions = bias
        distance = jnp.abs(positions[:, at, None] - jnp.arange(k.shape[2])[None, None])
        slopes = slopes.reshape(k.shape[1], -1)  # of each query head, group by group
        logits -= slopes[None, :, :, None, None] * distance[:, None, None]
    weights = masked_softmax(logits, mask.visible(at, k.shape[2])[:, :, None])
    weights = rearrange(weights.astype(v.dtype), "b g n t s -> b g (n t) s")
    out = jnp.einsum("bgrs,bgsd->bgrd", weights, v)
    return rearrange(out, "b g (n t) d -> b t g n d", n=many)
