"""Convolution of every channel of a picture by itself."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.target import target


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
    return _taps(jnp.repeat(x, multiple, axis=-1) if multiple > 1 else x, weights, stride)


def _sum(x, weights, stride: int):
    side = len(weights)
    around = (side // 2, side // 2)
    height, width = ((n + 2 * (side // 2) - side) // stride + 1 for n in x.shape[1:3])
    padded = jnp.pad(x, [(0, 0), around, around, (0, 0)]).astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    out = jnp.zeros((), jnp.float32)
    for row in range(side):
        for column in range(side):
            rows = slice(row, row + (height - 1) * stride + 1, stride)
            columns = slice(column, column + (width - 1) * stride + 1, stride)
            out = out + padded[:, rows, columns] * weights[row, column, 0][None, None, None]
    return out.astype(x.dtype)


def _forward(x, weights, stride: int):
    return _sum(x, weights, stride), (x, weights)


def _backward(stride: int, residuals, gradient):
    """Image by image: in one piece XLA would fuse whatever makes the gradient into every shift of
    the sum, and compute it K^2 times."""
    x, weights = residuals
    exact = weights.astype(jnp.float32)

    def image(total, at):
        x, gradient = (part[None] for part in at)
        of_x, of_weights = jax.vjp(partial(_sum, stride=stride), x, exact)[1](gradient)
        return total + of_weights, of_x[0]

    of_weights, of_x = jax.lax.scan(image, jnp.zeros_like(exact), (x, gradient))
    return of_x, of_weights.astype(weights.dtype)


_taps = jax.custom_vjp(_sum, nondiff_argnums=(2,))
_taps.defvjp(_forward, _backward)


def _xla(x, weights, stride: int):
    around = (len(weights) // 2, len(weights) // 2)
    return jax.lax.conv_general_dilated(
        x, weights.astype(x.dtype), (stride, stride), (around, around),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip
