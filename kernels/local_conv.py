"""Depthwise convolution along the sequence with kernels shared within a head.

Lightweight convolution has one set of kernels, dynamic convolution one for each position
(Wu et al. 2019, arXiv 1901.10430, equations 4-6):

    out[t, c] = sum_j w[t, h(c), j] x[t + j - p, c],    p = K - 1 if causal, else (K - 1) // 2
"""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from kernels.dispatch import Backend, choose
from kernels.mask import Mask


def local_conv(
    x: Float[Array, "B T E"],
    weights: Float[Array, "#B #T H K"],
    *,
    mask: Mask | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B T E"]:
    """Convolve x with K taps; channel c belongs to head c H // E.

    Weights [1, 1, H, K] are a lightweight, [B, T, H, K] a dynamic convolution. Padding counts as
    zero, segments do not see each other, and a causal mask puts all taps at or before t.

    Raises:
        ValueError: the mask does not fit, or H does not divide E.
        NotImplementedError: the op has no such backend.
    """
    mask = mask or Mask()
    mask.check(x.shape[1], x.shape[1])
    if x.shape[2] % weights.shape[2]:
        raise ValueError(f"{weights.shape[2]} heads do not divide {x.shape[2]} channels")
    return choose("local_conv", backend, {"xla": _xla})(x, weights, mask=mask)


def _xla(x, weights, *, mask: Mask):
    """One shifted copy of x per tap, which XLA fuses into a single pass."""
    length, taps = x.shape[1], weights.shape[-1]
    if mask.keys is not None:
        x = jnp.where(mask.keys[:, :, None], x, 0)
    past = taps - 1 if mask.causal else (taps - 1) // 2
    around = (past, taps - 1 - past)
    heads = jnp.pad(
        rearrange(x, "b t (h d) -> b t h d", h=weights.shape[2]), [(0, 0), around, (0, 0), (0, 0)]
    )
    segments = mask.segments
    if segments is not None:
        beside = jnp.pad(segments, [(0, 0), around], mode="edge")
    out = jnp.zeros((), x.dtype)
    for tap in range(taps):
        term = heads[:, tap : tap + length] * weights[..., tap, None].astype(x.dtype)
        if segments is not None:
            term = jnp.where((beside[:, tap : tap + length] == segments)[..., None, None], term, 0)
        out = out + term
    return rearrange(out, "b t h d -> b t (h d)")
