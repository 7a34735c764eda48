"""Convolution of every channel of a picture by itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.target import target
from kernels.varying import alike


def depthwise_conv(
    x: Float[Array, "B H W C"], weights: Float[Array, "K K 1 F"], *, stride: int = 1
) -> Float[Array, "B h w F"]:
    """out[i, j, f] = sum_{a, b} weights[a, b, f] x[i s + a - p, j s + b - p, f C // F], p = K // 2.

    Outside of x there are zeros; h = (H + 2 p - K) // s + 1; F / C outputs see each channel. Sums
    are float32, the result has x's dtype.

    On a CPU the K^2 shifted products are summed, and XLA makes one loop of them: 20 to 120 times as
    fast as its own convolution, which has no depthwise path there (kernels of 3 and 5, 14 to 112
    pixels, 32 to 576 channels, forward). Their gradient is written out, and has no forward mode.
    Elsewhere it is XLA's convolution.
    """
    if target().chip != "cpu":
        return _xla(x, weights, stride)
    multiple = weights.shape[-1] // x.shape[-1]
    x = jnp.repeat(x, multiple, axis=-1) if multiple > 1 else x
    return _taps(*alike([x, weights]), stride)


def _sum(x, weights, stride: int):
    return _shifted(_padded(x, len(weights)), weights, stride).astype(x.dtype)


def _padded(x, side: int):
    around = (side // 2, side // 2)
    return jnp.pad(x, [(0, 0), around, around, (0, 0)])


def _shifted(padded, weights, stride: int):
    """The sum of products wherever all taps are inside, float32."""
    side, padded = len(weights), padded.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    spans = [(n - side) // stride * stride + 1 for n in padded.shape[1:3]]
    out = jnp.zeros((), jnp.float32)
    for row in range(side):
        for column in range(side):
            rows = slice(row, row + spans[0], stride)
            columns = slice(column, column + spans[1], stride)
            out = out + padded[:, rows, columns] * weights[row, column, 0][None, None, None]
    return out


def _forward(x, weights, stride: int):
    return _sum(x, weights, stride), (x, weights)


def _backward(stride: int, residuals, gradient):
    """Image by image: in one piece XLA would fuse whatever makes the gradient into every shift of
    the sum, and compute it K^2 times. And tap by tap: it would write out every shifted product.

    x's is such a sum of the gradient, with zeros where the stride left places out, and the taps
    turned round.
    """
    x, weights = residuals
    side, before = len(weights), len(weights) // 2
    turned = weights[::-1, ::-1]

    def image(total, at):
        x, grad = (part[None] for part in at)
        grad = grad.astype(jnp.float32)
        spans = [(n - 1) * stride + 1 for n in grad.shape[1:3]]
        after = [n + before - span for n, span in zip(x.shape[1:3], spans, strict=True)]
        apart = [(side - 1 - before, behind, stride - 1) for behind in after]
        spread = jax.lax.pad(grad, jnp.float32(0), [(0, 0, 0), *apart, (0, 0, 0)])
        padded = _padded(x, side)

        def tap(at):
            start = (0, at // side, at % side, 0)
            seen = jax.lax.dynamic_slice(padded, start, (1, *spans, grad.shape[3]))
            return jnp.sum(seen[:, ::stride, ::stride] * grad, axis=(0, 1, 2))

        taps = jax.lax.map(tap, jnp.arange(side * side)).reshape(weights.shape)
        return total + taps, _shifted(spread, turned, 1)[0].astype(x.dtype)

    zeros = jnp.zeros_like(weights, jnp.float32)
    of_weights, of_x = jax.lax.scan(image, zeros, (x, gradient))
    return of_x, of_weights.astype(weights.dtype)


_taps = jax.custom_vjp(_sum, nondiff_argnums=(2,))
_taps.defvjp(_forward, _backward)


def _xla(x, weights, stride: int):
    around = (len(weights) // 2, len(weights) // 2)
    return jax.lax.conv_general_dilated(
        x, weights.astype(x.dtype), (stride, stride), (around, around),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip
