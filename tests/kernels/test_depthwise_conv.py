"""Depthwise convolution: the sum of shifted products against XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import depthwise_conv
from kernels.target import use


def draw(height, width, channels, side, multiple=1):
    random = np.random.default_rng(height * width + side)
    shapes = (2, height, width, channels), (side, side, 1, multiple * channels)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape", [(7, 9, 5, 3, 3), (8, 8, 4, 5), (1, 6, 3, 7), (4, 5, 2, 2)], ids=str
)
def test_shifted_products_are_the_convolution(shape, stride):
    x, w = draw(*shape)

    def both(function):
        out, back = jax.vjp(function, x, w)
        return out, *back(jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    with use("cpu"):
        got = both(lambda x, w: depthwise_conv(x, w, stride=stride))
    with use("gpu"):
        expected = both(lambda x, w: depthwise_conv(x, w, stride=stride))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_tap_by_hand():
    x, w = draw(5, 5, 1, 3)
    out = depthwise_conv(x, w, stride=2)
    patch = x[0, 1:4, 3:5, 0]  # around row 2, column 4: its third column is outside
    assert out.shape == (2, 3, 3, 1)
    np.testing.assert_allclose(out[0, 1, 2, 0], np.sum(patch * w[:, :2, 0, 0]), rtol=1e-5)


def test_bfloat16_sums_in_float32():
    x, w = draw(6, 6, 4, 5)
    low, weights = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    out = depthwise_conv(low, weights)
    exact = depthwise_conv(low.astype(jnp.float32), weights.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
