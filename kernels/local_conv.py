"""Depthwise convolution along the sequence with kernels shared within a head.

Lightweight convolution has one set of kernels, dynamic convolution one for each position
(Wu et al. 2019, arXiv 1901.10430, equations 4-6); with as many heads as channels it is the short
convolution of the recurrences:

    out[t, c] = sum_j w[t, h(c), j] x[t + j - p, c],    p = K - 1 if causal, else (K - 1) // 2

The backward pass is written out: differentiated as it stands, a sum of K shifted products keeps
and adds K arrays. It has no forward mode.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from kernels.mask import Mask
from kernels.varying import alike


def local_conv(
    x: Float[Array, "B T E"],
    weights: Float[Array, "#B #T H K"],
    *,
    mask: Mask | None = None,
) -> Float[Array, "B T E"]:
    """Convolve x with K taps; channel c belongs to head c H // E.

    Weights [1, 1, H, K] are a lightweight, [B, T, H, K] a dynamic convolution. Padding counts as
    zero, segments do not see each other, and a causal mask puts all taps at or before t. Sums are
    float32, the result has x's dtype.

    Raises:
        ValueError: the mask does not fit, or H does not divide E.
    """
    mask = mask or Mask()
    mask.check(x.shape[1], x.shape[1])
    if x.shape[2] % weights.shape[2]:
        raise ValueError(f"{weights.shape[2]} heads do not divide {x.shape[2]} channels")
    taps, dtype = weights.shape[-1], x.dtype
    x, weights = x.astype(jnp.float32), weights.astype(jnp.float32)
    if mask.keys is not None:
        x = jnp.where(mask.keys[:, :, None], x, 0)
    past = taps - 1 if mask.causal else (taps - 1) // 2
    heads = rearrange(x, "b t (h d) -> b t h d", h=weights.shape[2])
    heads, weights = alike([heads, weights])
    out: Array = _convolve(heads, weights, mask.segments, past)
    return rearrange(out, "b t h d -> b t (h d)").astype(dtype)


def _near(x, segments, taps: int, past: int):
    """x and its segments, if any, with zeros around: tap j of token t reads place t + j of both."""
    around = (past, taps - 1 - past)
    return _padded(x, around), None if segments is None else _padded(segments, around)


def _padded(x, around: tuple[int, int]):
    """x [B,T,...] with so many more tokens of zeros before and after it."""
    return jnp.pad(x, [(0, 0), around] + [(0, 0)] * (x.ndim - 2))


def _sum(x, weights, segments, past: int):
    """sum_j weights[t, h, j] x[t + j - past, h] of x [B,T,H,D], among tokens of one segment."""
    length, taps = x.shape[1], weights.shape[-1]
    near, beside = _near(x, segments, taps, past)
    out = jnp.zeros((), x.dtype)
    for tap in range(taps):
        at = slice(tap, tap + length)
        term = near[:, at] * weights[..., tap, None]
        if beside is not None:
            term = jnp.where((beside[:, at] == segments)[..., None, None], term, 0)
        out = out + term
    return out


def _forward(x, weights, segments, past: int):
    return _sum(x, weights, segments, past), (x, weights, segments)


def _backward(past: int, residuals, gradient):
    """x[s] reaches t = s + past - j by tap j: the taps, in the other order, of the gradient."""
    x, weights, segments = residuals
    length, taps = x.shape[1], weights.shape[-1]
    mirrored = weights[..., ::-1]
    if weights.shape[1] > 1:
        wide = _padded(mirrored, (taps - 1 - past, past))
        each = [wide[:, tap : tap + length, :, tap] for tap in range(taps)]
        mirrored = jnp.stack(each, axis=-1)
    of_x = _sum(gradient, mirrored, segments, taps - 1 - past)
    near, beside = _near(x, segments, taps, past)
    same = [axis for axis in (0, 1) if weights.shape[axis] == 1]

    def of_tap(tap):
        product = gradient * jax.lax.dynamic_slice_in_dim(near, tap, length, 1)
        if beside is not None:
            seen = jax.lax.dynamic_slice_in_dim(beside, tap, length, 1) == segments
            product = jnp.where(seen[..., None, None], product, 0)
        return jnp.sum(jnp.sum(product, axis=3), axis=same, keepdims=True)

    of_weights = jnp.moveaxis(jax.lax.map(of_tap, jnp.arange(taps)), 0, -1)
    return of_x, of_weights, None


_convolve = jax.custom_vjp(_sum, nondiff_argnums=(3,))
_convolve.defvjp(_forward, _backward)


def local_conv_step(
    x: Float[Array, "B 1 E"], inputs: Float[Array, "B P E"], weights: Float[Array, "#B 1 H K"]
) -> tuple[Float[Array, "B 1 E"], Float[Array, "B P E"]]:
    """One token of the causal convolution from the P = K - 1 inputs before it, and the next ones.

    All zeros before the first token. The output has the dtype of `inputs`.
    """
    window = jnp.concatenate([inputs, x.astype(inputs.dtype)], axis=1)
    heads = rearrange(window, "b k (h d) -> b k h d", h=weights.shape[2])
    taps = jnp.broadcast_to(weights[:, 0], (len(x), *weights.shape[2:]))
    out = jnp.einsum("bkhd,bhk->bhd", heads.astype(jnp.float32), taps.astype(jnp.float32))
    return rearrange(out, "b h d -> b 1 (h d)").astype(inputs.dtype), window[:, 1:]


def last_inputs(
    x: Float[Array, "B T E"], inputs: Float[Array, "B P E"], *, keys: Bool[Array, "B T"]
) -> Float[Array, "B P E"]:
    """The last P inputs of each row once those of x that `keys` shows, a beginning, have followed.

    What `local_conv_step` goes on from after a prompt.
    """
    whole = jnp.concatenate([inputs, x.astype(inputs.dtype)], axis=1)
    at = jnp.sum(keys, axis=1)[:, None] + jnp.arange(inputs.shape[1])[None]
    return jnp.take_along_axis(whole, at[..., None], axis=1)
